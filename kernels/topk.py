"""A sparse (top-k) teacher: one program a row, the student read twice.

A divergence of K + 1 outcomes: the K entries of the teacher, and the rest of the vocabulary as one.

    statistics  the running maximum and sum of exponentials of the student's complement, the entries
                that are not among the K (never 1 - Σ q: that cancels); the K are gathered
    value       the divergence's terms on K + 1 lanes
    gradient    the complement's softmax times one number a row, then the K entries over it

A program streams through one row after the other, and there are so few of them that the second
read finds a row in the L2: 4 bytes an entry in bf16, one read and one write.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch, limits
from .block import (
    DEAD,
    LN_2,
    LOG2_E,
    LOG_FLOOR,
    NEG_INF,
    PER_PART,
    accumulate,
    int64,
    load_logits,
    log2_sum,
    no_entries,
    read_numbers,
    row_start,
    store_zeros,
    with_infinity,
)
from .terms import kl

ABSENT = tl.constexpr(limits.ABSENT)
REST_FLOOR = tl.constexpr(limits.REST_FLOOR)


class Row(NamedTuple):
    """A row: where its logits and its ids start, and how many there are."""

    student: object
    ids: object
    K: object
    n: object
    V: object


class Complement(NamedTuple):
    """Statistics of the entries that are not among the K, and of all at temperature 1; sums are a
    number per lane."""

    maximum: object
    total: object
    product: object  # Σ e z with e = 2^z: its entropy's other half
    maximum_1: object
    total_1: object


class Student(NamedTuple):
    """The K + 1 outcomes of the student, the rest in lane K."""

    x: object  # the K logits
    maximum: object
    log_total: object  # log2, +inf without support
    z: object  # log2 of the probabilities q, of the rest's too
    q: object
    q_rest: object
    log_q: object  # natural, finite; nothing of the rest if the tail is "truncate"
    dead: object  # whether an outcome is impossible


@triton.jit
def _expm1(x):
    return tl.where(tl.abs(x) < 0.5, x + kl(1.0, 1.0, x), tl.exp(x) - 1.0)


@triton.jit
def _accumulate_product(maximum, total, product, x, scale):
    """`accumulate`, and Σ e z with e = 2^z, z = (x - maximum) scale: the entropy's other half."""
    high = tl.maximum(maximum, tl.max(x, 0))
    anchor = tl.where(high == NEG_INF, 0.0, high)
    step = tl.where(maximum == NEG_INF, 0.0, (maximum - anchor) * scale)
    z = (x - anchor) * scale
    e = tl.exp2(z)
    product = (product + step * total) * tl.exp2(step) + tl.where(x == NEG_INF, 0.0, z) * e
    return high, total * tl.exp2(step) + e, product


