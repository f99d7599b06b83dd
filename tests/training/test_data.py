"""Every format yields the response, and only the response, as labels; nothing a row says of its
tokens is passed over."""

import json

import pytest
import torch
from datasets import Dataset
from test_chat import TALK, TOOLS, assistant, learnt, system, user
from test_files import cache as cache  # for each test its own
from tiny_lms import tiny
from tiny_tokenizers import CHAT, by_bytes, masked_words
from transformers import BloomConfig, GPT2Config, LlamaConfig, MambaConfig

from fastkd.training.data import (
    Prompts,
    collator,
    encode,
    keeps_documents_apart,
    open_data,
)
from fastkd.training.errors import InputError
from fastkd.training.settings import DataSettings

IGNORED = -100


def encoded(rows, tokenizer=None, max_length=200, **options):
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return encode(rows, tokenizer or by_bytes(), max_length, **{"packing": False} | options)


def read_back(row, tokenizer=None, prefix="", **options):
    """(the whole text, what is learnt of it) of one row."""
    tokenizer = tokenizer or by_bytes()
    (made,) = encoded([row], tokenizer, **options)
    ids, labels = made[prefix + "input_ids"], made[prefix + "labels"]
    assert all(label in (IGNORED, i) for i, label in zip(ids, labels, strict=True))
    return tokenizer.decode(ids), learnt(labels, tokenizer)


@pytest.mark.parametrize(
    ("row", "whole"),
    [
        ({"prompt": "2+2=", "completion": "4"}, "2+2=4<|end|>"),
        ({"prompt": "2+2=", "response": "4"}, "2+2=4<|end|>"),
        ({"prompt": "2+2=", "completion": "4<|end|>"}, "2+2=4<|end|>"),
        ({"prompt": "2+2=", "completion": 4}, "2+2=4<|end|>"),
        ({"query": "2+2", "response": "4"}, "2+2\n\n4<|end|>"),
        ({"question": "2+2", "answer": "4"}, "2+2\n\n4<|end|>"),
        ({"instruction": "add", "input": "2, 2", "output": "4"}, "add\n\n2, 2\n\n4<|end|>"),
        ({"instruction": "say four", "input": None, "output": "4"}, "say four\n\n4<|end|>"),
    ],
)
def test_labels_only_on_the_response(row, whole):
    assert read_back(row) == (whole, "4<|end|>")


ASKED = "<|user|>four<|end|>\n<|assistant|>4<|end|>\n"


