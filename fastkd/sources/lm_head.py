"""A hidden state and the LM head that follows: logits that exist for a chunk of rows at a time."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from fastkd.backends import buffers, matmul
from fastkd.checks import check_floats, is_number, shape_of
from fastkd.sources.source import Reader, Source, flat, sum_dtype


@dataclass(frozen=True, eq=False)
class LMHead(Source):
    """Logits of a hidden state: `scale · hidden @ weight.T + bias`, then `softcap · tanh(z /
    softcap)`.

    As a student, gradients of `hidden`, `weight` and `bias` are computed, of each that requires
    one; as a teacher it is a constant. The logits exist for one chunk of rows at a time, and are
    overwritten by their gradient: four matrix products in all (the student's logits, its two
    gradients, the teacher's logits), and no (T, V) tensor.

    Args:
        hidden: (..., H), what the model gives to its head.
        weight: (V, H), `model.lm_head.weight` or the tied embedding.
        bias: (V,) or None.
        softcap: of the logits (Gemma 2: 30), or None.
        scale: factor of the product (Cohere's logit_scale, Granite's 1 / logits_scaling).

    Raises:
        TypeError, ValueError: naming what does not fit. `kd_loss` refuses unequal dtypes of hidden
            and weight, unless autocast says in which to multiply.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    softcap: float | None = None
    scale: float = 1.0

    parameters = ("weight", "bias")

    def __post_init__(self):
        hidden, weight, bias = self.hidden, self.weight, self.bias
        for what, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if what != "bias" or x is not None:
                check_floats(f"LMHead's {what}", x)
                if x.device != hidden.device:
                    raise ValueError(
                        f"LMHead's {what} is on {x.device}, the hidden state on {hidden.device}"
                    )
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"LMHead's weight must be (V, H), got shape {shape_of(weight)}")
        if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"LMHead's hidden must be (..., H) with H = {weight.shape[1]} as the weight's"
                f" {shape_of(weight)}, got shape {shape_of(hidden)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"LMHead's bias must be ({weight.shape[0]},), got shape {shape_of(bias)}"
            )
        if self.softcap is not None and not (is_number(self.softcap) and self.softcap > 0):
            raise ValueError(f"LMHead's softcap must be positive or None, got {self.softcap}")
        if not is_number(self.scale):
            raise ValueError(f"LMHead's scale must be a finite number, got {self.scale}")

    @property
    def leading(self):
        return self.hidden.shape[:-1]

    @property
    def entries(self):
        return self.weight.shape[0]

    @property
    def like(self):
        return self.hidden

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits: autocast's (which leaves float64 alone), or the one of both factors."""
        double = self.hidden.dtype == self.weight.dtype == torch.float64
        if torch.is_autocast_enabled(self.device.type) and not double:
            return torch.get_autocast_dtype(self.device.type)
        if self.hidden.dtype != self.weight.dtype:
            raise TypeError(
                f"LMHead's hidden is {self.hidden.dtype} and its weight {self.weight.dtype}:"
                " cast one, or use torch.autocast"
            )
        return self.hidden.dtype

    def whole_logits(self, temperature=1.0, n=None):
        z = self.scale * (self.hidden @ self.weight.T)
        z = z if self.bias is None else z + self.bias
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z

    def reader(self, ask):
        return LMHeadReader(self, ask)

    def student(self, ask, wants, inplace):
        return LMHeadStudent(self, ask, wants)


class LMHeadReader(Reader):
    """As the teacher: the columns that are asked for, in one product a chunk."""

    def __init__(self, source, ask, wants=()):
        super().__init__(source, ask, wants)
        entries = None if wants else ask.n  # the student's cross-entropy sees all
        self.hidden = flat(source.hidden).to(self.dtype)
        self.weight = source.weight[:entries].to(self.dtype)
        self.bias = None if source.bias is None else source.bias[:entries].to(self.dtype)

    def row_bytes(self, entries):
        return entries * self.dtype.itemsize

    def prepare(self, size):
        self.buffer = buffers.empty((size, len(self.weight)), self.hidden)
        self.tanh = self.buffer

    def logits(self, low, high):
        out, softcap = self.buffer[: high - low], self.source.softcap
        matmul.linear(out, self.hidden[low:high], self.weight, self.bias, self.source.scale)
        if softcap:
            tanh = torch.tanh(out.div_(softcap), out=self.tanh[: high - low])
            torch.mul(tanh, softcap, out=out)
        return out[None]


class LMHeadStudent(LMHeadReader):
    """As the student: a chunk's logits become their gradient, and then part of each tensor's."""

    def __init__(self, source, ask, wants):
        super().__init__(source, ask, wants)
        wants_hidden, wants_weight, wants_bias = (*wants, False)[:3]
        self.d_hidden = self.d_weight = self.d_bias = None
        if wants_hidden:
            contiguous = torch.contiguous_format
            self.d_hidden = torch.empty_like(self.hidden, memory_format=contiguous)
        if wants_bias:
            self.d_bias = torch.zeros_like(self.bias, dtype=sum_dtype(self.dtype))
        self.wants_weight = wants_weight  # `prepare` makes its place, and knows in which type
        self.untouched = True  # no chunk has been taken yet

    def row_bytes(self, entries):
        numbers = (2 if self.source.softcap else 1) * entries
        if self.hidden.device.type == "cpu":
            numbers += matmul.SUM_PARTS * self.hidden.shape[1]
        return numbers * self.dtype.itemsize

    def prepare(self, size):
        super().prepare(size)
        if self.source.softcap:
            self.tanh = buffers.empty(self.buffer.shape, self.buffer)
        if self.wants_weight:
            # Several chunks of a low precision add up in fp32, or each would be rounded.
            several = size < len(self.hidden)
            dtype = sum_dtype(self.dtype) if several else self.dtype
            self.d_weight = buffers.empty(self.weight.shape, self.weight, dtype)

    def take(self, grad, low, high, counts):
        if self.source.softcap:
            tanh = self.tanh[: high - low]
            torch.ops.aten.tanh_backward.grad_input(grad, tanh, grad_input=grad)
            grad.masked_fill_(~counts[:, None], 0)  # a row that does not count may hold anything
        if self.d_hidden is not None:
            matmul.product(self.d_hidden[low:high], grad, self.weight, self.source.scale)
        if self.d_weight is not None:
            hidden = self.hidden[low:high].masked_fill(~counts[:, None], 0)  # NaN · 0 is NaN
            matmul.add_product(self.d_weight, grad.t(), hidden, self.source.scale, self.untouched)
        if self.d_bias is not None:
            self.d_bias += grad.sum(0, dtype=self.d_bias.dtype)
        self.untouched = False

    def skip(self, low, high):
        if self.d_hidden is not None:
            self.d_hidden[low:high] = 0

    def finish(self):
        if self.untouched and self.d_weight is not None:
            self.d_weight.zero_()
        if self.ask.shard is not None and self.d_hidden is not None:
            self.d_hidden = self.ask.shard.total(self.d_hidden)  # each shard knows its own part
        source = self.source
        pairs = [
            (self.d_hidden, source.hidden), (self.d_weight, source.weight),
            (self.d_bias, source.bias),
        ]  # fmt: skip
        return [None if grad is None else grad.to(x.dtype) for grad, x in pairs if x is not None]
