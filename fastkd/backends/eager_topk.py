"""A sparse (top-k) teacher in row-blocked torch: CPU, float64, and any device without Triton.

The same function as `topk` in `kernels/topk.py`. A divergence of K + 1 outcomes a row: the K
entries, and the rest of the vocabulary. Only the student's complement, the entries that are not
among the K, is work in V: its log-sum-exp and one exponential an entry, which is also its gradient
up to a factor.

Over vocabulary shards the complements of all ranks make the rest, so one exchange of the K logits
and a few sums suffices: every rank then compares the same K + 1 outcomes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastkd.backends import buffers
from fastkd.backends.eager import (
    DEAD,
    LN_2,
    _blocks,
    _cross_entropy,
    _in_shard,
    _softmax,
    _wide,
    block_rows,
)
from fastkd.divergences import LOG_FLOOR, Divergence

REST_FLOOR = 2.0**-24  # log-probabilities that sum to 1 leave this to the rest: a rounding of 1


def topk(
    student: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    labels: torch.Tensor | None,
    weight: torch.Tensor,
    divergence: Divergence,
    *,
    tail: str,
    teacher_temperature: float,
    temperature: float,
    n: int,
    kd_scale: float,
    ce_scale: float,
    cross_entropy: bool,
    grad: torch.Tensor | None,
    diagnostics: bool = False,
    slack: float = 2.0**-20,
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    first: int | torch.Tensor = 0,
    N: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Divergence from a sparse teacher and cross-entropy of every row, and the gradient of their
    weighted sum.

    With q the softmax of the student's first n entries / T and S the row's K entries, `tail` says
    what the teacher has outside S:

        "bucket"       p = exp(logprob) on S, and 1 - Σ p for the rest as one outcome. Never above
                       the divergence of the whole distributions, and equal to it where K = n. The
                       rest is nothing where S is all n entries, and else at least 2^-24: logprobs
                       that sum to 1 must not make reverse KL infinite.
        "renormalize"  p = softmax(logprob · teacher_temperature / T) on S, 0 elsewhere.
        "truncate"     p = exp(logprob) on S, and the textbook's sum over S alone; can be negative.

    Args:
        student: (outer, length, V) logits; T = outer · length rows.
        ids: (T, K) integers, unique within a row; an entry whose id is negative or ≥ n is absent.
        logprobs: (T, K) natural log-probabilities at `teacher_temperature`, which is `temperature`
        unless the tail is "renormalize".
        labels: (T,) integers, or None without cross-entropy.
        weight: (T,); rows of weight 0 count nowhere and have gradient 0.
        divergence: one with `plain`.
        temperature: of the divergence. n: entries that the divergence sees, the first of each row.
        kd_scale, ce_scale: factors of the two gradients wrt the student's logits, besides the row's
        weight and 1/T.
        cross_entropy: whether it is wanted.
        grad: (T, V) to write, which may be the student's own memory, or None.
        diagnostics: whether the last four rows of the result are wanted.
        slack: a rest of the teacher's mass up to this is taken for a rounding of the
            log-probabilities where the student has nothing left for it.
        gather: as in `eager.dense`: the columns are this rank's shard of a vocabulary, `labels`
            count from its first column and `n`, 0 to V, is this shard's. `ids` are the whole
            vocabulary's, the same on all ranks. Called once, whatever the shapes.
        first, N: of shards, the number of this one's first column, and the sum of all their n.

    Returns:
        (2 or 6, T) float32, or float64 for a float64 student: divergence, cross-entropy (0 where it
        is not wanted), the teacher's entropy over its outcomes, the student's over n entries,
        whether the teacher's largest entry is also the student's, and Σ exp(logprob). 0 in rows of
        weight 0.
    """
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    V, device = student.shape[-1], student.device
    on_cpu = device.type == "cpu"  # elsewhere a decision on data would be a device sync
    out = torch.zeros((6 if diagnostics else 2, weight.numel()), dtype=dtype, device=device)
    weight = weight.to(dtype)
    labels = labels if cross_entropy else None
    size = block_rows(V, device)

    def blocks(grad):
        """Those with rows that count; the gradient of the others is 0."""
        for rows, s, _ in _blocks(student, student, size):
            w, g = weight[rows, None], None if grad is None else grad[rows]
            if not on_cpu or w.any():
                yield rows, s, w, g
            elif g is not None:
                g.zero_()

    outcomes = functools.partial(
        _outcomes, divergence=divergence, tail=tail, temperature=temperature,
        ratio=teacher_temperature / temperature, slack=slack,
    )  # fmt: skip
    # The column after the last is -inf, and where absent entries go.
    scratch = buffers.empty((size, n + 1), student, dtype)
    kd_scale = kd_scale / temperature
    if gather is None:
        own = labels is not None and (temperature, n) != (1, V)
        whole = buffers.empty((2, size, V), student, dtype) if own else None
        _whole_rows(
            blocks, out, ids, logprobs, labels, temperature, n, kd_scale, ce_scale, grad, outcomes,
            scratch, whole,
        )  # fmt: skip
    else:
        whole = None if labels is None else buffers.empty((size, V + 1), student, dtype)
        _shards(
            blocks, out, ids, logprobs, labels, weight[:, None], temperature, n, kd_scale, ce_scale,
            grad, outcomes, scratch, whole, gather, first, N,
        )  # fmt: skip
    return out.masked_fill_(weight == 0, 0)