@pytest.mark.parametrize(
    ("row", "whole"),
    [
        ({"messages": [user("four"), assistant("4")]}, ASKED),
        ({"conversations": [
            {"from": "human", "value": "four"}, {"from": "gpt", "value": "4"}]}, ASKED),
        ({"prompt": [user("four")], "completion": [assistant("4")]}, ASKED),
        ({"prompt": [user("four")], "completion": "4"}, ASKED),
        ({"instruction": "four", "output": "4"}, ASKED),
        ({"question": "four", "answer": "4", "system": "", "history": []}, ASKED),
        ({"prompt": "four", "completion": "4", "system": "s"}, "<|system|>s<|end|>\n" + ASKED),
        (
            {"instruction": "four", "output": "4", "history": [["q", "a"]]},
            "<|user|>q<|end|>\n<|assistant|>a<|end|>\n" + ASKED,
        ),
        (
            {"messages": [system("s"), user("four"), assistant("4")],
             "history": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "<|system|>s<|end|>\n<|user|>q<|end|>\n<|assistant|>a<|end|>\n" + ASKED,
        ),
        (
            {"messages": [system("s"), user("four"), assistant("4")], "tools": '[{"name": "f"}]'},
            '[{"name": "f"}]<|system|>s<|end|>\n' + ASKED,
        ),
    ],
)  # fmt: skip
def test_conversations(row, whole):
    assert read_back(row, by_bytes(TOOLS)) == (whole, "4<|end|>")


def test_chat_template_kwargs():
    tokenizer = by_bytes("{{ mood }}" + CHAT)
    row = {"messages": [user("four"), assistant("4")], "chat_template_kwargs": {"mood": "kind"}}
    assert read_back(row, tokenizer)[0] == "kind" + ASKED


@pytest.mark.parametrize("text", ["abc", "<|begin|>abc", "abc<|end|>", "<|begin|>abc<|end|>"])
def test_special_tokens_are_added_once(text):
    whole = "<|begin|>abc<|end|>"
    assert read_back({"text": text}, by_bytes(begin=True)) == (whole, whole)
    row = {"prompt": text.replace("<|end|>", ""), "completion": "<|begin|>x<|end|>"}
    assert read_back(row, by_bytes(begin=True)) == ("<|begin|>abcx<|end|>", "x<|end|>")


@pytest.mark.parametrize(
    ("row", "ids", "labels"),
    [
        ({}, [1, 2, 3, 4], [1, 2, 3, 4]),
        ({"labels": [-100, 2, 3, 4]}, [1, 2, 3, 4], [-100, 2, 3, 4]),
        ({"attention_mask": [1, 1, 1, 0]}, [1, 2, 3], [1, 2, 3]),
        ({"attention_mask": [0, 1, 1, 1], "labels": [1, 2, 3, 4]}, [2, 3, 4], [2, 3, 4]),
        ({"completion_mask": [0, 0, 1, 1]}, [1, 2, 3, 4], [-100, -100, 3, 4]),
        ({"assistant_masks": [0, 1, 0, 1], "labels": [-100, 2, -100, 4]},
         [1, 2, 3, 4], [-100, 2, -100, 4]),
        ({"attention_mask": [1, 1, 1, 0], "labels": [-100, 2, 3, -100],
          "completion_mask": [0, 1, 1, 1]}, [1, 2, 3], [-100, 2, 3]),
        ({"loss_mask": [0.0, 0.0, 1.0, 1.0]}, [1, 2, 3, 4], [-100, -100, 3, 4]),
    ],
)  # fmt: skip
def test_columns_of_token_ids(row, ids, labels):
    (made,) = encoded([{"input_ids": [1, 2, 3, 4], **row}])
    assert (made["input_ids"], made["labels"]) == (ids, labels)


@pytest.mark.parametrize("column", [{"position_ids": [0, 1, 0, 1]}, {"seq_lengths": [2, 2]}])
def test_rows_that_are_packed_already(column):
    (made,) = encoded([{"input_ids": [1, 2, 3, 4], **column}])
    expected = {"labels": [1, 2, -100, 4], "position_ids": [0, 1, 0, 1], "use_cache": False}
    assert made == {"input_ids": [1, 2, 3, 4]} | expected


IDS = {"input_ids": [1, 2, 3]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (IDS | {"attention_mask": [1, 0, 1]}, "attention_mask has zeros between ones"),
        (IDS | {"prompt_mask": [1, 1, 0]}, "the column prompt_mask .* cannot be obeyed"),
        (IDS | {"token_type_ids": [0, 1, 1]}, "the column token_type_ids .* cannot be obeyed"),
        (IDS | {"prompt_length": 2}, "the column prompt_length holds 2, which cannot be obeyed"),
        ({"prompt": "a", "completion": "b", "images": ["x.png"]}, "the column images holds"),
        (IDS | {"labels": [1, 2]}, "3 input_ids and 2 labels"),
        (IDS | {"labels": [2, 3, -100]}, "the label 2 at the id 1, position 0: .* not shifted"),
        (IDS | {"completion_mask": [0, 1, 1], "labels": [-100, -100, 3]}, "contradict each other"),
        (IDS | {"loss_mask": [0.0, 0.5, 1.0]}, r"loss_mask holds \[0.0, 0.5, 1.0\], .* zeros and"),
        (IDS | {"seq_lengths": [1, 1]}, "seq_lengths sum to 2, of 3 input_ids"),
        (IDS | {"weight": 0.5}, "weight holds 0.5: rows have no weights"),
        ({"input_ids": [1, 300, 3]}, "the id 300, and the models know 259 tokens"),
        ({"input_ids": [1, -5, 3]}, "the id -5 is below 0"),
        ({"input_ids": ["a"]}, r"input_ids holds \['a'\], and not a list of integers"),
        ({"prompt": "a", "completion": True}, "completion holds True, and not text"),
        ({"prompt": "a", "completion": ["b"]}, r"completion holds \['b'\], and not text"),
        ({"text": {"a": 1}}, "text holds {'a': 1}, and not text"),
        ({"prompt": "a", "completion": "b", "system": "s"}, "system: needs a .* chat template"),
    ],
)
def test_rows_that_are_refused_by_number(row, words):
    asked = {k: "a" for k in row if k not in ("system", "images")}
    good = {"input_ids": [1, 2]} if "input_ids" in row else asked
    good = dict.fromkeys(row) | good
    rows = Dataset.from_list([good, good, row], on_mixed_types="use_json")
    with pytest.raises(InputError, match=f"^row 2 .counted from 0.: .*{words}"):
        encoded(rows, vocab_size=259)


