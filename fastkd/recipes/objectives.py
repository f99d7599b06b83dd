"""What is learnt of what student and teacher say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastkd.divergences import Divergence
from fastkd.loss import KDLoss
from fastkd.recipes.recipe import Batch, Learnt, Outputs
from fastkd.sources import Source

IGNORED = -100
MEASURES = {  # what a log calls the parts of the loss
    "kd": "divergence",
    "ce": "cross_entropy",
    "teacher_entropy": "teacher_entropy",
    "student_entropy": "student_entropy",
    "top1_agreement": "top1_agreement",
    "teacher_mass": "teacher_mass",
}
Scheduled = float | Callable[[float], float]


class Distil:
    """`kd_loss` as an objective: the student's logits under the teacher's, and the labels.

    `temperature`, `alpha` and `divergence` may be schedules: functions of the progress in [0, 1],
    as `schedules.Linear(4, 1)`. Without a teacher alpha is 0.

    Args:
        shift: True: position i predicts label i + 1, as in causal language models; False: label i,
            as in encoder-decoders and masked language models.
        divergence, temperature, alpha: `kd_loss`'s, or functions from the progress to one.
        **settings: the other keywords of `KDLoss`.

    Raises:
        TypeError, ValueError: settings that `kd_loss` would refuse, as they are at the start.

    Where both models' logits are made by their heads, only the positions that count go through
    them: of instruction data often less than half.
    """

    hidden_states = False

    def __init__(
        self,
        shift: bool = True,
        *,
        divergence: str | Divergence | Callable[[float], Divergence] = "forward_kl",
        temperature: Scheduled = 1.0,
        alpha: Scheduled = 1.0,
        **settings: Any,
    ):
        refused = {"reduction", "return_parts"} & set(settings)
        if refused:
            raise TypeError(f"{', '.join(sorted(refused))} cannot be set: an objective sums")
        self.shift = shift
        self.scheduled = {"divergence": divergence, "temperature": temperature, "alpha": alpha}
        self.settings = {"inplace": True} | settings
        self.at(0.0)

    def at(self, progress: float) -> KDLoss:
        """The loss at a progress in [0, 1]."""
        now = {k: x(progress) if _is_schedule(x) else x for k, x in self.scheduled.items()}
        return KDLoss(**now, **self.settings, return_parts=True)

    def targets(self, batch: Batch) -> Tensor:
        """(N, length) labels of what the logits predict, -100 where nothing is."""
        return targets(batch, self.shift, self.settings.get("ignore_index", IGNORED))

    def counts(self, batch: Batch) -> Tensor:
        return (self.targets(batch) != IGNORED).sum()[None]

    def __call__(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        num_items: Tensor,
        progress: float = 0.0,
    ) -> Learnt:
        labels = self.targets(batch)
        s, t = student.logits, None if teacher is None else teacher.logits
        counted = teacher is not None and teacher.counted
        if counted or all(x is None or isinstance(x, Source) for x in (s, t)):
            counts = labels != IGNORED
            s, labels = rows_of(s, counts), labels[counts]
            t = t if counted or t is None else rows_of(t, counts)
        loss = self.at(progress)
        if t is None:
            loss.settings |= {"alpha": 0.0}
        loss.settings["ignore_index"] = IGNORED
        parts = loss(s, t, labels, num_items=num_items[0])
        found = {name: getattr(parts, field) for name, field in MEASURES.items()}
        measures = {name: x.detach() for name, x in found.items() if x is not None}
        total = parts.loss
        if student.auxiliary is not None:
            # Its share of the step, as every other part's.
            share = self.counts(batch)[0] / num_items[0].clamp(min=1)
            added = student.auxiliary * share
            total, measures["auxiliary"] = total + added, added.detach()
        return Learnt(total, measures)


def targets(batch: Batch, shift: bool, ignore_index: int = IGNORED) -> Tensor:
    """The labels of a batch, (N, length), each at the position whose logits predict it; -100 where
    nothing is to be learnt."""
    labels = batch["labels"]
    if ignore_index != IGNORED:
        labels = labels.masked_fill(labels == ignore_index, IGNORED)
    if not shift:
        return labels
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED)


def rows_of(source: Tensor | Source, counts: Tensor) -> Tensor | Source:
    """The positions of a source where `counts`, of its leading shape, is True: (n,) of them."""
    if isinstance(source, Tensor):
        return source[counts]
    leading = source.leading
    chosen = {}
    for field in fields(source):
        x = getattr(source, field.name)
        if isinstance(x, tuple) and x and all(isinstance(member, Source) for member in x):
            chosen[field.name] = tuple(rows_of(member, counts) for member in x)
        elif isinstance(x, Tensor) and field.name not in source.parameters:
            if x.shape[: len(leading)] == leading:
                chosen[field.name] = x[counts]
    return replace(source, **chosen)


def _is_schedule(x: Any) -> bool:
    return callable(x) and not isinstance(x, Divergence)
