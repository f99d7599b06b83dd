"""A sparse (top-k) teacher in row-blocked torch: CPU, float64, and any device without Triton.

The same function as `topk` in `kernels/topk.py`. A divergence of K + 1 outcomes a row: the K
entries, and the rest of the vocabulary. Only the student's complement, the entries that are not
among the K, is work in V: its log-sum-exp and one exponential an entry, which is also its gradient
up to a factor.

Over vocabulary shards the complements of all ranks make the rest, so one exchange of the K logits
and a few sums suffices: every rank then compares the same K + 1 outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.backends import buffers
from fastkd.backends.eager import on_host
from fastkd.backends.softmax import (
    block_rows,
    blocks_of,
    in_shard,
    logits_at,
    scaled,
    softmax,
    surprise,
    wide,
)
from fastkd.kernels.limits import DEAD, LN_2, LOG_FLOOR, REST_FLOOR
from fastkd.rows import Ask, Rows, Sparse


def topk(rows: Rows, ask: Ask) -> Tensor:
    """Divergence from a sparse teacher and cross-entropy of every row, and the gradient of their
    weighted sum.

    Args:
        rows, ask: see fastkd/rows.py; `rows.teacher` is a `Sparse`, the divergence one with
            `pooled_terms`. Over vocabulary shards the lists are the whole vocabulary's, the same on
            all ranks.

    Returns:
        (2 or 6, T) float32, or float64 for a float64 student: divergence, cross-entropy (0 where it
        is not asked for), with `ask.diagnostics` the teacher's entropy over its outcomes, the
        student's over n entries, whether the teacher's largest entry is also the student's, and
        Σ exp(logprob). 0 in rows of weight 0.
    """
    job = _Job(rows, on_host(ask))
    if ask.shard is None:
        _whole_rows(job)
    else:
        _shards(job)
    return job.values.masked_fill_(rows.factors[0] == 0, 0)


class _Block(NamedTuple):
    """Some rows, of which one at least counts (elsewhere than on the CPU: all there are)."""

    rows: slice
    student: Tensor  # (rows, V)
    factors: Tensor  # (3, rows, 1): weight, and the gradients' factors
    grad: Tensor | None  # (rows, V)


class _Job:
    """A call: what is asked, and the memory that its blocks share."""

    def __init__(self, rows: Rows, ask: Ask):
        student, device = rows.student, rows.student.device
        self.rows, self.ask, self.V = rows, ask, student.shape[-1]
        self.n = self.V if ask.n is None else ask.n
        self.on_cpu = device.type == "cpu"  # elsewhere a decision on data would be a device sync
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        self.factors = rows.factors.to(dtype)
        count = 6 if ask.diagnostics else 2
        self.values = torch.zeros((count, rows.factors.shape[1]), dtype=dtype, device=device)
        self.size = block_rows(self.V, device)
        # The column after the last is -inf, and where absent entries go.
        self.scratch = buffers.empty((self.size, self.n + 1), student, dtype)
        # Whether the cross-entropy needs a softmax of its own.
        self.own = rows.labels is not None and (ask.temperature, self.n) != (1, self.V)
        self.whole = None
        if ask.shard is not None and rows.labels is not None:
            self.whole = buffers.empty((self.size, self.V + 1), student, dtype)
        elif self.own:
            self.whole = buffers.empty((2, self.size, self.V), student, dtype)

    def blocks(self, grad: Tensor | None) -> Iterator[_Block]:
        """Those with rows that count; the gradient of the others is 0."""
        for rows, (s,) in blocks_of(self.size, self.rows.student):
            factors, g = self.factors[:, rows, None], None if grad is None else grad[rows]
            if not self.on_cpu or factors[0].any():
                yield _Block(rows, s, factors, g)
            elif g is not None:
                g.zero_()

    def label(self, rows: slice) -> Tensor | None:
        return None if self.rows.labels is None else self.rows.labels[rows, None].long()


def _whole_rows(job: _Job) -> None:
    """One pass over the rows, into the values and the gradient."""
    teacher, n, out = job.rows.teacher, job.n, job.values
    for block in job.blocks(job.rows.grad):
        rows, s = block.rows, block.student
        at, present = _columns(teacher.ids[rows], n)
        x = logits_at(s, at, present, out.dtype)
        c = _complement(s[:, :n], at, job.ask, job.scratch[: len(s)])
        found = _outcomes(job, rows, x, present, c.rest)
        kd = _of_divergence(job, block, found.gradient)
        ce, label = None, job.label(rows)
        if label is not None:
            label = label.clamp(min=0)
            at_label = logits_at(s, label, None, out.dtype)
            of_ce = block.factors[2]
            if job.own:
                b = softmax(s, 1.0, *job.whole[:, : len(s)])
                out[1, rows] = surprise(b.maximum, b.anchor, b.log_total, at_label)
                ce = _Labelled(b.p, of_ce, label, -of_ce)
            else:
                out[1, rows] = (found.log_total + (found.maximum - at_label)).squeeze(-1)
                ce = _Labelled(None, of_ce, label, -of_ce)
                kd.add_(found.q * of_ce)
        if block.grad is not None:
            _write_gradient(block, c, at, kd, ce)


def _shards(job: _Job) -> None:
    """Of vocabulary shards: a pass over all rows for the statistics, one exchange, the outcomes of
    all rows, and a pass for the gradient."""
    ask, teacher, n, out = job.ask, job.rows.teacher, job.n, job.values
    K = teacher.ids.shape[1]
    at, here = _columns(teacher.ids - ask.shard.first, n)
    nowhere = at[:, :0]  # what is left of a row without its entries there is the whole row
    at_1 = ask._replace(temperature=1.0, diagnostics=False)
    # The logits at the ids; the rest, and the row at T = 1, as `_Rest` has them; the label's logit.
    stats = out.new_zeros((out.shape[1], K + 7))
    for rows, s, _, _ in job.blocks(None):
        stats[rows, :K] = logits_at(s, at[rows], here[rows], out.dtype)
        c = _complement(s[:, :n], at[rows], ask, job.scratch[: len(s)])
        stats[rows, K : K + 3] = torch.cat(c.rest, -1)
        if job.whole is not None:
            b = _complement(s, nowhere[rows], at_1, job.whole[: len(s)])
            stats[rows, K + 3 : K + 6] = torch.cat(b.rest, -1)
            label, inside = in_shard(job.label(rows), s)
            stats[rows, K + 6 :] = logits_at(s, label, inside, out.dtype)
    parts = ask.shard.gather(stats)
    x, at_label = parts[..., :K].amax(0), parts[..., K + 6 :].amax(0)
    rest, share = _met(parts[..., K : K + 3], stats[:, K : K + 3], ask.temperature)
    present = (teacher.ids >= 0) & (teacher.ids < ask.shard.n)
    every = slice(None)
    kd = _outcomes(job, every, x, present, rest).gradient
    if job.whole is not None:  # of all rows at once: the same bits whatever a rank's blocks are
        row, share_1 = _met(parts[..., K + 3 : K + 6], stats[:, K + 3 : K + 6], 1.0)
        out[1] = (_finite(row.log_total) + (_finite(row.maximum) - at_label)).squeeze(-1)
    if job.rows.grad is None:
        return
    for block in job.blocks(job.rows.grad):
        rows, s = block.rows, block.student
        c = _complement(s[:, :n], at[rows], ask._replace(diagnostics=False), job.scratch[: len(s)])
        kd_here = _of_divergence(job, block, kd[rows])
        kd_here[:, -1:] *= share[rows]
        ce = None
        if job.whole is not None:
            b = _complement(s, nowhere[rows], at_1, job.whole[: len(s)])
            label, inside = in_shard(job.label(rows), s)
            of_ce = block.factors[2]
            factor = of_ce * (share_1[rows] / b.total)
            ce = _Labelled(b.exponentials[:, :-1], factor, label, -of_ce * inside)
        _write_gradient(block, c, at[rows], kd_here, ce)


def _of_divergence(job: _Job, block: _Block, gradient: Tensor) -> Tensor:
    """The divergence's part in the rows' gradient."""
    if not job.ask.learns:
        return torch.zeros_like(gradient)
    of_kd = block.factors[1]
    gradient = gradient * (of_kd / job.ask.temperature)
    return gradient.masked_fill_(of_kd == 0, 0) if job.ask.learns == "by row" else gradient


def _columns(ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The ids' columns, n for those outside [0, n); and which are inside."""
    inside = (ids >= 0) & (ids < n)
    return ids.long().masked_fill(~inside, n), inside