def test_a_row_that_the_template_refuses():
    refuses = "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}"
    rows = [{"messages": TALK[:2], "system": None}] * 3 + [{"messages": TALK}]
    with pytest.raises(InputError, match="^row 3 .*: the chat template refuses .*: too long$"):
        encoded(rows, by_bytes(refuses + CHAT))
    rows[3] = {"messages": [system("s"), *TALK[:2]], "system": "t"}
    with pytest.raises(InputError, match="^row 3 .*: two system prompts"):
        encoded(rows, by_bytes(CHAT))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "?", "verdict": "!"}, "question, verdict: a question without .*`fastkd gen"),
        ({"prompt": "?", "chosen": "a", "rejected": "b"}, "a prompt without its answer"),
        ({"verdict": "!"}, "found the columns verdict; expected text | prompt"),
        ({"text": "a", "completion_mask": [1]}, "completion_mask would say .* no input_ids"),
        ({"messages": TALK}, "`messages` data need a tokenizer with a chat template"),
    ],
)
def test_columns_that_are_refused(row, words):
    with pytest.raises(InputError, match=words):
        encoded([row])


def test_unusable_rows_are_counted_by_reason(capsys):
    rows = [
        {"prompt": "p" * 50, "completion": "x", "id": 1},
        {"prompt": "p", "completion": "x", "id": 2},
        {"prompt": "p", "completion": None, "id": 3},
        {"prompt": None, "completion": "x", "id": 4},
        {"prompt": "p", "completion": " ", "id": 5},
    ]
    assert len(encoded(rows, max_length=10)) == 1
    out = capsys.readouterr().out
    assert "dropped 4 of 5 rows: 2 no response; 1 no response within 10 tokens; 1 no prompt" in out
    assert "columns that are ignored: id" in out
    with pytest.raises(
        InputError, match="none of the 2 rows has .*: no response; `fastkd generate`"
    ):
        encoded(rows[2:5:2])
    with pytest.raises(InputError, match="there are no rows"):
        encoded(Dataset.from_list(rows).select([]))
    with pytest.raises(InputError, match="no turn of the assistant to learn; `fastkd generate`"):
        encoded([{"messages": [user("q")]}], by_bytes(CHAT))


def test_packing(capsys):
    """Documents are whole where they fit, and nothing but a token without another is lost."""
    texts = ["a" * 6, "b" * 4, "c" * 9, "d", ""]
    rows = encoded([{"text": text} for text in texts], max_length=8, packing=True)
    assert "dropped 1 of 5 rows: no text" in capsys.readouterr().out
    packs = sorted(by_bytes().decode(row["input_ids"]) for row in rows)
    assert packs == ["aaaaaa<|end|>", "bbbb<|end|>c<|end|>", "c" * 8, "d<|end|>"]
    (row,) = [row for row in rows if row["position_ids"] == [0, 1, 2, 3, 4, 0, 1]]
    assert [label == IGNORED for label in row["labels"]] == [True] + [False] * 4 + [True, False]
    assert row["use_cache"] is False


def test_packed_documents_do_not_see_each_other():
    """Each has the logits that it has alone, in a batch of unequal rows too."""
    model = tiny(0).eval()
    rows = [{"text": chr(1) * n} for n in (9, 5, 4, 8, 2)]
    tokenizer = by_bytes()
    ids = {"input_ids": [[i % 67 for i in d] for d in encoded(rows)["input_ids"]]}
    alone = [model(torch.tensor([d]), use_cache=False).logits[0] for d in ids["input_ids"]]
    packed = encode(Dataset.from_list(rows), tokenizer, 12)
    batch = collator(tokenizer)(packed)
    assert len(packed) == 3 and "attention_mask" not in batch and batch["use_cache"] is False
    labels = batch.pop("labels")
    batch["input_ids"] %= 67
    with torch.no_grad():
        logits = model(**batch).logits
    starts = (batch["position_ids"] == 0) & (torch.arange(labels.shape[1]) < 12)
    found = 0
    for row, n in zip(range(3), [len(r) for r in packed["input_ids"]], strict=True):
        begins = [*starts[row, :n].nonzero().flatten().tolist(), n]
        for a, b in zip(begins, begins[1:], strict=False):
            (same,) = [x for x in alone if len(x) == b - a]
            torch.testing.assert_close(logits[row, a:b], same)
            found += 1
    assert found == len(rows)


