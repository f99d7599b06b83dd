"""Where logits come from, and what becomes of their gradient.

A source is one side of the comparison: a tensor of logits (`Dense`), a hidden state and the LM head
that follows (`LMHead`), a served teacher's best entries (`TopK`), several teachers (`Ensemble`).
`kd_loss` takes them as the user made them, with any leading shape; inside its operator (compare.py)
they are unpacked again as T rows, of which they give the logits chunk by chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.backends import buffers
from fastkd.backends.eager import DEAD

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
TAILS = ("bucket", "renormalize", "truncate")
MODES = ("probabilities", "logits")
# Of a product with the weights, on a CPU:
COLUMNS = 256  # of a block
SUM_PARTS = 4  # of a sum over the vocabulary


def shape_of(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _check_floats(what: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{what} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def _is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


class Source:
    """What `kd_loss` and the operator ask of a source.

    Attributes:
        leading: the shape without the vocabulary. entries: V, or None where any will do (`TopK`).
        device, dtype: of the logits.
    """

    leading: torch.Size
    entries: int | None
    device: torch.device
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its logits, for messages."""
        return (*self.leading, self.entries)

    def pack(self) -> tuple[list[float], list[Tensor]]:
        """As numbers and tensors, which can go through an operator; `unpack` is the way back."""
        raise TypeError(f"{type(self).__name__} is not a source")

    def row_bytes(self, n: int) -> int:
        """Memory that `logits` needs for each row of a chunk."""
        return 0

    def prepare(self, size: int, n: int) -> None:
        """Make room for chunks of `size` rows and `n` entries."""

    def logits(self, low: int, high: int, n: int, temperature: float) -> Tensor:
        """(outer, length, at least n) logits of rows `low` to `high`, with unit stride along V;
        valid until the next call."""
        raise TypeError(f"{type(self).__name__} has no logits")


