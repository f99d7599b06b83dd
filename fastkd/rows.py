"""What a backend is asked, and what it answers.

A row function compares T rows of logits with what a teacher says of them. There are four of one
interface, `dense` and `topk` of each backend (backends/eager.py, backends/eager_topk.py,
kernels/dense.py, kernels/topk.py):

    measures = dense(rows, ask)

and (T, V) memory for the gradient, which `rows.grad` names, is written on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fastkd.divergences import Divergence

# What is computed of each row, in this order.
MEASURES = (
    "divergence", "cross_entropy", "teacher_entropy", "student_entropy", "agreement",
    "teacher_mass",
)  # fmt: skip


class Sparse(NamedTuple):
    """What a top-k teacher says of T rows, outside of whose K entries it has the `tail`:

    "bucket"       p = exp(logprob) on the entries, and 1 - Σ p for the rest as one outcome.
                   Never above the divergence of the whole distributions, and equal to it where
                   K = n. The rest is nothing where the entries are all n, and else at least
                   2^-24: log-probabilities that sum to 1 must not make reverse KL infinite.
    "renormalize"  p = softmax(logprob · temperature / T) on the entries, 0 elsewhere.
    "truncate"     p = exp(logprob) on the entries, and the textbook's sum over them alone,
                   which can be negative.
    """

    ids: Tensor  # (T, K) integers, unique within a row; negative or ≥ n: absent
    logprobs: Tensor  # (T, K) natural log-probabilities
    tail: str = "bucket"
    temperature: float = 1.0  # of the log-probabilities: the loss's, unless "renormalize"
    slack: float = 2.0**-20  # a rest up to this is a rounding where the student has none


class Shard(NamedTuple):
    """One rank's part of a vocabulary. All ranks of the group call a row function at the same time,
    and get the results of the whole rows, to the bit the same.

    `dense` gathers twice, once without a teacher, and `topk` once, whatever the shapes.
    """

    gather: Callable[[Tensor], Tensor]  # (world, *x.shape): the x of all ranks, in rank order
    first: Tensor | int  # the number of this shard's first column
    n: Tensor | int  # entries that the divergence sees, of all ranks
    total: Callable[[Tensor], Tensor] | None = None  # Σ over the ranks, in fp32: for LM heads


class Ask(NamedTuple):
    """What is asked of all rows of a call alike."""

    divergence: Divergence
    temperature: Tensor | float = 1.0  # of the divergence; a 0-d tensor, or a number
    n: int | None = None  # entries that the divergence sees, the first of each row; None: all
    diagnostics: bool = False  # the measures after the second as well
    # Whether the divergence has a part in the gradient; "by row": where its factor is not 0, and
    # elsewhere the teacher may hold anything.
    learns: bool | str = True
    shard: Shard | None = None  # then n, 0 to V, is this shard's


class Rows(NamedTuple):
    """T rows, outer · length of them."""

    # (outer, length, V) fp32, bf16, fp16 or (torch only) fp64, with unit stride along V.
    student: Tensor
    # The same of at least n entries, or what a top-k teacher says; None: cross-entropy alone.
    teacher: Tensor | Sparse | None
    # (T,) integers, or None without cross-entropy. Of a shard they count from its first column; one
    # outside [0, V) is then another rank's.
    labels: Tensor | None
    # (3, T) in fp32 (fp64 for fp64 students): the row's weight, and the factors of the gradients of
    # divergence and cross-entropy. A row of weight 0 counts nowhere: it may hold anything, its
    # measures and its gradient are 0.
    factors: Tensor
    # (T, V) contiguous, to write: Σ factors[1] D + factors[2] CE, differentiated. It may be the
    # student's own memory. None: no gradient.
    grad: Tensor | None = None