@pytest.mark.parametrize(
    ("family", "settings", "apart"),
    [
        (LlamaConfig, {}, True),
        (GPT2Config, {"n_head": 2, "n_layer": 2, "n_embd": 16}, True),
        (BloomConfig, {"n_head": 2, "n_layer": 2}, False),
        (MambaConfig, {"state_size": 4}, False),
    ],
)
def test_which_models_keep_documents_apart(family, settings, apart):
    model = tiny(0, family, **settings)
    state = torch.random.get_rng_state()
    assert keeps_documents_apart(model.train()) == apart
    assert model.training and torch.equal(state, torch.random.get_rng_state())


def test_prompts_of_their_own():
    """Braces of all sorts; and the same response tokens for both, however long the prompts are."""
    row = {"prompt": "2+2=", "completion": "four", "hint": "{input} is {4}"}
    prompts = Prompts("{input}", '{"a": {x}} {hint}: {input}')
    assert read_back(row, prompts=prompts) == ("2+2=four<|end|>", "four<|end|>")
    seen = '{"a": {x}} {input} is {4}: 2+2=four<|end|>'
    assert read_back(row, prefix="teacher_", prompts=prompts) == (seen, "four<|end|>")
    talk = {"messages": [user("q"), assistant("a"), user("r"), assistant("b")]}
    whole, said = read_back(talk, by_bytes(CHAT), "teacher_", prompts=Prompts(None, "[{input}]"))
    assert (whole.count("[q]"), whole.count("[r]"), said) == (1, 1, "a<|end|>b<|end|>")
    with pytest.raises(InputError, match="teacher_prompt_template has no {input}: 'x'"):
        Prompts(None, "x")
    with pytest.raises(InputError, match="prompt templates need a prompt"):
        encoded([{"text": "a"}], prompts=prompts)


@pytest.mark.parametrize(("student", "teacher"), [(7, 100), (100, 20), (8, 17)])
def test_cut_prompts_keep_the_same_tokens(student, teacher):
    row = {"prompt": "2+2=", "completion": "twenty-two"}
    prompts = Prompts(None, "Add up: {input}", teacher)
    (made,) = encoded([row], max_length=student, prompts=prompts)
    kept = [[i for i in made[k] if i != IGNORED] for k in ("labels", "teacher_labels")]
    n = min(student - 4, teacher - 12, 11)
    assert kept[0] == kept[1] == by_bytes()("twenty-two<|end|>")["input_ids"][:n]
    assert len(made["input_ids"]) == 4 + n and len(made["teacher_input_ids"]) == 12 + n


def test_masked_lm(tmp_path):
    tokenizer = masked_words()
    rows = [{"text": " ".join(f"w{(i + j) % 20}" for j in range(5 + i))} for i in range(6)]
    made = encode(Dataset.from_list(rows), tokenizer, 8, task="masked-lm")
    assert made.column_names == ["input_ids"]
    assert tokenizer.decode(made[5]["input_ids"]) == "[CLS] w5 w6 w7 w8 w9 w10 [SEP]"
    collate = collator(tokenizer, "masked-lm", 0.5)
    first = collate(list(made))
    torch.rand(1)
    again = collate(list(made))  # as in the next evaluation
    assert all(torch.equal(first[k], again[k]) for k in first)
    other = collate(list(made)[::-1])  # as in the next epoch
    assert not torch.equal(first["labels"], other["labels"].flip(0))
    drawn = first["labels"] != IGNORED
    special = torch.tensor(tokenizer.all_special_ids)
    assert drawn.any() and not torch.isin(first["labels"][drawn], special).any()
    with pytest.raises(InputError, match="masked-lm learns from text or input_ids"):
        encode(
            Dataset.from_list([{"prompt": "a", "completion": "b"}]), tokenizer, 8, task="masked-lm"
        )
    with pytest.raises(InputError, match="mask token"):
        collator(by_bytes(), "masked-lm")


