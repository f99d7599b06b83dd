"""Every strategy from the command line, end to end on tiny models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import WORDS, difference, log, rows, run, weights, words, write_model, write_rows
from test_run import fresh_process  # noqa: F401 - for each test
from test_run import settings as settings  # noqa: PLC0414
from transformers import AutoModelForMaskedLM, BertConfig

from fastkd.cli import main

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def first(tmp_path):
    return next(row for row in log(tmp_path / "out") if "loss" in row)


@pytest.mark.parametrize(
    "change",
    [
        dict(divergence="reverse_kl"),
        dict(divergence="skew_forward_kl", divergence_args=["teacher_weight=0.2"]),
        dict(divergence="taid", divergence_args=["t=0.2..0.9"]),
        dict(divergence="0.5*forward_kl+0.5*tvd"),
        dict(divergence="logit_mse"),
        dict(temperature="4..1", alpha="1..0.2"),
    ],
)
def test_losses_of_logits(settings, tmp_path, change):
    assert run(**settings | change) == 0
    assert difference(settings["student"], tmp_path / "out") > 1e-4
    assert all(row["kd"] >= 0 for row in log(tmp_path / "out"))


def test_schedules_move(settings, tmp_path):
    """The last step is at three quarters of the way."""
    assert run(**settings | dict(temperature="4..2", alpha="1..0", learning_rate=0)) == 0
    for i, row in enumerate(log(tmp_path / "out")):
        t, a = 4 - 2 * i / 4, 1 - i / 4
        assert row["loss"] == pytest.approx(a * t**2 * row["kd"] + (1 - a) * row["ce"], rel=1e-4)


def test_labels_alone_need_no_teacher(settings, tmp_path):
    settings.pop("teacher")
    assert run(**settings | dict(alpha=0)) == 0
    assert first(tmp_path)["loss"] == pytest.approx(first(tmp_path)["ce"])


def test_packed_documents_are_learnt_as_if_alone(settings, tmp_path):
    """All of them in one step, packed into few rows or a row each."""
    texts = [{"text": row["completion"]} for row in rows(12)]
    settings |= dict(data=write_rows(tmp_path / "texts.jsonl", texts), batch_size=12, max_steps=1)
    found = []
    for more in ([], ["--no_packing", "--overwrite"]):
        assert run(*more, **settings) == 0
        found.append(first(tmp_path))
    for name in ("loss", "kd", "ce", "grad_norm"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4), name


def test_two_stages_in_one_command(settings, tmp_path):
    assert run(**settings | dict(finetune_epochs=0.5, save_steps=100)) == 0
    stages = [tmp_path / "out-distilled", tmp_path / "out"]
    assert "kd" in log(stages[0])[0] and "kd" not in log(stages[1])[0]
    assert difference(settings["student"], stages[0]) > 1e-4
    assert difference(*stages) > 1e-4
    assert run("--resume", **settings | dict(finetune_epochs=0.5, save_steps=100)) == 0


@pytest.mark.parametrize("mode", ["probabilities", "logits"])
def test_several_teachers_of_different_widths(settings, tmp_path, mode):
    other = write_model(tmp_path / "other", 7, scale=50.0, hidden_size=24)
    mixed = settings | dict(
        teacher=[settings["teacher"], other], teacher_weight=[0.25, 0.75], teacher_mode=mode,
        divergence="forward_kl", learning_rate=0, eval_fraction=0.2,
    )  # fmt: skip
    assert run(**mixed) == 0
    found = first(tmp_path)
    for teacher in mixed["teacher"]:
        assert run("--overwrite", **mixed | dict(teacher=teacher, teacher_weight=1.0)) == 0
        assert abs(first(tmp_path)["kd"] - found["kd"]) > 1e-3
    same = mixed | dict(teacher=[other, other])
    assert run("--overwrite", **same) == 0
    assert first(tmp_path)["kd"] == pytest.approx(
        kd_of(mixed | dict(teacher=other, teacher_weight=1.0), tmp_path), rel=1e-4
    )


def kd_of(settings, tmp_path):
    assert run("--overwrite", **settings) == 0
    return first(tmp_path)["kd"]


def test_the_triple_loss_of_masked_models(settings, tmp_path, capsys):
    """DistilBERT: masked words, the teacher's distributions, the direction of its hidden states; a
    student of every other layer."""
    teacher = write_model(
        tmp_path / "bert", 3, family=BertConfig, tokenizer=words(["<mask>"]), scale=20.0,
        num_hidden_layers=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    texts = [{"text": " ".join(f"w{(i * j + j) % WORDS}" for j in range(20))} for i in range(24)]
    settings |= dict(
        teacher=teacher, student_from_teacher="every=2", task="masked-lm", hidden_loss="cosine",
        hidden_weight=0.5, data=write_rows(tmp_path / "texts.jsonl", texts), eval_fraction=0.25,
    )  # fmt: skip
    settings.pop("student")
    assert run(**settings) == 0
    assert "18 rows, 360 tokens\n" in capsys.readouterr().out  # whole, and nothing of a causal LM's
    row = first(tmp_path)
    whole = 0.7 * 4 * row["kd"] + 0.3 * row["ce"] + 0.5 * row["cosine"]
    assert row["loss"] == pytest.approx(whole, rel=1e-4)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 2
    kept = weights(teacher, AutoModelForMaskedLM)["bert.embeddings.word_embeddings.weight"]
    assert not torch.equal(model.bert.embeddings.word_embeddings.weight, kept)


@pytest.mark.parametrize("kind", ["mse", "rkd"])
def test_hidden_states_of_another_width(settings, tmp_path, kind):
    settings["teacher"] = write_model(tmp_path / "wide", 4, scale=20.0, hidden_size=24)
    settings |= dict(hidden_loss=kind, hidden_weight=2.0, save_steps=2)
    assert run(**settings) == 0
    row = first(tmp_path)
    whole = 0.7 * 4 * row["kd"] + 0.3 * row["ce"] + 2 * row[kind]
    assert row["loss"] == pytest.approx(whole, rel=1e-4)
    projection = tmp_path / "out" / "checkpoint-2" / "objective.safetensors"
    assert projection.exists() == (kind == "mse")
    assert not (tmp_path / "out" / "objective.safetensors").exists()


def test_texts_are_not_packed_beside_the_students_responses(settings, tmp_path, capsys):
    """Where packed, nobody could tell what to write anew."""
    texts = [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(8)]
    data = write_rows(tmp_path / "texts.jsonl", texts)
    policy = dict(on_policy=1.0, on_policy_max_new_tokens=2, max_steps=1)
    assert run(**settings | policy | dict(data=data)) == 0
    assert "8 rows" in capsys.readouterr().out
    packed = [{"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}] * 4
    data = write_rows(tmp_path / "packed.jsonl", packed)
    assert run(**settings | policy | dict(data=data, output=tmp_path / "again")) == 2
    assert "--on_policy needs one document a row" in capsys.readouterr().err


def test_on_policy(settings, tmp_path):
    """All batches written by the student: nothing that is learnt is of the data."""
    settings |= dict(
        on_policy=1.0, on_policy_max_new_tokens=5, divergence="reverse_kl", alpha=1.0, max_steps=3,
        save_steps=2,
    )  # fmt: skip
    assert run(**settings) == 0
    assert run(**settings | dict(output=tmp_path / "other", max_steps=2)) == 0
    assert run("--resume", **settings | dict(output=tmp_path / "other")) == 0
    assert log(tmp_path / "out")[-1]["kd"] == log(tmp_path / "other")[-1]["kd"]
    off = settings | dict(on_policy=0.0, output=tmp_path / "off")
    assert run(**off) == 0
    assert log(tmp_path / "off")[0]["kd"] != first(tmp_path)["kd"]


def test_a_teacher_with_its_own_prompt(settings, tmp_path, capsys):
    """'{input}' alone is no change; with another prompt the teacher says something else."""
    assert run(**settings) == 0
    plain = first(tmp_path)
    same = dict(teacher_prompt_template="{input}", student_prompt_template="{input}")
    assert run("--overwrite", **settings | same) == 0
    assert first(tmp_path)["kd"] == pytest.approx(plain["kd"], rel=1e-5)
    assert "no such columns" not in capsys.readouterr().out
    other = dict(teacher_prompt_template="w9 w8 {hnit} {input} w6", max_teacher_length=40)
    assert run("--overwrite", **settings | other) == 0
    assert "no such columns, so they stay in the prompts: {hnit}" in capsys.readouterr().out
    assert abs(first(tmp_path)["kd"] - plain["kd"]) > 1e-3
    assert first(tmp_path)["ce"] == pytest.approx(plain["ce"], rel=1e-5)


def test_adapters_as_student_and_as_teacher(settings, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    adapter = dict(lora_r=2, lora_alpha=8, lora_targets=["q_proj", "v_proj"], lora_dropout=0.1)
    assert run(**settings | adapter) == 0
    trained = load_file(out / "adapter_model.safetensors")
    assert all("q_proj" in name or "v_proj" in name for name in trained)
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 8
    on = settings | dict(student=out, output=tmp_path / "on")
    assert run(**on) == 0
    further = load_file(tmp_path / "on" / "adapter_model.safetensors")
    assert further.keys() == trained.keys()
    assert any(not torch.equal(further[k], trained[k]) for k in trained)
    taught = settings | dict(teacher=out, output=tmp_path / "taught", learning_rate=0)
    assert run(**taught) == 0
    base = log(tmp_path / "taught")[0]["kd"]
    assert run("--overwrite", **taught | dict(teacher=settings["student"])) == 0
    assert log(tmp_path / "taught")[0]["kd"] == pytest.approx(0, abs=1e-6) and base > 1e-6


def generate(settings, tmp_path, *more, **others):
    made = dict(
        teacher=settings["teacher"], data=settings["data"], output=tmp_path / "answers.jsonl",
        batch_size=4, max_new_tokens=6, seed=1,
    )  # fmt: skip
    flags = [f"--{k}={v}" for k, v in (made | others).items()]
    return main(["generate", *flags, *more])


def test_response_distillation(settings, tmp_path, capsys):
    """The teacher's answers, written in two goes, are those of one; then trained on, mixed with
    real data 70 : 30."""
    assert generate(settings, tmp_path) == 0
    answers = (tmp_path / "answers.jsonl").read_text()
    made = [json.loads(line) for line in answers.splitlines()]
    assert [row["prompt"] for row in made] == [row["prompt"] for row in rows(24)]
    assert len({row["completion"] for row in made}) > 12
    lines = answers.splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[:9]) + lines[9][:7])
    assert generate(settings, tmp_path) == 0
    assert (tmp_path / "answers.jsonl").read_text() == answers
    assert generate(settings, tmp_path, temperature=0.5) == 2
    assert "temperature" in capsys.readouterr().err
    assert generate(settings, tmp_path, "--overwrite", temperature=0) == 0
    settings |= dict(
        data=[tmp_path / "answers.jsonl", settings["data"]], data_weight=[70, 30], alpha=0.5
    )
    assert run(**settings) == 0
    assert difference(settings["student"], tmp_path / "out") > 1e-4


def test_answers_to_more_prompts_are_those_of_all(settings, tmp_path):
    """Sampled text depends on its batch: the last one of fewer prompts is written anew."""
    assert generate(settings, tmp_path, output=tmp_path / "all.jsonl") == 0
    for limit in (6, 9, 24):
        assert generate(settings, tmp_path, limit=limit) == 0
    assert (tmp_path / "answers.jsonl").read_text() == (tmp_path / "all.jsonl").read_text()


def test_prompts_that_are_none(settings, tmp_path, capsys):
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": x} for x in (None, "", 3, "w1")])
    assert generate(settings, tmp_path, data=data) == 0
    made = [json.loads(x) for x in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in made] == [3, "w1"]
    out = capsys.readouterr().out
    assert "dropped 1 of 4 rows: no prompt" in out and "left out 1 of 4 prompts: empty" in out


def test_answers_replace_nothing_of_others(settings, tmp_path, capsys):
    theirs = write_rows(tmp_path / "theirs.jsonl", [{"a": 1}])
    for path in map(Path, (theirs, settings["data"])):
        before = path.read_text()
        assert generate(settings, tmp_path, "--overwrite", output=path) == 2
        assert path.read_text() == before


def test_answers_to_conversations(settings, tmp_path):
    tokenizer = words(["user", "assistant"])
    tokenizer.chat_template = CHAT
    teacher = write_model(tmp_path / "chats", 5, scale=20.0, tokenizer=tokenizer)
    talk = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    data = write_rows(tmp_path / "talks.jsonl", [{"messages": talk}] * 3)
    assert generate(settings, tmp_path, teacher=teacher, data=data) == 0
    made = [json.loads(x) for x in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [m["role"] for m in made[0]["messages"]] == ["user", "assistant"]
    assert made[0]["messages"][0] == talk[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(teacher="nowhere"), "nowhere"),
        (dict(data="nowhere.jsonl"), "nowhere.jsonl"),
        (dict(temperature=-1), "temperature"),
        (dict(output="."), "."),
        (dict(output="answers.txt"), "name it answers.jsonl"),
        (dict(max_new_tokens=64), "64 positions"),
    ],
)
def test_generate_refuses_in_one_line(settings, tmp_path, capsys, change, words):
    assert generate(settings, tmp_path, **change) == 2
    error = capsys.readouterr().err
    (line,) = [x for x in error.splitlines() if x.startswith("fastkd: error: ")]
    assert words in line


def test_a_student_in_4_bits_under_adapters(settings, tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = write_model(tmp_path / "wide", 2, hidden_size=64, intermediate_size=64)
    settings |= dict(student=wide, lora_r=2, load_in_4bit=True)
    assert run(**settings) == 0
    trained = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(x.abs().max() > 0 for name, x in trained.items() if "lora_B" in name)
    further = settings | dict(student=tmp_path / "out", lora_r=0, load_in_4bit=False)
    assert run(**further | dict(output=tmp_path / "further")) == 0  # on the 32-bit base