@triton.jit
def _statistics(row, scale, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    """The complement's. The ids ascend, and so does j: which of them a block holds costs no
    search."""
    limit = row.V if WHAT.ce == "own" else row.n
    mc, lc = no_entries(BLOCK)
    m1, l1 = no_entries(BLOCK)
    product = tl.zeros([BLOCK], tl.float32)
    j = 0
    next_id = tl.load(row.ids)
    cols = tl.arange(0, BLOCK)
    ahead = tl.load(row.student + cols, mask=cols < limit, other=NEG_INF)
    for start in range(0, limit, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = ahead.to(tl.float32)
        x = tl.where(x <= DEAD, NEG_INF, x)
        # Arrives while this block is summed.
        ahead = tl.load(row.student + cols + BLOCK, mask=cols + BLOCK < limit, other=NEG_INF)
        if WHAT.ce == "own":
            m1, l1 = accumulate(m1, l1, x, LOG2_E)
            x = tl.where(cols < row.n, x, NEG_INF)
        while next_id < start + BLOCK:
            x = tl.where(cols == next_id, NEG_INF, x)
            j += 1
            next_id = tl.load(row.ids + j, mask=j < row.K, other=ABSENT)
        if WHAT.diagnostics:
            mc, lc, product = _accumulate_product(mc, lc, product, x, scale)
        else:
            mc, lc = accumulate(mc, lc, x, scale)
    return Complement(mc, lc, product, m1, l1)


@triton.jit
def _student(row, ids, lane, complement, total, scale, WHAT: tl.constexpr):
    """`total`: the complement's sum."""
    x = load_logits(row.student, ids, row.n)
    maximum = tl.maximum(complement.maximum, tl.max(x, 0))
    maximum = tl.where(maximum == NEG_INF, 0.0, maximum)
    log_c = (complement.maximum - maximum) * scale + tl.log2(total)
    z = tl.where(lane == row.K, log_c, (x - maximum) * scale)
    log_total = log2_sum(tl.sum(tl.exp2(z), 0))
    z -= log_total
    q_rest = tl.exp2(log_c - log_total)
    seen = z
    if WHAT.tail == "truncate":
        seen = tl.where(lane == row.K, NEG_INF, z)
    dead = seen == NEG_INF
    log_q = tl.where(dead, LOG_FLOOR, seen * LN_2)
    return Student(x, maximum, log_total, z, tl.exp2(z), q_rest, log_q, dead)


@triton.jit
def _teacher(row, lane, logprob, present, rest_lives, numbers, WHAT: tl.constexpr):
    """Natural log-probabilities of the K lanes and, in lane K, of the rest; -inf for none."""
    log_p = logprob
    if WHAT.tail == "bucket":
        # 1 - Σ p, without the rounding of a largest p near 1.
        top = tl.max(logprob, 0)
        first = tl.min(tl.where(logprob == top, lane, lane.shape[0]), 0)
        others = tl.sum(tl.where(lane == first, 0.0, tl.exp(logprob)), 0)
        rest = -_expm1(tl.maximum(top, LOG_FLOOR)) - others
        impossible = tl.where(rest > numbers.slack, rest, 0.0)
        rest = tl.where(rest_lives, tl.maximum(rest, REST_FLOOR), impossible)
        rest = tl.where(tl.sum(present.to(tl.int32), 0) == row.n, 0.0, rest)
        log_p = tl.where(lane == row.K, tl.where(rest == 0.0, NEG_INF, tl.log(rest)), log_p)
    if WHAT.tail == "renormalize":
        scaled = logprob * numbers.ratio
        top = tl.max(scaled, 0)
        top = tl.where(top == NEG_INF, 0.0, top)
        total = tl.sum(tl.exp(scaled - top), 0)
        log_p = scaled - top - log2_sum(total) * LN_2
    return log_p


@triton.jit
def _outcomes(log_p, student, numbers, WHAT: tl.constexpr):
    """Values and slopes of the K + 1 outcomes."""
    p, q, log_q = tl.exp(log_p), tl.exp2(student.z), student.log_q
    dead_p, dead_q = log_p == NEG_INF, student.dead
    if WHAT.tail == "truncate":
        q = tl.where(dead_q, 0.0, q)
    log_p = tl.where(dead_p, LOG_FLOOR, log_p)
    values, slopes = None, None  # 0 + x would not be free
    for i in tl.static_range(len(WHAT.terms)):
        a, b = numbers.parts[i * PER_PART + 1], numbers.parts[i * PER_PART + 2]
        v, s = WHAT.terms[i](log_p, log_q, p, q, a, b)
        for_p, for_q = numbers.parts[i * PER_PART + 3], numbers.parts[i * PER_PART + 4]
        v = with_infinity(v, dead_p & (q > 0.0), for_p, WHAT.infinite_p[i])
        v = with_infinity(v, dead_q & (p > 0.0), for_q, WHAT.infinite_q[i])
        if WHAT.weighed[i]:
            v, s = numbers.parts[i * PER_PART] * v, numbers.parts[i * PER_PART] * s
        values = v if values is None else values + v
        slopes = s if slopes is None else slopes + s
    if WHAT.tail == "truncate":
        values += numbers.pooled_value * (p - q)
        slopes += numbers.pooled_slope * q
    outside = dead_p & dead_q
    return tl.where(outside, 0.0, values), tl.where(outside, 0.0, slopes)


@triton.jit(
    do_not_specialize=["T", "K", "s_len", "factor_stride", "number_stride"],
    do_not_specialize_on_alignment=["label_ptr", "factor_ptr"],
)
def topk_kernel(
    s_ptr, id_ptr, logprob_ptr, label_ptr, factor_ptr, out_ptr, grad_ptr, number_ptr,
    T, K, n, V, s_len, s_outer, s_inner, factor_stride, number_stride,
    numbers,
    WHAT: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every row; `topk` says what the arguments are, launch.py what is constant. The ids of a row
    ascend, ABSENT ones last."""
    lane = tl.arange(0, KP)
    for i in range(tl.program_id(0), T, tl.num_programs(0)):
        j = int64(i)
        row = Row(row_start(s_ptr, j, s_len, s_outer, s_inner), id_ptr + j * K, K, n, V)
        grad_row = grad_ptr + j * V
        if tl.load(factor_ptr + j) == 0.0:
            if WHAT.grad:
                store_zeros(grad_row, 0, V, V, BLOCK)
        else:
            ptr = number_ptr + j * number_stride
            own = read_numbers(numbers, ptr, len(WHAT.terms), WHAT.data)
            complement = _statistics(row, own.scale, WHAT, BLOCK)
            total = tl.sum(complement.total, 0)
            rest_lives = complement.maximum != NEG_INF
            ids = tl.load(row.ids + lane, mask=lane < K, other=ABSENT)
            present = ids < n
            student = _student(row, ids, lane, complement, total, own.scale, WHAT)
            logprob = tl.load(logprob_ptr + j * K + lane, mask=present & (lane < K), other=NEG_INF)
            logprob = tl.where(logprob <= DEAD, NEG_INF, logprob)
            log_p = _teacher(row, lane, logprob, present, rest_lives, own, WHAT)
            values, slopes = _outcomes(log_p, student, own, WHAT)
            value = tl.sum(values, 0)
            if WHAT.tail == "renormalize":
                support = tl.sum(tl.where(log_p == NEG_INF, 0, 1), 0)
                value = tl.where(support == 0, float("inf"), value)
            if WHAT.tail != "truncate":
                value = tl.where(value < 0.0, 0.0, value)
            value = tl.where(student.log_total == float("inf"), float("inf"), value)
            tl.store(out_ptr + j, value)
            label = 0
            maximum_1, log_1 = student.maximum, student.log_total
            if WHAT.ce != "none":
                label = tl.load(label_ptr + j).to(tl.int32)
                if WHAT.ce == "own":
                    log_1 = log2_sum(tl.sum(complement.total_1, 0))
                    empty = complement.maximum_1 == NEG_INF
                    maximum_1 = tl.where(empty, 0.0, complement.maximum_1)
                at_label = load_logits(row.student, label, V)
                tl.store(out_ptr + int64(T) + j, log_1 * LN_2 + (maximum_1 - at_label))
            if WHAT.diagnostics:
                out = out_ptr + int64(T) * 2 + j
                finite = tl.where(log_p == NEG_INF, LOG_FLOOR, log_p)
                tl.store(out, -tl.sum(tl.exp(log_p) * finite, 0))
                entropy_c = tl.log2(total) - tl.sum(complement.product, 0) / total
                entropy = tl.where(rest_lives, student.q_rest * entropy_c, 0.0)
                z = tl.where(student.q == 0.0, 0.0, student.z)
                entropy -= tl.sum(student.q * z, 0)
                tl.store(out + T, entropy * LN_2)
                top = present & (logprob == tl.max(logprob, 0)) & (student.x == student.maximum)
                tl.store(out + int64(T) * 2, tl.max(top.to(tl.int32), 0).to(tl.float32))
                tl.store(out + int64(T) * 3, tl.sum(tl.exp(logprob), 0))

            if WHAT.grad:
                # From here on, the gradient may overwrite the student: all lanes have read it.
                tl.debug_barrier()
                of_ce = 0.0
                of_lanes, of_rest = tl.zeros([KP], tl.float32), tl.full((), 0.0, tl.float32)
                if WHAT.ce != "none":
                    of_ce = tl.load(factor_ptr + j + 2 * factor_stride)
                if WHAT.learns:
                    of_kd = tl.load(factor_ptr + j + factor_stride) * own.inverse
                    slope_sum = tl.sum(slopes, 0)
                    slope_rest = tl.sum(tl.where(lane == K, slopes, 0.0), 0)
                    of_lanes = of_kd * (slopes - student.q * slope_sum)
                    # Of the complement's own softmax: finite where q_rest underflows.
                    of_rest = of_kd * (slope_rest - student.q_rest * slope_sum)
                    if WHAT.by_row:  # not 0 · NaN
                        of_lanes = tl.where(of_kd == 0.0, 0.0, of_lanes)
                        of_rest = tl.where(of_kd == 0.0, 0.0, of_rest)
                if WHAT.ce == "shared":
                    of_rest += of_ce * student.q_rest
                if WHAT.ce != "none":
                    q_1 = student.q
                    if WHAT.ce == "own":
                        q_1 = tl.exp2((student.x - maximum_1) * LOG2_E - log_1)
                    of_lanes += of_ce * (q_1 - tl.where(ids == label, 1.0, 0.0))
                maximum_c = tl.where(rest_lives, complement.maximum, 0.0)
                log_c = log2_sum(total)
                for start in range(0, V, BLOCK):
                    cols = start + tl.arange(0, BLOCK)
                    full = load_logits(row.student, cols, V)
                    seen = tl.where(cols < n, full, NEG_INF)
                    grad = tl.zeros([BLOCK], tl.float32)
                    if WHAT.learns or WHAT.ce == "shared":
                        grad = of_rest * tl.exp2((seen - maximum_c) * own.scale - log_c)
                    if WHAT.ce == "own":
                        grad += of_ce * tl.exp2((full - maximum_1) * LOG2_E - log_1)
                    if WHAT.ce != "none":
                        grad -= tl.where(cols == label, of_ce, 0.0)
                    # In fp32, cast once; streamed past the cache, which holds logits.
                    tl.store(grad_row + cols, grad, mask=cols < V, cache_modifier=".cs")
                tl.debug_barrier()
                tl.store(grad_row + ids, of_lanes, mask=present)


def topk(rows, ask) -> torch.Tensor:
    """Divergence from a sparse teacher and cross-entropy of every row, and the gradient of their
    weighted sum.

    The row function of fastkd/rows.py for sparse teachers. It has no shards, and no fp64: there it
    computes in fp32.

    Args:
        rows: `Rows` with a `Sparse` teacher.
        ask: `Ask`, of a divergence with `pooled_terms`.

    Returns:
        (2, T) fp32 divergence and cross-entropy, 0 where there is none; with diagnostics (6, T):
        the teacher's entropy over its outcomes, the student's over n entries, whether the teacher's
        largest entry is also the student's, and Σ exp(logprob). 0 where the weight is.

    Raises:
        ValueError: the rows are a shard's.
    """
    if ask.shard is not None:
        raise ValueError("a sparse teacher over vocabulary shards has no Triton kernel")
    student, teacher, labels, grad = rows.student, rows.teacher, rows.labels, rows.grad
    T, V, K = rows.factors.shape[1], student.shape[-1], teacher.ids.shape[-1]
    device = student.device
    n = V if ask.n is None else ask.n
    out = torch.zeros((6 if ask.diagnostics else 2, T), dtype=torch.float32, device=device)
    if not T:
        return out
    factors = rows.factors if rows.factors.stride(1) == 1 else rows.factors.contiguous()
    numbers, data = launch.pack(launch.numbers_of(ask, sparse=teacher), device)
    plan = launch.topk_device_plan(student)
    what = dict(tail=teacher.tail, K=K, labels=labels is not None, grad=grad is not None)
    constants = launch.specialise_topk(ask, plan, whole=n == V, **what)
    absent = (teacher.ids < 0) | (teacher.ids >= n)
    ids, order = teacher.ids.masked_fill(absent, limits.ABSENT).int().sort(-1)
    logprobs = teacher.logprobs.float().gather(-1, order)
    with launch.on(device):
        topk_kernel[(min(T, plan.programs),)](
            student, ids, logprobs, factors if labels is None else labels, factors, out,
            out if grad is None else grad, out if data is None else data,
            T, K, n, V, student.shape[1], student.stride(0), student.stride(1),
            factors.stride(0), 0, numbers,
            **constants, **launch.options_on(device, plan.warps),
        )  # fmt: skip
    return out
