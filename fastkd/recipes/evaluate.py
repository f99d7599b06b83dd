"""How good a student is: perplexity, KL to the teacher, how often both would say the same."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from fastkd.recipes.lm import LM, evaluating, shifts_labels
from fastkd.recipes.objectives import Distil
from fastkd.recipes.recipe import Batch, Teacher

SCORES = {"kl": "kd", "top1_agreement": "top1_agreement"}


@torch.no_grad()
def evaluate(student: LM, batches: Iterable[Batch], teacher: Teacher | None = None) -> dict:
    """Score a model on held-out batches, in evaluation mode; modes are left as they were.

    Args:
        student: scored.
        batches: with labels; those of -100 do not count.
        teacher: scored against, over the vocabulary that both have.

    Returns:
        `perplexity`, and with a teacher `kl` (KL(teacher‖student) in nats per token) and
        `top1_agreement`; averages over all tokens that count. Without any: {}.
    """
    objective = Distil(
        shifts_labels(student.model), alpha=0.0 if teacher is None else 1.0, vocab="shared"
    )
    sums: dict[str, torch.Tensor] = {}
    tokens = 0
    with evaluating(student.model):
        for batch in batches:
            count = objective.counts(batch)
            says = None if teacher is None else teacher(batch)
            one = torch.ones_like(count)  # undivided: sums
            found = objective(student(batch), says, batch, one, 0.0).measures
            for name in ("ce", *SCORES.values()):
                if name in found:
                    sums[name] = sums.get(name, 0) + found[name].double()
            tokens += count[0]
    if not tokens:
        return {}
    averages = {name: (x / tokens).item() for name, x in sums.items()}
    scores = {"perplexity": math.exp(min(averages["ce"], 700.0))}
    return scores | {key: averages[name] for key, name in SCORES.items() if name in averages}
