"""Every data format yields the response, and only the response, as labels."""

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastkd.training.config import InputError
from fastkd.training.data import (
    IGNORED,
    Collator,
    batches_per_epoch,
    encode,
    load_rows,
    train_batches,
)

PLAIN = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As Qwen3 does: what was thought is kept in the last turn only.
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.last %}(thinking){% endif %}"
    "{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "bye"},
]


@pytest.fixture
def tokenizer():
    """Bytes as tokens: what is labelled can be read back exactly."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>")


def learnt(row, tokenizer):
    return tokenizer.decode([i for i in row["labels"] if i != IGNORED])


def encode_one(row, tokenizer, **options):
    rows = encode(Dataset.from_list([row]), tokenizer, options.pop("max_length", 200), **options)
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        assert all(label in (IGNORED, i) for i, label in zip(ids, labels, strict=True))
    return rows[0]


@pytest.mark.parametrize(
    ("row", "whole"),
    [
        ({"prompt": "2+2=", "completion": "4"}, "2+2=4<|end|>"),
        ({"prompt": "2+2=", "response": "4"}, "2+2=4<|end|>"),
        ({"instruction": "add", "input": "2, 2", "output": "4"}, "add\n\n2, 2\n\n4<|end|>"),
        ({"instruction": "say four", "input": None, "output": "4"}, "say four\n\n4<|end|>"),
    ],
)
def test_labels_only_on_the_response(row, whole, tokenizer):
    encoded = encode_one(row, tokenizer)
    assert tokenizer.decode(encoded["input_ids"]) == whole
    assert learnt(encoded, tokenizer) == "4<|end|>"


def test_text_is_learnt_whole_and_ended_once(tokenizer):
    for text in ("abc", "abc<|end|>"):
        assert (
            learnt(encode_one({"text": text}, tokenizer, packing=False), tokenizer) == "abc<|end|>"
        )


@pytest.mark.parametrize("template", [PLAIN, MARKED, FORGETFUL])
def test_conversations_are_learnt_where_the_assistant_speaks(template, tokenizer):
    tokenizer.chat_template = template
    encoded = encode_one({"messages": TALK}, tokenizer)
    said = "(thinking)bye" if template == FORGETFUL else "bye"
    assert learnt(encoded, tokenizer) == f"hello<|end|>{said}<|end|>"
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(encoded["input_ids"]) == text


def test_conversational_prompt_and_completion(tokenizer):
    tokenizer.chat_template = PLAIN
    encoded = encode_one({"prompt": TALK[:3], "completion": TALK[3:]}, tokenizer)
    assert learnt(encoded, tokenizer) == "bye<|end|>"


def test_instructions_use_the_chat_template(tokenizer):
    tokenizer.chat_template = PLAIN
    encoded = encode_one({"instruction": "say four", "output": "4"}, tokenizer)
    assert (
        tokenizer.decode(encoded["input_ids"]) == "<|user|>say four<|end|>\n<|assistant|>4<|end|>\n"
    )
    assert learnt(encoded, tokenizer) == "4<|end|>"


def test_pre_tokenised_rows_are_kept(tokenizer):
    assert encode_one({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, tokenizer)["labels"] == [
        -100,
        2,
        3,
    ]
    assert encode_one({"input_ids": [1, 2, 3]}, tokenizer)["labels"] == [1, 2, 3]


def test_packing_joins_documents_and_loses_nothing(tokenizer):
    texts = ["a" * 7, "b" * 5, "c" * 9]
    rows = encode(Dataset.from_list([{"text": text} for text in texts]), tokenizer, 8)
    assert [len(ids) for ids in rows["input_ids"]] == [8, 8, 8]
    stream = tokenizer.decode([i for ids in rows["input_ids"] for i in ids])
    assert stream == "".join(text + "<|end|>" for text in texts)
    assert rows["labels"][:] == rows["input_ids"][:]


def test_rows_cut_before_the_response_are_dropped_and_counted(tokenizer, capsys):
    rows = Dataset.from_list(
        [{"prompt": "p" * 50, "completion": "x"}, {"prompt": "p", "completion": "x"}]
    )
    encoded = encode(rows, tokenizer, 10)
    assert len(encoded) == 1 and learnt(encoded[0], tokenizer) == "x<|end|>"
    assert "dropped 1 of 2 rows" in capsys.readouterr().out
    with pytest.raises(InputError, match="none of the 1 rows"):
        encode(rows.select([0]), tokenizer, 10)


def test_unknown_columns_are_listed(tokenizer):
    with pytest.raises(
        InputError, match="found the columns question, verdict; expected text | prompt"
    ):
        encode(Dataset.from_list([{"question": "?", "verdict": "!"}]), tokenizer, 10)


def test_messages_without_a_chat_template_are_refused(tokenizer):
    with pytest.raises(InputError, match="chat template"):
        encode(Dataset.from_list([{"messages": TALK}]), tokenizer, 100)


def test_files_and_folders(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "x.csv").write_text("prompt,completion\na,b\nc,d\n")
    Dataset.from_list(rows).to_parquet(str(tmp_path / "x.parquet"))
    for name in ("x.jsonl", "x.csv", "x.parquet"):
        assert load_rows(str(tmp_path / name)).to_list() == rows
    with pytest.raises(InputError, match=r"several kinds \(csv, json, parquet\)"):
        load_rows(str(tmp_path))
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "1.txt").write_text("one\ntwo\n")
    (texts / "2.txt").write_text("three\n")
    assert [text.strip() for text in load_rows(str(texts))["text"]] == ["one\ntwo", "three"]
    with pytest.raises(InputError, match="no such file"):
        load_rows(str(tmp_path / "missing.jsonl"))


def test_collator_pads():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(pad_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_each_epoch(processes):
    rows = Dataset.from_list([{"input_ids": [i, i], "labels": [i, i]} for i in range(14)])

    def seen(rank, done, steps):
        batches = train_batches(rows, Collator(0), 2, 2, processes, rank, seed=3, done=done)
        return [[b["input_ids"][:, 0].tolist() for b in next(batches)] for _ in range(steps)]

    n = batches_per_epoch(14, 2, processes)
    per_epoch = -(-n // 2)
    ranks = [seen(rank, 0, 2 * per_epoch) for rank in range(processes)]
    for epoch in (0, 1):
        steps = [
            step for rank in ranks for step in rank[epoch * per_epoch : (epoch + 1) * per_epoch]
        ]
        ids = [i for step in steps for batch in step for i in batch]
        assert len(ids) == len(set(ids)) and len(ids) > 14 - processes
    assert all(len(rank) == 2 * per_epoch for rank in ranks)
    assert seen(0, per_epoch - 1, 2) == ranks[0][per_epoch - 1 : per_epoch + 1]  # as if resumed
    assert ranks[0][0] != ranks[0][per_epoch]


def test_batches_leave_the_random_state_alone():
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}] * 4)
    before = torch.random.get_rng_state()
    next(train_batches(rows, Collator(0), 2, 1, 1, 0, seed=0, done=0))
    assert torch.equal(before, torch.random.get_rng_state())
