"""The same losses in a few lines of plain torch, differentiated by autograd: the truth in tests (in
float64), the baseline in benchmarks (`naive`). Slow and memory-hungry on purpose: what one writes
without this package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import divergences
from fastkd.divergences import Divergence
from fastkd.kernels.limits import DEAD, LOG_FLOOR
from fastkd.sources import Source, as_source


def naive(
    student: Tensor, teacher: Tensor, divergence: str | Divergence, temperature: float
) -> Tensor:
    """D(p, q) of (..., V) logits, (...): the definition, and nothing about -inf."""
    return divergences.get(divergence).reference(student, teacher, temperature)


def logits(source: Tensor | Source, temperature: float = 1.0, n: int | None = None) -> Tensor:
    """The (..., V) logits of a source, all of them at once; of an ensemble's first n entries."""
    return as_source("source", source).whole_logits(temperature, n)


def kd_loss(
    student: Tensor | Source,
    teacher: Tensor | Source | None,
    labels: Tensor | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    alpha: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    compensate: bool = True,
    vocab: str | int = "strict",
) -> Tensor:
    """`fastkd.kd_loss` without its checks, in the precision of its inputs, for every source that
    has logits.

    Logits of -inf are replaced so that both distributions have log 0 = -10,000: values that are
    +inf by definition come out finite and large here, with the gradient that `fastkd.kd_loss`
    gives.
    """
    d = divergences.get(divergence)
    student = logits(student)
    V = student.shape[-1]
    weight = torch.ones(student.shape[:-1], dtype=student.dtype, device=student.device)
    if token_weight is not None:
        weight = token_weight.to(student.dtype)
    if shift:
        student, weight = student[..., :-1, :], weight[..., 1:]
        labels = None if labels is None else labels[..., 1:]
        alpha = alpha[..., 1:] if isinstance(alpha, Tensor) and alpha.dim() else alpha
    if labels is not None:
        weight = weight * (labels != ignore_index)
    losses = torch.zeros_like(weight)
    if teacher is not None:
        sizes = V, logits(teacher).shape[-1]
        n = {"strict": V, "shared": min(sizes)}.get(vocab, vocab)
        teacher = logits(teacher, temperature, n)
        teacher = teacher[..., :-1, :] if shift else teacher
        d, c = d.compensated(temperature) if compensate else (d, 1.0)
        finite = (_floored(x[..., :n], temperature) for x in (student, teacher))
        losses = d.reference(*finite, temperature) * (alpha * c)
    if labels is not None:
        entropies = F.cross_entropy(
            student.reshape(-1, V),
            labels.reshape(-1).long(),
            reduction="none",
            ignore_index=ignore_index,
        ).view(labels.shape)
        losses = losses + torch.where(weight != 0, (1 - alpha) * entropies, 0)
    losses = torch.where(weight != 0, weight * losses, 0)
    if reduction == "none":
        return F.pad(losses, (0, 1)) if shift else losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (num_items if num_items is not None else weight.sum().clamp(min=1e-30))


def _floored(logits: Tensor, temperature: float) -> Tensor:
    """Logits whose -inf entries have the log-probability LOG_FLOOR at this temperature."""
    alive = torch.where(logits <= DEAD, -torch.inf, logits.detach()) / temperature
    floor = temperature * (LOG_FLOOR + torch.logsumexp(alive, -1, keepdim=True))
    return torch.where(logits <= DEAD, floor, logits)
