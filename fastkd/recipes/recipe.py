"""A recipe: what is read x what the teacher says of it x what is learnt; and the loop that follows
it.

Every strategy is one of the three: a `Teacher` of its own (teachers.py), an `Objective`
(objectives.py), or batches that are rewritten before they are counted (rollouts.py). `train` is
the whole loop; `fastkd.integrations.transformers.DistillationTrainer` follows the same recipe
inside of Hugging Face's Trainer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastkd.sources import Source

Batch = dict[str, Tensor]  # a model's keyword arguments and `labels`, (N, length) each


class Outputs(NamedTuple):
    """What a model, or who stands in for one, says of a batch.

    Attributes:
        logits: (N, length, V), or a source that makes them.
        hidden_states: of the embeddings and of every layer, (N, length, H) each; where asked for.
        auxiliary: 0-d, what the model adds to its own loss (the balance of a mixture of experts),
            with the model's own factor; None: nothing.
        counted: the logits are of the positions that count alone, (n, V), in their order: of a
            teacher that saw another prompt.
    """

    logits: Tensor | Source | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    auxiliary: Tensor | None = None
    counted: bool = False


class Learnt(NamedTuple):
    """What an objective makes of a batch.

    Attributes:
        loss: 0-d, differentiable: this batch's share of the step's average.
        measures: what a log shows beside the loss, detached 0-d tensors that are shares too: their
            sum over micro-batches and processes is the average.
    """

    loss: Tensor
    measures: dict[str, Tensor]


class Teacher(Protocol):
    """Who is learnt from. `LM` is one."""

    def __call__(self, batch: Batch, hidden_states: bool = False) -> Outputs:
        """What it says of a batch; called under `no_grad`."""
        ...


class Objective(Protocol):
    """What is learnt. One with parameters or a state of its own is an `nn.Module`.

    Attributes:
        hidden_states: whether it reads them. An objective that reads no logits may say
            `logits = False` beside it (see `Plus`).
    """

    hidden_states: bool

    def counts(self, batch: Batch) -> Tensor:
        """(k,) what the averages of its k terms are over: `loss` divides by their sums over the
        step, so that the gradient is the one of a single big batch."""
        ...

    def __call__(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        num_items: Tensor,
        progress: float,
    ) -> Learnt:
        """The loss of a batch.

        Args:
            num_items: (k,) the sums of `counts` over all micro-batches and processes of the step.
            progress: the part of the training that is done, in [0, 1]: for schedules.
        """
        ...


class Recipe(NamedTuple):
    """All that a training is, but for student and optimizer.

    Attributes:
        batches: the micro-batches of each optimizer step.
        teacher: None: labels are all there is.
        objective: what is learnt.
    """

    batches: Iterable[list[Batch]]
    teacher: Teacher | None
    objective: Objective


def train(student: Any, recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> list[dict]:
    """Train a student: all there is to a distillation, in plain PyTorch on one device.

    Micro-batches of unequal token counts make the step of one big batch.

    Args:
        student: an `LM`.
        recipe: its batches are endless, or last for `steps`.
        optimizer: of the student's parameters, and of the objective's if it has any.
        steps: optimizer steps.

    Returns:
        For each step its loss and the objective's measures.
    """
    history = []
    teacher, objective = recipe.teacher, recipe.objective
    for step, micro_batches in zip(range(steps), recipe.batches, strict=False):
        num_items = sum(objective.counts(batch) for batch in micro_batches)
        totals: dict[str, Tensor] = {}
        for batch in micro_batches:
            says = None
            if teacher is not None:
                with torch.no_grad():
                    says = teacher(batch, objective.hidden_states)
            heard = student(batch, objective.hidden_states)
            loss, measures = objective(heard, says, batch, num_items, step / steps)
            loss.backward()
            for name, x in {"loss": loss.detach(), **measures}.items():
                totals[name] = totals.get(name, 0) + x
        optimizer.step()
        optimizer.zero_grad()
        history.append({"step": step + 1} | {name: x.item() for name, x in totals.items()})
    return history
