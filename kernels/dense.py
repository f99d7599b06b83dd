"""Dense logits: one algorithm for every divergence, in three phases over the vocabulary.

    statistics  the running maximum and sum of exponentials of each side
    value       Σ value_v and Σ slope_v of the divergence's term
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

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
DEAD = tl.constexpr(
    -1e30
)  # a logit at or below this is -inf: torch.finfo(dtype).min is a common mask
LOG_FLOOR = tl.constexpr(-1e4)  # stands for log 0
# (maximum, sum) of: student, teacher, student at T = 1, mixed logits. Kind "logits" has instead
# the number of entries and Σ of the differences, nothing and the number of differences.
STATS = tl.constexpr(8)


@triton.jit
def _wide(i):
    """Rows times V exceed 32 bits."""
    return tl.full((), 0, tl.int64) + i


@triton.jit
def _load(ptr, cols, n):
    x = tl.load(ptr + cols, mask=cols < n, other=NEG_INF).to(tl.float32)
    return tl.where(x <= DEAD, NEG_INF, x)


@triton.jit
def _nothing(BLOCK: tl.constexpr):
    return tl.full((), NEG_INF, tl.float32), tl.zeros([BLOCK], tl.float32)


@triton.jit
def _accumulate(maximum, total, x, scale):
    """Online softmax statistics: the sum stays one number per lane until the end."""
    high = tl.maximum(maximum, tl.max(x, 0))
    anchor = tl.where(high == NEG_INF, 0.0, high)
    return high, total * tl.exp2((maximum - anchor) * scale) + tl.exp2((x - anchor) * scale)


@triton.jit
def _mix(x, y, mix_s, mix_t):
    """Mixed logits; an entry that is dead on a side that counts is dead."""
    from_s = tl.where(mix_s == 0.0, 0.0, mix_s * x)
    from_t = tl.where(mix_t == 0.0, 0.0, mix_t * y)
    dead = ((x == NEG_INF) & (mix_s != 0.0)) | ((y == NEG_INF) & (mix_t != 0.0))
    return tl.where(dead, NEG_INF, from_s + from_t)


@triton.jit
def _meet(stat_ptr, parts, SPLIT, slot, scale):
    """The team's maximum and log2 of its sum; (0, +inf) where no entry is in the support."""
    mask = parts < SPLIT
    at = stat_ptr + parts * STATS + slot
    high = tl.load(at, mask=mask, other=NEG_INF, cache_modifier=".cg")  # written by other programs
    part = tl.load(at + 1, mask=mask, other=0.0, cache_modifier=".cg")
    maximum = tl.max(high, 0)
    maximum = tl.where(maximum == NEG_INF, 0.0, maximum)
    total = tl.sum(part * tl.exp2((high - maximum) * scale), 0)
    return maximum, tl.where(total == 0.0, float("inf"), tl.log2(total))


@triton.jit
def _log_softmax(x, maximum, log_total, scale):
    """Natural log-probability (finite) and probability."""
    z = (x - maximum) * scale - log_total
    return tl.where(z == NEG_INF, LOG_FLOOR, z * LN_2), tl.exp2(z)


@triton.jit
def _wait(flag_ptr, SPLIT: tl.constexpr):
    while tl.atomic_add(flag_ptr, 0, sem="acquire", scope="gpu") < SPLIT:
        pass