class _Outcomes(NamedTuple):
    q: Tensor  # (rows, K + 1) probabilities of the student
    gradient: Tensor  # wrt its logits, up to the row's factor
    maximum: Tensor  # (rows, 1), of its row, and the log-sum-exp relative to it
    log_total: Tensor


def _outcomes(job: _Job, rows: slice, x: Tensor, present: Tensor, rest: _Rest) -> _Outcomes:
    """The divergence of K + 1 outcomes, and diagnostics, into the values.

    `x`: (rows, K) logits of the student, -inf where there is none; `rest`: its other entries.
    """
    ask, teacher, values = job.ask, job.rows.teacher, job.values[:, rows]
    divergence, temperature, tail = ask.divergence, ask.temperature, teacher.tail
    lp = teacher.logprobs[rows].to(x.dtype).masked_fill(~present, -math.inf)
    lp.masked_fill_(lp <= DEAD, -math.inf)
    maximum = torch.maximum(x.amax(-1, keepdim=True), rest.maximum)
    maximum.masked_fill_(maximum <= DEAD, 0)
    z = torch.cat(((x - maximum) / temperature, rest.log_sum(maximum, temperature)), -1)
    log_total = z.logsumexp(-1, keepdim=True)
    empty = log_total == -math.inf
    log_total.masked_fill_(empty, 0)
    log_q = z.sub_(log_total)
    every_q = log_q.exp()
    if ask.diagnostics:
        values[3] = torch.special.entr(every_q).sum(-1)
        values[3] += (every_q[:, -1:] * rest.entropy).squeeze(-1)
    q = every_q
    if tail == "truncate":
        log_q[:, -1] = -math.inf
        q = log_q.exp()
    n = job.n if ask.shard is None else ask.shard.n
    log_p = _log_teacher(teacher, temperature, lp, present.sum(-1, keepdim=True) == n, rest)
    p = log_p.exp()
    dead_p, dead_q = log_p == -math.inf, log_q == -math.inf
    log_p.masked_fill_(dead_p, LOG_FLOOR)
    log_q.masked_fill_(dead_q, LOG_FLOOR)
    infinite = empty.squeeze(-1)
    if tail == "renormalize":
        infinite = infinite | dead_p.all(-1)
    if divergence.infinite_p:
        infinite = infinite | (dead_p & (q > 0)).any(-1)
    if divergence.infinite_q:
        infinite = infinite | (dead_q & (p > 0)).any(-1)
    if ask.diagnostics:
        values[2] = -(p * log_p).sum(-1)
        values[4] = ((lp == lp.amax(-1, keepdim=True)) & (x == maximum)).any(-1).to(x.dtype)
        values[5] = lp.exp().sum(-1)
    excess = p.sum(-1) - q.sum(-1)
    value, slope = divergence.term(log_p, log_q, p, q)
    if tail == "truncate":
        in_value, in_slope = divergence.pooled_terms
        value = value + in_value * excess
        slope = slope + in_slope * q
    values[0] = value.masked_fill(infinite, math.inf)
    gradient = slope.sub_(every_q * slope.sum(-1, keepdim=True))
    return _Outcomes(every_q, gradient, maximum, log_total)