def _whole_rows(
    blocks, out, ids, logprobs, labels, temperature, n, kd_scale, ce_scale, grad, outcomes,
    scratch, whole,
):  # fmt: skip
    """One pass over the rows, into `out` and `grad`. `whole`: room for the cross-entropy's own
    softmax, or None where the divergence's serves."""
    own, diagnostics = whole is not None, len(out) == 6
    for rows, s, w, g in blocks(grad):
        at, present = _columns(ids[rows], n)
        x = _logits_at(s, at, present, out.dtype)
        c = _complement(s[:, :n], at, temperature, scratch[: len(s)], diagnostics)
        lp = logprobs[rows]
        q, kd, maximum, log_total = outcomes(out[:, rows], x, lp, present, c.rest, n)
        ce = None
        if labels is not None:
            label = labels[rows, None].long().clamp(min=0)
            at_label = s.gather(-1, label).to(out.dtype)
            at_label.masked_fill_(at_label <= DEAD, -math.inf)
            b = _softmax(s, 1.0, *whole[:, : len(s)]) if own else None
            out[1, rows] = (
                _cross_entropy(b, at_label)
                if own
                else (log_total + (maximum - at_label)).squeeze(-1)
            )
            ce = b.p if own else None, ce_scale * w, label, -ce_scale * w
        if g is not None:
            kd.mul_(w * kd_scale)
            if labels is not None and not own:
                kd.add_(q * w, alpha=ce_scale)
            _write_gradient(g, w, c, at, kd, ce)