@triton.jit
def _announce(flag_ptr):
    tl.debug_barrier()
    tl.atomic_add(flag_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _term(
    x, y, ms, ls, mt, lt, mz, lz, center, scale, mix_s, mix_t, a, b,
    TERM: tl.constexpr, KIND: tl.constexpr, INFINITE_P: tl.constexpr, INFINITE_Q: tl.constexpr,
):  # fmt: skip
    """Value, slope, student probability, p log p and q log q of a block of entries."""
    dead_s, dead_t = x == NEG_INF, y == NEG_INF
    if KIND == "logits":
        q = tl.zeros_like(x)
        p_log_p, q_log_q = q, q
        delta = tl.where(dead_s | dead_t, 0.0, x - y - center)
        value, slope = b * delta * delta, 2.0 * b * delta
        value = tl.where(dead_s != dead_t, float("inf"), value)
    else:
        log_q, q = _log_softmax(x, ms, ls, scale)
        log_p, p = _log_softmax(y, mt, lt, scale)
        p_log_p, q_log_q = p * log_p, q * log_q
        if KIND == "mixed":
            z = _mix(x, y, mix_s, mix_t)
            log_r, r = _log_softmax(z, mz, lz, scale)
            value, slope = TERM(log_p, log_q, log_r, p, q, r, a, b)
        else:
            value, slope = TERM(log_p, log_q, p, q, a, b)
        if INFINITE_P:
            value = tl.where(dead_t & (q > 0.0), float("inf"), value)
        if INFINITE_Q:
            value = tl.where(dead_s & (p > 0.0), float("inf"), value)
        outside = dead_s & dead_t
        value, slope = tl.where(outside, 0.0, value), tl.where(outside, 0.0, slope)
    return value, slope, q, p_log_p, q_log_q


@triton.jit
def _row(ptr, row, length, outer, inner):
    """Start of a row of logits in (outer, length, V) strides: `logits[:, :-1]` needs no copy."""
    return ptr + row // length * outer + row % length * inner


@triton.jit
def _statistics(
    s_row, t_row, out, n, V, scale, mix_s, mix_t, first,
    KIND: tl.constexpr, CE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Phase 1 of one part of a row."""
    ms, ls = _nothing(BLOCK)
    mt, lt = _nothing(BLOCK)
    m1, l1 = _nothing(BLOCK)
    mz, lz = _nothing(BLOCK)
    for k in range(TILES):
        cols = first + k * BLOCK + tl.arange(0, BLOCK)
        x = _load(s_row, cols, V)
        y = _load(t_row, cols, n)
        if CE == "own":
            m1, l1 = _accumulate(m1, l1, x, LOG2_E)
        x = tl.where(cols < n, x, NEG_INF)
        if KIND == "logits":
            alive = (x != NEG_INF) & (y != NEG_INF)
            ls += tl.where(alive, x - y, 0.0)
            lt += tl.where(alive, 1.0, 0.0)
        else:
            ms, ls = _accumulate(ms, ls, x, scale)
            mt, lt = _accumulate(mt, lt, y, scale)
        if KIND == "mixed":
            mz, lz = _accumulate(mz, lz, _mix(x, y, mix_s, mix_t), scale)
    if KIND == "logits":
        ms = tl.minimum(tl.maximum(n - first, 0), TILES * BLOCK).to(tl.float32)
    tl.store(out, ms)
    tl.store(out + 1, tl.sum(ls, 0))
    tl.store(out + 2, mt)
    tl.store(out + 3, tl.sum(lt, 0))
    if CE == "own":
        tl.store(out + 4, m1)
        tl.store(out + 5, tl.sum(l1, 0))
    if KIND == "mixed":
        tl.store(out + 6, mz)
        tl.store(out + 7, tl.sum(lz, 0))


@triton.jit
def _sweep(
    j, s_ptr, t_ptr, label_ptr, weight_ptr, stat_ptr, sum_ptr, ce_ptr, grad_ptr, flag_ptr,
    T, n, V, s_len, s_outer, s_inner, t_len, t_outer, t_inner, part,
    scale, kd_scale, ce_scale, slope_sum, mix_s, mix_t, a, b,
    TERM: tl.constexpr, KIND: tl.constexpr, INFINITE_P: tl.constexpr, INFINITE_Q: tl.constexpr,
    MEAN: tl.constexpr, CE: tl.constexpr, DIAGNOSTICS: tl.constexpr,
    VALUE: tl.constexpr, GRAD: tl.constexpr, WAITS: tl.constexpr,
    SPLIT: tl.constexpr, SPLIT_2: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Phase 2 (VALUE) or 3 of one part of row j, the gradient written in either (GRAD)."""
    row = _wide(j)
    first = part * TILES * BLOCK
    grad_row = grad_ptr + row * V
    weight = tl.load(weight_ptr + row)
    if weight == 0.0:
        if GRAD:
            for k in range(TILES):
                cols = first + k * BLOCK + tl.arange(0, BLOCK)
                tl.store(grad_row + cols, tl.zeros([BLOCK], tl.float32), mask=cols < V)
    else:
        s_row = _row(s_ptr, row, s_len, s_outer, s_inner)
        t_row = _row(t_ptr, row, t_len, t_outer, t_inner)
        stats = stat_ptr + row * SPLIT * STATS
        SUMS: tl.constexpr = 5 if DIAGNOSTICS else 2
        sums = sum_ptr + row * SPLIT * SUMS
        if WAITS:
            _wait(flag_ptr + row, SPLIT)

        parts = tl.arange(0, SPLIT_2)
        zero = tl.full((), 0.0, tl.float32)
        ms, ls, mt, lt = zero, zero, zero, zero
        mz, lz, m1, l1 = zero, zero, zero, zero
        center = zero
        if KIND == "logits":
            at = stats + parts * STATS
            entries = tl.load(at, mask=parts < SPLIT, other=0.0, cache_modifier=".cg")
            delta = tl.load(at + 1, mask=parts < SPLIT, other=0.0, cache_modifier=".cg")
            alive = tl.load(at + 3, mask=parts < SPLIT, other=0.0, cache_modifier=".cg")
            center = a * tl.sum(delta, 0) / tl.maximum(tl.sum(alive, 0), 1.0)
            b = 1.0 / tl.maximum(tl.sum(entries, 0), 1.0)
        else:
            ms, ls = _meet(stats, parts, SPLIT, 0, scale)
            mt, lt = _meet(stats, parts, SPLIT, 2, scale)
        if KIND == "mixed":
            mz, lz = _meet(stats, parts, SPLIT, 6, scale)
        label = 0
        if CE != "none":
            if CE == "own":
                m1, l1 = _meet(stats, parts, SPLIT, 4, LOG2_E)
            else:
                m1, l1 = ms, ls
            label = tl.load(label_ptr + row).to(tl.int32)
            if VALUE:
                if part == 0:
                    tl.store(ce_ptr + row, l1 * LN_2 + (m1 - tl.load(ce_ptr + row)))
        mean = slope_sum
        if not VALUE:
            at = sums + parts * SUMS + 1
            mean = tl.sum(tl.load(at, mask=parts < SPLIT, other=0.0, cache_modifier=".cg"), 0)

        values, slopes = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        h_p, h_q = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        agree = tl.zeros([BLOCK], tl.float32)
        for k in range(TILES):
            cols = first + k * BLOCK + tl.arange(0, BLOCK)
            full = _load(s_row, cols, V)
            y = _load(t_row, cols, n)
            x = tl.where(cols < n, full, NEG_INF)
            value, slope, q, p_log_p, q_log_q = _term(
                x, y, ms, ls, mt, lt, mz, lz, center, scale, mix_s, mix_t, a, b,
                TERM, KIND, INFINITE_P, INFINITE_Q,
            )  # fmt: skip
            if VALUE:
                values += value
                if MEAN:
                    slopes += slope
                if DIAGNOSTICS:
                    h_p -= p_log_p
                    h_q -= q_log_q
                    agree = tl.where((x == ms) & (y == mt), 1.0, agree)
            if GRAD:
                grad = kd_scale * (slope - q * mean)
                if CE != "none":
                    q1 = q if CE == "shared" else tl.exp2((full - m1) * LOG2_E - l1)
                    grad += ce_scale * (q1 - tl.where(cols == label, 1.0, 0.0))
                # Weighted in fp32, cast once; streamed past the cache, which holds logits.
                tl.store(grad_row + cols, weight * grad, mask=cols < V, cache_modifier=".cs")
        if VALUE:
            empty = (ls == float("inf")) | (lt == float("inf")) | (lz == float("inf"))
            tl.store(sums + part * SUMS, tl.where(empty, float("inf"), tl.sum(values, 0)))
            tl.store(sums + part * SUMS + 1, tl.sum(slopes, 0))
            if DIAGNOSTICS:
                tl.store(sums + part * SUMS + 2, tl.sum(h_p, 0))
                tl.store(sums + part * SUMS + 3, tl.sum(h_q, 0))
                tl.store(sums + part * SUMS + 4, tl.max(agree, 0))


@triton.jit(
    do_not_specialize=["T", "s_len", "t_len", "lag", "step"],
    # Parts of larger tensors: where a chunk starts is no part of a kernel.
    do_not_specialize_on_alignment=["label_ptr", "weight_ptr", "ce_ptr"],
)
def dense_kernel(
    s_ptr, t_ptr, label_ptr, weight_ptr, stat_ptr, sum_ptr, ce_ptr, grad_ptr, flag_ptr,  # pointers
    T, n, V, s_len, s_outer, s_inner, t_len, t_outer, t_inner, lag, step,  # shapes, strides, rows
    scale, kd_scale, ce_scale, slope_sum, mix_s, mix_t, a, b,  # numbers
    TERM: tl.constexpr, KIND: tl.constexpr, INFINITE_P: tl.constexpr, INFINITE_Q: tl.constexpr,
    MEAN: tl.constexpr, CE: tl.constexpr, GRAD: tl.constexpr,
    DIAGNOSTICS: tl.constexpr,  # what is computed
    PHASES: tl.constexpr, SPLIT: tl.constexpr, SPLIT_2: tl.constexpr,
    TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The three phases of every row; `dense` says what the arguments are.

    CE: "none", "shared" (the student's own statistics serve) or "own" (T != 1 or a cut vocabulary).
    MEAN: Σ slope must be summed before the gradient; else it is `slope_sum`.
    DIAGNOSTICS: of kinds with a softmax, each part also sums -p log p and -q log q, and has a 1
    where it finds a maximum of both sides.
    PHASES: bit 1 statistics, 2 value, 4 gradient. All of them in one launch of SPLIT > 1 wait for
    each other, so its programs must run at the same time; one launch a phase never waits.
    """
    part = tl.program_id(0) % SPLIT
    WAITS: tl.constexpr = SPLIT > 1 and PHASES == 7
    THIRD: tl.constexpr = MEAN and GRAD

    for i in range(tl.program_id(0) // SPLIT, T + 2 * lag, step):
        if PHASES & 1:
            if i < T:
                row = _wide(i)
                if tl.load(weight_ptr + row) != 0.0:
                    s_row = _row(s_ptr, row, s_len, s_outer, s_inner)
                    if CE != "none":
                        if part == 0:  # now: the gradient may overwrite the student's logits
                            label = tl.load(label_ptr + row)
                            here = (label >= 0) & (label < V)  # else in another shard
                            at_label = tl.load(s_row + label, mask=here, other=NEG_INF)
                            at_label = at_label.to(tl.float32)
                            dead = at_label <= DEAD
                            tl.store(ce_ptr + row, tl.where(dead, NEG_INF, at_label))
                    _statistics(
                        s_row,
                        _row(t_ptr, row, t_len, t_outer, t_inner),
                        stat_ptr + (row * SPLIT + part) * STATS,
                        n, V, scale, mix_s, mix_t, part * TILES * BLOCK, KIND, CE, TILES, BLOCK,
                    )  # fmt: skip
                if WAITS:
                    _announce(flag_ptr + row)
            if SPLIT == 1:
                tl.debug_barrier()
        if PHASES & 2:
            j = i - lag
            if (j >= 0) & (j < T):
                _sweep(
                    j, s_ptr, t_ptr, label_ptr, weight_ptr, stat_ptr, sum_ptr, ce_ptr, grad_ptr,
                    flag_ptr, T, n, V, s_len, s_outer, s_inner, t_len, t_outer, t_inner, part,
                    scale, kd_scale, ce_scale, slope_sum, mix_s, mix_t, a, b,
                    TERM, KIND, INFINITE_P, INFINITE_Q, MEAN, CE, DIAGNOSTICS,
                    True, GRAD and not MEAN, WAITS, SPLIT, SPLIT_2, TILES, BLOCK,
                )  # fmt: skip
                if WAITS and THIRD:
                    _announce(flag_ptr + T + j)
            if SPLIT == 1 and THIRD:
                tl.debug_barrier()
        if PHASES & 4 and THIRD:
            j = i - 2 * lag
            if (j >= 0) & (j < T):
                _sweep(
                    j, s_ptr, t_ptr, label_ptr, weight_ptr, stat_ptr, sum_ptr, ce_ptr, grad_ptr,
                    flag_ptr + T, T, n, V, s_len, s_outer, s_inner, t_len, t_outer, t_inner, part,
                    scale, kd_scale, ce_scale, slope_sum, mix_s, mix_t, a, b,
                    TERM, KIND, INFINITE_P, INFINITE_Q, MEAN, CE, DIAGNOSTICS,
                    False, True, WAITS, SPLIT, SPLIT_2, TILES, BLOCK,
                )  # fmt: skip


@triton.jit
def scale_kernel(x_ptr, factor_ptr, T, V, factor_stride, BLOCK: tl.constexpr):
    """x[row] *= factor[row], in place; returns at once where one factor serves all and it is 1."""
    if factor_stride == 0:
        if tl.load(factor_ptr) == 1.0:
            return
    blocks = tl.cdiv(V, BLOCK)
    for i in range(tl.program_id(0), T * blocks, tl.num_programs(0)):
        row = _wide(i // blocks)
        cols = i % blocks * BLOCK + tl.arange(0, BLOCK)
        factor = tl.load(factor_ptr + row * factor_stride).to(tl.float32)
        if factor != 1.0:
            x = tl.load(x_ptr + row * V + cols, mask=cols < V, other=0.0).to(tl.float32)
            tl.store(x_ptr + row * V + cols, x * factor, mask=cols < V)


class Plan(NamedTuple):
    """How a launch is cut: `teams` of `split` programs, each with `tiles` blocks of `block`
    entries."""

    block: int
    tiles: int
    split: int
    teams: int
    warps: int
    waits: bool


def plan(
    T: int,
    V: int,
    row_bytes: int,
    programs: int = 0,
    cache_bytes: int = 0,
    warp: int = 32,
    diagnostics: bool = False,
) -> Plan:
    """Pure function of the shapes and the device.

    `programs` that run at the same time and wait for each other (0: none may), `cache_bytes` of L2
    in which the rows of all teams must stay for three phases. With `diagnostics`, whose entries
    take more registers, as many threads with half the entries each, in half the programs.
    """
    block = max(128, min(2048, triton.next_power_of_2(V)))
    blocks = triton.cdiv(V, block)
    warps = (256 if block == 2048 else 128) // warp  # 8 entries a thread: 16-byte loads of bf16
    if diagnostics:
        warps, programs = 2 * warps, programs // 2
    if not programs or blocks == 1:
        return Plan(block, blocks, 1, T, warps, False)
    rows = max(1, cache_bytes // (3 * row_bytes))
    split = min(blocks, programs, max(triton.cdiv(programs, rows), triton.cdiv(programs, T)))
    # A power of two: few kernels serve all T.
    tiles = triton.next_power_of_2(triton.cdiv(blocks, split) + 1) // 2
    if triton.cdiv(blocks, tiles) > programs:
        tiles *= 2
    split = triton.cdiv(blocks, tiles)
    return Plan(block, tiles, split, min(T, programs // split), warps, split > 1)


def device_plan(
    T: int,
    V: int,
    student: torch.Tensor,
    teacher: torch.Tensor,
    alone: bool = False,
    diagnostics: bool = False,
) -> Plan:
    """Programs wait for each other on NVIDIA GPUs only, launched cooperatively: all of them run, or
    none. `alone`: nobody waits, one program a row."""
    row_bytes = V * (student.element_size() + teacher.element_size())
    if alone or student.device.type != "cuda" or torch.version.hip:
        warp = 64 if torch.version.hip else 32
        return plan(T, V, row_bytes, warp=warp, diagnostics=diagnostics)
    device = torch.cuda.get_device_properties(student.device)
    programs = PROGRAMS_PER_SM * device.multi_processor_count
    return plan(T, V, row_bytes, programs, device.L2_cache_size // 2, diagnostics=diagnostics)


PROGRAMS_PER_SM = 2
MAX_REGISTERS = 128  # a thread: two programs of 8 warps fill an SM's 65,536


def dense(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor | None,
    weight: torch.Tensor,
    divergence,
    *,
    temperature: float,
    n: int,
    kd_scale: float,
    ce_scale: float,
    cross_entropy: bool,
    grad: torch.Tensor | None,
    diagnostics: bool = False,
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Divergence and cross-entropy of every row, and the gradient of their weighted sum.

    The same function as `dense` in `fastkd/eager.py`.

    Args:
        student, teacher: (outer, length, V) logits with unit stride along V; T = outer · length
        rows.
        labels: (T,) integers within the vocabulary, or None without cross-entropy.
        weight: (T,) float32; a row of weight 0 is not read, counts nowhere and has gradient 0.
        divergence: a `fastkd.divergences.Divergence`.
        temperature: of the divergence. n: entries that the divergence sees, the first of each row.
        kd_scale, ce_scale: factors of the two gradients wrt the student's logits, besides the row's
        weight and 1/T.
        cross_entropy: whether it is wanted.
        grad: (T, V) contiguous, to write, which may be the student's own memory, or None.
        diagnostics: whether the entropies and the agreement are wanted.
        gather: the columns are this rank's shard of a vocabulary, and every rank of the group calls
            this function at the same time; `gather(x)` is the (world, *x.shape) x of all, the same
            on each. `labels` then count from this shard's first column (one outside [0, V) is
            another rank's) and `n`, 0 to V, is this shard's. Results are those of the whole rows,
            to the bit the same on all ranks. Called twice, whatever the shapes.
        plan: how the launch is cut, for tests and tuning; one program a row with `gather`.

    Returns:
        (2, T) float32 divergence and cross-entropy (0 without), or (5, T) with the entropies of
        teacher and student, in nats, at `temperature`, over the entries that the divergence sees,
        and 1 where some entry is a maximum of both sides, else 0: NaN for kind "logits", which has
        no distributions. 0 where the weight is.
    """
    T, V, device = weight.numel(), student.shape[-1], student.device
    mean = divergence.slope_sum is None
    softmax = divergence.kind != "logits"
    wide = diagnostics and softmax
    p = plan or device_plan(T, V, student, teacher, gather is not None, wide)
    a, b = divergence.numbers
    if softmax:
        kd_scale = kd_scale / temperature
    mix_s, mix_t = divergence.mixing
    # Not for a shard: another one may be cut.
    shared = softmax and temperature == 1 and n == V and gather is None
    ce = "none" if not cross_entropy else "shared" if shared else "own"
    stats = torch.empty((T, p.split, STATS.value), dtype=torch.float32, device=device)
    sums = torch.zeros((T, p.split, 5 if wide else 2), dtype=torch.float32, device=device)
    rows = torch.zeros((5 if diagnostics else 2, T), dtype=torch.float32, device=device)
    flags = torch.zeros(2 * T, dtype=torch.int32, device=device) if p.waits else sums
    # A team that waits does all phases in one launch, and so does a program alone; else each phase
    # is a launch.
    phases = (1, 2, 4) if mean and grad is not None else (1, 2)
    if p.waits or (p.split == 1 and gather is None):
        phases = (7,)
    scale = 1 / (temperature * math.log(2))
    options = {"maxnreg": MAX_REGISTERS} if device.type == "cuda" and not torch.version.hip else {}
    if p.waits:
        options["launch_cooperative_grid"] = True
    with on(device):
        for which in phases:
            dense_kernel[(p.teams * p.split,)](
                student, teacher, labels if cross_entropy else weight, weight, stats, sums,
                rows[1], sums if grad is None else grad, flags,
                T, n, V, student.shape[1], student.stride(0), student.stride(1),
                teacher.shape[1], teacher.stride(0), teacher.stride(1),
                p.teams if p.waits else 0, p.teams,
                scale, kd_scale, ce_scale,
                0.0 if mean else divergence.slope_sum, mix_s, mix_t, a, b,
                TERM=divergence.triton_term(), KIND=divergence.kind,
                INFINITE_P=divergence.infinite_p, INFINITE_Q=divergence.infinite_q,
                MEAN=mean, CE=ce, GRAD=grad is not None, DIAGNOSTICS=wide,
                PHASES=which, SPLIT=p.split, SPLIT_2=triton.next_power_of_2(p.split),
                TILES=p.tiles, BLOCK=p.block, num_warps=p.warps, **options,
            )  # fmt: skip
            if gather is not None and which == 1:
                shards = gather(torch.cat([stats[:, 0], rows[1, :, None]], 1))
                stats[:, 0] = _meet_shards(shards[..., :-1], softmax, scale)
                rows[1] = shards[..., -1].amax(0)  # the label's logit, -inf where it is not
            if gather is not None and which == 2:
                sums[:, 0] = _sum_parts(gather(sums[:, 0]).transpose(0, 1))
    total = _sum_parts(sums).clamp_(min=0)
    rows[0] = total[:, 0]
    if wide:
        rows[2:] = total[:, 2:].T
    elif diagnostics:
        rows[2:] = torch.where(weight == 0, 0.0, math.nan)
    return rows


def _meet_shards(stats: torch.Tensor, softmax: bool, scale: float) -> torch.Tensor:
    """(T, STATS) of whole rows from (world, T, STATS) of their shards, as `_meet` does it."""
    high, part = stats.unflatten(-1, (-1, 2)).unbind(-1)
    maximum = high.amax(0)
    below = (high - maximum.masked_fill(maximum == -math.inf, 0)) * scale
    below[..., 2] *= LOG2_E.value / scale  # the student at T = 1
    whole = torch.stack([maximum, (part * torch.exp2(below)).sum(0)], -1).flatten(-2)
    if not softmax:
        whole[:, :4] = stats[..., :4].sum(0)
    return whole


def _sum_parts(sums: torch.Tensor) -> torch.Tensor:
    """(T, parts, 2 or 5) to (T, 2 or 5); the last of 5, the agreement, is a maximum."""
    total = sums.sum(1)
    if total.shape[-1] == 5:
        total[:, 4] = sums[..., 4].amax(1)
    return total


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return getattr(torch, device.type).device(device)


def scale_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """(T, V) `x` times a scalar or (T,) `factor`, in place, in fp32, without a device sync."""
    T, V = x.shape
    with on(x.device):
        programs = 4 if x.device.type == "cpu" else 2048
        scale_kernel[(programs,)](
            x, factor, T, V, factor.stride(0) if factor.dim() else 0, BLOCK=2048
        )
    return x
