"""From flags and a `--config` file to the settings of a run.

The settings are those of settings.py and all of transformers' `TrainingArguments`, under their own
names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
from argparse import Action
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from fastkd.training.errors import InputError, one_line
from fastkd.training.settings import (
    DEFAULTS,
    GROUPS,
    SHORT,
    DataSettings,
    LossSettings,
    ModelSettings,
    RunSettings,
)

# Of `TrainingArguments`: what is this process's own, or a secret.
UNSAVED = ("local_rank", "hub_token", "do_train", "do_eval", "do_predict")
# Not in the file that a run leaves: who copies it would overwrite unasked.
OF_ONE_CALL = ("overwrite", "resume", "resume_from_checkpoint")
OPTIMIZERS = {"adamw": "adamw_torch"}
STRATEGIES = {"eval_steps": "eval_strategy", "save_steps": "save_strategy"}


class Config(NamedTuple):
    """The settings of one run.

    Attributes:
        given: name -> values, as flags and files said them.
    """

    models: ModelSettings
    data: DataSettings
    loss: LossSettings
    run: RunSettings
    training: TrainingArguments
    given: dict[str, list[str]]

    @property
    def ours(self) -> dict[str, Any]:
        """The settings of settings.py, by name."""
        parts = (self.models, self.data, self.loss, self.run)
        return {k: x for part in parts for k, x in dataclasses.asdict(part).items()}

    def as_dict(self) -> dict[str, Any]:
        """All settings by name, as plain values that a `--config` file may hold."""
        training = json.loads(self.training.to_json_string())
        known = {f.name for f in dataclasses.fields(TrainingArguments)} - set(UNSAVED)
        return self.ours | {k: x for k, x in training.items() if k in known}

    def save(self, path: Path) -> None:
        """Write what was given as a `--config` file, but what is said of one call alone."""
        settings = {
            name: [_plain(x) for x in values] if len(values) > 1 else _plain(*values or ["true"])
            for name, values in self.given.items()
            if name not in OF_ONE_CALL
        }
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        path.write_text(text, encoding="utf-8")


class Parser(HfArgumentParser):
    """One whose errors are `InputError`s."""

    def error(self, message: str):
        raise InputError(f"{message}; --help lists the settings")


def parse(argv: list[str]) -> Config:
    """The settings of `fastkd distill`: what flags name, over a `--config` file, over the defaults.

    A flag that takes several values takes them at once or one at a time; any other is given once.

    Raises:
        InputError: unknown flags or keys, one given twice, values that cannot be, a file that
            cannot be read.
    """
    # Where there is nothing but a CPU transformers refuses bf16, unless it is told.
    own = {} if torch.accelerator.is_available() else {"use_cpu": True}
    parts, given = read(argv, [*GROUPS, TrainingArguments], DEFAULTS | own)
    config = Config(*parts, given)
    trackers = [name for text in config.training.report_to for name in text.split(",")]
    config.training.report_to = trackers
    return config


def read(
    argv: list[str], kinds: list[type], defaults: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, list[str]]]:
    """The dataclasses that flags name, and what was given; see `parse`."""
    parser = Parser(kinds, prog="fastkd", allow_abbrev=False)
    # In reverse: of `packing` and `no_packing`, the first is meant.
    known = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    flags = _flags(argv, known)
    given = _file(flags.pop("config")[0], known) if "config" in flags else {}
    given |= flags
    settings = {name: _texts(value) for name, value in defaults.items()} | given
    _meanings(settings)
    tokens = []
    for name, values in settings.items():
        single = len(values) == 1
        tokens += [f"--{name}={values[0]}"] if single else [f"--{name}", *values]
    try:
        return parser.parse_args_into_dataclasses(tokens, look_for_args_file=False), given
    except (ValueError, TypeError, ImportError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(one_line(error)) from error


def _flags(argv: list[str], known: dict[str, Action]) -> dict[str, list[str]]:
    """Name -> values, of the tokens of a command line."""
    flags: dict[str, list[str]] = {}
    name = None
    for token in argv:
        if token.startswith("--") and len(token) > 2:
            flag, equals, value = token[2:].partition("=")
            name = _name(flag, known)
            if name.startswith("no_") and name not in known:
                name, equals, value = name[3:], "=", "false"
            if name in flags and not _takes_several(name, known):
                raise InputError(f"--{flag} is given twice")
            flags.setdefault(name, []).extend([value] if equals else [])
        elif name is None:
            raise InputError(f"expected a --setting, got {token!r}")
        else:
            flags[name].append(token)
    for name, values in flags.items():
        several = _takes_several(name, known)
        if len(values) > 1 and not several:
            raise InputError(f"--{name} takes one value, got {' '.join(values)}")
        if not values and not (name in known and known[name].nargs == "?"):
            raise InputError(f"--{name} needs a value")
    return flags


def _name(flag: str, known: dict[str, Action]) -> str:
    """The setting that a flag or key means."""
    name = flag.replace("-", "_")
    name = name if name in known else SHORT.get(name, name)
    positive = name.removeprefix("no_")
    if name in known or name in ("config", "mixed_precision"):
        return name
    if positive in known and known[positive].nargs == "?":
        return name
    close = difflib.get_close_matches(name, [*known, *SHORT], 1)
    hint = f"did you mean --{close[0]}?" if close else "--help lists the settings"
    raise InputError(f"unknown: --{flag}; {hint}")


def _takes_several(name: str, known: dict[str, Action]) -> bool:
    return name == "report_to" or (name in known and known[name].nargs in ("+", "*"))


def _file(path: str, known: dict[str, Action]) -> dict[str, list[str]]:
    """Name -> values, of a YAML file."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        settings, node = yaml.safe_load(text), yaml.compose(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path} cannot be read: {one_line(error)}") from error
    if not isinstance(settings, dict):
        kind = type(settings).__name__
        raise InputError(f"--config {path} must hold `name: value` lines, got {kind}")
    found = {}
    keys = [key.value for key, _ in node.value]
    for key, value in settings.items():
        if keys.count(str(key)) > 1:  # YAML would take the last
            raise InputError(f"--config {path}: {key} is given twice")
        try:
            name = _name(str(key), known)
        except InputError as error:
            raise InputError(
                f"--config {path}: {error}".replace("--" + str(key), str(key))
            ) from error
        if name == "config":
            raise InputError(f"--config {path}: a file of settings cannot name another")
        if name in found:
            raise InputError(f"--config {path}: {key} is given twice")
        if isinstance(value, dict) and name.endswith("_args"):
            value = [f"{k}={v}" for k, v in value.items()]
        if value is not None and value != []:
            found[name] = _texts(value)
    return found


