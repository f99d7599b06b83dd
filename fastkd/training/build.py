"""From settings to what is learnt."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

from torch import nn

from fastkd import divergences
from fastkd.divergences import Divergence
from fastkd.recipes import Distil, Hidden, Linear, Objective, Plus, shifts_labels
from fastkd.training.errors import InputError
from fastkd.training.settings import LossSettings, ModelSettings

LINE = re.compile(r"(.+?)\.\.(.+)")  # 4..1: from 4 at the start to 1 at the end


def make_objective(
    loss: LossSettings, vocab: str | int, student: nn.Module, teachers: list[nn.Module]
) -> Objective:
    """What is learnt.

    Raises:
        InputError: words and numbers that cannot be.
    """
    objective = _distil(loss, vocab, shifts_labels(student))
    if loss.hidden_loss is None:
        return objective
    hidden = Hidden.between(student, teachers[0], loss.hidden_loss)
    return Plus(objective, hidden, loss.hidden_weight)


def _distil(loss: LossSettings, vocab: str | int, shift: bool) -> Distil:
    try:
        objective = Distil(
            shift,
            divergence=make_divergence(loss),
            temperature=make_number("temperature", loss.temperature),
            alpha=make_number("alpha", loss.alpha),
            vocab=vocab,
        )
        for end in (0.0, 1.0):
            objective.at(end)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from error
    return objective


def make_number(name: str, text: str) -> float | Linear:
    """0.5, or a line 0.1..0.9 over the training."""
    found = LINE.fullmatch(str(text))
    try:
        numbers = [float(x) for x in (found.groups() if found else (text,))]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"{name} must be a number, or a line as 4..1, got {text!r}")
    return Linear(*numbers) if found else numbers[0]


def make_divergence(loss: LossSettings) -> Divergence | Callable[[float], Divergence]:
    """The divergence, or the sum of several, with its numbers; a function of the progress where one
    of them is a line.

    Raises:
        InputError: an unknown name, or numbers that it does not take.
    """
    known, parts = divergences.known(), []
    for text in loss.divergence.split("+"):
        weight, star, name = text.strip().rpartition("*")
        name = name.strip()
        if name not in known:
            raise InputError(f"unknown divergence {name!r}; known: {', '.join(sorted(known))}")
        parts.append((float(make_number("a weight", weight)) if star else 1.0, known[name]))
    numbers = {}
    for pair in loss.divergence_args:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise InputError(f"divergence_args takes name=number, got {pair!r}")
        numbers[name] = make_number(name, value)
    taken = {f.name for _, kind in parts for f in dataclasses.fields(kind)}
    unknown = sorted(set(numbers) - taken)
    if unknown:
        takes = ", ".join(sorted(taken)) or "no numbers"
        raise InputError(f"{loss.divergence} has no {', '.join(unknown)}; it takes {takes}")

    def at(progress: float) -> Divergence:
        total = None
        for weight, kind in parts:
            mine = {f.name: numbers[f.name] for f in dataclasses.fields(kind) if f.name in numbers}
            mine = {k: x(progress) if callable(x) else x for k, x in mine.items()}
            needed = [
                f.name
                for f in dataclasses.fields(kind)
                if f.default is dataclasses.MISSING and f.name not in mine
            ]
            if needed:
                raise InputError(
                    f"{kind.name} needs its numbers, as in: --divergence_args {needed[0]}="
                    + ("0.1..0.9" if kind.name == "taid" else "0.5")
                )
            part = kind(**mine)
            part = part if len(parts) == 1 and weight == 1 else weight * part
            total = part if total is None else total + part
        return total

    try:
        for end in (0.0, 1.0):
            at(end)
    except (TypeError, ValueError) as error:
        raise (
            error
            if isinstance(error, InputError)
            else InputError(
                f"{loss.divergence} with divergence_args {loss.divergence_args}: {error}"
            )
        ) from error
    return at if any(callable(x) for x in numbers.values()) else at(0.0)


def check_settings(models: ModelSettings, loss: LossSettings) -> None:
    """Raise `InputError` for what can be seen to be wrong without opening a file."""
    _distil(loss, "strict", True)
    alpha = make_number("alpha", loss.alpha)
    ends = [alpha(0.0), alpha(1.0)] if callable(alpha) else [alpha]
    if not models.teacher and max(ends) > 0:
        raise InputError(
            f"--teacher is missing; only alpha 0 needs none, and alpha is {loss.alpha}"
        )
    if models.teacher_weight and len(models.teacher_weight) != len(models.teacher):
        raise InputError(
            f"{len(models.teacher)} teachers, but {len(models.teacher_weight)} weights"
        )
    if any(not (w > 0 and math.isfinite(w)) for w in models.teacher_weight):
        raise InputError(f"teacher_weight must be positive, got {models.teacher_weight}")
    for name in ("on_policy", "hidden_weight", "finetune_epochs", "on_policy_temperature"):
        if not getattr(loss, name) >= 0:
            raise InputError(f"{name} must not be negative, got {getattr(loss, name)}")
    if loss.on_policy > 1:
        raise InputError(f"on_policy is a part of the batches, in [0, 1], got {loss.on_policy}")
    if loss.on_policy_max_new_tokens < 1:
        raise InputError(
            f"on_policy_max_new_tokens must be positive, got {loss.on_policy_max_new_tokens}"
        )
    if loss.hidden_loss and not models.teacher:
        raise InputError("--hidden_loss needs a --teacher")
    if loss.hidden_loss and len(models.teacher) > 1:
        raise InputError(
            "--hidden_loss needs a single teacher: of several, whose states are meant?"
        )
