"""All that `fastkd distill` can be told: fields here are its flags and the keys of `--config`."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fastkd import divergences
from fastkd.divergences import Divergence
from fastkd.training.errors import InputError


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _list_flag(text: str) -> Any:
    return field(default_factory=list, metadata={"help": text})


@dataclass
class DistillConfig:
    """The settings of one run. `fastkd distill --help` prints them."""

    student: str | None = _flag(None, "Model to train: a folder or a hub name.")
    teacher: str | None = _flag(
        None, "Model to learn from, with the student's tokenizer. Optional when alpha is 0."
    )
    data: str | None = _flag(
        None,
        "JSONL, JSON, parquet, CSV or text file, a folder of these, or a hub dataset. Columns:"
        " text | prompt + completion (or response) | messages |"
        " instruction (+ input) + output | input_ids (+ labels).",
    )
    output: str | None = _flag(None, "Folder for the model, the log and the checkpoints.")
    overwrite: bool = _flag(
        False, "Write into an output folder that already holds a finished model."
    )
    eval_data: str | None = _flag(None, "Held-out data, in any of the formats of --data.")
    eval_fraction: float = _flag(
        0.02, "Part of --data held out when there is no --eval_data; 0: no evaluation."
    )
    data_split: str = _flag("train", "Split of a hub dataset.")
    data_name: str | None = _flag(None, "Configuration of a hub dataset.")
    max_length: int = _flag(1024, "Tokens per sequence; longer ones are cut.")
    packing: bool = _flag(True, "Pack the documents of `text` data into sequences of max_length.")

    divergence: str = _flag("forward_kl", "One of: " + ", ".join(sorted(divergences.known())) + ".")
    divergence_args: list[str] = _list_flag(
        "The divergence's numbers, as in: --divergence_args teacher_weight=0.3"
    )
    temperature: float = _flag(
        1.0, "Divides both sides' logits in the divergence (not in the cross-entropy)."
    )
    alpha: float = _flag(1.0, "loss = alpha * T^2 * divergence + (1 - alpha) * cross-entropy.")

    max_steps: int | None = _flag(None, "Optimizer steps; default: what the epochs come to.")
    epochs: float = _flag(1.0, "Passes over the data, unless max_steps is given.")
    batch_size: int = _flag(4, "Sequences per device and micro-batch.")
    gradient_accumulation_steps: int = _flag(
        1, "Micro-batches per optimizer step, weighted by their target tokens."
    )
    learning_rate: float = _flag(1e-4, "Peak learning rate.")
    optimizer: str = _flag("AdamW", "Name of a torch.optim class, or Adafactor (transformers').")
    optimizer_args: list[str] = _list_flag(
        "The optimizer's other arguments, as in: --optimizer_args betas=[0.9,0.95]"
    )
    weight_decay: float = _flag(0.0, "Weight decay of matrices; norms and biases have none.")
    scheduler: str = _flag(
        "cosine", "Learning-rate schedule by transformers' name: linear, cosine, constant, …"
    )
    scheduler_args: list[str] = _list_flag(
        "The schedule's other arguments, as in: --scheduler_args num_cycles=2"
    )
    warmup_ratio: float = _flag(0.03, "Part of the steps in which the learning rate rises.")
    max_grad_norm: float = _flag(1.0, "Gradients are scaled down to this norm; 0: never.")
    mixed_precision: Literal["no", "bf16", "fp16"] = _flag(
        "no", "Autocast of both models' forward passes."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag(
        "auto", "Type of the teacher's weights."
    )
    student_dtype: Literal["auto", "float32", "bfloat16"] = _flag(
        "float32", "Type of the student's weights."
    )
    gradient_checkpointing: bool = _flag(
        False, "Recompute the student's activations: less memory, more time."
    )
    logits: Literal["auto", "whole"] = _flag(
        "auto",
        "auto: under a teacher, made from hidden states a chunk of tokens at a time, where the"
        " model's head allows; whole: as one tensor.",
    )
    attn_implementation: str | None = _flag(
        None, "transformers' name: sdpa, eager, flash_attention_2, …"
    )
    lora_r: int = _flag(
        0, "Train rank-r adapters on the student's linear layers only (needs peft); 0: all weights."
    )
    trust_remote_code: bool = _flag(False, "Run model code that comes with the models.")
    seed: int = _flag(0, "Seeds the order of the data and dropout.")

    logging_steps: int = _flag(10, "Steps between lines of the log.")
    eval_steps: int = _flag(500, "Steps between evaluations; 0: only at the end.")
    save_steps: int = _flag(500, "Steps between checkpoints; 0: none.")
    save_total_limit: int | None = _flag(None, "Keep only this many checkpoints, the newest.")
    resume_from_checkpoint: str | None = _flag(
        None, "A checkpoint folder, or `last` for the newest one in --output."
    )

    def build_divergence(self) -> Divergence:
        """The divergence with its numbers.

        Raises:
            InputError: unknown name, or numbers it does not take.
        """
        known = divergences.known()
        if self.divergence not in known:
            raise InputError(
                f"unknown divergence {self.divergence!r}; known: {', '.join(sorted(known))}"
            )
        numbers = parse_pairs(self.divergence_args, "divergence_args")
        fields = [f.name for f in dataclasses.fields(known[self.divergence])]
        unknown = sorted(set(numbers) - set(fields))
        if unknown:
            takes = ", ".join(fields) or "no numbers"
            raise InputError(
                f"{self.divergence} has no {', '.join(unknown)} (divergence_args); it takes {takes}"
            )
        try:
            return known[self.divergence](**numbers)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{self.divergence} with divergence_args {numbers}: {error}"
            ) from error

    def check(self) -> None:
        """Raise `InputError` for whatever can be seen to be wrong without opening a file."""
        for name in ("student", "data", "output"):
            if not getattr(self, name):
                raise InputError(f"--{name} is missing")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha must be in [0, 1], got {self.alpha}")
        if self.teacher is None and self.alpha > 0:
            raise InputError(
                f"--teacher is missing; only alpha 0 needs none, and alpha is {self.alpha}"
            )
        for name in (
            "temperature",
            "max_length",
            "batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
        ):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        for name in (
            "learning_rate",
            "eval_steps",
            "save_steps",
            "max_grad_norm",
            "lora_r",
            "weight_decay",
        ):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("eval_fraction", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if (self.max_steps if self.max_steps is not None else self.epochs) <= 0:
            raise InputError(
                f"nothing to train: max_steps is {self.max_steps}, epochs is {self.epochs}"
            )
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise InputError(f"save_total_limit must be at least 1, got {self.save_total_limit}")
        self.build_divergence()

    def save(self, path: Path) -> None:
        """Write the settings as YAML that `--config` reads."""
        path.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False), encoding="utf-8")


def parse_pairs(pairs: list[str], name: str) -> dict[str, Any]:
    """["a=0.3", "b=[1, 2]"] as {"a": 0.3, "b": [1, 2]}; the values are YAML.

    Raises:
        InputError: an entry that is not `name=value`.
    """
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise InputError(f"{name} takes name=value, got {pair!r}")
        value = yaml.safe_load(value)
        with contextlib.suppress(ValueError):  # YAML wants a dot in 1.0e-4; people do not
            value = float(value) if isinstance(value, str) else value
        values[key] = value
    return values


def flags_from_yaml(path: str) -> list[str]:
    """A YAML mapping as the command line that means the same, so that real flags can come after it.

    Raises:
        InputError: no such file, not a mapping, or keys that are no settings.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(
            f"--config {path} must hold `name: value` lines, got {type(settings).__name__}"
        )
    settings = {str(key).replace("-", "_"): value for key, value in settings.items()}
    known = [f.name for f in dataclasses.fields(DistillConfig)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise InputError(
            f"--config {path} has unknown keys: {', '.join(unknown)}; known: {', '.join(known)}"
        )
    flags = []
    for key, value in settings.items():
        if isinstance(value, dict):
            value = [f"{k}={v}" for k, v in value.items()]
        if value is None or value == []:
            continue
        # `--key=value` keeps negative numbers from looking like flags; lists have no such form.
        flags += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return flags
