"""The row-blocked torch path: CPU, float64, and any device without Triton.

Naive PyTorch spends its time in page faults (each step makes a new (T, V) tensor) and repeated
exponentials. Here rows go through in blocks that stay in the cache, with one exponential per side
and entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.backends import buffers
from fastkd.backends.softmax import (
    Softmax,
    anchor_of,
    block_rows,
    blocks_of,
    in_shard,
    logits_at,
    merged,
    softmax,
    statistics,
    surprise,
)
from fastkd.divergences import Divergence
from fastkd.kernels.limits import DEAD, LN_2
from fastkd.packing import replace_tensors
from fastkd.rows import Ask, Rows

LEAST_ENTRIES = 3 * 2**16  # of a block: the calls on fewer cost more than their work


def dense(rows: Rows, ask: Ask) -> Tensor:
    """Divergence and cross-entropy of every row, and the gradient of their weighted sum.

    Args:
        rows, ask: see fastkd/rows.py; `rows.teacher` are logits, or None. Numbers that are tensors
            are read by the host, for which a GPU has to be waited for.

    Returns:
        (2, T) divergence and cross-entropy, each 0 where it is not asked for, or with
        `ask.diagnostics` (5, T), with the entropies of teacher and student, in nats, at the
        divergence's temperature, over the entries that it sees, and 1 where some entry is a maximum
        of both sides, else 0: NaN where the divergence compares no distributions. 0 where the
        weight is. float32, or float64 for a float64 student.
    """
    job = _Job(rows, on_host(ask))
    if ask.shard is None:
        _whole_rows(job)
    else:
        _shards(job)
    values = job.values
    if len(values) == 5:
        values[2:] = values[2:].clamp(min=0) if job.softmax else math.nan
    return values.masked_fill_(rows.factors[0] == 0, 0)


def on_host(ask: Ask) -> Ask:
    """With plain numbers only."""
    divergence, temperature = ask.divergence, ask.temperature
    return ask._replace(
        divergence=replace_tensors(divergence, float), temperature=float(temperature)
    )


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """(T, V) `x` times a scalar or (T,) `factor`, in place."""
    if factor.dim() == 0 and factor.device.type == "cpu" and factor == 1:
        return x
    return x.mul_(factor if factor.dim() == 0 else factor[:, None])


class _Block(NamedTuple):
    """Some rows, of which one at least counts (elsewhere than on the CPU: all there are)."""

    rows: slice
    student: Tensor  # (rows, V)
    teacher: Tensor | None  # (rows, n)
    label: Tensor | None  # (rows, 1)
    factors: Tensor  # (3, rows, 1): weight, and the gradients' factors
    grad: Tensor | None  # (rows, V)
    work: Tensor  # (4 to 7, rows, n) and (2, rows, V) of scratch
    work_1: Tensor


class _Job:
    """A call: what is asked, and the memory that its blocks share."""

    def __init__(self, rows: Rows, ask: Ask):
        student, device = rows.student, rows.student.device
        self.rows, self.ask, self.V = rows, ask, student.shape[-1]
        self.n = self.V if ask.n is None else ask.n
        self.parts = () if rows.teacher is None else ask.divergence.parts
        self.softmax = any(part.kind != "logits" for _, part in self.parts)
        mixed = [part for _, part in self.parts if part.kind == "mixed"]
        self.mixed: Divergence | None = mixed[0] if mixed else None
        sums = [w * (part.slope_sum or 0.0) for w, part in self.parts if part.kind != "logits"]
        known = all(part.slope_sum is not None for _, part in self.parts)
        self.slope_sum = sum(sums) if known else None  # None: it must be summed
        self.learns = bool(ask.learns and self.parts)
        # The student's softmax in the divergence is the one of the cross-entropy.
        whole = (ask.temperature, self.n) == (1, self.V) and ask.shard is None
        self.shared = self.softmax and whole

        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        self.factors = rows.factors.to(dtype)
        count = 5 if ask.diagnostics else 2
        self.values = torch.zeros((count, rows.factors.shape[1]), dtype=dtype, device=device)
        # Elsewhere a decision on data would be a device sync.
        self.on_cpu = device.type == "cpu"
        if self.on_cpu:
            buffers.teach_malloc()
        self.all_count = self.on_cpu and bool((self.factors[0] != 0).all())
        self.learns_ce = rows.labels is not None
        if self.on_cpu:
            self.learns_ce = self.learns_ce and bool(self.factors[2].any())

        # Little beside a chunk of an LM head's rows.
        T = rows.factors.shape[1]
        self.size = min(block_rows(self.V, device), max(1, T // 20, LEAST_ENTRIES // self.V))
        # Allocated once: what is freed in between costs page faults again.
        logits = any(part.kind == "logits" for _, part in self.parts)
        count = 4 * self.softmax + 2 * bool(mixed) + logits
        self.work = buffers.empty((count, self.size, self.n), student, dtype)
        columns = self.V if rows.labels is not None and not self.shared else 0
        self.work_1 = buffers.empty((2, self.size, columns), student, dtype)

    def blocks(self, grad: Tensor | None) -> Iterator[_Block]:
        """Those with rows that count; the gradient of the others is 0."""
        labels, teacher = self.rows.labels, self.rows.teacher
        sides = [self.rows.student] if teacher is None else [self.rows.student, teacher]
        for rows, (s, *t) in blocks_of(self.size, *sides):
            factors = self.factors[:, rows, None]
            g = None if grad is None else grad[rows]
            if not self.on_cpu or self.all_count or factors[0].any():
                label = None if labels is None else labels[rows, None].long()
                t = t[0][:, : self.n] if t else None
                work = self.work[:, : len(s)], self.work_1[:, : len(s)]
                yield _Block(rows, s, t, label, factors, g, *work)
            elif g is not None:
                g.zero_()


def _whole_rows(job: _Job) -> None:
    """One pass over the rows, into the values and the gradient."""
    values = job.values
    for block in job.blocks(job.rows.grad):
        kd = _compared(job, block) if job.parts else None
        if kd is not None:
            values[0, block.rows] = kd.measures[0].clamp_(min=0)
            for row, measure in enumerate(kd.measures[1:], 2):
                values[row, block.rows] = measure
        ce = None
        if block.label is not None:
            a = kd.student if job.shared else softmax(block.student, 1.0, *block.work_1)
            label = block.label.clamp(min=0)
            at_label = logits_at(block.student, label, None, values.dtype)
            values[1, block.rows] = surprise(a.maximum, a.anchor, a.log_total, at_label)
            ce = a.p, label, block.factors[2]
        if block.grad is not None:
            slope_sum = job.slope_sum
            if slope_sum is None and job.learns:
                slope_sum = kd.slope.sum(-1, keepdim=True)
            _write_gradient(job, block, kd, slope_sum, ce)


def _shards(job: _Job) -> None:
    """Of vocabulary shards: a pass over all rows for each of the kernel's three phases, and between
    them a gather."""
    ask, values, n = job.ask, job.values, job.n
    # `statistics` of student, teacher, student at T = 1, mixed logits; Σ and number of the
    # differences; the label's logit.
    stats = values.new_zeros((values.shape[1], 11))
    stats[:, 0:8:2] = -math.inf
    for block in job.blocks(None):
        rows, s, t, work = block.rows, block.student, block.teacher, block.work
        if n and job.softmax:
            stats[rows, 0:2], dead_s = statistics(s[:, :n], ask.temperature, *work[:2])
            stats[rows, 2:4], dead_t = statistics(t, ask.temperature, *work[:2])
            if job.mixed:
                z = _mix(s[:, :n], t, (dead_s, dead_t), job.mixed.mixing, work[0])
                stats[rows, 6:8], _ = statistics(z, ask.temperature, *work[:2])
        if n and any(part.kind == "logits" for _, part in job.parts):
            dead, _ = _difference(s[:, :n], t, work[-1])
            stats[rows, 8] = work[-1].sum(-1)
            stats[rows, 9] = n if dead is None else (~dead).sum(-1).to(stats.dtype)
        if block.label is not None:
            stats[rows, 4:6], _ = statistics(s, 1.0, *block.work_1)
            label, here = in_shard(block.label, s)
            stats[rows, 10:] = logits_at(s, label, here, stats.dtype)
    stats = ask.shard.gather(stats)
    temperatures = (ask.temperature, ask.temperature, 1.0, ask.temperature)
    sides = [merged(stats[..., 2 * i : 2 * i + 2], T) for i, T in enumerate(temperatures)]
    known = torch.cat([*sides, stats[..., 8:10].sum(0)], -1)
    if job.rows.labels is not None:  # of all rows at once: the same bits whatever the blocks are
        maximum, total = known[:, 4:5], known[:, 5:6]
        log_total = total.masked_fill(total == 0, 1).log()
        anchor = anchor_of(maximum, 1 / LN_2)
        values[1] = surprise(maximum, anchor, log_total, stats[..., 10:].amax(0))

    sums = values.new_zeros((values.shape[1], len(values) if job.softmax else 2))
    late = job.learns and job.slope_sum is None  # then the gradient waits for the third phase

    def sweep(value: bool, grad: Tensor | None, slope_sum: float | Tensor | None) -> None:
        """The second phase or the third, the gradient in either."""
        for block in job.blocks(grad):
            rows, kd = block.rows, None
            if n and job.parts:
                kd = _compared(job, block, known[rows], value and sums.shape[1] == 5)
            if kd is not None and value:
                sums[rows, 0] = kd.measures[0]
                for column, measure in enumerate(kd.measures[1:], 2):
                    sums[rows, column] = measure
                if late:
                    sums[rows, 1] = kd.slope.sum(-1)
            if block.grad is not None:
                ce = None
                if job.learns_ce:
                    label, here = in_shard(block.label, block.student)
                    a = softmax(block.student, 1.0, *block.work_1, known[rows, 4:6])
                    ce = a.p, label, here * block.factors[2]
                mean = slope_sum[rows] if isinstance(slope_sum, Tensor) else slope_sum
                _write_gradient(job, block, kd, mean, ce)

    sweep(True, None if late else job.rows.grad, job.slope_sum)
    if not job.parts:
        return
    total = ask.shard.gather(sums).sum(0).T
    if late and job.rows.grad is not None:
        sweep(False, job.rows.grad, total[1, :, None])
    values[0] = total[0].clamp(min=0)
    if len(total) == 5:
        values[2:] = total[2:]
        values[4].clamp_(max=1)  # a maximum on several shards is one agreement


class _Compared(NamedTuple):
    """What a divergence says of a block."""

    measures: list[Tensor]  # (rows,): its value; with diagnostics entropies and agreement
    student: Softmax | None  # None where no part of the divergence has one
    slope: Tensor | None  # (rows, n), of the parts with a softmax
    direct: Tensor | None  # (rows, n), gradient wrt the logits of those without


def _compared(
    job: _Job, block: _Block, known: Tensor | None = None, diagnostics: bool | None = None
) -> _Compared:
    """`known`: (rows, 10) statistics of the rows that these are shards of."""
    ask, work = job.ask, block.work
    s, t = block.student[:, : job.n], block.teacher
    diagnostics = ask.diagnostics if diagnostics is None else diagnostics
    a = infinite = None
    sides, measures = (), []
    if job.softmax:
        a, b = (
            softmax(x, ask.temperature, *work[i : i + 2], _columns(known, i))
            for i, x in ((0, s), (2, t))
        )
        sides = (b.log_p, a.log_p, b.p, a.p)
        empty = [a.empty, b.empty]
        if job.mixed:
            z = _mix(s, t, (a.dead, b.dead), job.mixed.mixing, work[4])
            c = softmax(z, ask.temperature, *work[4:6], _columns(known, 6))
            sides = (b.log_p, a.log_p, c.log_p, b.p, a.p, c.p)
            empty.append(c.empty)
        # Before the terms overwrite what they are given:
        infinite = _infinite(a, b, empty, ask.divergence)
        if diagnostics:
            measures = [-(side.p * side.log_p).sum(-1) for side in (b, a)]
            behind = (s - a.maximum).add_(t - b.maximum)  # 0 where both are at their maximum
            measures.append((behind.amax(-1) == 0).to(a.p.dtype))
    value = slope = direct = None
    last = [part for _, part in job.parts if part.kind != "logits"][-1:]
    for weight, part in job.parts:
        if part.kind == "logits":
            own = work[-1] if direct is None else torch.empty_like(work[-1])
            of_part, gradient = _logits_term(part, s, t, own, job, known)
            direct = _plus(direct, gradient, weight)
        else:
            given = sides
            if job.mixed and part.kind != "mixed":
                given = (sides[0], sides[1], sides[3], sides[4])
            if part is not last[0]:  # terms may overwrite all but q
                given = [x if x is a.p else x.clone() for x in given]
            of_part, gradient = part.term(*given)
            slope = _plus(slope, gradient, weight)
        value = _plus(value, of_part, weight)
    if infinite is not None:
        value = value.masked_fill(infinite, math.inf)
    return _Compared([value, *measures], a, slope, direct)


def _columns(known: Tensor | None, first: int) -> Tensor | None:
    return None if known is None else known[:, first : first + 2]


def _plus(total: Tensor | None, x: Tensor, weight: float) -> Tensor:
    if total is None:
        return x if weight == 1 else x.mul_(weight)
    return total.add_(x, alpha=weight)


def _write_gradient(
    job: _Job,
    block: _Block,
    kd: _Compared | None,
    slope_sum: float | Tensor | None,
    ce: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """`ce`: None, or the probabilities at T = 1, the label and its (rows, 1) part of the
    gradient."""
    # Everything has been read: from here on, the gradient may overwrite the student.
    g, dtype = block.grad, job.values.dtype
    out = g if g.dtype == dtype else torch.empty(g.shape, dtype=dtype, device=g.device)
    seen = out[:, : job.n]
    learns = kd is not None and job.learns
    of_kd = block.factors[1] if learns else None
    if learns and kd.slope is not None:
        if isinstance(slope_sum, Tensor):
            torch.mul(kd.student.p, -slope_sum, out=seen).add_(kd.slope)
        else:
            torch.add(kd.slope, kd.student.p, alpha=-slope_sum, out=seen)
        seen.mul_(of_kd / job.ask.temperature)
        if kd.direct is not None:
            seen.addcmul_(kd.direct, of_kd)
    elif learns:
        torch.mul(kd.direct, of_kd, out=seen)
    if job.ask.learns == "by row" and learns:
        seen.masked_fill_(of_kd == 0, 0)  # not 0 · NaN
    if learns and job.n < job.V:
        out[:, job.n :].zero_()
    if ce is not None and job.learns_ce:
        p, label, at_label = ce
        if learns:
            out.addcmul_(p, block.factors[2])
        else:
            torch.mul(p, block.factors[2], out=out)
        out.scatter_add_(-1, label, -at_label)
    elif not learns:
        out.zero_()
    if not job.all_count:
        out.masked_fill_(block.factors[0] == 0, 0)  # an ignored row may hold anything, NaN too
    if out is not g:
        g.copy_(out)


def _infinite(a: Softmax, b: Softmax, empty: list[Tensor | None], divergence: Divergence):
    """Rows whose divergence is +inf by definition, or None: a distribution without support, or
    outside the other's."""
    if a.dead is None and b.dead is None:
        return None
    infinite = torch.zeros(len(a.p), dtype=torch.bool, device=a.p.device)
    for rows in empty:
        if rows is not None:
            infinite |= rows
    if divergence.infinite_p and b.dead is not None:
        infinite |= (b.dead & (a.p > 0)).any(-1)
    if divergence.infinite_q and a.dead is not None:
        infinite |= (a.dead & (b.p > 0)).any(-1)
    return infinite


