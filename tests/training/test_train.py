"""The loop: exact under accumulation and data parallelism, resumable, its result loadable."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fastkd import cli, demo
from fastkd.cli import main, parse
from fastkd.recipes.lm import find_head
from fastkd.sources import LMHead
from fastkd.training.config import DistillConfig, InputError
from fastkd.training.data import Collator, eval_batches
from fastkd.training.evaluate import evaluate
from fastkd.training.models import open_teacher
from fastkd.training.train import distill

WORDS = 60


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def write_model(
    folder, seed, words=WORDS, size=None, scale=1.0, dropout=0.0, family=LlamaConfig, **others
):
    vocabulary = {f"w{i}": i for i in range(words)} | {"<end>": words}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>"
    )
    tokenizer.save_pretrained(folder)
    config = family(
        vocab_size=size or words + 4, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, attention_dropout=dropout, **others,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight *= scale
    model.save_pretrained(folder)
    return str(folder)


def write_rows(path, count, seed=0):
    """Rows whose responses differ in length, so that micro-batches differ in target tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        words = [
            f"w{j}" for j in torch.randint(WORDS, (2 + 3 * i % 17,), generator=generator).tolist()
        ]
        rows.append({"prompt": f"w{i % WORDS} w1 ", "completion": " ".join(words)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def settings(tmp_path):
    """Keyword arguments of a small run."""
    return {
        "student": write_model(tmp_path / "student", 0),
        "teacher": write_model(tmp_path / "teacher", 1, scale=50.0),
        "data": write_rows(tmp_path / "rows.jsonl", 24),
        "output": str(tmp_path / "out"),
        "eval_fraction": 0.0,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 0,
        "max_steps": 4,
        "batch_size": 2,
        "alpha": 0.7,
        "temperature": 2.0,
    }


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def difference(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# Heads: untied; tied, with a softcap; logits multiplied, and divided.
FAMILIES = {
    "llama": {},
    "gemma2": {
        "family": Gemma2Config,
        "head_dim": 8,
        "num_key_value_heads": 2,
        "final_logit_softcapping": 3.0,
    },
    "cohere": {"family": CohereConfig, "logit_scale": 0.3, "tie_word_embeddings": False},
    "granite": {"family": GraniteConfig, "logits_scaling": 4.0},
}
CHUNKS = "in chunks, from hidden states"


def both_ways(settings, tmp_path, **change):
    """The settings' run with logits=auto; that it ends where one on whole logits does."""
    settings |= {"optimizer": "SGD", "learning_rate": 0.2, "eval_fraction": 0.25, **change}
    auto, whole = (
        distill(DistillConfig(**settings | {"logits": way, "output": str(tmp_path / way)}))
        for way in ("auto", "whole")
    )
    assert difference(auto.output, whole.output) < 1e-6
    assert difference(auto.output, settings["student"]) > 1e-3
    for row, other in zip(auto.history, whole.history, strict=True):
        for name in row.keys() - {"tokens_per_second", "peak_memory_mb"}:
            assert row[name] == pytest.approx(other[name], rel=1e-4), name
    return auto


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_chunks_train_as_whole_logits_do(settings, tmp_path, capsys, family):
    for seed, name in enumerate(("student", "teacher")):
        settings[name] = write_model(tmp_path / name, seed, scale=5.0, **FAMILIES[family])
    both_ways(settings, tmp_path, gradient_accumulation_steps=2)
    said = capsys.readouterr().out
    assert f"logits: the student's {CHUNKS}; the teacher's {CHUNKS}\n" in said
    assert "logits: the student's whole; the teacher's whole\n" in said


def test_the_log_says_how_far_apart_the_models_are(settings):
    first, *_ = distill(DistillConfig(**settings | {"student": settings["teacher"]})).history
    assert first["top1_agreement"] == pytest.approx(1)
    assert first["teacher_entropy"] == pytest.approx(first["student_entropy"], rel=1e-3)
    assert 1 < first["teacher_entropy"] < math.log(WORDS + 4)
    alone, *_ = distill(
        DistillConfig(**settings | {"teacher": None, "alpha": 0.0, "overwrite": True})
    ).history
    assert alone["ce"] == alone["loss"] and "top1_agreement" not in alone


def test_no_tensor_of_all_logits_is_made(settings, monkeypatch):
    """In training and evaluation, of either model: by the head, or by other means for the loss."""
    import fastkd.training.evaluate
    import fastkd.training.train

    positions, sides = [], []
    linear = torch.nn.functional.linear

    def product(*args):
        out = linear(*args)
        if out.shape[-1] == WORDS + 4:
            positions.append(out.shape[1])
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    for module in (fastkd.training.train, fastkd.training.evaluate):

        def loss(s, t, *rest, compare=module.kd_loss, **kwargs):
            sides.extend([s, t])
            return compare(s, t, *rest, **kwargs)

        monkeypatch.setattr(module, "kd_loss", loss)
    distill(DistillConfig(**settings | {"eval_fraction": 0.2, "gradient_checkpointing": True}))
    assert sides and all(isinstance(side, LMHead) for side in sides)
    assert max(side.leading[1] for side in sides) > 8
    assert positions == [8] * 4  # the two probes of each


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z + torch.arange(z.shape[-1]) / 20,
        lambda z: 100 * torch.tanh(z / 100),  # not felt by a fresh student's small logits
    ],
)
def test_logits_that_are_not_the_heads_alone_stay_whole(
    settings, tmp_path, monkeypatch, capsys, change
):
    """Of the student; the teacher, of another class, decides for itself."""
    settings["teacher"] = write_model(tmp_path / "other", 1, scale=5.0, **FAMILIES["gemma2"])
    forward = LlamaForCausalLM.forward

    def changed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", changed)
    both_ways(settings, tmp_path)
    assert f"logits: the student's whole; the teacher's {CHUNKS}\n" in capsys.readouterr().out


@pytest.mark.parametrize("teacher", [True, False])
def test_accumulated_micro_batches_make_the_step_of_one_batch(settings, tmp_path, teacher):
    settings |= {"optimizer": "SGD", "max_steps": 1, "warmup_ratio": 0.0, "learning_rate": 0.5}
    settings |= {} if teacher else {"teacher": None, "alpha": 0.0}
    whole = None
    for rows, accumulation in ((8, 1), (2, 4), (1, 8)):
        output = str(tmp_path / f"by{rows}")
        config = DistillConfig(
            **settings
            | {"output": output, "batch_size": rows, "gradient_accumulation_steps": accumulation}
        )
        run = distill(config)
        if whole:
            assert difference(tmp_path / "by8", output) < 1e-6
            assert run.history[0]["loss"] == pytest.approx(whole["loss"], rel=1e-5)
            assert run.history[0]["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
        else:
            whole = run.history[0]
            assert difference(settings["student"], output) > 1e-3
    ratio = settings["alpha"]
    assert whole["loss"] == pytest.approx(
        ratio * 4 * whole["kd"] + (1 - ratio) * whole["ce"], rel=1e-5
    )


@pytest.mark.parametrize("tied", [False, True])
def test_two_processes_make_the_steps_of_one(settings, tmp_path, tied):
    """The head's gradient comes from outside of the forward pass that is wrapped, a tied one's also
    from inside."""
    settings["student"] = write_model(tmp_path / "student", 0, tie_word_embeddings=tied)
    settings |= {
        "optimizer": "SGD",
        "learning_rate": 0.5,
        "gradient_accumulation_steps": 2,
        "eval_fraction": 0.25,
    }
    alone = distill(DistillConfig(**settings | {"batch_size": 4}))
    flags = [f"--{name}={value}" for name, value in settings.items() if name != "output"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    command = [*launch, "-m", "fastkd.cli", "distill", *flags, f"--output={tmp_path / 'two'}"]
    subprocess.run(command, check=True, env=environment, cwd=root, capture_output=True, timeout=100)
    assert difference(tmp_path / "out", tmp_path / "two") < 1e-6
    history = [
        json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    ]
    for row, other in zip(alone.history, history, strict=True):
        for name in row.keys() - {"tokens_per_second", "peak_memory_mb"}:
            assert row[name] == pytest.approx(other[name], rel=1e-4), name


@pytest.mark.parametrize("at", [2, 5])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(settings, tmp_path, at):
    # 24 rows in 6 micro-batches, 2 a step: three steps an epoch, and step 5 lies in the second.
    settings |= {"batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 7, "save_steps": 1}
    settings["student"] = write_model(
        tmp_path / "dropout", 0, dropout=0.1
    )  # draws from the random state
    distill(DistillConfig(**settings))
    other = settings | {"output": str(tmp_path / "other")}
    torch.manual_seed(123)
    checkpoint = tmp_path / "out" / f"checkpoint-{at}"
    run = distill(DistillConfig(**other, resume_from_checkpoint=str(checkpoint)))
    assert difference(tmp_path / "out", tmp_path / "other") == 0
    assert [row["step"] for row in run.history] == list(range(at + 1, 8))
    assert (
        difference(checkpoint, tmp_path / "out") > 1e-4
    )  # a checkpoint loads like a model, and is not yet the end


def test_resuming_in_place_goes_on_with_the_log_and_limits_checkpoints(settings, tmp_path):
    settings |= {"save_steps": 2, "save_total_limit": 2, "max_steps": 6}
    distill(DistillConfig(**settings))
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*checkpoint*")) == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    before = (out / "log.jsonl").read_text().splitlines()
    distill(DistillConfig(**settings, resume_from_checkpoint=str(out / "checkpoint-4")))
    after = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in after] == [1, 2, 3, 4, 5, 6]
    assert json.loads(before[-1])["loss"] == json.loads(after[-1])["loss"]
    with pytest.raises(InputError, match="cannot go on"):
        distill(DistillConfig(**settings | {"batch_size": 3}, resume_from_checkpoint="last"))


def test_the_output_is_a_model_without_pickles(settings, tmp_path):
    distill(DistillConfig(**settings))
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "fastkd.yaml",
        "log.jsonl",
    } <= names
    assert not [
        name for name in names if name.endswith((".bin", ".pkl", ".pt", ".pth", ".partial"))
    ]
    assert (
        AutoTokenizer.from_pretrained(out).get_vocab()
        == AutoTokenizer.from_pretrained(settings["student"]).get_vocab()
    )
    assert difference(settings["student"], out) > 1e-3
    assert DistillConfig(**yaml.safe_load((out / "fastkd.yaml").read_text())) == DistillConfig(
        **settings
    )
    with pytest.raises(InputError, match="already holds a model"):
        distill(DistillConfig(**settings))
    distill(DistillConfig(**settings, overwrite=True))


def test_the_teacher_is_frozen_and_left_as_it_was(settings):
    teacher = open_teacher(DistillConfig(**settings))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    before = weights(settings["teacher"])
    distill(DistillConfig(**settings))
    after = weights(settings["teacher"])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_teacher_of_a_run_gets_no_gradient(settings, monkeypatch):
    import fastkd.training.train

    opened = []
    monkeypatch.setattr(
        fastkd.training.train,
        "open_teacher",
        lambda config: opened.append(open_teacher(config)) or opened[0],
    )
    before = weights(settings["teacher"])
    distill(DistillConfig(**settings))
    assert all(p.grad is None for p in opened[0].parameters())
    assert all(torch.equal(before[name], p) for name, p in opened[0].state_dict().items())
    assert not opened[0].training


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_distilling_brings_the_student_to_the_teacher(settings, divergence):
    settings |= {
        "max_steps": 60,
        "alpha": 1.0,
        "temperature": 1.0,
        "batch_size": 8,
        "eval_fraction": 0.2,
    }
    settings |= {
        "logging_steps": 20,
        "eval_steps": 1,
        "learning_rate": 2e-2,
        "divergence": divergence,
    }
    run = distill(DistillConfig(**settings))
    kl = [row["eval_kl"] for row in run.history if "eval_kl" in row]
    assert len(kl) == 60 and kl[-1] == run.scores["kl"]
    assert kl[-1] < 0.7 * kl[0]
    agreement = [row["eval_top1_agreement"] for row in run.history if "eval_kl" in row]
    assert agreement[-1] > agreement[0]


def test_scores_are_what_torch_says(settings):
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(settings[name], dtype=torch.float32).eval()
        for name in ("student", "teacher")
    )
    rows = Dataset.from_list([
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, 4, 5]},
        {"input_ids": [6, 7], "labels": [6, 7]},
    ])  # fmt: skip
    scores = evaluate(student, eval_batches(rows, Collator(0), 2, 1, 0), Accelerator(), teacher)
    log_q, log_p = (
        torch.cat(
            [model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1) for row in rows]
        )
        for model in (student, teacher)
    )
    counts, targets = [1, 2, 3, 4], torch.tensor([3, 4, 5, 7])
    log_q, log_p = log_q[counts], log_p[counts]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert scores["kl"] == pytest.approx(kl.item(), rel=1e-4)
    perplexity = math.exp(-log_q.gather(1, targets[:, None]).mean().item())
    assert scores["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    agreement = (log_q.argmax(-1) == log_p.argmax(-1)).float().mean().item()
    assert scores["top1_agreement"] == pytest.approx(agreement)
    alone = evaluate(student, eval_batches(rows, Collator(0), 2, 1, 0), Accelerator())
    assert alone == {"perplexity": pytest.approx(perplexity, rel=1e-5)}


def test_padding_columns_of_one_tokenizer_are_fine(settings, tmp_path):
    settings["teacher"] = write_model(tmp_path / "padded", 1, size=WORDS + 20)
    assert math.isfinite(distill(DistillConfig(**settings)).history[-1]["loss"])


def test_other_tokenizers_are_refused_before_any_weights_are_read(settings, tmp_path):
    settings["teacher"] = write_model(tmp_path / "stranger", 1, words=WORDS + 2)
    (tmp_path / "stranger" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="must share one tokenizer; 3 tokens differ"):
        distill(DistillConfig(**settings))
    settings["teacher"] = write_model(tmp_path / "small", 1, size=WORDS)
    with pytest.raises(InputError, match=r"has 60 logits, but its tokenizer has ids up to 60"):
        distill(DistillConfig(**settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": None}, "--teacher is missing"),
        ({"data": None}, "--data is missing"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\]"),
        ({"divergence": "kl"}, "unknown divergence 'kl'; known: .*forward_kl"),
        ({"divergence_args": ["w=1"]}, "forward_kl has no w"),
        ({"divergence": "jsd", "divergence_args": ["teacher_weight=2"]}, "teacher_weight"),
        ({"divergence_args": ["0.3"]}, "takes name=value"),
        ({"optimizer": "Adamm"}, "unknown optimizer 'Adamm'"),
        ({"scheduler": "cosin"}, "scheduler cosin"),
        ({"max_steps": 0}, "nothing to train"),
        ({"student": "/nowhere/at-all"}, "cannot open the student /nowhere/at-all"),
        ({"resume_from_checkpoint": "last"}, "no checkpoint to resume from"),
    ],
)
def test_what_cannot_work_is_said_before_training(settings, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        distill(DistillConfig(**settings | change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "Adafactor", "scheduler": "linear"},
        {"optimizer_args": ["betas=[0.8, 0.9]", "eps=1e-6"], "gradient_checkpointing": True},
        {"mixed_precision": "bf16", "dtype": "bfloat16"},
        {"divergence": "jsd", "divergence_args": ["teacher_weight=0.3"], "max_grad_norm": 0.0},
    ],
)
def test_settings_that_work(settings, change):
    run = distill(DistillConfig(**settings | change))
    assert all(math.isfinite(row["loss"]) for row in run.history)
    assert difference(settings["student"], run.output) > 1e-4


def test_compiled_models_are_refused(settings, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(InputError, match="dynamo_backend"):
        distill(DistillConfig(**settings))


@pytest.mark.parametrize("logits", ["auto", "whole"])
def test_mixed_precision_keeps_logits_in_bf16(settings, monkeypatch, logits):
    import fastkd.training.train

    seen = []
    loss = fastkd.training.train.kd_loss
    monkeypatch.setattr(
        fastkd.training.train,
        "kd_loss",
        lambda s, *rest, **kwargs: seen.append((type(s), s.dtype)) or loss(s, *rest, **kwargs),
    )
    distill(DistillConfig(**settings | {"mixed_precision": "bf16", "logits": logits}))
    kind = LMHead if logits == "auto" else torch.Tensor
    assert set(seen) == {(kind, torch.bfloat16)}


def test_adapters_are_saved_alone(settings, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    distill(DistillConfig(**settings, lora_r=2))
    assert CHUNKS in capsys.readouterr().out.partition("the teacher's")[0]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    base = weights(settings["student"])
    for name, x in model.merge_and_unload().state_dict().items():
        changes = "_proj" in name
        assert torch.equal(x, base[name]) != changes


def test_a_scale_near_one_is_found_in_low_precision(settings, tmp_path):
    settings["teacher"] = write_model(
        tmp_path / "near", 1, family=GraniteConfig, logits_scaling=1.01
    )
    model = open_teacher(DistillConfig(**settings | {"dtype": "bfloat16"})).train()
    model.model.layers[0].eval()
    assert find_head(model, torch.arange(8)[None]).scale == 1 / 1.01
    assert model.training and not model.model.layers[0].training


def test_an_adapter_on_the_head_keeps_logits_whole(settings):
    """A fresh one adds nothing yet: only its class tells."""
    peft = pytest.importorskip("peft")
    model = open_teacher(DistillConfig(**settings))
    ids = torch.arange(8)[None]
    assert find_head(model, ids) is not None
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    assert find_head(wrapped, ids) is None


def test_command_line_end_to_end(settings, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    settings |= {
        "learning-rate": "1e-3",
        "divergence": "jsd",
        "divergence_args": {"teacher_weight": 0.3},
    }
    settings |= {"packing": False}
    del settings["learning_rate"]
    config.write_text(yaml.safe_dump(settings))
    status = main(
        ["distill", "--config", str(config), "--max-steps", "2", "--batch_size=3", "--packing"]
    )
    assert status == 0
    said = capsys.readouterr().out
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path / "out"}")' in said
    saved = yaml.safe_load((tmp_path / "out" / "fastkd.yaml").read_text())
    assert saved["max_steps"] == 2 and saved["batch_size"] == 3 and saved["packing"] is True
    assert saved["learning_rate"] == 1e-3 and saved["divergence_args"] == ["teacher_weight=0.3"]
    assert saved["temperature"] == 2.0
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2
    assert math.isfinite(weights(tmp_path / "out")["lm_head.weight"].sum().item())


def test_command_line_errors_are_one_line(settings, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("teachr: x\nstudent: y\n")
    assert main(["distill", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert "unknown keys: teachr; known: student, teacher, data" in error and error.count("\n") == 1
    assert main(["distill", "--student", "x"]) == 2
    assert "--data is missing" in capsys.readouterr().err
    assert main(["distill", "--alfa", "1"]) == 2
    assert "unknown: --alfa 1" in capsys.readouterr().err
    for argv in (
        ["distil"],
        [],
        ["distill", "--mixed_precision", "int3"],
        ["distill", "--alpha", "x"],
    ):
        with pytest.raises(SystemExit) as done:
            main(argv)
        assert done.value.code == 2


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "datasets" else name)
    assert main(["distill", "--student", "x"]) == 2
    assert "needs datasets: pip install 'fastkd[train]'" in capsys.readouterr().err


def test_help_names_every_setting(capsys):
    for argv in (["--help"], ["distill", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as done:
            main(argv)
        assert done.value.code == 0
    said = capsys.readouterr().out
    for name, field in DistillConfig.__dataclass_fields__.items():
        assert f"--{name}" in said and field.metadata["help"]
    assert parse(["--alpha", "0.5", "--max-steps", "3"]) == DistillConfig(alpha=0.5, max_steps=3)


def test_the_demonstration(settings, tmp_path, monkeypatch, capsys):
    words = (Path(settings["data"]).read_text() + " w1 w2").split()
    texts = ["\n".join(word for word in words if word.startswith("w")) * 40] * 3
    monkeypatch.setattr(demo, "TEACHER", Path(settings["teacher"]))
    monkeypatch.setattr(demo, "stdlib_texts", lambda held_out: texts)
    monkeypatch.setattr(demo, "PROMPT", "w1 w2")
    monkeypatch.setattr(demo, "LENGTH", 32)
    results = demo.run(str(tmp_path / "demo"), steps=2)
    said = capsys.readouterr().out
    folder = tmp_path / "demo"
    assert json.loads((folder / "results.json").read_text()) == results
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    alone, taught = (results["models"][name] for name in demo.NAMES[1:])
    assert f"{taught['perplexity']:.1f}" in said and f"{alone['kl']:.3f}" in said
    assert f'AutoModelForCausalLM.from_pretrained("{folder / "distilled"}")' in said
    assert difference(folder / "cross-entropy", folder / "distilled") > 0
    assert results["loss_peak_mb"]["naive"] > results["loss_peak_mb"]["fastkd"] > 0
