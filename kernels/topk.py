"""A sparse (top-k) teacher: one program a row, the student read twice.

A divergence of K + 1 outcomes: the K entries of the teacher, and the rest of the vocabulary as one.

    statistics  the running maximum and sum of exponentials of the student's complement, the entries
                that are not among the K (never 1 - Σ q: that cancels); the K are gathered
    value       the divergence's term on K + 1 lanes
    gradient    the complement's softmax times one number a row, then the K entries over it

A program streams through one row after the other, and there are so few of them that the second
read finds a row in the L2: 4 bytes an entry in bf16, one read and one write.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .dense import (
    DEAD,
    LN_2,
    LOG2_E,
    LOG_FLOOR,
    MAX_REGISTERS,
    NEG_INF,
    _accumulate,
    _load,
    _nothing,
    _row,
    _wide,
    on,
)
from .terms import kl

ABSENT = tl.constexpr(2**31 - 1)  # sorts behind every id
REST_FLOOR = tl.constexpr(2.0**-24)  # stored log-probabilities that sum to 1 leave this to the rest


@triton.jit
def _expm1(x):
    return tl.where(tl.abs(x) < 0.5, x + kl(1.0, 1.0, x), tl.exp(x) - 1.0)


@triton.jit
def _log2(total):
    """+inf for an empty sum: probabilities relative to it are then 0."""
    return tl.where(total == 0.0, float("inf"), tl.log2(total))


@triton.jit
def _accumulate_product(maximum, total, product, x, scale):
    """`_accumulate`, and Σ e z with e = 2^z, z = (x - maximum) scale: the entropy's other half."""
    high = tl.maximum(maximum, tl.max(x, 0))
    anchor = tl.where(high == NEG_INF, 0.0, high)
    step = tl.where(maximum == NEG_INF, 0.0, (maximum - anchor) * scale)
    z = (x - anchor) * scale
    e = tl.exp2(z)
    product = (product + step * total) * tl.exp2(step) + tl.where(x == NEG_INF, 0.0, z) * e
    return high, total * tl.exp2(step) + e, product