def _mix(s, t, dead: tuple[Tensor | None, Tensor | None], mixing: tuple[float, float], mixed):
    """Mixed logits; an entry that is dead on a side that counts is dead."""
    mixed.zero_()
    for logits, weight in zip((s, t), mixing, strict=True):
        if weight:
            mixed.add_(logits, alpha=weight)
    for entries, weight in zip(dead, mixing, strict=True):
        if weight and entries is not None:
            mixed.masked_fill_(entries, -math.inf)
    return mixed


def _logits_term(part: Divergence, s, t, difference, job: _Job, known: Tensor | None):
    """(rows,) values and the gradient of a part of kind "logits", in `difference`; entries that are
    dead on either side are left out of both sums."""
    dead, outside = _difference(s, t, difference)
    entries = job.n if known is None else job.ask.shard.n
    centered = part.numbers[0]
    if centered:
        if known is not None:
            total, alive = known[:, 8:9], known[:, 9:10].clamp(min=1)
        else:
            total = difference.sum(-1, keepdim=True)
            alive = entries if dead is None else (~dead).sum(-1, keepdim=True).clamp(min=1)
        difference.sub_(centered * total / alive)
        if dead is not None:
            difference.masked_fill_(dead, 0)
    entries = entries.to(difference.dtype) if isinstance(entries, Tensor) else entries
    value, gradient = part.term(difference, 1 / entries)
    if outside is not None:
        value.masked_fill_(outside, math.inf)
    return value, gradient


def _difference(s, t, difference):
    """s - t into `difference`; the entries that are dead on either side, where it is 0, and the
    rows with one that is dead on one side only, or None and None."""
    if s.dtype == t.dtype == difference.dtype:
        torch.sub(s, t, out=difference)
    else:
        difference.copy_(s).sub_(t)
    if s.device.type == "cpu" and s.amin() > DEAD and t.amin() > DEAD:
        return None, None
    dead_s, dead_t = s <= DEAD, t <= DEAD
    dead = dead_s | dead_t
    difference.masked_fill_(dead, 0)
    return dead, (dead_s != dead_t).any(-1)