def _plain(text: str) -> Any:
    """A flag's text as a value of YAML: a number, where it is read back as this text."""
    with contextlib.suppress(yaml.YAMLError):
        value = yaml.safe_load(text)
        if _texts(value) == [text]:
            return value
    return text  # of "{input}" YAML would make a mapping


def _texts(value: Any) -> list[str]:
    """As the values of a flag."""
    if isinstance(value, list | tuple):
        return [text for x in value for text in _texts(x)]
    if isinstance(value, bool | dict):
        return [json.dumps(value)]
    return [str(value)]


def _meanings(settings: dict[str, list[str]]) -> None:
    """What our own words come to in those of `TrainingArguments`."""
    (precision,) = settings.pop("mixed_precision", ["no"])
    if precision not in ("no", "bf16", "fp16"):
        raise InputError(f"mixed_precision must be no, bf16 or fp16, got {precision}")
    if precision != "no":
        settings[precision] = ["true"]
    if settings.get("optim"):
        word = settings["optim"][0].lower()
        settings["optim"] = [OPTIMIZERS.get(word, word)]
    if "report_to" in settings:
        settings["report_to"] = [",".join(settings["report_to"])]
    for steps, strategy in STRATEGIES.items():
        with contextlib.suppress(ValueError, KeyError, IndexError):
            if float(settings[steps][0]) == 0:
                settings[strategy] = ["no"]
                settings.pop(steps)
