"""Teachers made of others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastkd.recipes.lm import TEACHERS_PREFIX
from fastkd.recipes.objectives import IGNORED, rows_of, targets
from fastkd.recipes.recipe import Batch, Outputs, Teacher
from fastkd.sources import Ensemble


class Mixture:
    """Several teachers as one `Ensemble`; each may have its own width and its own kind of logits.

    Args:
        teachers: `LM`s, or others, with one tokenizer. Vocabularies of different sizes need
            `Distil(vocab="shared")`, or a number.
        weights: one number each, divided by their sum; None: equal.
        mode: "probabilities": their mean; "logits": the softmax of the mean of the logits.

    Raises:
        TypeError, ValueError: what `Ensemble` refuses. In a call: hidden states, of which there are
            several, and teachers with a prompt of their own: give one `Prompted` the mixture.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        weights: Sequence[float] | None = None,
        mode: str = "probabilities",
    ):
        self.teachers, self.weights, self.mode = list(teachers), weights, mode
        Ensemble([torch.zeros(1) for _ in self.teachers], weights, mode=mode)  # its checks, now

    def __call__(self, batch: Batch, hidden_states: bool = False) -> Outputs:
        if hidden_states:
            raise ValueError(
                f"a mixture of {len(self.teachers)} teachers has no hidden states: a loss of them"
                " needs one teacher"
            )
        answers = [teacher(batch) for teacher in self.teachers]
        for i, answer in enumerate(answers):
            if answer.counted:
                raise ValueError(
                    f"teacher {i} of the mixture answers for the positions that count alone: use"
                    " Prompted(Mixture([…])) instead of Mixture([Prompted(…), …])"
                )
        logits = [answer.logits for answer in answers]
        return Outputs(Ensemble(logits, self.weights, mode=self.mode))


def teachers_part(batch: Batch) -> Batch:
    """What a teacher with a prompt of its own reads of a batch; empty where it has none."""
    return {
        name.removeprefix(TEACHERS_PREFIX): x
        for name, x in batch.items()
        if name.startswith(TEACHERS_PREFIX)
    }


class Prompted:
    """A teacher that sees another prompt before the same response.

    It reads `teacher_input_ids`, `teacher_labels` and whatever else of the batch begins with
    `teacher_` (`teacher_attention_mask`), of any length, and answers for the positions that its
    labels count; these must be the labels that the student learns, row by row, in their order.

    Args:
        teacher: an `LM`, a `Mixture`.
        shift: as `Distil`'s.

    Raises:
        ValueError: in a call: a batch without the teacher's part; labels that differ from the
            student's, naming the row and both; hidden states, whose positions differ.
    """

    def __init__(self, teacher: Teacher, shift: bool = True):
        self.teacher, self.shift = teacher, shift

    def __call__(self, batch: Batch, hidden_states: bool = False) -> Outputs:
        if hidden_states:
            raise ValueError(
                "a teacher with its own prompt has other positions than the student: its hidden"
                " states cannot be compared"
            )
        own = teachers_part(batch)
        for name in ("input_ids", "labels"):
            if name not in own:
                raise ValueError(
                    f"a teacher with its own prompt reads {TEACHERS_PREFIX}{name}, and the batch"
                    f" has only {', '.join(batch)}"
                )
        students, learnt = targets(batch, self.shift), targets(own, self.shift)
        counts, theirs = learnt != IGNORED, students != IGNORED
        same = torch.equal(counts.sum(-1), theirs.sum(-1))
        if not (same and torch.equal(students[theirs], learnt[counts])):
            _refuse(students, learnt)
        answer = self.teacher(own)
        if answer.counted:
            raise ValueError("the teacher of Prompted must answer for all positions")
        return Outputs(rows_of(answer.logits, counts), counted=True)


def _refuse(students: torch.Tensor, teachers: torch.Tensor) -> None:
    """Name the first row in which what the two learn differs."""
    if len(students) != len(teachers):
        raise ValueError(f"the student has {len(students)} rows, the teacher {len(teachers)}")
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        s, t = s[s != IGNORED], t[t != IGNORED]
        if len(s) != len(t):
            raise ValueError(
                f"row {i}: {len(s)} positions count for the student, {len(t)} for the teacher:"
                " both must hold the same response"
            )
        if not torch.equal(s, t):
            at = int((s != t).nonzero()[0])
            raise ValueError(
                f"row {i}: label {at} that counts is {int(s[at])} for the student, {int(t[at])} for"
                " the teacher: both must hold the same response"
            )
