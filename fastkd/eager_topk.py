"""A sparse (top-k) teacher in row-blocked torch: CPU, float64, and any device without Triton.

The same function as `topk` in `kernels/topk.py`. A divergence of K + 1 outcomes a row: the K
entries, and the rest of the vocabulary. Only the student's complement, the entries that are not
among the K, is work in V: its log-sum-exp and one exponential an entry, which is also its gradient
up to a factor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastkd import buffers
from fastkd.divergences import LOG_FLOOR, Divergence
from fastkd.eager import DEAD, LN_2, _blocks, _cross_entropy, _softmax, _wide, block_rows

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
    size = block_rows(V, device)
    # The column after the last is -inf, and where absent entries go.
    scratch = buffers.empty((size, n + 1), student, dtype)
    shared = temperature == 1 and n == V
    own = cross_entropy and not shared
    whole = buffers.empty((2, size, V), student, dtype) if own else None
    for rows, s, _ in _blocks(student, student, size):
        w, g = weight[rows, None], None if grad is None else grad[rows]
        if on_cpu and not w.any():
            if g is not None:
                g.zero_()
            continue
        present = (ids[rows] >= 0) & (ids[rows] < n)
        at = ids[rows].long().masked_fill(~present, n)
        x = s.gather(-1, at.clamp(max=n - 1)).to(dtype)
        x.masked_fill_(~present | (x <= DEAD), -math.inf)
        c = _complement(s[:, :n], at, temperature, scratch[: len(s)])
        lp = logprobs[rows].to(dtype).masked_fill(~present, -math.inf)
        lp.masked_fill_(lp <= DEAD, -math.inf)

        maximum = torch.maximum(x.amax(-1, keepdim=True), c.maximum)
        maximum.masked_fill_(maximum <= DEAD, 0)
        z = torch.cat(((x - maximum) / temperature, c.log_sum(maximum, temperature)), -1)
        log_total = z.logsumexp(-1, keepdim=True)
        empty = log_total == -math.inf
        log_total.masked_fill_(empty, 0)
        log_q = z.sub_(log_total)
        every_q = log_q.exp()
        if diagnostics:
            out[3, rows] = torch.special.entr(every_q).sum(-1)
            out[3, rows] += (every_q[:, -1:] * c.entropy()).squeeze(-1)
        q = every_q
        if tail == "truncate":
            log_q[:, -1] = -math.inf
            q = log_q.exp()
        log_p = _teacher(lp, present, c, tail, teacher_temperature / temperature, n, slack)
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
            out[2, rows] = -(p * log_p).sum(-1)
            out[4, rows] = ((lp == lp.amax(-1, keepdim=True)) & (x == maximum)).any(-1).to(dtype)
            out[5, rows] = lp.exp().sum(-1)
        excess = p.sum(-1) - q.sum(-1)
        value, slope = divergence.term(log_p, log_q, p, q)
        if tail == "truncate":
            value = value + divergence.plain[0] * excess
            slope = slope + divergence.plain[1] * q
        out[0, rows] = value.masked_fill(infinite, math.inf)
        if cross_entropy:
            label = labels[rows, None].long().clamp(min=0)
            at_label = s.gather(-1, label).to(dtype)
            at_label.masked_fill_(at_label <= DEAD, -math.inf)
            b = _softmax(s, 1.0, *whole[:, : len(s)]) if own else None
            out[1, rows] = (
                _cross_entropy(b, at_label)
                if own
                else (log_total + (maximum - at_label)).squeeze(-1)
            )
        if g is None:
            continue
        # Everything has been read: from here on, the gradient may overwrite the student.
        kd = slope.sub_(every_q * slope.sum(-1, keepdim=True)).mul_(w * (kd_scale / temperature))
        if cross_entropy and not own:
            kd.add_(every_q * w, alpha=ce_scale)
        c.exponentials.mul_(kd[:, -1:] / c.total)
        c.exponentials.scatter_(-1, at, kd[:, :-1])
        if cross_entropy and not own:
            c.exponentials.scatter_add_(-1, label, -ce_scale * w)
        if own:
            b.p.mul_(ce_scale * w).scatter_add_(-1, label, -ce_scale * w)
            b.p[:, :n].add_(c.exponentials[:, :n])
            g.copy_(b.p)
        else:
            g[:, :n].copy_(c.exponentials[:, :n])
            g[:, n:].zero_()
        if not (on_cpu and w.all()):
            g.masked_fill_(w == 0, 0)  # an ignored row may hold anything, NaN too
    return out.masked_fill_(weight == 0, 0)


class _Complement(NamedTuple):
    """The student's entries outside S."""

    exponentials: torch.Tensor  # (rows, n + 1), 0 in S and in the last column
    total: torch.Tensor  # (rows, 1), their sum, or 1 where nothing lives
    log_total: torch.Tensor  # (rows, 1), relative to maximum / T; -inf where nothing lives
    maximum: torch.Tensor  # (rows, 1), of the logits; -inf where nothing lives

    def log_sum(self, maximum, temperature):
        """log Σ exp((logits - maximum) / T)."""
        return (self.maximum - maximum) / temperature + self.log_total

    def entropy(self):
        """(rows, 1) of its own softmax."""
        entropies = torch.special.entr(self.exponentials).sum(-1, keepdim=True)
        return self.total.log() + entropies / self.total


def _complement(logits, at, temperature, x) -> _Complement:
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
    return _Complement(
        x, total, log_total.masked_fill_(dead, -math.inf), maximum.masked_fill(dead, -math.inf)
    )


def _teacher(lp, present, c: _Complement, tail, ratio, n, slack):
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
