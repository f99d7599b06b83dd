"""A tensor of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.backends import buffers
from fastkd.checks import check_floats, shape_of
from fastkd.sources.source import Reader, Source, as_rows


@dataclass(frozen=True, eq=False)
class Dense(Source):
    """(..., V) logits: what a tensor given to `kd_loss` becomes."""

    logits: Tensor
    row_by_row = True
    alone_in_shards = True

    def __post_init__(self):
        check_floats("logits", self.logits)
        if self.logits.dim() == 0 or self.logits.shape[-1] == 0:
            raise ValueError(
                f"logits must be (..., V) with V > 0, got shape {shape_of(self.logits)}"
            )

    @property
    def leading(self):
        return self.logits.shape[:-1]

    @property
    def entries(self):
        return self.logits.shape[-1]

    @property
    def like(self):
        return self.logits

    @property
    def may_be_overwritten(self):
        """Not a leaf's logits, which are somebody's data."""
        leaf = self.logits.is_leaf and self.logits.requires_grad
        return self.logits.is_contiguous() and not leaf

    def whole_logits(self, temperature=1.0, n=None):
        return self.logits

    def reader(self, ask):
        return DenseReader(self, ask)

    def student(self, ask, wants, inplace):
        return DenseStudent(self, ask, wants, inplace)


def as_source(name: str, x: Tensor | Source) -> Source:
    """A source as it is, or a tensor as logits."""
    if isinstance(x, Source):
        return x
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a tensor of logits, LMHead, TopK, Ensemble or another"
            f" fastkd.sources.Source, got {type(x).__name__}"
        )
    try:
        return Dense(x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


class DenseReader(Reader):
    def __init__(self, source, ask, wants=()):
        super().__init__(source, ask, wants)
        self.rows = as_rows(source.logits)

    def logits(self, low, high):
        outer, length, _ = self.rows.shape
        if (low, high) == (0, outer * length):
            return self.rows
        if outer == 1:
            return self.rows[:, low:high]
        pieces = [
            self.rows[o, max(low - o * length, 0) : high - o * length]
            for o in range(low // length, -(-high // length))
        ]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[None]


class DenseStudent(DenseReader):
    def __init__(self, source, ask, wants, inplace):
        super().__init__(source, ask, wants)
        self.grad = None
        if wants[0]:
            outer, length, V = self.rows.shape
            shape = (outer * length, V)
            self.grad = self.rows.view(shape) if inplace else buffers.empty(shape, self.rows)

    def grad_of(self, logits, low, high):
        return None if self.grad is None else self.grad[low:high]

    def take(self, grad, low, high, counts):
        """It is where it belongs."""

    def skip(self, low, high):
        if self.grad is not None:
            self.grad[low:high] = 0

    def finish(self):
        return [self.grad]