def _shards(
    blocks, out, ids, logprobs, labels, weight, temperature, n, kd_scale, ce_scale, grad, outcomes,
    scratch, whole, gather, first, N,
):  # fmt: skip
    """`topk` of vocabulary shards, into `out` and `grad`: a pass over all rows for the statistics,
    one exchange, the outcomes of all rows, and a pass for the gradient. `whole`: room for the
    student's exponentials at T = 1, or None without labels."""
    diagnostics, K = len(out) == 6, ids.shape[1]
    at, here = _columns(ids - first, n)
    nowhere = at[:, :0]  # what is left of a row without its entries there is the whole row
    # The logits at the ids; the rest, and the row at T = 1, as `_Rest` has them; the label's logit.
    stats = out.new_zeros((out.shape[1], K + 7))
    for rows, s, _, _ in blocks(None):
        stats[rows, :K] = _logits_at(s, at[rows], here[rows], out.dtype)
        c = _complement(s[:, :n], at[rows], temperature, scratch[: len(s)], diagnostics)
        stats[rows, K : K + 3] = torch.cat(c.rest, -1)
        if labels is not None:
            b = _complement(s, nowhere[rows], 1.0, whole[: len(s)])
            stats[rows, K + 3 : K + 6] = torch.cat(b.rest, -1)
            label, inside = _in_shard(labels[rows, None].long(), s)
            stats[rows, K + 6 :] = _logits_at(s, label, inside, out.dtype)
    parts = gather(stats)
    x, at_label = parts[..., :K].amax(0), parts[..., K + 6 :].amax(0)
    rest, share = _meet(parts[..., K : K + 3], stats[:, K : K + 3], temperature)
    present = (ids >= 0) & (ids < N)
    _, kd, _, _ = outcomes(out, x, logprobs, present, rest, N)
    if labels is not None:  # of all rows at once: the same bits whatever a rank's blocks are
        row, share_1 = _meet(parts[..., K + 3 : K + 6], stats[:, K + 3 : K + 6], 1.0)
        out[1] = (_finite(row.log_total) + (_finite(row.maximum) - at_label)).squeeze(-1)
    if grad is None:
        return
    kd.mul_(weight * kd_scale)
    kd[:, -1:] *= share
    for rows, s, w, g in blocks(grad):
        c = _complement(s[:, :n], at[rows], temperature, scratch[: len(s)])
        ce = None
        if labels is not None:
            b = _complement(s, nowhere[rows], 1.0, whole[: len(s)])
            label, inside = _in_shard(labels[rows, None].long(), s)
            factor = ce_scale * w * (share_1[rows] / b.total)
            ce = b.exponentials[:, :-1], factor, label, -ce_scale * w * inside
        _write_gradient(g, w, c, at[rows], kd[rows], ce)


def _columns(ids, n):
    """The ids' columns, n for those outside [0, n); and which are inside."""
    inside = (ids >= 0) & (ids < n)
    return ids.long().masked_fill(~inside, n), inside


def _logits_at(s, at, inside, dtype):
    x = s.gather(-1, at.clamp(max=s.shape[-1] - 1)).to(dtype)
    return x.masked_fill_(~inside | (x <= DEAD), -math.inf)


def _outcomes(
    values, x, logprobs, present, rest, n, *, divergence, tail, temperature, ratio, slack
):  # fmt: skip
    """The divergence of K + 1 outcomes, and diagnostics, into `values`.

    `x`: (rows, K) logits of the student, -inf where there is none; `rest`: its other entries.
    Returns the student's (rows, K + 1) probabilities, the gradient wrt its logits, up to the row's
    factor, and the maximum and the log-sum-exp, relative to it, of its row.
    """
    diagnostics = len(values) == 6
    lp = logprobs.to(x.dtype).masked_fill(~present, -math.inf)
    lp.masked_fill_(lp <= DEAD, -math.inf)
    maximum = torch.maximum(x.amax(-1, keepdim=True), rest.maximum)
    maximum.masked_fill_(maximum <= DEAD, 0)
    z = torch.cat(((x - maximum) / temperature, rest.log_sum(maximum, temperature)), -1)
    log_total = z.logsumexp(-1, keepdim=True)
    empty = log_total == -math.inf
    log_total.masked_fill_(empty, 0)
    log_q = z.sub_(log_total)
    every_q = log_q.exp()
    if diagnostics:
        values[3] = torch.special.entr(every_q).sum(-1)
        values[3] += (every_q[:, -1:] * rest.entropy).squeeze(-1)
    q = every_q
    if tail == "truncate":
        log_q[:, -1] = -math.inf
        q = log_q.exp()
    log_p = _teacher(lp, present, rest, tail, ratio, n, slack)
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
    if diagnostics:
        values[2] = -(p * log_p).sum(-1)
        values[4] = ((lp == lp.amax(-1, keepdim=True)) & (x == maximum)).any(-1).to(x.dtype)
        values[5] = lp.exp().sum(-1)
    excess = p.sum(-1) - q.sum(-1)
    value, slope = divergence.term(log_p, log_q, p, q)
    if tail == "truncate":
        value = value + divergence.pooled_terms[0] * excess
        slope = slope + divergence.pooled_terms[1] * q
    values[0] = value.masked_fill(infinite, math.inf)
    return every_q, slope.sub_(every_q * slope.sum(-1, keepdim=True)), maximum, log_total


