"""Dense logits: one algorithm for every divergence, in three phases over the vocabulary.

    statistics  the running maximum and sum of exponentials of each side
    value       Σ value_v and Σ slope_v of the divergence's terms
    gradient    (slope_v - q_v Σ slope) / T; in the value phase already where Σ slope is known

A row is shared by SPLIT programs, a team, each of which owns TILES blocks of the vocabulary; they
meet through a small global buffer. On a GPU a team streams through its rows, and the later phases
of a row lag behind the statistics of the next: nobody waits for long, and the logits are read once
from memory and again from the cache while they are still there (6 bytes an entry in bf16: two
reads, one write). With SPLIT = 1 a program owns a row, and nobody waits at all.

Vocabulary shards are teams across devices: the phases are launches, and what the programs of a team
pass through the buffer goes through the caller's `gather`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .block import (
    DEAD,
    LN_2,
    LOG2_E,
    NEG_INF,
    PER_PART,
    accumulate,
    int64,
    load_logits,
    log_softmax,
    no_entries,
    read_numbers,
    row_start,
    store_zeros,
    with_infinity,
)
from .launch import scale_

__all__ = ["dense", "scale_"]

# (maximum, sum) of: student, teacher, student at T = 1, mixed logits. With a divergence of the
# logits themselves also: entries, Σ of the differences, differences, nothing.
STATS = tl.constexpr(8)
ALL_STATS = tl.constexpr(12)


class Pointers(NamedTuple):
    """The tensors of a launch."""

    student: object
    teacher: object
    labels: object
    factors: object
    stats: object
    sums: object
    cross_entropy: object  # before phase 2, the label's logit
    grad: object
    flags: object  # of rows: how many programs have done phase 1; and T further on, phase 2
    numbers: object


class Sizes(NamedTuple):
    """Shapes and strides of a launch."""

    T: object
    n: object
    V: object
    s_len: object
    s_outer: object
    s_inner: object
    t_len: object
    t_outer: object
    t_inner: object
    factor_stride: object
    number_stride: object


class Sides(NamedTuple):
    """What the statistics of a row say: (maximum, log2 of the sum) of each side at the divergence's
    temperature, of the student at 1 and of the mixed logits; the mean difference of the logits,
    and an entry's share in a mean."""

    student: object
    teacher: object
    at_one: object
    mixed: object
    difference: object
    share: object


@triton.jit
def _numbers_of(row, at, sizes, numbers, WHAT: tl.constexpr):
    ptr = at.numbers + row * sizes.number_stride
    return read_numbers(numbers, ptr, len(WHAT.terms), WHAT.data)


@triton.jit
def _mix(x, y, numbers):
    """Mixed logits; an entry that is dead on a side that counts is dead."""
    mix_s, mix_t = numbers.mix_s, numbers.mix_t
    from_s = tl.where(mix_s == 0.0, 0.0, mix_s * x)
    from_t = tl.where(mix_t == 0.0, 0.0, mix_t * y)
    x, y = tl.where(mix_s == 0.0, 0.0, x), tl.where(mix_t == 0.0, 0.0, y)
    return tl.where((x == NEG_INF) | (y == NEG_INF), NEG_INF, from_s + from_t)


@triton.jit
def _of_team(stats, slot, other, WHAT: tl.constexpr, CUT: tl.constexpr):
    """What each program of a team has written to a slot; its other programs wrote most of it."""
    STRIDE: tl.constexpr = ALL_STATS if WHAT.difference else STATS
    SPLIT_2: tl.constexpr = CUT.split_2
    parts = tl.arange(0, SPLIT_2)
    at = stats + parts * STRIDE + slot
    return tl.load(at, mask=parts < CUT.split, other=other, cache_modifier=".cg")


@triton.jit
def _meet(stats, slot, scale, WHAT: tl.constexpr, CUT: tl.constexpr):
    """The team's maximum and log2 of its sum; (0, +inf) where no entry is in the support."""
    high = _of_team(stats, slot, NEG_INF, WHAT, CUT)
    part = _of_team(stats, slot + 1, 0.0, WHAT, CUT)
    maximum = tl.max(high, 0)
    maximum = tl.where(maximum == NEG_INF, 0.0, maximum)
    total = tl.sum(part * tl.exp2((high - maximum) * scale), 0)
    return maximum, tl.where(total == 0.0, float("inf"), tl.log2(total))