@pytest.mark.parametrize("pad", ["<|pad|>", None])
def test_collator_pads_on_the_right(pad):
    tokenizer = by_bytes()
    tokenizer.pad_token, tokenizer.padding_side = pad, "left"
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    rows = [row | {f"teacher_{k}": [1, *x] for k, x in row.items()} for row in rows]
    batch = collator(tokenizer)(rows)
    padding = tokenizer.eos_token_id if pad is None else tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, padding, padding]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["teacher_labels"].tolist() == [[1, -100, 6, 7], [1, 8, -100, -100]]
    assert batch["teacher_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.fixture
def source(tmp_path):
    def source(name, rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return source


def pairs(n, letter="p"):
    return [{"prompt": f"{letter}{i}", "completion": "x"} for i in range(n)]


def test_held_out_from_the_usable_rows(source):
    tokenizer = by_bytes()
    path = source("a", pairs(3) + [{"prompt": "q", "completion": ""}] * 3)
    for seed in range(4):
        read = open_data(DataSettings(data=[path]), tokenizer, seed=seed)
        assert (len(read.train), len(read.held_out)) == (2, 1)
    assert any("dropped 3 of 6 rows: no response" in line for line in read.report)
    assert any(line.startswith("held out: 1 rows") and "few" in line for line in read.report)
    again = open_data(DataSettings(data=[path]), tokenizer, seed=3)
    assert again.held_out.to_list() == read.held_out.to_list()
    read = open_data(DataSettings(data=[source("b", pairs(1))]), tokenizer)
    assert len(read.train) == 1 and read.held_out is None
    read = open_data(DataSettings(data=[path], eval_fraction=0.99), tokenizer)
    assert (len(read.train), len(read.held_out)) == (1, 2)


def test_turns_of_a_conversation_stay_together(source):
    answered = "{{ '!' if loop.last and m['role'] == 'assistant' }}"
    forgetful = CHAT.replace("{{ m['content'] }}", "{{ m['content'] }}" + answered)
    rows = [{"messages": [user(f"{i:02}"), *TALK[1:]]} for i in range(20)]
    tokenizer = by_bytes(forgetful)
    read = open_data(DataSettings(data=[source("a", rows)], eval_fraction=0.2), tokenizer)
    first = len("<|user|>")
    seen = [
        {tokenizer.decode(ids)[first : first + 2] for ids in part["input_ids"]}
        for part in (read.train, read.held_out)
    ]
    assert (len(read.train), len(read.held_out)) == (32, 8)
    assert len(seen[0]) == 16 and len(seen[1]) == 4 and not seen[0] & seen[1]


def test_several_sources(source):
    tokenizer = by_bytes()
    data = [source("a", pairs(30)), source("b", [{"text": f"t{i}"} for i in range(60)])]
    settings = dict(data=data, max_length=8, eval_fraction=0.1)
    read = open_data(DataSettings(**settings), tokenizer)
    assert len(read.held_out) == 6 and len(read.train) == 27 + 27  # two texts to a pack
    batch = collator(tokenizer)([read.train[0], read.train[-1]])
    pair, pack = batch["position_ids"].tolist()
    n = len(read.train[0]["input_ids"])
    assert pair == [*range(n), *[0] * (len(pack) - n)] and pack.count(0) == 2
    mixed = open_data(DataSettings(**settings, data_weight=[90, 10]), tokenizer, seed=1)
    share = sum(positions is None for positions in mixed.train["position_ids"]) / len(mixed.train)
    assert 0.8 < share < 1 and len(mixed.train) > 200  # until all texts were read
    with pytest.raises(InputError, match="1 weights for 2 sources"):
        open_data(DataSettings(**settings, data_weight=[1]), tokenizer)


def test_held_out_data_of_another_format(source, tmp_path):
    (tmp_path / "d").mkdir()
    source("d/train", [{"text": "a"}] * 9)
    source("d/test", [{"text": "abc"}] * 4)
    data = DataSettings(data=[source("a", pairs(5))], eval_data=str(tmp_path / "d"), packing=False)
    read = open_data(data, by_bytes())
    assert len(read.train) == 5 and read.held_out.num_rows == 4


def test_the_same_data_are_encoded_once(source, monkeypatch):
    """By the names of what is cached: no state of the encoder is part of them."""
    talks = [
        [{"messages": [system("s"), user(f"{i}{j}"), assistant("a")]} for i in range(3)]
        for j in "ab"
    ]
    settings = DataSettings(data=[source(name, t) for name, t in zip("ab", talks, strict=True)])
    first = open_data(settings, by_bytes(CHAT))
    from fastkd.training.encode import Encoder

    monkeypatch.delattr(Encoder, "convert")  # it would have to
    assert open_data(settings, by_bytes(CHAT)).train.to_list() == first.train.to_list()


def test_errors_name_the_source(source):
    path = source("a", [{"text": "a"}, {"text": True}])
    with pytest.raises(InputError, match=r"a\.jsonl: row 1 .counted from 0.: .*text holds True"):
        open_data(DataSettings(data=[path]), by_bytes())
