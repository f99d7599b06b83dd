"""Several teachers as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.checks import check_constant, is_number, require, shape_of
from fastkd.kernels.limits import DEAD
from fastkd.sources.dense import as_source
from fastkd.sources.source import Reader, Source, sum_dtype

MODES = ("probabilities", "logits")


@dataclass(frozen=True, eq=False)
class Ensemble(Source):
    """Several teachers as one.

        "probabilities"  p = Σ_i w_i softmax(z_i / T)
        "logits"         p = softmax(Σ_i w_i z_i / T): the normalised geometric mean

    Args:
        teachers: logits, `LMHead`, `Ensemble`, other sources, or `TopK` (with tail "renormalize"
            and mode "probabilities" only: of another one the distribution is not known), of any
            widths.
        weights: one number or (...) tensor of the logits' leading shape for each teacher; they are
            divided by their sum. None: equal.
        mode: see above.

    Over vocabulary shards, too, each teacher's softmax is of whole rows: one exchange a teacher and
    chunk.

    Raises:
        TypeError, ValueError: naming what does not fit.
    """

    teachers: Sequence[Tensor | Source]
    weights: Sequence[float | Tensor] | Tensor | None = None
    _: KW_ONLY
    mode: str = "probabilities"

    def __post_init__(self):
        teachers, mode = self.teachers, self.mode
        if isinstance(teachers, (Tensor, Source)) or not len(teachers):
            raise TypeError(f"Ensemble needs a list of teachers, got {type(teachers).__name__}")
        teachers = tuple(as_source(f"teacher {i} of Ensemble", t) for i, t in enumerate(teachers))
        if mode not in MODES:
            raise ValueError(f"Ensemble's mode must be one of {', '.join(MODES)}, got {mode!r}")
        first = teachers[0]
        for i, t in enumerate(teachers):
            if t.leading != first.leading or t.device != first.device:
                raise ValueError(
                    f"the teachers of Ensemble differ: number {i} has leading shape"
                    f" {tuple(t.leading)} on {t.device}, number 0 {tuple(first.leading)} on"
                    f" {first.device}"
                )
            if t.sparse and (mode == "logits" or not t.is_whole):
                raise ValueError(
                    f"in an Ensemble, {type(t).__name__} needs mode='probabilities' and"
                    " tail='renormalize' (else its distribution is not known), got"
                    f" mode={mode!r}, tail={getattr(t, 'tail', None)!r}"
                )
        object.__setattr__(self, "teachers", teachers)
        object.__setattr__(self, "weights", self._stacked(self.weights))

    def _stacked(self, weights) -> tuple[float, ...] | Tensor:
        """Numbers that sum to 1, or (count, ...) as they are."""
        count = len(self.teachers)
        weights = [1.0] * count if weights is None else list(weights)
        if len(weights) != count:
            raise ValueError(f"Ensemble has {count} teachers, but {len(weights)} weights")
        if not any(isinstance(w, Tensor) for w in weights):
            valid = all(is_number(w) and w >= 0 for w in weights)
            if not valid or not 0 < sum(weights) < math.inf:
                raise ValueError(
                    "Ensemble's weights must be numbers that are not negative, with a finite"
                    f" positive sum, got {weights}"
                )
            return tuple(w / sum(weights) for w in weights)
        whole, dtype = [], sum_dtype(*(w.dtype for w in weights if isinstance(w, Tensor)))
        for w in weights:
            if not isinstance(w, Tensor):  # filled on the device: a copy would be a sync
                w = torch.full((), w, dtype=dtype, device=self.device)
            if w.shape not in ((), self.leading) or w.device != self.device:
                raise ValueError(
                    f"Ensemble's weights must be numbers or tensors of shape {tuple(self.leading)}"
                    f" on {self.device}, got shape {shape_of(w)} on {w.device}"
                )
            check_constant("Ensemble's weights", w)
            whole.append(w.to(dtype).expand(self.leading))
        return torch.stack(whole)

    @property
    def shares(self) -> tuple[float, ...] | Tensor:
        """The weights, divided by their sum."""
        if not isinstance(self.weights, Tensor):
            return self.weights
        total = self.weights.sum(0)
        return self.weights / torch.where(total == 0, 1, total)

    @property
    def members(self):
        return self.teachers

    @property
    def leading(self):
        return self.teachers[0].leading

    @property
    def like(self):
        return self.teachers[0].like

    @property
    def dtype(self):
        return sum_dtype(*(t.dtype for t in self.teachers))

    @property
    def entries(self):
        known = [t.entries for t in self.teachers if t.entries is not None]
        return min(known) if known else None

    @property
    def has_logits(self):
        return self.mode == "logits" and all(t.has_logits for t in self.teachers)

    def check(self, divergence, temperature):
        super().check(divergence, temperature)
        for member in self.teachers:
            if not member.sparse:  # a list's tail is no matter here: it is a whole distribution
                member.check(divergence, temperature)

    def check_rows(self, counts, n, strict):
        super().check_rows(counts, n, strict)
        if isinstance(self.weights, Tensor):
            valid = ~counts | (self.weights.isfinite() & (self.weights >= 0))
            message = "Ensemble's weights must be finite and not negative, got {}"
            require(valid, message, self.weights)
            total = self.weights.sum(0)
            message = "the sum of Ensemble's weights must be positive, got {}"
            require(~counts | (total > 0), message, total)

    def whole_logits(self, temperature=1.0, n=None):
        """In mode "probabilities" they are T log p."""
        n = n or self.entries
        total = 0
        for w, teacher in zip(self.shares, self.teachers, strict=True):
            z = teacher.whole_logits(temperature, n)[..., :n]
            w = w[..., None].to(z.dtype) if isinstance(w, Tensor) else w
            total = total + w * (z if self.mode == "logits" else F.softmax(z / temperature, -1))
        return total if self.mode == "logits" else temperature * total.log()

    def reader(self, ask):
        return EnsembleReader(self, ask)


class EnsembleReader(Reader):
    def __init__(self, source, ask):
        super().__init__(source, ask)
        self.members = [teacher.reader(ask) for teacher in source.teachers]
        self.weights = source.shares
        if isinstance(self.weights, Tensor):
            self.weights = self.weights.reshape(len(self.members), -1)

    def row_bytes(self, entries):
        own = 4 * entries * self.dtype.itemsize
        return sum(member.row_bytes(entries) for member in self.members) + own

    def prepare(self, size):
        for member in self.members:
            member.prepare(size)

    def logits(self, low, high):
        mean, temperature = self.source.mode == "logits", self.ask.temperature
        total = None
        for w, member in zip(self.weights, self.members, strict=True):
            per_row = isinstance(w, Tensor)
            if not per_row and w == 0:
                continue
            w = w[low:high, None].to(self.dtype) if per_row else w
            z = member.logits(low, high)[..., : self.ask.n].flatten(0, 1).to(self.dtype)
            if mean:
                z = torch.where(w == 0, 0, z * w) if per_row else z * w
                total = z if total is None else total.add_(z)
            else:
                # Dead entries, rows without any other and teachers without a share add nothing.
                z = self._log_softmax((z / temperature).masked_fill_(z <= DEAD, -math.inf))
                if per_row:
                    z.add_(w.log()).masked_fill_(w == 0, -math.inf)
                else:
                    z.add_(math.log(w))
                total = z if total is None else torch.logaddexp(total, z, out=total)
        return (total if mean else total.mul_(temperature))[None]

    def _log_softmax(self, z):
        """-inf in rows without any support. Of shards, with the maxima and sums of all ranks."""
        if self.ask.shard is None:
            empty = z.amax(-1, keepdim=True) == -math.inf
            return F.log_softmax(z, -1).masked_fill_(empty, -math.inf)
        some = z.shape[-1] > 0  # a cut may leave a shard nothing
        maximum = z.amax(-1, keepdim=True) if some else z.new_full((len(z), 1), -math.inf)
        total = (z - maximum.masked_fill(maximum == -math.inf, 0)).exp_().sum(-1, keepdim=True)
        maxima, totals = self.ask.shard.gather(torch.cat((maximum, total), -1)).split(1, -1)
        maximum = maxima.amax(0)
        empty = maximum == -math.inf
        maximum.masked_fill_(empty, 0)
        total = (totals * (maxima - maximum).exp()).sum(0).masked_fill_(empty, 1)
        return z.sub_(maximum).sub_(total.log())