@triton.jit
def _sides(stats, numbers, WHAT: tl.constexpr, CUT: tl.constexpr):
    zero = tl.full((), 0.0, tl.float32)
    student, teacher, at_one, mixed = (zero, zero), (zero, zero), (zero, zero), (zero, zero)
    difference, share = zero, zero
    if WHAT.softmax:
        student = _meet(stats, 0, numbers.scale, WHAT, CUT)
        teacher = _meet(stats, 2, numbers.scale, WHAT, CUT)
    if WHAT.ce == "own":
        at_one = _meet(stats, 4, LOG2_E, WHAT, CUT)
    if WHAT.ce == "shared":
        at_one = student
    if WHAT.mixed:
        mixed = _meet(stats, 6, numbers.scale, WHAT, CUT)
    if WHAT.difference:
        share = 1.0 / tl.maximum(tl.sum(_of_team(stats, 8, 0.0, WHAT, CUT), 0), 1.0)
        alive = tl.sum(_of_team(stats, 10, 0.0, WHAT, CUT), 0)
        difference = tl.sum(_of_team(stats, 9, 0.0, WHAT, CUT), 0) / tl.maximum(alive, 1.0)
    return Sides(student, teacher, at_one, mixed, difference, share)


@triton.jit
def _wait(flag_ptr, SPLIT: tl.constexpr):
    while tl.atomic_add(flag_ptr, 0, sem="acquire", scope="gpu") < SPLIT:
        pass


