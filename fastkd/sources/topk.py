"""The best entries of a teacher that is served, or was cached."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from fastkd.checks import (
    check_floats,
    check_integers,
    is_number,
    require,
    require_ids,
    shape_of,
)
from fastkd.rows import Sparse
from fastkd.sources.source import Reader, Source, flat, sum_dtype

TAILS = ("bucket", "renormalize", "truncate")


@dataclass(frozen=True, eq=False)
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
            vocabulary shards they count through the whole vocabulary, on all ranks the same. Rows
            that count nowhere may hold anything.
        logprobs: (..., K) log-probabilities at `temperature`.
        tail: see above.
        temperature: of the teacher's softmax; another temperature of the loss is exact, and
            allowed, only under "renormalize".

    Raises:
        TypeError, ValueError: naming the shapes, dtypes or values received.
    """

    ids: Tensor
    logprobs: Tensor
    _: KW_ONLY
    tail: str = "bucket"
    temperature: float = 1.0

    sparse = True
    entries = None

    def __post_init__(self):
        check_integers("TopK's ids", self.ids)
        check_floats("TopK's logprobs", self.logprobs)
        shape = self.ids.shape
        if shape != self.logprobs.shape or not shape or shape[-1] == 0:
            raise ValueError(
                "TopK's ids and logprobs must be (..., K) with K > 0, got shapes"
                f" {shape_of(self.ids)} and {shape_of(self.logprobs)}"
            )
        if self.ids.device != self.logprobs.device:
            raise ValueError(
                f"TopK's ids are on {self.ids.device}, its logprobs on {self.logprobs.device}"
            )
        if self.tail not in TAILS:
            raise ValueError(f"TopK's tail must be one of {', '.join(TAILS)}, got {self.tail!r}")
        if not (is_number(self.temperature) and self.temperature > 0):
            raise ValueError(f"TopK's temperature must be positive, got {self.temperature}")

    @property
    def leading(self):
        return self.ids.shape[:-1]

    @property
    def like(self):
        return self.logprobs

    @property
    def has_logits(self):
        return False

    @property
    def is_whole(self):
        return self.tail == "renormalize"

    @property
    def shape(self):
        return shape_of(self.ids)

    def check(self, divergence, temperature):
        super().check(divergence, temperature)
        if divergence.pooled_terms is None:
            raise ValueError(
                f"{divergence} is no sum over outcomes that may be pooled, as a top-k teacher's"
                " tail is"
            )
        if self.tail == "renormalize":
            require(
                _not(divergence.infinite_p),
                "{} is infinite where the teacher has no mass: outside a renormalised top-k"
                " teacher everywhere; use tail='bucket'",
                divergence,
            )
        else:
            require(
                temperature == self.temperature,
                f"the top-k log-probabilities are at temperature {self.temperature}, the loss at"
                f" {{}}: exact only with tail='renormalize', got tail={self.tail!r}",
                temperature,
            )

    def check_rows(self, counts, n, strict):
        ids = self.ids.long()  # n may be more than a smaller type holds
        ignored = ~counts[..., None]
        # Under "strict" an id beyond the vocabulary is a mistake; a cut leaves it out.
        absent = ignored | (ids < 0 if strict else (ids < 0) | (ids >= n))
        require_ids("top-k ids", ids, absent, n, "-1")
        ordered = torch.where(ids < 0, -1, ids).sort(-1).values
        repeated = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        message = "top-k ids must be distinct in a row, got {} twice"
        require(ignored | ~repeated, message, ordered[..., 1:])
        message = "top-k log-probabilities must be numbers that are not positive, got {}"
        require(absent | (self.logprobs <= 0.01), message, self.logprobs)

    def reader(self, ask):
        return TopKReader(self, ask)


def _not(x):
    return ~x if isinstance(x, Tensor) else not x


class TopKReader(Reader):
    """Lists conditioned on the vocabulary's first n entries: what was known of the others is not
    possible any more."""

    def __init__(self, source, ask):
        super().__init__(source, ask)
        ids, logprobs = flat(source.ids).long(), flat(source.logprobs)
        n = ask.n if ask.shard is None else ask.shard.n
        beyond = ids >= n
        self.dtype = sum_dtype(logprobs.dtype)
        lp = logprobs.to(self.dtype)
        gone = torch.where(beyond, lp.exp(), 0).sum(-1, keepdim=True)
        self.logprobs = lp - torch.log1p(-gone.clamp(max=1 - 1e-6))
        self.ids = ids.masked_fill(beyond, -1)
        self.slack = max(2.0**-20, 8 * torch.finfo(source.logprobs.dtype).eps)

    def row_bytes(self, entries):
        return self.dtype.itemsize * entries

    def logits(self, low, high):
        """Of a renormalised teacher, the only one that is a distribution over the vocabulary."""
        ids, n = self.ids[low:high], self.ask.n
        if self.ask.shard is not None:
            ids = ids - self.ask.shard.first
        absent = (ids < 0) | (ids >= n)
        z = self.logprobs[low:high] * self.source.temperature
        whole = z.new_full((len(ids), n + 1), -math.inf)  # absent entries fall into the last column
        whole.scatter_(1, ids.masked_fill(absent, n), z.masked_fill(absent, -math.inf))
        return whole[None, :, :n]

    def chunk(self, low, high):
        source = self.source
        ids, logprobs = self.ids[low:high], self.logprobs[low:high]
        return Sparse(ids, logprobs, source.tail, source.temperature, self.slack)
