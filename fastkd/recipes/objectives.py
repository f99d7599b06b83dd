"""What is learnt of what student and teacher say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.divergences import Divergence
from fastkd.loss import KDLoss
from fastkd.recipes.recipe import Batch, Learnt, Objective, Outputs
from fastkd.sources import Ensemble, Source
from fastkd.sources.dense import as_source

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
    as `schedules.Linear(4, 1)` or `schedules.taid(0.1, 0.9)`. Without a teacher alpha is 0. A
    student's auxiliary loss (the balance of a mixture of experts) is added, weighted as the
    micro-batch is in the step.

    Args:
        shift: True: position i predicts label i + 1, as in causal language models, unless its
            `attention_mask` is 0; False: label i, as in encoder-decoders and masked language models
            (`fastkd.recipes.shifts_labels`).
        divergence: `kd_loss`'s, or a function from the progress to one.
        temperature: the same; numbers may be 0-d tensors.
        alpha: the same.
        **settings: the other keywords of `KDLoss`. `inplace` is on unless it is set: whole logits
            of the student are overwritten by their gradient, but for those that the model's own
            backward pass reads again (it ends in a tanh, a softmax).

    Raises:
        TypeError, ValueError: settings that `kd_loss` would refuse, of a schedule at the start and
            the end; in a call, `kd_loss`'s own, and a teacher that answers for another number of
            positions.

    Where both models' logits are made by their heads, only the positions that count go through
    them: of instruction data often less than half. On a GPU that waits for the number of them,
    once per micro-batch.
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
        # And at the end; of a divergence that may have a state of its own only the beginning.
        KDLoss(temperature=value_at(temperature, 1.0), alpha=value_at(alpha, 1.0))

    def at(self, progress: float, **others: Any) -> KDLoss:
        """The loss at a progress in [0, 1]; `others` replace settings."""
        now = {name: value_at(x, progress) for name, x in self.scheduled.items()}
        return KDLoss(**(now | self.settings | others), return_parts=True)

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
        counts = labels != IGNORED
        s, t = student.logits, None if teacher is None else teacher.logits
        counted = teacher is not None and teacher.counted
        if counted:
            check_counted(t, counts)
        _check_positions(s, None if counted else t, labels)
        if counted or all(x is None or isinstance(x, Source) for x in (s, t)):
            kept = counts.nonzero(as_tuple=True)  # once: a GPU waits for it
            s, labels = rows_of(s, kept), labels[kept]
            t = t if counted or t is None else rows_of(t, kept)
        others = {"ignore_index": IGNORED} | ({"alpha": 0.0} if t is None else {})
        if isinstance(s, Tensor) and _is_read_again(s):
            others["inplace"] = False
        parts = self.at(progress, **others)(s, t, labels, num_items=num_items[0])
        found = {name: getattr(parts, field) for name, field in MEASURES.items()}
        measures = {name: x.detach() for name, x in found.items() if x is not None}
        total = parts.loss
        if student.auxiliary is not None:
            # Its share of the step, as every other part's.
            added = student.auxiliary * counts.sum() / num_items[0].clamp(min=1)
            total, measures["auxiliary"] = total + added, added.detach()
        return Learnt(total, measures)


class Plus(nn.Module):
    """Two objectives as one: loss = objective + weight · term. Three are two of them.

        Plus(Distil(shift=False), Hidden("cosine"), 0.1)

    Each is averaged over what it counts itself. Measures are those of both, without the weight; a
    name that both have gets a number: "kd", "kd_2". A student's auxiliary loss is added by the
    first that reads logits.

    Args:
        objective: its parameters, where it is a module, are this one's. Where both it and the term
            read logits (all but those that say `logits = False`), a `Distil` leaves them as they
            are.
        term: the same.
        weight: a number that is not negative, or a function from the progress to one.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    def __init__(self, objective: Objective, term: Objective, weight: Scheduled = 1.0):
        super().__init__()
        self.objective, self.term, self.weight = objective, term, weight
        self.hidden_states = objective.hidden_states or term.hidden_states
        reads = [getattr(x, "logits", True) for x in (objective, term)]
        self.logits = any(reads)
        if all(reads):
            keep_logits(self)  # the first must not overwrite what the second reads
        for progress in (0.0, 1.0):
            self._weight_at(progress)

    def _weight_at(self, progress: float) -> float | Tensor:
        weight = value_at(self.weight, progress)
        if not isinstance(weight, Tensor) and not 0 <= weight < float("inf"):
            raise ValueError(f"the weight of a term must be finite and not negative, got {weight}")
        return weight

    def counts(self, batch: Batch) -> Tensor:
        return torch.cat([self.objective.counts(batch), self.term.counts(batch)])

    def forward(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        num_items: Tensor,
        progress: float = 0.0,
    ) -> Learnt:
        k = len(self.objective.counts(batch))
        once = student
        if getattr(self.objective, "logits", True):
            once = student._replace(auxiliary=None)  # the first has added it
        loss, measures = self.objective(student, teacher, batch, num_items[:k], progress)
        more, others = self.term(once, teacher, batch, num_items[k:], progress)
        for name, x in others.items():
            key, number = name, 2
            while key in measures:
                key, number = f"{name}_{number}", number + 1
            measures[key] = x
        return Learnt(loss + self._weight_at(progress) * more, measures)