@triton.jit
def _teacher(
    logprob, present, lane, K, n, ratio, slack, rest_lives,
    TAIL: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Natural log-probabilities of the K lanes and, in lane K, of the rest; -inf for none."""
    log_p = logprob
    if TAIL == "bucket":
        # 1 - Σ p, without the rounding of a largest p near 1.
        top = tl.max(logprob, 0)
        first = tl.min(tl.where(logprob == top, lane, KP), 0)
        others = tl.sum(tl.where(lane == first, 0.0, tl.exp(logprob)), 0)
        rest = -_expm1(tl.maximum(top, LOG_FLOOR)) - others
        impossible = tl.where(rest > slack, rest, 0.0)
        rest = tl.where(rest_lives, tl.maximum(rest, REST_FLOOR), impossible)
        rest = tl.where(tl.sum(present.to(tl.int32), 0) == n, 0.0, rest)
        log_p = tl.where(lane == K, tl.where(rest == 0.0, NEG_INF, tl.log(rest)), log_p)
    if TAIL == "renormalize":
        scaled = logprob * ratio
        top = tl.max(scaled, 0)
        top = tl.where(top == NEG_INF, 0.0, top)
        total = tl.sum(tl.exp(scaled - top), 0)
        log_p = scaled - top - _log2(total) * LN_2
    return log_p


@triton.jit(
    do_not_specialize=["T", "K", "s_len"],
    do_not_specialize_on_alignment=["label_ptr", "weight_ptr"],
)
def topk_kernel(
    s_ptr, id_ptr, logprob_ptr, label_ptr, weight_ptr, out_ptr, grad_ptr,  # pointers
    T, K, n, V, s_len, s_outer, s_inner,  # shapes, strides
    scale, ratio, kd_scale, ce_scale, plain_value, plain_slope, a, b, slack,  # numbers
    TERM: tl.constexpr, INFINITE_P: tl.constexpr, INFINITE_Q: tl.constexpr, TAIL: tl.constexpr,
    CE: tl.constexpr, GRAD: tl.constexpr, DIAGNOSTICS: tl.constexpr,  # what is computed
    KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every row; `topk` says what the arguments are. The ids of a row ascend, ABSENT ones last.

    CE: "none", "shared" (the divergence's statistics serve) or "own" (T != 1 or a cut vocabulary).
    KP: a power of two > K.
    """
    lane = tl.arange(0, KP)
    for i in range(tl.program_id(0), T, tl.num_programs(0)):
        row = _wide(i)
        s_row = _row(s_ptr, row, s_len, s_outer, s_inner)
        grad_row = grad_ptr + row * V
        weight = tl.load(weight_ptr + row)
        if weight == 0.0:
            if GRAD:
                for start in range(0, V, BLOCK):
                    cols = start + tl.arange(0, BLOCK)
                    tl.store(grad_row + cols, tl.zeros([BLOCK], tl.float32), mask=cols < V)
        else:
            # Statistics. `ids` ascend, and so does j: which of them a block holds costs no search.
            limit = V if CE == "own" else n
            id_row = id_ptr + row * K
            mc, lc = _nothing(BLOCK)
            m1, l1 = _nothing(BLOCK)
            product = tl.zeros([BLOCK], tl.float32)
            j = 0
            next_id = tl.load(id_row)
            cols = tl.arange(0, BLOCK)
            ahead = tl.load(s_row + cols, mask=cols < limit, other=NEG_INF)
            for start in range(0, limit, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                x = ahead.to(tl.float32)
                x = tl.where(x <= DEAD, NEG_INF, x)
                # Arrives while this block is summed.
                ahead = tl.load(s_row + cols + BLOCK, mask=cols + BLOCK < limit, other=NEG_INF)
                if CE == "own":
                    m1, l1 = _accumulate(m1, l1, x, LOG2_E)
                    x = tl.where(cols < n, x, NEG_INF)
                while next_id < start + BLOCK:
                    x = tl.where(cols == next_id, NEG_INF, x)
                    j += 1
                    next_id = tl.load(id_row + j, mask=j < K, other=ABSENT)
                if DIAGNOSTICS:
                    mc, lc, product = _accumulate_product(mc, lc, product, x, scale)
                else:
                    mc, lc = _accumulate(mc, lc, x, scale)

            # The K + 1 outcomes, those of the student first.
            ids = tl.load(id_row + lane, mask=lane < K, other=ABSENT)
            present = ids < n
            x = _load(s_row, ids, n)
            total_c = tl.sum(lc, 0)
            rest_lives = mc != NEG_INF
            maximum = tl.maximum(mc, tl.max(x, 0))
            maximum = tl.where(maximum == NEG_INF, 0.0, maximum)
            log_c = (mc - maximum) * scale + tl.log2(total_c)
            z = tl.where(lane == K, log_c, (x - maximum) * scale)
            log_total = _log2(tl.sum(tl.exp2(z), 0))
            z -= log_total
            every_z, every_q = z, tl.exp2(z)
            q_rest = tl.exp2(log_c - log_total)
            if TAIL == "truncate":
                z = tl.where(lane == K, NEG_INF, z)
            q = tl.exp2(z)
            dead_q = z == NEG_INF
            log_q = tl.where(dead_q, LOG_FLOOR, z * LN_2)

            logprob = tl.load(
                logprob_ptr + row * K + lane, mask=present & (lane < K), other=NEG_INF
            )
            logprob = tl.where(logprob <= DEAD, NEG_INF, logprob)
            log_p = _teacher(logprob, present, lane, K, n, ratio, slack, rest_lives, TAIL, KP)
            p = tl.exp(log_p)
            dead_p = log_p == NEG_INF
            log_p = tl.where(dead_p, LOG_FLOOR, log_p)

            values, slopes = TERM(log_p, log_q, p, q, a, b)
            if TAIL == "truncate":
                values += plain_value * (p - q)
                slopes += plain_slope * q
            if INFINITE_P:
                values = tl.where(dead_p & (q > 0.0), float("inf"), values)
            if INFINITE_Q:
                values = tl.where(dead_q & (p > 0.0), float("inf"), values)
            outside = dead_p & dead_q
            values, slopes = tl.where(outside, 0.0, values), tl.where(outside, 0.0, slopes)
            value = tl.sum(values, 0)
            if TAIL == "renormalize":
                support = tl.sum(tl.where(dead_p, 0, 1), 0)
                value = tl.where(support == 0, float("inf"), value)
            if TAIL != "truncate":
                value = tl.where(value < 0.0, 0.0, value)
            value = tl.where(log_total == float("inf"), float("inf"), value)
            tl.store(out_ptr + row, value)
            label = 0
            log_1 = log_total
            if CE != "none":
                label = tl.load(label_ptr + row).to(tl.int32)
                if CE == "own":
                    log_1 = _log2(tl.sum(l1, 0))
                    m1 = tl.where(m1 == NEG_INF, 0.0, m1)
                else:
                    m1 = maximum
                at_label = _load(s_row, label, V)
                tl.store(out_ptr + _wide(T) + row, log_1 * LN_2 + (m1 - at_label))
            if DIAGNOSTICS:
                out = out_ptr + _wide(T) * 2 + row
                tl.store(out, -tl.sum(p * log_p, 0))
                entropy_c = tl.log2(total_c) - tl.sum(product, 0) / total_c
                entropy = tl.where(rest_lives, q_rest * entropy_c, 0.0)
                entropy -= tl.sum(every_q * tl.where(every_q == 0.0, 0.0, every_z), 0)
                tl.store(out + T, entropy * LN_2)
                top = present & (logprob == tl.max(logprob, 0)) & (x == maximum)
                tl.store(out + _wide(T) * 2, tl.max(top.to(tl.int32), 0).to(tl.float32))
                tl.store(out + _wide(T) * 3, tl.sum(tl.exp(logprob), 0))

            if GRAD:
                # From here on, the gradient may overwrite the student: all lanes have read it.
                tl.debug_barrier()
                slope_sum = tl.sum(slopes, 0)
                slope_rest = tl.sum(tl.where(lane == K, slopes, 0.0), 0)
                of_lanes = kd_scale * (slopes - every_q * slope_sum)
                # Of the complement's own softmax: finite where q_rest underflows.
                of_rest = kd_scale * (slope_rest - q_rest * slope_sum)
                if CE == "shared":
                    of_rest += ce_scale * q_rest
                if CE != "none":
                    q1 = every_q if CE == "shared" else tl.exp2((x - m1) * LOG2_E - log_1)
                    of_lanes += ce_scale * (q1 - tl.where(ids == label, 1.0, 0.0))
                mc = tl.where(rest_lives, mc, 0.0)
                log_c = _log2(total_c)
                for start in range(0, V, BLOCK):
                    cols = start + tl.arange(0, BLOCK)
                    full = _load(s_row, cols, V)
                    seen = tl.where(cols < n, full, NEG_INF)
                    grad = of_rest * tl.exp2((seen - mc) * scale - log_c)
                    if CE == "own":
                        grad += ce_scale * tl.exp2((full - m1) * LOG2_E - log_1)
                    if CE != "none":
                        grad -= tl.where(cols == label, ce_scale, 0.0)
                    # Weighted in fp32, cast once; streamed past the cache, which holds logits.
                    tl.store(grad_row + cols, weight * grad, mask=cols < V, cache_modifier=".cs")
                tl.debug_barrier()
                tl.store(grad_row + ids, weight * of_lanes, mask=present)


class Plan(NamedTuple):
    """How a launch is cut: `programs`, each with a row at a time in blocks of `block` entries."""

    block: int
    programs: int
    warps: int


def plan(V: int, itemsize: int, multiprocessors: int, cache_bytes: int, warp: int = 32) -> Plan:
    """Pure function of the shapes and the device.

    An SM has 512 threads with a 16-byte load each: one program, or two where the rows of all of
    them stay in half of the L2.
    """
    per_sm = 2 if 2 * multiprocessors * V * itemsize <= cache_bytes // 2 else 1
    block = max(128, min(8192 // itemsize // per_sm, triton.next_power_of_2(V)))
    return Plan(block, multiprocessors * per_sm, 512 // per_sm // warp)


def device_plan(student: torch.Tensor) -> Plan:
    V, itemsize = student.shape[-1], student.element_size()
    if student.device.type != "cuda":
        return plan(V, itemsize, 4 if student.device.type == "cpu" else 64, 0)
    device = torch.cuda.get_device_properties(student.device)
    warp = 64 if torch.version.hip else 32
    return plan(V, itemsize, device.multi_processor_count, device.L2_cache_size, warp)


def topk(
    student: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    labels: torch.Tensor | None,
    weight: torch.Tensor,
    divergence,
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

    The same function as `topk` in `fastkd/eager_topk.py`, which says what the tails are.

    Args:
        student: (outer, length, V) logits with unit stride along V; T = outer · length rows.
        ids: (T, K) integers, unique within a row; an entry whose id is negative or ≥ n is absent.
        logprobs: (T, K) natural log-probabilities at `teacher_temperature`, which is `temperature`
        unless the tail is "renormalize".
        labels: (T,) integers within the vocabulary, or None without cross-entropy.
        weight: (T,) float32; a row of weight 0 is not read, counts nowhere and has gradient 0.
        divergence: a `fastkd.divergences.Divergence` with `plain`.
        tail: "bucket", "renormalize" or "truncate".
        temperature: of the divergence. n: entries that the divergence sees, the first of each row.
        kd_scale, ce_scale: factors of the two gradients wrt the student's logits, besides the row's
        weight and 1/T.
        cross_entropy: whether it is wanted.
        grad: (T, V) contiguous, to write, which may be the student's own memory, or None.
        diagnostics: whether the last four rows of the result are wanted.
        slack: a rest of the teacher's mass up to this is taken for a rounding of the
            log-probabilities where the student has nothing left for it.

    Returns:
        (2 or 6, T) float32: divergence, cross-entropy (0 where it is not wanted), the teacher's
        entropy over its outcomes, the student's over n entries, whether the teacher's largest entry
        is also the student's, and Σ exp(logprob). 0 in rows of weight 0.
    """
    T, V, K, device = weight.numel(), student.shape[-1], ids.shape[-1], student.device
    out = torch.zeros((6 if diagnostics else 2, T), dtype=torch.float32, device=device)
    if not T:
        return out
    p = device_plan(student)
    absent = (ids < 0) | (ids >= n)
    ids, order = ids.masked_fill(absent, ABSENT.value).int().sort(-1)
    logprobs = logprobs.float().gather(-1, order)
    ce = "none" if not cross_entropy else "shared" if (temperature, n) == (1, V) else "own"
    plain_value, plain_slope = divergence.pooled_terms
    a, b = divergence.numbers
    on_cuda = device.type == "cuda" and not torch.version.hip
    options = {"maxnreg": MAX_REGISTERS} if on_cuda else {}
    with on(device):
        topk_kernel[(min(T, p.programs),)](
            student, ids, logprobs, labels if cross_entropy else weight, weight, out,
            out if grad is None else grad,
            T, K, n, V, student.shape[1], student.stride(0), student.stride(1),
            1 / (temperature * math.log(2)), teacher_temperature / temperature,
            kd_scale / temperature, ce_scale, plain_value, plain_slope, a, b, slack,
            TERM=divergence.triton_term(),
            INFINITE_P=divergence.infinite_p, INFINITE_Q=divergence.infinite_q, TAIL=tail,
            CE=ce, GRAD=grad is not None, DIAGNOSTICS=diagnostics,
            KP=triton.next_power_of_2(K + 1), BLOCK=p.block, num_warps=p.warps, **options,
        )  # fmt: skip
    return out