class _Labelled(NamedTuple):
    """The cross-entropy's part of a block's gradient: p · factor, and `at_label` at the label."""

    p: Tensor | None  # (rows, V); None where the divergence's gradient has it
    factor: Tensor  # (rows, 1)
    label: Tensor  # (rows, 1)
    at_label: Tensor  # (rows, 1)


def _write_gradient(
    block: _Block, c: _Complement, at: Tensor, kd: Tensor, ce: _Labelled | None
) -> None:
    """`kd`: wrt the K + 1 outcomes."""
    # Everything has been read: from here on, the gradient may overwrite the student.
    g, weight = block.grad, block.factors[0]
    out, n = c.exponentials, c.exponentials.shape[-1] - 1
    out.mul_(kd[:, -1:] / c.total)
    out.scatter_(-1, at, kd[:, :-1])
    if ce is not None and ce.p is not None:
        p = ce.p.mul_(ce.factor).scatter_add_(-1, ce.label, ce.at_label)
        p[:, :n].add_(out[:, :n])
        g.copy_(p)
    else:
        if ce is not None:
            out.scatter_add_(-1, ce.label, ce.at_label)
        g[:, :n].copy_(out[:, :n])
        g[:, n:].zero_()
    if g.device.type != "cpu" or not weight.all():
        g.masked_fill_(weight == 0, 0)  # an ignored row may hold anything, NaN too


