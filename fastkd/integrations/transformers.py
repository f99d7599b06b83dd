"""Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.recipes.lm import find_head, logits_of
from fastkd.sources import LMHead


def sources(
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Mapping[str, Any],
    *,
    teacher_batch: Mapping[str, Any] | None = None,
    logits: str = "auto",
) -> tuple[Tensor | LMHead, Tensor | LMHead | None]:
    """What two causal LMs say of a batch, as the first two arguments of `kd_loss`.

        student_source, teacher_source = sources(student, teacher, batch)
        loss = kd_loss(student_source, teacher_source, batch["labels"], shift=True)

    The forward pass is that of the models as they are given: wrap them as you like
    (DistributedDataParallel, FSDP, peft, torch.compile, a module of your own that passes keyword
    arguments on), and call this in place of the wrapper. A cache is never made: with one, the
    position ids of packed documents would be ignored. Modes are not changed: call
    `teacher.eval()`, or its dropout stays on.

    Args:
        student: differentiated where gradients are enabled.
        teacher: run under `no_grad`; None: no teacher, and None in its place.
        batch: the keyword arguments of both models. `labels` are left out, or the models would
            compute a loss of their own.
        teacher_batch: the teacher's, where it reads something else.
        logits: "auto": an `LMHead`, where a model's head alone makes its logits (with a bias, a
            softcap, a scale, tied weights), so that they are never all in memory; else the model's
            own. "whole": always the model's own.

    Returns:
        The two sources. The student's takes its gradient to every parameter, the head's too, and
        through the reducer of the wrapper: processes end with the same gradients.

    Raises:
        ValueError: `logits` is neither "auto" nor "whole".

    Cost: whether the head makes the logits is found with two forward passes of 8 tokens, the first
    time that a model is seen (`fastkd.recipes.lm.find_head`), and remembered until its head
    changes; that a wrapper returns these logits as they are, with one more. Whole logits come of an
    adapter or a hook on the head, of a quantised, offloaded or sharded head (FSDP), and of compiled
    models.
    """
    if logits not in ("auto", "whole"):
        raise ValueError(f"logits must be 'auto' or 'whole', got {logits!r}")

    def source(model, batch):
        return logits_of(model, find_head(model) if logits == "auto" else None, batch)

    student_source = source(student, batch)
    if teacher is None:
        return student_source, None
    with torch.no_grad():
        return student_source, source(teacher, batch if teacher_batch is None else teacher_batch)


def __getattr__(name: str) -> Any:
    """The trainer, when it is asked for: `sources` needs none of what it imports."""
    if name in ("DistillationMixin", "DistillationTrainer"):
        from fastkd.integrations import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
