"""An LM head in 8 bits, as anyone would write it: one file, and nothing else is touched."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.sources import Reader, Source


@dataclass(frozen=True, eq=False)
class Int8Head(Source):
    """Logits hidden @ (steps[:, None] * weight).T; as a student, `hidden` and `steps` get a
    gradient."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H) int8
    steps: Tensor  # (V,)

    leading = property(lambda self: self.hidden.shape[:-1])
    entries = property(lambda self: self.weight.shape[0])
    like = property(lambda self: self.hidden)

    def reader(self, ask):
        return Int8Reader(self, ask, n=ask.n)

    def student(self, ask, wants, inplace):
        return Int8Student(self, ask, wants)


class Int8Reader(Reader):
    """As the teacher: the first n entries are all that is asked for."""

    def __init__(self, source, ask, wants=(), n=None):
        super().__init__(source, ask, wants)
        self.hidden = source.hidden.reshape(-1, source.hidden.shape[-1])
        self.weight, self.steps = source.weight[:n], source.steps[:n].to(self.dtype)

    def row_bytes(self, entries):
        return 2 * entries * self.dtype.itemsize  # the product, and the logits

    def product(self, low, high):
        return self.hidden[low:high] @ self.weight.to(self.dtype).T

    def logits(self, low, high):
        return (self.product(low, high) * self.steps)[None]


class Int8Student(Int8Reader):
    """As the student: a chunk's logits become their gradient, and then part of each tensor's."""

    def __init__(self, source, ask, wants):
        super().__init__(source, ask, wants)
        self.d_hidden = torch.empty_like(self.hidden, memory_format=torch.contiguous_format)
        self.d_steps = torch.zeros_like(self.steps)

    def logits(self, low, high):
        self.products = self.product(low, high)
        return (self.products * self.steps)[None]

    def take(self, grad, low, high, counts):
        self.d_hidden[low:high] = (grad * self.steps) @ self.weight.to(self.dtype)
        alive = self.products.masked_fill(~counts[:, None], 0)  # NaN · 0 is NaN
        self.d_steps += (grad * alive).sum(0)

    def skip(self, low, high):
        self.d_hidden[low:high] = 0

    def finish(self):
        if self.ask.shard is not None:  # each rank knows the part of its own columns
            self.d_hidden = self.ask.shard.total(self.d_hidden)
        grads = self.d_hidden, None, self.d_steps
        return [grad if wanted else None for grad, wanted in zip(grads, self.wants, strict=True)]
