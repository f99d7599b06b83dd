"""What a model writes is what transformers has it write, prompt by prompt; and batches hold it as
their own."""

import random

import pytest
import torch
from tiny_lms import V, batch, tiny, words
from transformers import (
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fastkd.recipes import LM, Distil, OnPolicy, Prompted, Recipe, generate, train

NEW = 5


def model(seed=0, **others):
    """Of large weights: earlier tokens count."""
    return tiny(seed, eos_token_id=None, initializer_range=0.5, **others).double()


def greedily(model, prompt, **settings):
    """transformers' own, of one prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
        pad_token_id=0, **settings,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


PROMPTS = ["w1 w2 w3", "w5", "w7 w8 w9 w10 w11", "w4 w4", "w6 w1 w2 w3"]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_answers_are_those_of_each_prompt_alone(batch_size):
    student, table = model(), words()
    expected = [table.decode(greedily(student, table(p)["input_ids"])) for p in PROMPTS]
    assert len(set(expected)) == len(expected)
    settings = dict(batch_size=batch_size, max_new_tokens=NEW, temperature=0)
    assert list(generate(LM(student), table, PROMPTS, **settings)) == list(enumerate(expected))
    ids = [table(p)["input_ids"] for p in PROMPTS]  # as they are
    assert [text for _, text in generate(student, table, ids, **settings)] == expected


def test_what_was_begun_goes_on_to_the_letter():
    """Sampled: from any prompt on, whatever was drawn elsewhere; and nothing else is touched."""
    student, table = model(attention_dropout=0.5).train(), words()
    student.model.layers[0].eval()
    settings = dict(batch_size=2, max_new_tokens=NEW, seed=3)
    state, other = torch.get_rng_state(), random.getstate()
    whole = list(generate(student, table, PROMPTS, **settings))
    assert torch.equal(state, torch.get_rng_state()) and other == random.getstate()
    assert student.training and not student.model.layers[0].training
    assert [i for i, _ in whole] == list(range(5))
    for start in range(6):
        torch.rand(1)
        assert list(generate(student, table, PROMPTS, **settings, start=start)) == whole[start:]
    assert whole != list(generate(student, table, PROMPTS, **settings | {"seed": 4}))


def test_a_folders_sampling_settings_are_not_used():
    """But the ids that end a text are, and those of the tokenizer."""
    student, table = model(), words()
    settings = dict(max_new_tokens=NEW, seed=1)
    expected = list(generate(student, table, PROMPTS, **settings))
    student.generation_config.top_k = 1
    student.generation_config.repetition_penalty = 9.0
    student.generation_config.max_length = 3
    before = student.generation_config
    assert list(generate(student, table, PROMPTS, **settings)) == expected
    assert student.generation_config is before
    greedy = list(generate(student, table, PROMPTS, **settings, temperature=0))
    assert list(generate(student, table, PROMPTS, **settings, top_k=1)) == greedy != expected

    ids = greedily(model(), table(PROMPTS[0])["input_ids"])
    table.add_special_tokens({"eos_token": f"w{ids[2]}"})
    (_, text), *_ = generate(model(), table, PROMPTS, max_new_tokens=NEW, temperature=0)
    assert text == table.decode(ids[:2])
    table, student = words(), model()
    student.generation_config.eos_token_id = [ids[1], 66]
    (_, text), *_ = generate(student, table, PROMPTS, max_new_tokens=NEW, temperature=0)
    assert text == table.decode(ids[:2])


def test_what_cannot_be_written():
    student, table = model(), words()
    for prompts, message in (
        ([[1], []], "prompt 1 has 0 tokens"),
        (["w1", "w2 " * 64], "prompt 1 has 64 tokens.*at most 63"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(student, table, prompts)  # before the first is asked for
    with pytest.raises(ValueError, match="batch_size must be positive"):
        generate(student, table, PROMPTS, batch_size=0)
    sizes = dict(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    bert = BertForMaskedLM(BertConfig(**sizes, intermediate_size=32))
    with pytest.raises(ValueError, match="BertForMaskedLM cannot write"):
        generate(bert, table, PROMPTS)
    with pytest.raises(TypeError, match="GenerationConfig has no topp"):
        generate(student, table, PROMPTS, topp=0.5)
    with pytest.raises(ValueError, match="fraction must be in"):
        OnPolicy(student, 1.5)
    with pytest.raises(ValueError, match="temperature must be finite"):
        OnPolicy(student, 0.5, temperature=-1.0)


def rows():
    """Two prompts, of 3 and 1 tokens, padded on either side; a row of plain text; one without
    labels; one that is padding alone."""
    ids = torch.tensor(
        [[0, 1, 2, 3, 40, 41], [7, 50, 51, 52, 0, 0], [8, 9, 10, 11, 12, 0], [20, 21, 0, 0, 0, 0]]
        + [[0] * 6]
    )
    mask = torch.tensor(
        [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0] * 6]
    )
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = labels[1, 0] = labels[3] = -100
    labels[1, 2] = -100  # a later turn begins
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def unpadded(written, i, name, side=""):
    keep = written[f"{side}attention_mask"][i] != 0
    return written[f"{side}{name}"][i][keep].tolist()


def test_responses_are_the_students_own():
    student = model().train()
    prompts = {0: [1, 2, 3], 1: [7], 3: [20, 21]}
    own = {i: greedily(student.eval(), prompt) for i, prompt in prompts.items()}
    eos = own[0][1]
    own = {i: x[: x.index(eos) + 1] if eos in x else x for i, x in own.items()}
    assert 1 <= len(own[0]) <= 2
    before, student = rows(), student.train()
    policy = OnPolicy(student, 1.0, NEW, temperature=0, pad_token_id=5, eos_token_id=eos)
    written = policy(before)
    assert student.training
    for i, prompt in prompts.items():
        assert unpadded(written, i, "input_ids") == prompt + own[i]
        assert unpadded(written, i, "labels") == [-100] * len(prompt) + own[i]
    assert unpadded(written, 2, "input_ids") == [8, 9, 10, 11, 12]  # plain text stays
    assert unpadded(written, 2, "labels") == [8, 9, 10, 11, 12]
    assert not unpadded(written, 4, "input_ids")
    padding = written["attention_mask"] == 0
    assert (written["input_ids"][padding] == 5).all() and (written["labels"][padding] == -100).all()
    assert set(written) == set(before) and torch.equal(before["labels"], rows()["labels"])


def test_a_fraction_of_the_micro_batches_and_the_same_again_from_a_checkpoint():
    student = model()
    policy = OnPolicy(student, 0.5, 2, seed=1)
    steps, states = [], []
    for _ in range(6):
        states.append(policy.state_dict())
        steps.append(policy([rows(), rows()]))
    kept = [torch.equal(b["labels"], rows()["labels"]) for step in steps for b in step]
    assert 0 < sum(kept) < len(kept)
    again = OnPolicy(student, 0.5, 2, seed=1)
    again.load_state_dict(states[4])
    torch.rand(7)
    for one, other in zip(steps[4], again([rows(), rows()]), strict=True):
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert all(OnPolicy(student, 0.0)(b) is b for b in [rows()] * 5)


def test_positions_end():
    """A response is cut, a prompt that fills the model stays as it is."""
    inputs = {"input_ids": torch.arange(128).view(2, 64) % V}
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][0, :62] = -100
    inputs["labels"][1] = -100
    written = OnPolicy(model(), 1.0, NEW)(inputs)
    assert written["input_ids"].shape == (2, 64)
    assert (written["labels"][0] != -100).sum() == 2 and (written["labels"][1] == -100).all()


def test_a_teachers_own_prompt_gets_the_same_response():
    student = model()
    both = batch() | {
        "teacher_input_ids": torch.arange(24).view(2, 12),
        "teacher_labels": torch.full((2, 12), -100),
    }
    both["teacher_labels"][:, 5:] = 1
    both["labels"][0, :2] = -100
    written = OnPolicy(student, 1.0, NEW)(both)
    for i in range(2):
        own = unpadded(written, i, "labels", "teacher_")
        assert own == [-100] * 5 + own[5:]
        assert own[5:] == [y for y in unpadded(written, i, "labels") if y != -100]
        assert unpadded(written, i, "input_ids", "teacher_")[:5] == list(range(12 * i, 12 * i + 5))
    objective, teacher = Distil(), Prompted(LM(model(1)))
    with torch.no_grad():
        says = teacher(written)
    n = objective.counts(written)
    assert n == 2 * NEW and objective(LM(student)(written), says, written, n).loss > 0


def test_what_cannot_be_written_anew_is_named():
    policy = OnPolicy(model(), 1.0, 2)
    for name, x, message in (
        ("position_ids", torch.zeros(5, 6), "position_ids says that rows are packed"),
        ("attention_mask", torch.ones(5, 1, 6, 6), "attention_mask says that rows are packed"),
        ("token_type_ids", torch.ones(5, 6), "token_type_ids cannot be"),
        ("pixel_values", torch.ones(5, 3), "pixel_values cannot be"),
    ):
        with pytest.raises(ValueError, match=message):
            policy(rows() | {name: x})
    zeros = torch.zeros(5, 6, dtype=torch.long)
    written = policy(rows() | {"token_type_ids": zeros})
    assert written["token_type_ids"].shape == written["input_ids"].shape


def test_wrapped_students_write(tmp_path):
    """Under DDP, and with adapters that change what is written."""
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_()
    expected = greedily(adapted.eval(), [1, 2, 3])
    assert expected != greedily(model(), [1, 2, 3])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(adapted)
        written = OnPolicy(ddp, 1.0, NEW, temperature=0)(rows())
    finally:
        torch.distributed.destroy_process_group()
    assert unpadded(written, 0, "input_ids") == [1, 2, 3, *expected]

    class FullyShardedDataParallel(torch.nn.Sequential):
        """By its name; the real one needs processes."""

    student = model()
    policy = OnPolicy(student, 1.0, NEW)
    student.model.layers[0].mlp = FullyShardedDataParallel(student.model.layers[0].mlp)
    with pytest.raises(ValueError, match="FSDP1 cannot write: use FSDP2"):
        policy(rows())


def test_an_encoder_with_a_decoder_writes_its_labels():
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    t5 = T5ForConditionalGeneration(
        T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None)
    ).double()
    inputs, table = rows(), words()
    inputs["labels"] = torch.full((5, 3), -100)
    inputs["labels"][4, 0] = 9
    written = OnPolicy(t5, 1.0, NEW, temperature=0)(inputs)
    ids = [[1, 2, 3, 40, 41], [7, 50, 51, 52], [8, 9, 10, 11, 12], [20, 21]]
    answers = list(generate(t5, table, ids, batch_size=3, max_new_tokens=NEW, temperature=0))
    for i, prompt in enumerate(ids):
        alone = t5.eval().generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW)
        assert written["labels"][i].tolist() == alone[0, 1:].tolist()
        assert answers[i] == (i, table.decode(alone[0, 1:]))
    assert written["labels"][4].tolist() == [9] + [-100] * (NEW - 1)
    assert torch.equal(written["input_ids"], inputs["input_ids"])


def test_a_student_learns_what_its_teacher_wrote():
    """Response distillation: answers as data, mixed with others; no teacher in the loop."""
    student, teacher, table = model(0), model(1), words()
    texts = dict(generate(teacher, table, PROMPTS[:3], max_new_tokens=NEW, seed=1))
    answers = [
        (table(prompt)["input_ids"], table(texts[i])["input_ids"])
        for i, prompt in enumerate(PROMPTS[:3])
    ]
    real = batch(rows=1)
    length = max(len(prompt + answer) for prompt, answer in answers)
    written = {k: torch.zeros(3, length, dtype=torch.long) for k in real}
    written["labels"] -= 100
    for i, (prompt, answer) in enumerate(answers):
        written["input_ids"][i, : len(prompt + answer)] = torch.tensor(prompt + answer)
        written["attention_mask"][i, : len(prompt + answer)] = 1
        written["labels"][i, len(prompt) : len(prompt + answer)] = torch.tensor(answer)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    recipe = Recipe([[written, real]] * 40, None, Distil())
    train(LM(student), recipe, optimizer, steps=40)
    learnt = generate(student, table, PROMPTS[:3], max_new_tokens=NEW, temperature=0)
    assert dict(learnt) == texts


def test_on_policy_in_the_loop():
    """Counted after they were rewritten: one micro-batch and two are the same step."""
    found = []
    for pieces in (1, 2):
        student, teacher = model(0), LM(model(1))
        whole = {k: x[:4] for k, x in rows().items()}
        chunks = zip(*(x.chunk(pieces) for x in whole.values()), strict=True)
        parts = [dict(zip(whole, x, strict=True)) for x in chunks]
        batches = map(OnPolicy(student, 1.0, NEW, temperature=0), [parts])
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        objective = Distil(divergence="reverse_kl")
        history = train(LM(student), Recipe(batches, teacher, objective), optimizer, steps=1)
        found.append((history[0]["loss"], dict(student.named_parameters())))
    torch.testing.assert_close(*found)