@triton.jit
def _announce(flag_ptr):
    tl.debug_barrier()
    tl.atomic_add(flag_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _entries(x, y, sides, numbers, WHAT: tl.constexpr):
    """Of a block of entries: value, slope of the divergences of distributions, slope of those of
    the logits themselves, student probability, p log p and q log q."""
    dead_s, dead_t = x == NEG_INF, y == NEG_INF
    zeros = tl.zeros_like(x)
    p, q, r, log_p, log_q, log_r = zeros, zeros, zeros, zeros, zeros, zeros
    if WHAT.softmax:
        log_q, q = log_softmax(x, sides.student, numbers.scale)
        log_p, p = log_softmax(y, sides.teacher, numbers.scale)
    if WHAT.mixed:
        log_r, r = log_softmax(_mix(x, y, numbers), sides.mixed, numbers.scale)
    value, slope, direct = None, None, None  # 0 + x would not be free
    for i in tl.static_range(len(WHAT.terms)):
        a, b = numbers.parts[i * PER_PART + 1], numbers.parts[i * PER_PART + 2]
        if WHAT.kinds[i] == "logits":
            apart = tl.where(dead_s | dead_t, 0.0, x - y - a * sides.difference)
            v, s = WHAT.terms[i](apart, sides.share)
            v = tl.where(dead_s != dead_t, float("inf"), v)
        else:
            if WHAT.kinds[i] == "mixed":
                v, s = WHAT.terms[i](log_p, log_q, log_r, p, q, r, a, b)
            else:
                v, s = WHAT.terms[i](log_p, log_q, p, q, a, b)
            for_p, for_q = numbers.parts[i * PER_PART + 3], numbers.parts[i * PER_PART + 4]
            v = with_infinity(v, dead_t & (q > 0.0), for_p, WHAT.infinite_p[i])
            v = with_infinity(v, dead_s & (p > 0.0), for_q, WHAT.infinite_q[i])
            outside = dead_s & dead_t
            v, s = tl.where(outside, 0.0, v), tl.where(outside, 0.0, s)
        if WHAT.weighed[i]:
            v, s = numbers.parts[i * PER_PART] * v, numbers.parts[i * PER_PART] * s
        value = v if value is None else value + v
        if WHAT.kinds[i] == "logits":
            direct = s if direct is None else direct + s
        else:
            slope = s if slope is None else slope + s
    value = zeros if value is None else value
    slope = zeros if slope is None else slope
    direct = zeros if direct is None else direct
    return value, slope, direct, q, p * log_p, q * log_q


@triton.jit
def _statistics(row, first, out, at, sizes, numbers, WHAT: tl.constexpr, CUT: tl.constexpr):
    """Phase 1 of the part of a row that begins at entry `first`."""
    BLOCK: tl.constexpr = CUT.block
    s_row = row_start(at.student, row, sizes.s_len, sizes.s_outer, sizes.s_inner)
    t_row = row_start(at.teacher, row, sizes.t_len, sizes.t_outer, sizes.t_inner)
    ms, ls = no_entries(BLOCK)
    mt, lt = no_entries(BLOCK)
    m1, l1 = no_entries(BLOCK)
    mz, lz = no_entries(BLOCK)
    differences, alive = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for k in range(CUT.tiles):
        cols = first + k * BLOCK + tl.arange(0, BLOCK)
        x = load_logits(s_row, cols, sizes.V)
        if WHAT.ce == "own":
            m1, l1 = accumulate(m1, l1, x, LOG2_E)
        if len(WHAT.terms) > 0:
            y = load_logits(t_row, cols, sizes.n)
            x = tl.where(cols < sizes.n, x, NEG_INF)
            if WHAT.difference:
                both = (x != NEG_INF) & (y != NEG_INF)
                differences += tl.where(both, x - y, 0.0)
                alive += tl.where(both, 1.0, 0.0)
            if WHAT.softmax:
                ms, ls = accumulate(ms, ls, x, numbers.scale)
                mt, lt = accumulate(mt, lt, y, numbers.scale)
            if WHAT.mixed:
                mz, lz = accumulate(mz, lz, _mix(x, y, numbers), numbers.scale)
    if WHAT.softmax:
        tl.store(out, ms)
        tl.store(out + 1, tl.sum(ls, 0))
        tl.store(out + 2, mt)
        tl.store(out + 3, tl.sum(lt, 0))
    if WHAT.ce == "own":
        tl.store(out + 4, m1)
        tl.store(out + 5, tl.sum(l1, 0))
    if WHAT.mixed:
        tl.store(out + 6, mz)
        tl.store(out + 7, tl.sum(lz, 0))
    if WHAT.difference:
        entries = tl.minimum(tl.maximum(sizes.n - first, 0), CUT.tiles * BLOCK)
        tl.store(out + 8, entries.to(tl.float32))
        tl.store(out + 9, tl.sum(differences, 0))
        tl.store(out + 10, tl.sum(alive, 0))


@triton.jit
def _sweep(j, part, at, sizes, numbers, PHASE: tl.constexpr, WHAT: tl.constexpr, CUT: tl.constexpr):
    """Phase 2 (value) or 4 (gradient) of one part of row j; without WHAT.mean the gradient is
    written in phase 2."""
    BLOCK: tl.constexpr = CUT.block
    VALUE: tl.constexpr = PHASE == 2
    GRAD: tl.constexpr = WHAT.grad and (PHASE == 4 or not WHAT.mean)
    STRIDE: tl.constexpr = ALL_STATS if WHAT.difference else STATS
    SUMS: tl.constexpr = 5 if WHAT.diagnostics else 2
    row = int64(j)
    first = part * CUT.tiles * BLOCK
    grad_row = at.grad + row * sizes.V
    factors = at.factors + row
    if tl.load(factors) == 0.0:
        if GRAD:
            store_zeros(grad_row, first, first + CUT.tiles * BLOCK, sizes.V, BLOCK)
    else:
        s_row = row_start(at.student, row, sizes.s_len, sizes.s_outer, sizes.s_inner)
        t_row = row_start(at.teacher, row, sizes.t_len, sizes.t_outer, sizes.t_inner)
        stats = at.stats + row * CUT.split * STRIDE
        sums = at.sums + row * CUT.split * SUMS
        if CUT.waits:
            _wait(at.flags + (sizes.T if PHASE == 4 else 0) + row, CUT.split)

        own = _numbers_of(row, at, sizes, numbers, WHAT)
        sides = _sides(stats, own, WHAT, CUT)
        at_one = sides.at_one
        label = 0
        if WHAT.ce != "none":
            label = tl.load(at.labels + row).to(tl.int32)
            if VALUE:
                if part == 0:
                    ce = at.cross_entropy + row
                    tl.store(ce, at_one[1] * LN_2 + (at_one[0] - tl.load(ce)))
        mean = own.slope_sum
        if not VALUE:
            SPLIT_2: tl.constexpr = CUT.split_2
            parts = tl.arange(0, SPLIT_2)
            slope_sums = sums + parts * SUMS + 1
            mask = parts < CUT.split
            mean = tl.sum(tl.load(slope_sums, mask=mask, other=0.0, cache_modifier=".cg"), 0)
        of_kd, of_direct, of_ce = 0.0, 0.0, 0.0
        if GRAD and WHAT.learns:
            of_direct = tl.load(factors + sizes.factor_stride)
            of_kd = of_direct * own.inverse
        if GRAD and WHAT.ce != "none":
            of_ce = tl.load(factors + 2 * sizes.factor_stride)

        values, slopes = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        h_p, h_q = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        agree = tl.zeros([BLOCK], tl.float32)
        for k in range(CUT.tiles):
            cols = first + k * BLOCK + tl.arange(0, BLOCK)
            full = load_logits(s_row, cols, sizes.V)
            grad = tl.zeros([BLOCK], tl.float32)
            q = grad
            if len(WHAT.terms) > 0:
                y = load_logits(t_row, cols, sizes.n)
                x = tl.where(cols < sizes.n, full, NEG_INF)
                value, slope, direct, q, p_log_p, q_log_q = _entries(x, y, sides, own, WHAT)
                if VALUE:
                    values += value
                    if WHAT.mean:
                        slopes += slope
                    if WHAT.diagnostics:
                        h_p -= p_log_p
                        h_q -= q_log_q
                        best = (x == sides.student[0]) & (y == sides.teacher[0])
                        agree = tl.where(best, 1.0, agree)
                if WHAT.learns:
                    if WHAT.softmax:
                        grad = of_kd * (slope - q * mean)
                        if WHAT.difference:
                            grad += of_direct * direct
                    else:
                        grad = of_direct * direct
                    if WHAT.by_row:  # not 0 · NaN
                        grad = tl.where(of_direct == 0.0, 0.0, grad)
            if GRAD:
                if WHAT.ce != "none":
                    if WHAT.ce == "own":
                        q = tl.exp2((full - at_one[0]) * LOG2_E - at_one[1])
                    of_label = of_ce * (q - tl.where(cols == label, 1.0, 0.0))
                    grad = grad + of_label if WHAT.learns else of_label
                # Weighted in fp32, cast once; streamed past the cache, which holds logits.
                tl.store(grad_row + cols, grad, mask=cols < sizes.V, cache_modifier=".cs")
        if VALUE:
            total = tl.sum(values, 0)
            if WHAT.softmax:
                inf = float("inf")
                empty = (sides.student[1] == inf) | (sides.teacher[1] == inf)
                total = tl.where(empty | (sides.mixed[1] == inf), inf, total)
            tl.store(sums + part * SUMS, total)
            tl.store(sums + part * SUMS + 1, tl.sum(slopes, 0))
            if WHAT.diagnostics:
                tl.store(sums + part * SUMS + 2, tl.sum(h_p, 0))
                tl.store(sums + part * SUMS + 3, tl.sum(h_q, 0))
                tl.store(sums + part * SUMS + 4, tl.max(agree, 0))


@triton.jit(
    do_not_specialize=["T", "s_len", "t_len", "factor_stride", "number_stride", "lag", "step"],
    # Parts of larger tensors: where a chunk starts is no part of a kernel.
    do_not_specialize_on_alignment=["label_ptr", "factor_ptr", "ce_ptr"],
)
def dense_kernel(
    s_ptr, t_ptr, label_ptr, factor_ptr, stat_ptr, sum_ptr, ce_ptr, grad_ptr, flag_ptr, number_ptr,
    T, n, V, s_len, s_outer, s_inner, t_len, t_outer, t_inner, factor_stride, number_stride,
    lag, step,  # rows by which a phase lags behind, and from one row of a team to its next
    numbers,
    PHASES: tl.constexpr, WHAT: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """The three phases of every row; `dense` says what the arguments are, launch.py what is
    constant.

    PHASES: bit 1 statistics, 2 value, 4 gradient. All of them in one launch of teams wait for each
    other, so its programs must run at the same time; one launch a phase never waits. WHAT.mean: the
    gradient has a phase of its own. WHAT.diagnostics: each part also sums -p log p and -q log q,
    and has a 1 where it finds a maximum of both sides.
    """
    at = Pointers(
        s_ptr, t_ptr, label_ptr, factor_ptr, stat_ptr, sum_ptr, ce_ptr, grad_ptr, flag_ptr,
        number_ptr,
    )  # fmt: skip
    sizes = Sizes(
        T, n, V, s_len, s_outer, s_inner, t_len, t_outer, t_inner, factor_stride, number_stride
    )
    STRIDE: tl.constexpr = ALL_STATS if WHAT.difference else STATS
    part = tl.program_id(0) % CUT.split

    for i in range(tl.program_id(0) // CUT.split, T + 2 * lag, step):
        if PHASES & 1:
            if i < T:
                row = int64(i)
                if tl.load(factor_ptr + row) != 0.0:
                    if WHAT.ce != "none":
                        if part == 0:  # now: the gradient may overwrite the student's logits
                            s_row = row_start(s_ptr, row, s_len, s_outer, s_inner)
                            label = tl.load(label_ptr + row)
                            here = (label >= 0) & (label < V)  # else in another shard
                            at_label = tl.load(s_row + label, mask=here, other=NEG_INF)
                            at_label = at_label.to(tl.float32)
                            dead = at_label <= DEAD
                            tl.store(ce_ptr + row, tl.where(dead, NEG_INF, at_label))
                    own = _numbers_of(row, at, sizes, numbers, WHAT)
                    out = stat_ptr + (row * CUT.split + part) * STRIDE
                    first = part * CUT.tiles * CUT.block
                    _statistics(row, first, out, at, sizes, own, WHAT, CUT)
                if CUT.waits:
                    _announce(flag_ptr + row)
            if CUT.split == 1:
                tl.debug_barrier()
        if PHASES & 2:
            j = i - lag
            if (j >= 0) & (j < T):
                _sweep(j, part, at, sizes, numbers, 2, WHAT, CUT)
                if CUT.waits and WHAT.mean:
                    _announce(flag_ptr + T + j)
            if CUT.split == 1 and WHAT.mean:
                tl.debug_barrier()
        if PHASES & 4 and WHAT.mean:
            j = i - 2 * lag
            if (j >= 0) & (j < T):
                _sweep(j, part, at, sizes, numbers, 4, WHAT, CUT)


def dense(rows, ask, *, plan: launch.DensePlan | None = None) -> torch.Tensor:
    """Divergence and cross-entropy of every row, and the gradient of their weighted sum.

    The row function of fastkd/rows.py for teachers that have logits, and for none. Of students in
    fp64 it makes fp32: they are not for this backend.

    Args:
        rows: `Rows`.
        ask: `Ask`. With a shard a program has a row to itself.
        plan: how the launch is cut, for tests and tuning.

    Returns:
        (2, T) fp32 divergence and cross-entropy, 0 where there is none; with diagnostics (5, T):
        the entropies of teacher and student, in nats, at the temperature, over the entries that the
        divergence sees, and 1 where some entry is a maximum of both sides, else 0. They are NaN
        where there are no distributions: without a teacher, and if all the divergence's parts are
        of kind "logits". 0 where the weight is.
    """
    student, teacher, labels = rows.student, rows.teacher, rows.labels
    T, V, device = rows.factors.shape[1], student.shape[-1], student.device
    if not T:
        return torch.zeros((5 if ask.diagnostics else 2, 0), dtype=torch.float32, device=device)
    # Strides of 1 along T: a chunk of rows is a part of larger tensors.
    factors = rows.factors if rows.factors.stride(1) == 1 else rows.factors.contiguous()
    n = V if ask.n is None or teacher is None else ask.n
    gather = ask.shard.gather if ask.shard is not None else None
    every = launch.numbers_of(ask, teacher is not None)
    numbers, data = launch.pack(every, device)
    if plan is None:
        itemsize = student.element_size() + (0 if teacher is None else teacher.element_size())
        on_device = launch.dense_device(device, alone=gather is not None)
        heavy = launch.is_heavy(ask, teacher is not None)
        plan = launch.dense_plan(T, V, V * itemsize, on_device, heavy)
    what = dict(
        teacher=teacher is not None, labels=labels is not None, grad=rows.grad is not None,
        whole=n == V,
    )  # fmt: skip
    constants = launch.specialise_dense(ask, plan, **what)
    WHAT = constants["WHAT"]
    width = (ALL_STATS if WHAT.difference else STATS).value
    stats = torch.empty((T, plan.split, width), dtype=torch.float32, device=device)
    columns = 5 if WHAT.diagnostics else 2
    sums = torch.zeros((T, plan.split, columns), dtype=torch.float32, device=device)
    measures = torch.zeros((5 if ask.diagnostics else 2, T), dtype=torch.float32, device=device)
    flags = torch.zeros(2 * T, dtype=torch.int32, device=device) if plan.waits else sums
    # A team that waits does all phases in one launch, and so does a program alone; else each phase
    # is a launch.
    phases = (1, 2, 4) if WHAT.mean else (1, 2)
    if plan.waits or (plan.split == 1 and gather is None):
        phases = (7,)
    t = student if teacher is None else teacher
    with launch.on(device):
        for phase in phases:
            dense_kernel[(plan.teams * plan.split,)](
                student, t, factors if labels is None else labels, factors, stats, sums,
                measures[1], sums if rows.grad is None else rows.grad, flags,
                sums if data is None else data,
                T, n, V, student.shape[1], student.stride(0), student.stride(1),
                t.shape[1], t.stride(0), t.stride(1), factors.stride(0), 0,
                plan.teams if plan.waits else 0, plan.teams, numbers,
                **constants | dict(PHASES=phase),
                **launch.options_on(device, plan.warps, plan.waits),
            )  # fmt: skip
            if gather is not None and phase == 1:
                shards = gather(torch.cat([stats[:, 0], measures[1, :, None]], 1))
                stats[:, 0] = _meet_shards(shards[..., :-1], scale=every[0])
                measures[1] = shards[..., -1].amax(0)  # the label's logit, -inf where it is not
            if gather is not None and phase == 2 and teacher is not None:
                sums[:, 0] = _sum_parts(gather(sums[:, 0]).transpose(0, 1))
    total = _sum_parts(sums).clamp_(min=0)
    measures[0] = total[:, 0]
    if WHAT.diagnostics:
        measures[2:] = total[:, 2:].T
    elif ask.diagnostics:
        measures[2:] = torch.where(factors[0] == 0, 0.0, math.nan)
    return measures


def _meet_shards(stats: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """(T, STATS or ALL_STATS) of whole rows from (world, T, …) of their shards, as `_meet` does it;
    what is no softmax is a sum."""
    high, part = stats[..., : STATS.value].unflatten(-1, (-1, 2)).unbind(-1)
    maximum = high.amax(0)
    below = high - maximum.masked_fill(maximum == -math.inf, 0)
    at_one = below[..., 2] * LOG2_E.value
    below = below * scale
    below[..., 2] = at_one
    softmaxes = torch.stack([maximum, (part * torch.exp2(below)).sum(0)], -1).flatten(-2)
    return torch.cat([softmaxes, stats[..., STATS.value :].sum(0)], -1)


def _sum_parts(sums: torch.Tensor) -> torch.Tensor:
    """(T, parts, 2 or 5) to (T, 2 or 5); the last of 5, the agreement, is a maximum."""
    total = sums.sum(1)
    if total.shape[-1] == 5:
        total[:, 4] = sums[..., 4].amax(1)
    return total
