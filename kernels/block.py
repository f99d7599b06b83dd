"""What both kernels do with a block of entries of a row."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import limits

LOG2_E = tl.constexpr(limits.LOG2_E)
LN_2 = tl.constexpr(limits.LN_2)
DEAD = tl.constexpr(limits.DEAD)
LOG_FLOOR = tl.constexpr(limits.LOG_FLOOR)
NEG_INF = tl.constexpr(float("-inf"))
# For each part of a divergence: weight, the term's two, whether infinite_p, whether infinite_q.
PER_PART = tl.constexpr(5)
OF_ALL = tl.constexpr(9)  # and of the divergence as a whole


@triton.jit
def int64(i):
    """Rows times V exceed 32 bits."""
    return tl.full((), 0, tl.int64) + i


@triton.jit
def row_start(ptr, row, length, outer, inner):
    """Start of a row of logits in (outer, length, V) strides: `logits[:, :-1]` needs no copy."""
    return ptr + row // length * outer + row % length * inner


@triton.jit
def load_logits(ptr, cols, n):
    """fp32; -inf from entry n on, and for dead ones."""
    x = tl.load(ptr + cols, mask=cols < n, other=NEG_INF).to(tl.float32)
    return tl.where(x <= DEAD, NEG_INF, x)


@triton.jit
def store_zeros(ptr, first, end, V, BLOCK: tl.constexpr):
    """Zeros to the entries from `first` to `end` of a row of V."""
    for start in range(first, end, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(ptr + cols, tl.zeros([BLOCK], tl.float32), mask=cols < V)


@triton.jit
def no_entries(BLOCK: tl.constexpr):
    """The softmax statistics of nothing: maximum and sum."""
    return tl.full((), NEG_INF, tl.float32), tl.zeros([BLOCK], tl.float32)


@triton.jit
def accumulate(maximum, total, x, scale):
    """Online softmax statistics: the sum stays one number per lane until the end."""
    high = tl.maximum(maximum, tl.max(x, 0))
    anchor = tl.where(high == NEG_INF, 0.0, high)
    return high, total * tl.exp2((maximum - anchor) * scale) + tl.exp2((x - anchor) * scale)


@triton.jit
def log2_sum(total):
    """+inf for an empty sum: probabilities relative to it are then 0."""
    return tl.where(total == 0.0, float("inf"), tl.log2(total))


@triton.jit
def log_softmax(x, of, scale):
    """Natural log-probability (finite) and probability; `of`: maximum and log2 of the sum."""
    z = (x - of[0]) * scale - of[1]
    return tl.where(z == NEG_INF, LOG_FLOOR, z * LN_2), tl.exp2(z)


class Numbers(NamedTuple):
    """The numbers of a launch, as the kernels name them; without a teacher there are none to read.

    `scale` and `inverse` are 1 / (T log 2) and 1 / T; `ratio`, `slack` and the pooled ones are a
    sparse teacher's. `parts` has PER_PART numbers for each part of the divergence.
    """

    scale: object
    inverse: object
    slope_sum: object
    mix_s: object
    mix_t: object
    ratio: object
    slack: object
    pooled_value: object
    pooled_slope: object
    parts: object


@triton.jit
def read_numbers(x, ptr, PARTS: tl.constexpr, DATA: tl.constexpr):
    """`Numbers` of a flat tuple, or of what lies at `ptr` if they are DATA."""
    if DATA:
        x = ()
        for i in tl.static_range(OF_ALL + PER_PART * PARTS):
            x = x + (tl.load(ptr + i),)
    return Numbers(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9:])


@triton.jit
def with_infinity(value, impossible, number, WHEN: tl.constexpr):
    """+inf where that is `impossible`: WHEN is True, False, or "data" if `number` tells."""
    if WHEN == "data":
        value = tl.where(impossible, tl.where(number != 0.0, float("inf"), value), value)
    elif WHEN:
        value = tl.where(impossible, float("inf"), value)
    return value