def keep_logits(objective: Objective) -> None:
    """Have an objective leave the student's logits as they are, for who reads them after it."""
    if isinstance(objective, Plus):
        keep_logits(objective.objective)
        keep_logits(objective.term)
    elif isinstance(objective, Distil):
        objective.settings["inplace"] = False


def targets(batch: Batch, shift: bool, ignore_index: int = IGNORED) -> Tensor:
    """The labels of a batch, (N, length), each at the position whose logits predict it; -100 where
    nothing is to be learnt. Of padding nothing is asked: on the left it would predict each text's
    first token."""
    labels = batch["labels"]
    if ignore_index != IGNORED:
        labels = labels.masked_fill(labels == ignore_index, IGNORED)
    if not shift:
        return labels
    labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        labels = labels.masked_fill(mask == 0, IGNORED)
    return labels


def rows_of(source: Tensor | Source, kept: Tensor | tuple[Tensor, ...]) -> Tensor | Source:
    """Positions of a source, (n,) of them. `kept` is a mask of its leading shape, or what that
    mask's `nonzero(as_tuple=True)` gives."""
    if isinstance(source, Tensor):
        return source[kept]
    if isinstance(source, Ensemble):
        weights = [w[kept] if isinstance(w, Tensor) else w for w in source.weights]
        members = [rows_of(member, kept) for member in source.members]
        return Ensemble(members, weights, mode=source.mode)
    leading = source.leading
    chosen = {}
    for field in fields(source):
        x = getattr(source, field.name)
        if isinstance(x, tuple) and x and all(isinstance(member, Source) for member in x):
            chosen[field.name] = tuple(rows_of(member, kept) for member in x)
        elif isinstance(x, Tensor) and field.name not in source.parameters:
            if x.shape[: len(leading)] == leading:
                chosen[field.name] = x[kept]
    return replace(source, **chosen)


def _check_positions(
    student: Tensor | Source, teacher: Tensor | Source | None, labels: Tensor
) -> None:
    """Raise where logits are of other positions than the labels: of a classifier, of the virtual
    tokens that prompt tuning adds."""
    for side, x in (("student", student), ("teacher", teacher)):
        if x is not None:
            leading = tuple(as_source(side, x).leading)
            if leading != tuple(labels.shape):
                raise ValueError(
                    f"the {side}'s logits are of {leading} positions, the labels of"
                    f" {tuple(labels.shape)}: a classifier? virtual tokens of prompt tuning?"
                )


def _is_read_again(logits: Tensor) -> bool:
    """Whether the operation that made them keeps its result for the backward pass."""
    makers = logits.grad_fn, None if logits._base is None else logits._base.grad_fn
    return any(hasattr(maker, "_saved_result") for maker in makers)


def check_counted(logits: Tensor | Source, counts: Tensor) -> None:
    """Raise where a teacher does not answer for as many positions as count."""
    leading, n = tuple(as_source("teacher", logits).leading), int(counts.sum())
    if leading != (n,):
        raise ValueError(
            f"{n} positions of the batch count, but the teacher's answers have the leading shape"
            f" {leading}"
        )


def value_at(x: Any, progress: float) -> Any:
    """Of a schedule, or of what stays as it is."""
    return x(progress) if callable(x) and not isinstance(x, Divergence) else x
