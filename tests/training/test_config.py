"""Flags and files as settings."""

import dataclasses
import os
import subprocess
import sys

import pytest
from transformers import TrainingArguments

from fastkd.cli import help_of, main
from fastkd.training.build import check_settings, make_divergence, make_number
from fastkd.training.config import parse
from fastkd.training.errors import InputError
from fastkd.training.settings import DEFAULTS, GROUPS, SHORT, TRAINING, LossSettings, ModelSettings

NEEDED = ["--student", "s", "--teacher", "t", "--data", "d", "--output", "o"]


def settings(*flags):
    return parse([*NEEDED, *flags]).as_dict()


def test_short_names_and_transformers_names_are_one():
    short = settings(
        "--batch_size", "2", "--epochs=3", "--optimizer", "SGD", "--scheduler=linear", "--lr=0.1"
    )  # fmt: skip
    long = settings(
        "--per-device-train-batch-size", "2", "--num_train_epochs", "3", "--optim", "sgd",
        "--lr_scheduler_type", "linear", "--learning_rate", "0.1",
    )  # fmt: skip
    assert short == long and short["per_device_train_batch_size"] == 2


def test_zero_steps_are_none():
    found = settings("--save_steps", "0", "--eval_steps", "0")
    assert found["save_strategy"] == "no" and found["eval_strategy"] == "no"


def test_several_values_come_at_once_or_one_at_a_time():
    for flags in (["--data", "b", "c"], ["--data", "b", "--data=c"]):
        assert settings(*flags)["data"] == ["d", "b", "c"]
    assert settings("--report_to", "tensorboard,wandb")["report_to"] == ["tensorboard", "wandb"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--alpha", "1", "--alpha", "0"], "--alpha is given twice"),
        (["--batch_size=1", "--per_device_train_batch_size=2"], "given twice"),
        (["--alpha", "1", "0"], "--alpha takes one value, got 1 0"),
        (["--alpha"], "--alpha needs a value"),
        (["--max_step", "3"], "did you mean --max_steps"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--task", "poetry"], "invalid choice: 'poetry'"),
        (["--mixed_precision", "fp8"], "got fp8"),
        (["--optim", "sdg"], "sdg"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
    ],
)
def test_what_cannot_be_is_named(flags, words, capsys):
    assert main(["distill", *NEEDED, *flags]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("fastkd: error: ") and words in said


def test_a_file_of_settings(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "batch_size: 2\nlearning_rate: 1e-3\npacking: false\nteacher: [a, b]\n"
        "divergence: jsd\ndivergence_args:\n  teacher_weight: 0.3\nseed: null\n"
    )
    config = parse(["--config", str(file), "--learning_rate", "2e-3", "--output", "o"])
    assert config.training.learning_rate == 2e-3 and config.training.seed == DEFAULTS["seed"]
    assert config.training.per_device_train_batch_size == 2 and not config.data.packing
    assert config.models.teacher == ["a", "b"]
    assert make_divergence(config.loss).teacher_weight == 0.3
    again = tmp_path / "again.yaml"
    config.save(again)
    assert parse(["--config", str(again)]).as_dict() == config.as_dict()
    file.write_text("alpha: 1\nalpha: 0.5\n")
    with pytest.raises(InputError, match="c.yaml: alpha is given twice"):
        parse(["--config", str(file)])
    file.write_text("learnign_rate: 1")
    with pytest.raises(InputError, match="c.yaml: unknown: learnign_rate; did you mean"):
        parse(["--config", str(file)])
    file.write_text("epochs: 1\nnum_train_epochs: 2")
    with pytest.raises(InputError, match="given twice"):
        parse(["--config", str(file)])


@pytest.mark.parametrize(
    "text",
    ["{input}", "{prompt} {input}", "Q: {input}", "[x]", "007", "1_000", "null", "2020-01-01", "#"],
)
def test_texts_that_yaml_would_take_for_something_else(tmp_path, text):
    config = parse(["--teacher_prompt_template", text, "--data", text, "--output", text])
    file = tmp_path / "c.yaml"
    config.save(file)
    again = parse(["--config", str(file)])
    assert again.data.teacher_prompt_template == text and again.as_dict() == config.as_dict()


def test_a_saved_file_has_switches_and_does_not_overwrite(tmp_path):
    given = ["--load_in_4bit", "--no_packing", "--load_best_model_at_end", "--overwrite"]
    file = tmp_path / "c.yaml"
    parse([*given, "--resume"]).save(file)
    again = parse(["--config", str(file)])
    assert again.models.load_in_4bit and again.training.load_best_model_at_end
    assert not (again.data.packing or again.run.overwrite or again.run.resume)


def test_lines_over_the_training():
    line = make_number("temperature", "4..1")
    assert [line(x) for x in (0.0, 0.5, 1.0)] == [4, 2.5, 1]
    assert make_number("alpha", "1e-3") == 1e-3
    taid = make_divergence(LossSettings(divergence="taid", divergence_args=["t=0.1..0.9"]))
    assert [taid(x).t for x in (0.0, 0.5, 1.0)] == [0.1, 0.5, 0.9]
    both = make_divergence(LossSettings(divergence="0.5*forward_kl + 2*tvd"))
    assert [weight for weight, _ in both.parts] == [0.5, 2]


@pytest.mark.parametrize(
    ("loss", "models", "words"),
    [
        ({"temperature": "0"}, {}, "temperature must be positive"),
        ({"temperature": "1..0"}, {}, "temperature must be positive"),
        ({"alpha": "2"}, {}, "alpha must be in"),
        ({"alpha": "half"}, {}, "alpha must be a number"),
        ({"alpha": "0..0.5"}, {"teacher": []}, "--teacher is missing"),
        ({"divergence": "kld"}, {}, "unknown divergence 'kld'; known: .*forward_kl"),
        ({"divergence": "taid"}, {}, "taid needs its numbers"),
        ({"divergence": "jsd", "divergence_args": ["beta=1"]}, {}, "jsd has no beta; it takes"),
        ({"divergence": "jsd", "divergence_args": ["teacher_weight=7"]}, {}, "jsd with"),
        ({}, {"teacher": ["a", "b"], "teacher_weight": [1.0]}, "2 teachers, but 1 weights"),
        ({"on_policy": 1.5}, {}, "on_policy is a part"),
    ],
)
def test_settings_that_cannot_be(loss, models, words):
    with pytest.raises(InputError, match=words):
        check_settings(ModelSettings(**{"teacher": ["t"]} | models), LossSettings(**loss))


def test_help_is_grouped_has_one_spelling_a_flag_and_fits_a_terminal():
    text = help_of("distill")
    flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    ours = [f.name for group in GROUPS for f in dataclasses.fields(group)]
    shown = {flag.removeprefix("--").removeprefix("no_") for flag in flags}
    assert shown == {*ours, *TRAINING} and len(flags) == len(set(flags))
    assert max(map(len, text.splitlines())) < 90
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert {*TRAINING, *DEFAULTS, *SHORT.values()} <= known and not known & set(ours)


def test_help_imports_no_trainer():
    """It would take seconds."""
    code = (
        "import sys; from fastkd.cli import main; assert main(['distill', '--help']) == 0\n"
        "sys.exit(any(m in sys.modules for m in ('transformers', 'datasets', 'accelerate')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr("fastkd.cli.find_spec", lambda name: None if name == "datasets" else name)
    assert main(["distill", *NEEDED]) == 2
    assert "needs datasets: pip install 'fastkd[train]'" in capsys.readouterr().err
