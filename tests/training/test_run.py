"""Runs of `fastkd distill`: what they leave, that they can be interrupted, what stops them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from small import curve, difference, flags, log, rows, run, weights, write_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from fastkd.training.config import parse

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def settings(tmp_path):
    """Of a small run."""
    return dict(
        student=write_model(tmp_path / "student", 0),
        teacher=write_model(tmp_path / "teacher", 1, scale=50.0),
        data=write_rows(tmp_path / "rows.jsonl", rows(24)),
        output=tmp_path / "out",
        eval_fraction=0, learning_rate=1e-2, logging_steps=1, save_steps=0, max_steps=4,
        batch_size=2, alpha=0.7, temperature=2.0, max_length=32,
    )  # fmt: skip


def said(capsys):
    """The one line of an error."""
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fastkd: error")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("bar", [True, False])
def test_the_log_is_printed_with_a_bar_and_without(settings, capsys, bar):
    assert run(**settings | dict(eval_fraction=0.2, max_steps=2, disable_tqdm=str(not bar))) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step ")]
    assert [line.split("  ")[:2] for line in lines if "held out" in line] == [
        ["step 0", "held out"], ["step 2", "held out"],
    ]  # fmt: skip
    assert [line.split()[1:3] for line in lines if "kd" in line] == [["1", "loss"], ["2", "loss"]]


def test_the_output_is_a_model_a_log_and_its_settings(settings, tmp_path, capsys):
    before = weights(settings["teacher"])
    assert run(**settings | dict(eval_fraction=0.2, save_steps=2)) == 0
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "curves.png"} <= names
    pickles = (".bin", ".pkl", ".pt", ".pth", ".partial")
    assert not [name for name in names if name.endswith(pickles)]
    assert difference(settings["student"], out) > 1e-3
    assert all(torch.equal(x, before[k]) for k, x in weights(settings["teacher"]).items())
    assert AutoTokenizer.from_pretrained(out).get_vocab()["w7"] == 7
    assert AutoModelForCausalLM.from_pretrained(out).config.use_cache
    again = parse(["--config", str(out / "fastkd.yaml")]).as_dict()
    assert again == parse(flags(settings | dict(eval_fraction=0.2, save_steps=2))).as_dict()
    steps = [row for row in log(out) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    first = steps[0]
    whole = 0.7 * 4 * first["kd"] + 0.3 * first["ce"]
    assert first["loss"] == pytest.approx(whole, rel=1e-4)
    scores = [row for row in log(out) if "eval_loss" in row]
    assert [row["step"] for row in scores] == [0, 4]  # before the first step, and at the end
    assert scores[0]["eval_kl"] > 0 and 0 <= scores[0]["eval_top1_agreement"] <= 1
    printed = capsys.readouterr().out
    assert "the teacher has a perplexity of" in printed
    assert f'transformers.AutoModelForCausalLM.from_pretrained("{out}")' in printed


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_distilling_brings_the_student_to_the_teacher(settings, tmp_path, divergence):
    settings |= dict(
        max_steps=60, alpha=1, temperature=1, batch_size=8, eval_fraction=0.2, logging_steps=20,
        eval_steps=20, learning_rate=2e-2, divergence=divergence,
    )  # fmt: skip
    assert run(**settings) == 0
    scores = [row for row in log(tmp_path / "out") if "eval_kl" in row]
    assert scores[-1]["eval_kl"] < 0.7 * scores[0]["eval_kl"]
    assert scores[-1]["eval_top1_agreement"] > scores[0]["eval_top1_agreement"]


def test_no_tensor_of_all_logits_is_made(settings, monkeypatch):
    """In training and evaluation, by either model, but for the probes of a few tokens."""
    made, linear = [], torch.nn.functional.linear

    def product(*args):
        out = linear(*args)
        if out.shape[-1] == 64:
            made.append(out.shape[:-1].numel())
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    settings |= dict(batch_size=8, eval_fraction=0.3, gradient_checkpointing=True)
    assert run(**settings) == 0
    assert len(made) <= 12 and max(made) <= 8
    made.clear()
    assert run("--overwrite", **settings | dict(logits="whole")) == 0
    assert max(made) > 8 * 16


def test_a_run_needs_a_folder_of_its_own(settings, tmp_path, capsys):
    pytest.importorskip("peft")
    assert run(**settings) == 0
    assert run(**settings) == 2
    assert "holds an earlier run" in said(capsys)
    assert run("--overwrite", **settings | dict(lora_r=2)) == 0
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert run("--overwrite", **settings) == 0
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert difference(settings["student"], tmp_path / "out") > 1e-3


@pytest.mark.parametrize("lora", [0, 2])
def test_a_run_that_goes_on_ends_where_an_uninterrupted_one_does(settings, tmp_path, lora):
    """In the middle of an epoch and after it; dropout draws from the random state."""
    if lora:
        pytest.importorskip("peft")
    settings["student"] = write_model(tmp_path / "dropout", 0, attention_dropout=0.1)
    settings |= dict(
        batch_size=4, gradient_accumulation_steps=2, max_steps=7, save_steps=2, lora_r=lora,
        lora_dropout=0.1 if lora else 0, eval_fraction=0.1, eval_steps=3, logging_steps=3,
    )  # fmt: skip
    assert run(**settings) == 0
    torch.manual_seed(123)
    other = settings | dict(output=tmp_path / "other")
    other |= dict(resume_from_checkpoint=tmp_path / "out" / "checkpoint-4")
    assert run(**other) == 0
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    first, second = (load_file(tmp_path / out / name) for out in ("out", "other"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert [r for r in curve(tmp_path / "out") if r["step"] > 4] == [
        r for r in curve(tmp_path / "other") if r["step"] > 4
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(learning_rate=1e-3), "learning_rate was 0.01, is 0.001"),
        (dict(temperature=3.0), "temperature was 2.0, is 3.0"),
        (dict(batch_size=3), "per_device_train_batch_size was 2, is 3"),
        (dict(lora_r=2), "lora_r was 0, is 2"),
        (dict(divergence="jsd"), "divergence was forward_kl, is jsd"),
    ],
)
def test_another_loss_does_not_go_on(settings, capsys, change, words):
    if "lora_r" in change:
        pytest.importorskip("peft")
    settings |= dict(save_steps=2, max_steps=2)
    assert run(**settings) == 0
    assert run("--resume", **settings | change) == 2
    assert words in said(capsys)


def test_other_data_do_not_go_on(settings, tmp_path, capsys):
    settings |= dict(save_steps=2, max_steps=2)
    assert run(**settings) == 0
    write_rows(Path(settings["data"]), rows(24, seed=1))
    assert run("--resume", **settings) == 2
    assert "the data" in said(capsys)


def test_more_steps_go_on_and_say_so(settings, tmp_path, capsys):
    settings |= dict(save_steps=2, max_steps=4)
    assert run(**settings) == 0
    with open(tmp_path / "out" / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # torn
    assert run("--resume", **settings | dict(max_steps=6)) == 0
    assert "max_steps was 4, is 6" in capsys.readouterr().out
    assert [row["step"] for row in log(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_takes_no_step_more(settings, tmp_path, capsys):
    settings |= dict(save_steps=2, scheduler="constant", warmup_ratio=0)
    assert run(**settings) == 0
    done = load_file(tmp_path / "out" / "model.safetensors")
    assert run("--resume", **settings) == 0
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(done[k], again[k]) for k in done)
    assert [row["step"] for row in log(tmp_path / "out")] == [1, 2, 3, 4]
    assert run("--resume", **settings | dict(max_steps=2)) == 2
    assert "the checkpoint is of step 4, and 2 are all" in said(capsys)
    assert json.loads((tmp_path / "out" / "fastkd.json").read_text())["finished"]


def test_a_checkpoint_from_elsewhere_starts_a_run_of_its_own(settings, tmp_path, capsys):
    settings |= dict(save_steps=2)
    assert run(**settings) == 0
    other = settings | dict(output=tmp_path / "other")
    assert run(**other | dict(max_steps=6)) == 0
    other["resume_from_checkpoint"] = tmp_path / "out" / "checkpoint-2"
    assert run(**other) == 2
    assert "holds an earlier run" in said(capsys)
    assert run("--overwrite", **other) == 0
    checkpoints = sorted(path.name for path in (tmp_path / "other").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-4"]  # none of the six steps before
    assert difference(tmp_path / "out", tmp_path / "other") == 0


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_what_a_run_reads_is_not_replaced(settings, tmp_path, capsys, side):
    assert run("--overwrite", **settings | dict(output=settings[side])) == 2
    assert f"holds {settings[side]}: name another folder" in said(capsys)


def test_nothing_is_replaced_before_the_training_begins(settings, tmp_path, capsys):
    assert run(**settings) == 0
    before = weights(tmp_path / "out")
    galore = dict(optim="galore_adamw", optim_target_modules="all-linear", optimizer=None)
    galore = {k: x for k, x in (settings | galore).items() if x is not None}
    assert run("--overwrite", **galore) == 2
    assert "galore_torch" in said(capsys)
    assert all(torch.equal(x, before[k]) for k, x in weights(tmp_path / "out").items())


def test_the_best_model_is_kept_and_only_own_checkpoints_are_dropped(settings, tmp_path):
    """The best one is of step 1, whose learning rate is 0, and no multiple of `save_steps`."""
    out = tmp_path / "out"
    (out / "checkpoint-2-best").mkdir(parents=True)
    settings |= dict(
        eval_fraction=0.2, eval_steps=1, save_steps=2, save_total_limit=1, learning_rate=1.0,
        load_best_model_at_end=True, metric_for_best_model="perplexity",
    )  # fmt: skip
    assert run(**settings) == 0
    assert difference(settings["student"], out) == 0
    assert (out / "checkpoint-2-best").exists() and (out / "checkpoint-1").exists()
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(out / "checkpoint-1")
    assert run("--resume", **settings) == 0
    assert difference(settings["student"], out) == 0


def test_sequences_are_as_long_as_the_models_allow(settings, tmp_path, capsys):
    student = write_model(tmp_path / "gpt", 2, GPT2Config, max_position_embeddings=16)
    settings = {k: x for k, x in settings.items() if k != "max_length"} | dict(student=student)
    assert run(**settings) == 0
    assert "sequences are cut to 16 tokens" in capsys.readouterr().out
    assert run("--overwrite", **settings | dict(max_length=17)) == 2
    assert "16 positions" in said(capsys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(report_to="nowhere"), "--report_to: nowhere is not supported"),
        (dict(seed=-1), "seed must be in [0, 2^32), got -1"),
        (dict(epochs="inf", max_steps=-1), "nothing to train"),
        (dict(save_minutes="nan"), "save_minutes must not be negative, got nan"),
        (dict(logging_steps=-1), "logging_steps must not be negative"),
        (dict(mlm_probability=2), "mlm_probability must be in (0, 1)"),
        (dict(eval_fraction=0.2, metric_for_best_model="bleu"), "metric_for_best_model is bleu"),
        (dict(save_strategy="best"), "save_strategy best needs held-out data"),
        (dict(fsdp="full_shard"), "fsdp"),
        (dict(output="x" * 300), "File name too long"),
    ],
)
def test_what_cannot_be_is_refused_before_the_training(settings, tmp_path, capsys, change, words):
    settings = {k: x for k, x in settings.items() if k != "save_steps"} | change
    assert run(**settings) == 2
    assert words in said(capsys)


def command(settings):
    return [sys.executable, "-m", "fastkd", "distill", *flags(settings)]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def test_killed_at_any_moment_and_gone_on_with(settings, tmp_path):
    """A real run, killed without warning until it gets through: its curve and weights are those of
    one that was left alone."""
    settings |= dict(save_steps=2, max_steps=24, save_total_limit=2)
    assert run(**settings | dict(output=tmp_path / "alone")) == 0
    moments, kills = random.Random(0), 0
    for attempt in range(6):
        process = subprocess.Popen(
            [*command(settings), "--resume"], env=environment(), cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        if attempt < 3:
            before = time.monotonic()
            wait = 3 + attempt + 2 * moments.random()  # beyond the imports
            while process.poll() is None and time.monotonic() - before < 60:
                started = (tmp_path / "out" / "log.jsonl").exists()
                if started and time.monotonic() - before > wait:
                    process.kill()
                    kills += 1
                    break
                time.sleep(0.01)
        _, error = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error.decode()[-2000:]
    assert process.returncode == 0 and kills
    assert difference(tmp_path / "alone", tmp_path / "out") == 0
    assert curve(tmp_path / "alone") == curve(tmp_path / "out")


def test_ctrl_c_saves_and_says_how_to_go_on(settings, tmp_path):
    settings |= dict(max_steps=100_000, save_steps=50_000)
    process = subprocess.Popen(
        command(settings), env=environment(), cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while process.poll() is None and not (tmp_path / "out" / "log.jsonl").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error[-2000:]
    assert "Traceback" not in error and "--resume goes on" in out
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert run("--resume", **settings | dict(max_steps=step + 1)) == 0
    assert log(tmp_path / "out")[-1]["step"] == step + 1


def test_nothing_that_is_not_finite_is_saved(settings, tmp_path, capsys):
    settings |= dict(
        max_steps=12, save_steps=3, save_total_limit=1, logging_steps=100, learning_rate=1e30,
        optimizer="SGD", max_grad_norm=0, scheduler="constant", warmup_ratio=0,
    )  # fmt: skip
    assert run(**settings) == 1
    assert "no longer finite since step" in said(capsys)
    assert (
        not list((tmp_path / "out").glob("checkpoint-*"))
        and not (tmp_path / "out" / "model.safetensors").exists()
    )


def test_the_last_finite_checkpoint_stays(settings, tmp_path, capsys, monkeypatch):
    from fastkd.training.trainer import FolderTrainer

    step = FolderTrainer.training_step

    def poisoned(self, model, *args):
        loss = step(self, model, *args)
        if self.state.global_step == 4:
            next(model.parameters()).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(FolderTrainer, "training_step", poisoned)
    settings |= dict(max_steps=8, save_steps=2, save_total_limit=1, max_grad_norm=0)
    assert run(**settings) == 1
    words = said(capsys)
    assert "checkpoint-4" in words and "since step 6" in words
    assert all(x.isfinite().all() for x in weights(tmp_path / "out" / "checkpoint-4").values())


def test_checkpoints_of_adapters_are_adapters(settings, tmp_path):
    peft = pytest.importorskip("peft")
    assert run(**settings | dict(lora_r=2, save_steps=4)) == 0
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-4"):
        model = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
        base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
        expected = weights(settings["student"])["model.layers.0.self_attn.q_proj.weight"]
        assert torch.equal(base, expected)
        assert any(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_early_stopping(settings, tmp_path):
    settings |= dict(
        eval_fraction=0.2, eval_steps=1, max_steps=50, early_stopping_patience=2,
        learning_rate=5.0, scheduler="constant",
    )  # fmt: skip
    assert run(**settings) == 0
    losses = [row["eval_loss"] for row in log(tmp_path / "out") if "eval_loss" in row]
    assert len(losses) < 50 and min(losses[-2:]) >= min(losses)


def launched(settings, tmp_path, launcher):
    done = subprocess.run(
        [*map(str, launcher), *flags(settings)], env=environment(), cwd=tmp_path,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_make_the_steps_of_one(settings, tmp_path, fsdp):
    settings |= dict(
        optimizer="SGD", learning_rate=0.5, gradient_accumulation_steps=2, eval_fraction=0.25,
        save_steps=2,
    )  # fmt: skip
    assert run(**settings | dict(batch_size=4)) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launcher += ["-m", "fastkd", "distill"]
    if fsdp:
        accelerate = dict(
            compute_environment="LOCAL_MACHINE", distributed_type="FSDP", num_processes=2,
            num_machines=1, machine_rank=0, use_cpu=True, main_process_port=0,
            fsdp_config=dict(
                fsdp_version=2, fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP",
                fsdp_transformer_layer_cls_to_wrap="LlamaDecoderLayer",
                fsdp_state_dict_type="FULL_STATE_DICT", fsdp_reshard_after_forward=True,
            ),
        )  # fmt: skip
        config = tmp_path / "accelerate.yaml"
        config.write_text(yaml.safe_dump(accelerate))
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        launcher += [Path(__file__).parent / "sharded.py"]
    printed = launched(settings | dict(output=tmp_path / "two"), tmp_path, launcher)
    assert printed.count("The model is in") == 1
    assert printed.count("sharded: [True, True]") == (6 if fsdp else 0)  # two checkpoints, the end
    assert difference(tmp_path / "out", tmp_path / "two") < 1e-6
    for row, other in zip(curve(tmp_path / "out"), curve(tmp_path / "two"), strict=True):
        assert row.keys() == other.keys()
        for name in row:
            assert row[name] == pytest.approx(other[name], rel=1e-4), name
    assert json.loads((tmp_path / "two" / "fastkd.json").read_text())["finished"]


def test_checkpoints_by_the_clock(settings, tmp_path):
    settings |= dict(save_minutes=1e-6, save_steps=100, save_total_limit=2)
    assert run(**settings) == 0
    found = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert found == {"checkpoint-3", "checkpoint-4"}