class Dense(Source):
    """(..., V) logits."""

    code = 0

    def __init__(self, logits: Tensor):
        _check_floats("logits", logits)
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(f"logits must be (..., V) with V > 0, got shape {shape_of(logits)}")
        self.tensor = logits
        self.leading, self.entries = logits.shape[:-1], logits.shape[-1]
        self.device, self.dtype = logits.device, logits.dtype

    def pack(self):
        return [self.code], [self.tensor]

    @classmethod
    def unpack(cls, numbers: Iterator[float], tensors: Iterator[Tensor]) -> Dense:
        source = cls(next(tensors))
        source.logits_dtype = source.dtype
        source.rows = as_rows(source.tensor)
        return source

    def logits(self, low, high, n, temperature):
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

    # As a student:

    def start(self, wants: list[bool], inplace: bool = False) -> None:
        self.grads = [None]
        if wants[0]:
            outer, length, V = self.rows.shape
            shape = (outer * length, V)
            self.grads = [self.rows.view(shape) if inplace else buffers.empty(shape, self.rows)]

    def grad_of(self, logits: Tensor, low: int, high: int) -> Tensor | None:
        """(rows, V) memory that the gradient wrt a chunk's logits is written to."""
        return None if self.grads[0] is None else self.grads[0][low:high]

    def take(self, grad: Tensor, low: int, high: int, counts: Tensor) -> None:
        """Pass a chunk's gradient on; `counts` (rows,) is False where a row counts nowhere."""

    def skip(self, low: int, high: int) -> None:
        """No row of the chunk counts."""
        if self.grads[0] is not None:
            self.grads[0][low:high] = 0

    def finish(self) -> list[Tensor | None]:
        return self.grads


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

    code = 1

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        softcap: float | None = None,
        scale: float = 1.0,
    ):
        for what, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if what != "bias" or x is not None:
                _check_floats(f"LMHead's {what}", x)
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
        if softcap is not None and not (_is_number(softcap) and softcap > 0):
            raise ValueError(f"LMHead's softcap must be positive or None, got {softcap}")
        if not _is_number(scale):
            raise ValueError(f"LMHead's scale must be a finite number, got {scale}")
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.softcap, self.scale = softcap, scale
        self.leading, self.entries = hidden.shape[:-1], weight.shape[0]
        self.device = hidden.device

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

    def pack(self):
        numbers = [
            self.code, FLOATS.index(self.dtype), self.bias is not None, self.softcap or 0.0,
            self.scale,
        ]  # fmt: skip
        return numbers, [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    @classmethod
    def unpack(cls, numbers, tensors):
        dtype, bias, softcap, scale = (next(numbers) for _ in range(4))
        hidden, weight = next(tensors), next(tensors)
        source = cls(
            _flat(hidden), weight, next(tensors) if bias else None,
            softcap=softcap or None, scale=scale,
        )  # fmt: skip
        dtype = FLOATS[int(dtype)]
        source.logits_dtype = dtype
        source.h, source.w = source.hidden.to(dtype), weight.to(dtype)
        source.b = None if source.bias is None else source.bias.to(dtype)
        source.grads = None
        return source

    def row_bytes(self, n):
        if not self.grads:
            return n * self.h.element_size()
        entries = (2 if self.softcap else 1) * self.entries
        parts = SUM_PARTS * self.h.shape[1] if self.device.type == "cpu" else 0
        return (entries + parts) * self.h.element_size()

    def prepare(self, size, n):
        n = self.entries if self.grads else n
        self.buffer = buffers.empty((size, n), self.h)
        self.tanh = buffers.empty((size, n), self.h) if self.grads and self.softcap else self.buffer
        # Several chunks of a low precision add up in fp32, or each would be rounded.
        if self.grads and self.grads[1] is not None:
            several = size < len(self.h)
            dtype = _sum_dtype(self.h.dtype) if several else self.h.dtype
            self.grads[1] = buffers.empty(self.w.shape, self.w, dtype)

    def logits(self, low, high, n, temperature):
        out, h, w = self.buffer[: high - low], self.h[low:high], self.w[: self.buffer.shape[1]]
        _linear(out, h, w, None if self.b is None else self.b[: len(w)], self.scale)
        if self.softcap:
            tanh = torch.tanh(out.div_(self.softcap), out=self.tanh[: len(h)])
            torch.mul(tanh, self.softcap, out=out)
        return out[None]

    # As a student:

    def start(self, wants, inplace=False):
        wants = [*wants, False][:3]
        self.grads = [
            torch.empty_like(self.h, memory_format=torch.contiguous_format) if wants[0] else None,
            self.w if wants[1] else None,  # its place: `prepare` knows in which type
            torch.zeros_like(self.b, dtype=_sum_dtype(self.b.dtype)) if wants[2] else None,
        ]
        self.first = True

    def grad_of(self, logits, low, high):
        return None if all(x is None for x in self.grads) else logits[0]

    def take(self, grad, low, high, counts):
        d_hidden, d_weight, d_bias = self.grads
        if self.softcap:
            tanh = self.tanh[: high - low]
            torch.ops.aten.tanh_backward.grad_input(grad, tanh, grad_input=grad)
            grad.masked_fill_(~counts[:, None], 0)  # a row that does not count may hold anything
        if d_hidden is not None:
            out = d_hidden[low:high]
            _product(out, grad, self.w, self.scale)
        if d_weight is not None:
            h = self.h[low:high].masked_fill(~counts[:, None], 0)  # NaN · 0 is NaN
            _add_product(d_weight, grad.t(), h, self.scale, self.first)
        if d_bias is not None:
            d_bias += grad.sum(0, dtype=d_bias.dtype)
        self.first = False

    def skip(self, low, high):
        if self.grads[0] is not None:
            self.grads[0][low:high] = 0

    def finish(self):
        if self.first and self.grads[1] is not None:
            self.grads[1].zero_()
        wanted = (self.hidden, self.weight, self.bias)
        return [
            None if g is None else g.to(x.dtype) for g, x in zip(self.grads, wanted, strict=True)
        ]


class TopK(Source):
    """The K best entries of a teacher that is served, or was cached; never differentiated.

    What the K entries leave of the vocabulary (the tail) is

        "bucket"       one more outcome: the teacher's remaining mass against the student's. Never
                       more than the divergence of the whole distributions, and equal at K = V.
        "renormalize"  impossible: the teacher is renormalised on its K entries.
        "truncate"     left out of the sum, which may then be negative. With `logprobs` = log(counts
                       / N) of N samples drawn from the teacher, the gradient of forward KL is
                       unbiased (random-sampling KD: Anshumann et al., Sparse logit sampling, 2025).

    Args:
        ids: (..., K) integers, distinct in a row; -1 where a row has fewer than K entries. Over
            vocabulary shards they count through the whole vocabulary, on all ranks the same.
        logprobs: (..., K) log-probabilities at `temperature`.
        tail: see above.
        temperature: of the teacher's softmax; another temperature of the loss is exact, and
            allowed, only under "renormalize".

    Raises:
        TypeError, ValueError: naming the shapes, dtypes or values received.
    """

    code = 2
    entries = None
    first: int | Tensor = 0  # over vocabulary shards, the number of this one's first column

    def __init__(
        self, ids: Tensor, logprobs: Tensor, *, tail: str = "bucket", temperature: float = 1.0
    ):
        if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
            got = getattr(ids, "dtype", type(ids).__name__)
            raise TypeError(f"TopK's ids must be an integer tensor, got {got}")
        _check_floats("TopK's logprobs", logprobs)
        if ids.shape != logprobs.shape or ids.dim() == 0 or ids.shape[-1] == 0:
            raise ValueError(
                "TopK's ids and logprobs must be (..., K) with K > 0, got shapes"
                f" {shape_of(ids)} and {shape_of(logprobs)}"
            )
        if ids.device != logprobs.device:
            raise ValueError(f"TopK's ids are on {ids.device}, its logprobs on {logprobs.device}")
        if tail not in TAILS:
            raise ValueError(f"TopK's tail must be one of {', '.join(TAILS)}, got {tail!r}")
        if not (_is_number(temperature) and temperature > 0):
            raise ValueError(f"TopK's temperature must be positive, got {temperature}")
        self.ids, self.logprobs, self.tail, self.temperature = ids, logprobs, tail, temperature
        self.leading, self.device, self.dtype = ids.shape[:-1], ids.device, logprobs.dtype

    def pack(self):
        numbers = [self.code, TAILS.index(self.tail), self.temperature]
        return numbers, [self.ids, self.logprobs]

    @classmethod
    def unpack(cls, numbers, tensors):
        tail, temperature = TAILS[int(next(numbers))], next(numbers)
        ids, logprobs = next(tensors), next(tensors)
        return cls(_flat(ids).long(), _flat(logprobs), tail=tail, temperature=temperature)

    @property
    def shape(self):
        return tuple(self.ids.shape)

    def row_bytes(self, n):
        return _sum_dtype(self.dtype).itemsize * n

    def shard(self, gather, first: Tensor) -> None:
        self.first = first

    def cut(self, n: int | Tensor) -> None:
        """Keep the vocabulary's first n entries: what was known of the others is not possible any
        more."""
        beyond = self.ids >= n
        lp = self.logprobs.to(_sum_dtype(self.dtype))
        gone = torch.where(beyond, lp.exp(), 0).sum(-1, keepdim=True)
        self.logprobs = lp - torch.log1p(-gone.clamp(max=1 - 1e-6))
        self.ids = self.ids.masked_fill(beyond, -1)

    def logits(self, low, high, n, temperature):
        """Of a renormalised teacher, the only one that is a distribution over the vocabulary."""
        ids = self.ids[low:high] - self.first
        absent = (ids < 0) | (ids >= n)
        z = self.logprobs[low:high].to(_sum_dtype(self.dtype)) * self.temperature
        whole = z.new_full((len(ids), n + 1), -math.inf)  # absent entries fall into the last column
        whole.scatter_(1, ids.masked_fill(absent, n), z.masked_fill(absent, -math.inf))
        return whole[None, :, :n]


class Ensemble(Source):
    """Several teachers as one.

        "probabilities"  p = Σ_i w_i softmax(z_i / T)
        "logits"         p = softmax(Σ_i w_i z_i / T): the normalised geometric mean

    Args:
        teachers: logits, `LMHead`, `Ensemble`, or `TopK` (with tail "renormalize" and mode
            "probabilities" only: of another one the distribution is not known), of any widths.
        weights: one number or (...) tensor of the logits' leading shape for each teacher; they are
            divided by their sum. None: equal.
        mode: see above.

    Over vocabulary shards, too, each teacher's softmax is of whole rows: one exchange a teacher and
    chunk.

    Raises:
        TypeError, ValueError: naming what does not fit.
    """

    code = 3
    gather: Callable[[Tensor], Tensor] | None = None  # over vocabulary shards

    def __init__(
        self,
        teachers: Sequence[Tensor | Source],
        weights: Sequence[float | Tensor] | Tensor | None = None,
        *,
        mode: str = "probabilities",
    ):
        if isinstance(teachers, (Tensor, Source)) or not len(teachers):
            raise TypeError(f"Ensemble needs a list of teachers, got {type(teachers).__name__}")
        self.teachers = [as_source(f"teacher {i} of Ensemble", t) for i, t in enumerate(teachers)]
        if mode not in MODES:
            raise ValueError(f"Ensemble's mode must be one of {', '.join(MODES)}, got {mode!r}")
        first = self.teachers[0]
        self.leading, self.device = first.leading, first.device
        for i, t in enumerate(self.teachers):
            if t.leading != first.leading or t.device != first.device:
                raise ValueError(
                    f"the teachers of Ensemble differ: number {i} has leading shape"
                    f" {tuple(t.leading)} on {t.device}, number 0 {tuple(first.leading)} on"
                    f" {first.device}"
                )
            if isinstance(t, TopK) and (mode == "logits" or t.tail != "renormalize"):
                raise ValueError(
                    "in an Ensemble, TopK needs mode='probabilities' and tail='renormalize' (else"
                    f" its distribution is not known), got mode={mode!r}, tail={t.tail!r}"
                )
        self.mode = mode
        self.weights = self._normalised(weights)

    def _normalised(self, weights) -> list[float] | Tensor:
        count = len(self.teachers)
        weights = [1.0] * count if weights is None else list(weights)
        if len(weights) != count:
            raise ValueError(f"Ensemble has {count} teachers, but {len(weights)} weights")
        if not any(isinstance(w, Tensor) for w in weights):
            valid = all(_is_number(w) and w >= 0 for w in weights)
            if not valid or not 0 < sum(weights) < math.inf:
                raise ValueError(
                    "Ensemble's weights must be numbers that are not negative, with a finite"
                    f" positive sum, got {weights}"
                )
            return [w / sum(weights) for w in weights]
        whole = []
        for w in weights:
            if not isinstance(w, Tensor):  # filled on the device: a copy would be a sync
                w = torch.full((), w, dtype=self.dtype, device=self.device)
            if w.shape not in ((), self.leading) or w.device != self.device:
                raise ValueError(
                    f"Ensemble's weights must be numbers or tensors of shape {tuple(self.leading)}"
                    f" on {self.device}, got shape {shape_of(w)} on {w.device}"
                )
            if w.requires_grad:
                raise ValueError("Ensemble's weights are not differentiated: detach them")
            whole.append(w.to(self.dtype).expand(self.leading))
        stacked = torch.stack(whole)
        total = stacked.sum(0)
        return stacked / torch.where(total == 0, 1, total)

    @property
    def dtype(self):
        return _sum_dtype(*(t.dtype for t in self.teachers))

    @property
    def entries(self):
        known = [t.entries for t in self.teachers if t.entries is not None]
        return min(known) if known else None

    def pack(self):
        per_token = isinstance(self.weights, Tensor)
        numbers = [
            self.code, len(self.teachers), MODES.index(self.mode), per_token,
            *([] if per_token else self.weights),
        ]  # fmt: skip
        tensors = [self.weights] if per_token else []
        for teacher in self.teachers:
            more_numbers, more_tensors = teacher.pack()
            numbers += more_numbers
            tensors += more_tensors
        return numbers, tensors

    @classmethod
    def unpack(cls, numbers, tensors):
        count, mode, per_token = (int(next(numbers)) for _ in range(3))
        source = cls.__new__(cls)
        source.mode = MODES[mode]
        if per_token:
            source.weights = next(tensors).reshape(count, -1)
        else:
            source.weights = [next(numbers) for _ in range(count)]
        source.teachers = [unpack(numbers, tensors) for _ in range(count)]
        return source

    def row_bytes(self, n):
        return sum(t.row_bytes(n) for t in self.teachers) + 4 * n * self.dtype.itemsize

    def prepare(self, size, n):
        for t in self.teachers:
            t.prepare(size, n)

    def shard(self, gather: Callable[[Tensor], Tensor], first: Tensor) -> None:
        """The columns are a vocabulary shard: `gather` as in `eager.dense`, `first` its column's
        number."""
        self.gather = gather
        for t in self.teachers:
            if isinstance(t, (TopK, Ensemble)):
                t.shard(gather, first)

    def logits(self, low, high, n, temperature):
        total = None
        for i, teacher in enumerate(self.teachers):
            w = self.weights[i]
            w = w[low:high, None].to(self.dtype) if isinstance(w, Tensor) else w
            if isinstance(w, float) and w == 0:
                continue
            z = teacher.logits(low, high, n, temperature)[..., :n].flatten(0, 1).to(self.dtype)
            if self.mode == "logits":
                z = torch.where(w == 0, 0, z * w) if isinstance(w, Tensor) else z * w
                total = z if total is None else total.add_(z)
            else:
                # Dead entries, rows without any other and teachers without a share add nothing.
                z = (z / temperature).masked_fill_(z <= DEAD, -math.inf)
                z = self._log_softmax(z)
                if isinstance(w, Tensor):
                    z = z.add_(w.log()).masked_fill_(w == 0, -math.inf)
                else:
                    z += math.log(w)
                total = z if total is None else torch.logaddexp(total, z, out=total)
        return (total if self.mode == "logits" else total.mul_(temperature))[None]

    def _log_softmax(self, z):
        """-inf in rows without any support. Of shards, with the maxima and sums of all ranks."""
        if self.gather is None:
            empty = z.amax(-1, keepdim=True) == -math.inf
            return F.log_softmax(z, -1).masked_fill_(empty, -math.inf)
        some = z.shape[-1] > 0  # a cut may leave a shard nothing
        maximum = z.amax(-1, keepdim=True) if some else z.new_full((len(z), 1), -math.inf)
        total = (z - maximum.masked_fill(maximum == -math.inf, 0)).exp_().sum(-1, keepdim=True)
        maxima, totals = self.gather(torch.cat((maximum, total), -1)).split(1, -1)
        maximum = maxima.amax(0)
        empty = maximum == -math.inf
        maximum.masked_fill_(empty, 0)
        total = (totals * (maxima - maximum).exp()).sum(0).masked_fill_(empty, 1)
        return z.sub_(maximum).sub_(total.log())


_KINDS = {cls.code: cls for cls in (Dense, LMHead, TopK, Ensemble)}


def as_source(name: str, x: Tensor | Source) -> Source:
    if type(x) in _KINDS.values():
        return x
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a tensor of logits, LMHead, TopK or Ensemble, got {type(x).__name__}"
        )
    try:
        return Dense(x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def unpack(numbers: Iterator[float], tensors: Iterator[Tensor]) -> Source:
    """The source that `pack` made numbers and tensors of, flattened to rows."""
    return _KINDS[int(next(numbers))].unpack(numbers, tensors)


def as_rows(x: Tensor) -> Tensor:
    """(outer, length, V) with unit stride along V, as a view where strides allow: `logits[:, :-1]`
    is not copied."""
    x = x.detach()
    if x.dim() == 3 and x.stride(-1) == 1 and not x.is_contiguous():
        return x
    if x.dim() == 2 and x.stride(-1) == 1:
        return x[None]
    return x.contiguous().view(1, math.prod(x.shape[:-1]), x.shape[-1])


def _flat(x: Tensor) -> Tensor:
    """(T, last), T = 0 too."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _sum_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> None:
    """out = scale · x @ weight.T + bias, of a chunk's few rows and a whole vocabulary."""
    first, beta = 0, 0 if bias is None else 1
    if _in_blocks(x):
        # A few columns at a time, each thread its own: they are read once, and stay in the cache.
        count = len(weight) // COLUMNS
        first = count * COLUMNS
        blocks = out[:, :first].unflatten(1, (count, COLUMNS)).transpose(0, 1)
        weights = weight[:first].unflatten(0, (count, COLUMNS)).transpose(1, 2)
        added = blocks if bias is None else bias[:first].view(count, 1, COLUMNS)
        xs = x.expand(count, *x.shape)
        torch.baddbmm(added, xs, weights, beta=beta, alpha=scale, out=blocks)
    rest = out[:, first:]
    added = rest if bias is None else bias[first:]
    torch.addmm(added, x, weight[first:].t(), beta=beta, alpha=scale, out=rest)


def _product(out: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """out = alpha · a @ b, of a chunk's few rows, each the sum of a whole vocabulary."""
    if not _in_blocks(a):
        torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)
        return
    # The sum in parts: threads need not share one, and shorter sums are more exact.
    n = a.shape[1] // SUM_PARTS * SUM_PARTS
    shape = (SUM_PARTS, n // SUM_PARTS)
    parts = torch.bmm(a[:, :n].unflatten(1, shape).transpose(0, 1), b[:n].unflatten(0, shape))
    torch.sum(parts, 0, out=out)
    torch.addmm(out, a[:, n:], b[n:], beta=alpha, alpha=alpha, out=out)


def _in_blocks(x: Tensor) -> bool:
    """Whether the math library takes products of blocks as they lie, and each in one thread."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _add_product(total: Tensor, a: Tensor, b: Tensor, alpha: float, first: bool) -> None:
    """total = alpha · a @ b (`first`), or added to it; low-precision factors are summed in fp32."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, alpha=alpha, out=total)
        return
    if first:
        total.zero_()
    if _accumulates_in_fp32(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, alpha=alpha, out=total)
        return
    for rows in range(0, len(a), 4096):  # the products stay small
        total[rows : rows + 4096].add_(a[rows : rows + 4096] @ b, alpha=alpha)


@functools.cache
def _accumulates_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds low-precision products to an fp32 matrix on this device: not
    everywhere, and not in every version."""
    x = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, x, x, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # no kernel here, or no such argument yet
        return False
    return True