class _Rest(NamedTuple):
    """Entries of the student as one outcome; each (rows, 1)."""

    maximum: Tensor  # of the logits; -inf where nothing lives
    log_total: Tensor  # log Σ exp((logits - maximum) / T); -inf where nothing lives
    entropy: Tensor  # of their own softmax; 0 where it is not wanted

    def log_sum(self, maximum, temperature):
        """log Σ exp((logits - maximum) / T)."""
        return (self.maximum - maximum) / temperature + self.log_total


def _met(parts: Tensor, own: Tensor, temperature: float) -> tuple[_Rest, Tensor]:
    """The `_Rest` of whole rows from (world, T, 3) of their shards, and this rank's share of it,
    from its (T, 3) own."""
    shards, own = (_Rest(*x.split(1, -1)) for x in (parts, own))
    maximum = shards.maximum.amax(0)
    finite = _finite(maximum)
    log_sums = shards.log_sum(finite, temperature)
    log_total = log_sums.logsumexp(0)
    share = (log_sums - _finite(log_total)).exp()
    entropy = (share * shards.entropy + torch.special.entr(share)).sum(0)
    mine = (own.log_sum(finite, temperature) - _finite(log_total)).exp()
    return _Rest(maximum, log_total, entropy), mine


def _finite(x):
    """0 for -inf."""
    return x.masked_fill(x == -math.inf, 0)


class _Complement(NamedTuple):
    """The student's entries outside S."""

    exponentials: Tensor  # (rows, n + 1), 0 in S and in the last column
    total: Tensor  # (rows, 1), their sum, or 1 where nothing lives
    rest: _Rest


def _complement(logits: Tensor, at: Tensor, ask: Ask, x: Tensor) -> _Complement:
    """Into `x`. A sum of its own: 1 - Σ q over S would lose all its digits where S has the mass."""
    x[:, :-1].copy_(logits)
    x[:, -1] = -math.inf
    x.scatter_(-1, at, -math.inf)
    maximum = x.amax(-1, keepdim=True)
    dead = maximum <= DEAD
    finite = maximum.masked_fill(dead, 0)
    scale = torch.tensor(1 / (ask.temperature * LN_2), dtype=x.dtype).item()
    anchor = scaled(x, finite, scale, x)
    torch.exp2(x, out=x)
    total = x.sum(-1, keepdim=True).masked_fill_(dead, 1)
    rounding = wide(finite) * scale + wide(anchor)  # the anchor's
    log_total = total.log() - (rounding * LN_2).to(x.dtype)
    entropy = torch.zeros_like(total)
    if ask.diagnostics:
        entropy = total.log() + torch.special.entr(x).sum(-1, keepdim=True) / total
    rest = _Rest(
        maximum.masked_fill(dead, -math.inf), log_total.masked_fill_(dead, -math.inf), entropy
    )
    return _Complement(x, total, rest)


def _log_teacher(
    teacher: Sparse, temperature: float, lp: Tensor, whole: Tensor, c: _Rest
) -> Tensor:
    """(rows, K + 1) log-probabilities; -inf where there is none. `whole`: (rows, 1), the entries
    are all there are."""
    if teacher.tail == "bucket":
        # 1 - Σ p, without the rounding of a largest p near 1.
        top, index = lp.max(-1, keepdim=True)
        others = lp.scatter(-1, index, -math.inf).exp().sum(-1, keepdim=True)
        rest = -torch.expm1(top) - others
        impossible = torch.where(rest > teacher.slack, rest, 0)
        rest = torch.where(c.maximum == -math.inf, impossible, rest.clamp(min=REST_FLOOR))
        rest = rest.masked_fill(whole, 0).log()
    else:
        rest = torch.full_like(lp[:, :1], -math.inf)
    if teacher.tail == "renormalize":
        scaled = lp * (teacher.temperature / temperature)
        total = scaled.logsumexp(-1, keepdim=True)
        lp = scaled - total.masked_fill(total == -math.inf, 0)
    return torch.cat((lp, rest), -1)