def _write_gradient(g, w, c, at, kd, ce):
    """Of a block of rows. `kd`: wrt the K + 1 outcomes. `ce`: None, or the cross-entropy's
    probabilities (None where `kd` has their part) and their factor, the label and its part."""
    # Everything has been read: from here on, the gradient may overwrite the student.
    p, factor, label, at_label = ce or (None,) * 4
    out, n = c.exponentials, c.exponentials.shape[-1] - 1
    out.mul_(kd[:, -1:] / c.total)
    out.scatter_(-1, at, kd[:, :-1])
    if p is not None:
        p.mul_(factor).scatter_add_(-1, label, at_label)
        p[:, :n].add_(out[:, :n])
        g.copy_(p)
    else:
        if ce is not None:
            out.scatter_add_(-1, label, at_label)
        g[:, :n].copy_(out[:, :n])
        g[:, n:].zero_()
    if g.device.type != "cpu" or not w.all():
        g.masked_fill_(w == 0, 0)  # an ignored row may hold anything, NaN too


class _Rest(NamedTuple):
    """Entries of the student as one outcome; each (rows, 1)."""

    maximum: torch.Tensor  # of the logits; -inf where nothing lives
    log_total: torch.Tensor  # log Σ exp((logits - maximum) / T); -inf where nothing lives
    entropy: torch.Tensor  # of their own softmax; 0 where it is not wanted

    def log_sum(self, maximum, temperature):
        """log Σ exp((logits - maximum) / T)."""
        return (self.maximum - maximum) / temperature + self.log_total


def _meet(parts, own, temperature):
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

    exponentials: torch.Tensor  # (rows, n + 1), 0 in S and in the last column
    total: torch.Tensor  # (rows, 1), their sum, or 1 where nothing lives
    rest: _Rest


def _complement(logits, at, temperature, x, diagnostics=False) -> _Complement:
    """Into `x`. A sum of its own: 1 - Σ q over S would lose all its digits where S has the mass."""
    x[:, :-1].copy_(logits)
    x[:, -1] = -math.inf
    x.scatter_(-1, at, -math.inf)
    maximum = x.amax(-1, keepdim=True)
    dead = maximum <= DEAD
    finite = maximum.masked_fill(dead, 0)
    scale = torch.tensor(1 / (temperature * LN_2), dtype=x.dtype).item()
    anchor = finite * -scale
    torch.add(anchor, x, alpha=scale, out=x)
    torch.exp2(x, out=x)
    total = x.sum(-1, keepdim=True).masked_fill_(dead, 1)
    rounding = _wide(finite) * scale + _wide(anchor)  # the anchor's
    log_total = total.log() - (rounding * LN_2).to(x.dtype)
    entropy = torch.zeros_like(total)
    if diagnostics:
        entropy = total.log() + torch.special.entr(x).sum(-1, keepdim=True) / total
    rest = _Rest(
        maximum.masked_fill(dead, -math.inf), log_total.masked_fill_(dead, -math.inf), entropy
    )
    return _Complement(x, total, rest)


def _teacher(lp, present, c: _Rest, tail, ratio, n, slack):
    """(rows, K + 1) log-probabilities; -inf where there is none."""
    if tail == "bucket":
        # 1 - Σ p, without the rounding of a largest p near 1.
        top, index = lp.max(-1, keepdim=True)
        others = lp.scatter(-1, index, -math.inf).exp().sum(-1, keepdim=True)
        rest = -torch.expm1(top) - others
        impossible = torch.where(rest > slack, rest, 0)
        rest = torch.where(c.maximum == -math.inf, impossible, rest.clamp(min=REST_FLOOR))
        rest = rest.masked_fill(present.sum(-1, keepdim=True) == n, 0).log()
    else:
        rest = torch.full_like(lp[:, :1], -math.inf)
    if tail == "renormalize":
        scaled = lp * ratio
        total = scaled.logsumexp(-1, keepdim=True)
        lp = scaled - total.masked_fill(total == -math.inf, 0)
    return torch.cat((lp, rest), -1)
