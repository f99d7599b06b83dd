"""The row-blocked torch path: CPU, float64, and any device without Triton.

Naive PyTorch spends its time in page faults (each step makes a new (T, V) tensor) and repeated
exponentials. Here rows go through in blocks that stay in the cache, with one exponential per side
and entry, in base 2: the fastest one torch has.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastkd.divergences import LOG_FLOOR, Divergence

LN_2 = math.log(2)
DEAD = -1e30  # a logit at or below this is -inf: torch.finfo(dtype).min is a common mask
BLOCK_ENTRIES = (
    5 * 2**16
)  # per thread: a few buffers of 1.25 MiB in fp32 stay in a core's share of the cache
HUGE_PAGE = 2**21


def dense(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor | None,
    weight: torch.Tensor,
    divergence: Divergence,
    *,
    temperature: float,
    n: int,
    kd_scale: float,
    ce_scale: float,
    cross_entropy: bool,
    grad: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Divergence and cross-entropy of every row, and the gradient of their weighted sum.

    The same function as `dense` in `kernels/dense.py`.

    Args:
        student, teacher: (outer, length, V) logits; T = outer · length rows.
        labels: (T,) integers, or None without cross-entropy.
        weight: (T,); rows of weight 0 count nowhere and have gradient 0.
        temperature: of the divergence. n: entries that the divergence sees, the first of each row.
        kd_scale, ce_scale: factors of the two gradients wrt the student's logits, besides the row's
        weight and 1/T.
        cross_entropy: whether it is wanted.
        grad: (T, V) to write, which may be the student's own memory, or None.

    Returns:
        (T,) divergence and cross-entropy (None without), float32, or float64 for a float64 student.
    """
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    values = torch.zeros(weight.shape, dtype=dtype, device=student.device)
    entropies = torch.zeros_like(values) if cross_entropy else None
    on_cpu = student.device.type == "cpu"  # elsewhere a decision on data would be a device sync
    weight = weight.to(dtype)
    all_count = on_cpu and bool((weight != 0).all())
    # glibc's malloc learns from what it frees: after this it keeps the small temporaries' pages
    # instead of returning them to the system, which would cost page faults, the larger part of the
    # time, in every block.
    torch.empty(32_000_000, dtype=torch.uint8)
    size = _block_rows(student)
    # Allocated once: what is freed in between costs page faults again.
    scratch = torch.empty(
        (6 if divergence.kind == "mixed" else 4, size, n), dtype=dtype, device=student.device
    )
    whole = (
        torch.empty((2, size, student.shape[-1]), dtype=dtype, device=student.device)
        if cross_entropy
        else None
    )
    for rows, s, t in _blocks(student, teacher, size):
        w = weight[rows, None]
        g = None if grad is None else grad[rows]
        if on_cpu and not (all_count or w.any()):
            if g is not None:
                g.zero_()
            continue
        work = scratch[:, : len(s)]
        if divergence.kind == "logits":
            values[rows], slope = _logit_mse(s[:, :n], t[:, :n], divergence, work[0])
            q = None
        else:
            a = _softmax(s[:, :n], temperature, *work[:2])
            values[rows], slope = _value_and_slope(
                a, s[:, :n], t[:, :n], divergence, temperature, work[2:]
            )
            q = a.p
        if cross_entropy:
            shared = q is not None and temperature == 1 and n == s.shape[-1]
            b = a if shared else _softmax(s, 1.0, *whole[:, : len(s)])
            label = labels[rows, None].clamp(min=0)
            at_label = s.gather(-1, label).to(dtype)
            entropies[rows] = _cross_entropy(b, at_label)
        if g is None:
            continue
        # Everything has been read: from here on, the gradient may overwrite the student.
        out = g if g.dtype == dtype else torch.empty(g.shape, dtype=dtype, device=g.device)
        kd = out[:, :n]
        if q is None:
            torch.mul(slope, kd_scale * w, out=kd)
        else:
            if divergence.slope_sum is None:
                torch.mul(q, -slope.sum(-1, keepdim=True), out=kd).add_(slope)
            else:
                torch.add(slope, q, alpha=-divergence.slope_sum, out=kd)
            kd.mul_(w * (kd_scale / temperature))
        if n < out.shape[-1]:
            out[:, n:].zero_()
        if cross_entropy and ce_scale:
            out.addcmul_(b.p, w, value=ce_scale)
            out.scatter_add_(-1, label, -ce_scale * w)
        if not all_count:
            out.masked_fill_(w == 0, 0)  # an ignored row may hold anything, NaN too
        if out is not g:
            g.copy_(out)
    ignored = weight == 0
    values.masked_fill_(ignored, 0)
    return values, None if entropies is None else entropies.masked_fill_(ignored, 0)


def _block_rows(student) -> int:
    threads = torch.get_num_threads() if student.device.type == "cpu" else 64
    return max(1, threads * BLOCK_ENTRIES // student.shape[-1])


def _blocks(student, teacher, size: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Blocks of consecutive rows, as (rows, student, teacher); none crosses a boundary that a view
    cannot."""
    length = min(student.shape[1], teacher.shape[1])
    for start in range(0, student.shape[0] * student.shape[1], length):
        for low in range(start, start + length, size):
            high = min(low + size, start + length)
            yield slice(low, high), _rows(student, low, high), _rows(teacher, low, high)


def _rows(x, low, high):
    outer, offset = divmod(low, x.shape[1])
    return x[outer, offset : offset + high - low]


def empty_grad(student: torch.Tensor) -> torch.Tensor:
    """(T, V) memory for the gradient. On Linux in huge pages: the first touch of ordinary ones
    costs as much as the arithmetic. The advice is only that, and where it cannot be given nothing
    happens."""
    grad = torch.empty(
        (student.shape[0] * student.shape[1], student.shape[2]),
        dtype=student.dtype,
        device=student.device,
    )
    start = -(-grad.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    size = (grad.data_ptr() + grad.nbytes) // HUGE_PAGE * HUGE_PAGE - start
    if sys.platform == "linux" and grad.device.type == "cpu" and size > 16 * HUGE_PAGE:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return grad


def scale_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """(T, V) `x` times a scalar or (T,) `factor`, in place."""
    if factor.dim() == 0 and factor.device.type == "cpu" and factor == 1:
        return x
    return x.mul_(factor if factor.dim() == 0 else factor[:, None])


class _Softmax(NamedTuple):
    log_p: torch.Tensor  # (rows, V), finite
    p: torch.Tensor
    maximum: torch.Tensor  # (rows, 1), of the logits
    anchor: torch.Tensor  # -maximum / (T log 2), rounded
    log_total: torch.Tensor  # of Σ 2^(anchor + logits / (T log 2))
    dead: torch.Tensor | None  # where p is 0 by a logit of -inf, or None: nowhere
    empty: torch.Tensor | None  # (rows,) without any support


def _softmax(logits, temperature, x, p) -> _Softmax:
    """Into `x` and `p`."""
    dead = empty = None
    z = logits if logits.dtype == x.dtype else x.copy_(logits)
    maximum = z.amax(-1, keepdim=True)
    maximum.masked_fill_(maximum <= DEAD, 0)
    scale = 1 / (temperature * LN_2)
    anchor = maximum * -scale
    # One fused multiply-add: its only rounding is the anchor's, which cancels in p.
    torch.add(anchor, z, alpha=scale, out=x)
    # Nothing is above 0, so one dead entry shows in the sum. Elsewhere than on the CPU a decision
    # on data would be a device sync.
    if x.device.type != "cpu" or not x.sum() > DEAD / 2 * scale:
        dead = (x if x.data_ptr() == logits.data_ptr() else logits) <= DEAD
        x.masked_fill_(dead, -math.inf)
    torch.exp2(x, out=p)
    total = p.sum(-1, keepdim=True)
    if dead is not None:
        empty = total.squeeze(-1) == 0
        total.masked_fill_(total == 0, 1)
    log_total = total.log()
    # Not 1 / total: what is rounded away from log_total must be missing from both p and log_p.
    p.mul_(torch.exp(-log_total.double()).to(p.dtype))
    torch.add(-log_total, x, alpha=LN_2, out=x)
    if dead is not None:
        x.masked_fill_(dead, LOG_FLOOR)
    return _Softmax(x, p, maximum, anchor, log_total, dead, empty)


def _cross_entropy(a: _Softmax, at_label):
    """(rows,) -log softmax(logits)[label] at temperature 1, of (rows, 1) logits of the labels."""
    scale = torch.tensor(1 / LN_2, dtype=a.p.dtype)
    rounding = a.maximum.double() * scale.double() + a.anchor.double()
    log_total = a.log_total - (rounding * LN_2).to(a.p.dtype)
    return (log_total + (a.maximum - at_label)).squeeze(-1)


def _value_and_slope(a: _Softmax, s, t, divergence: Divergence, temperature, work):
    b = _softmax(t, temperature, *work[:2])
    sides = (b.log_p, a.log_p, b.p, a.p)
    empty = [a.empty, b.empty]
    if divergence.kind == "mixed":
        mixed = _mix(s, t, a, b, *divergence.mixing, work[2])
        c = _softmax(mixed, temperature, *work[2:])
        sides = (b.log_p, a.log_p, c.log_p, b.p, a.p, c.p)
        empty.append(c.empty)
    infinite = _infinite(a, b, empty, divergence)  # before the term overwrites what it is given
    value, slope = divergence.term(*sides)
    return value if infinite is None else value.masked_fill(infinite, math.inf), slope


def _infinite(a: _Softmax, b: _Softmax, empty, divergence: Divergence):
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


def _mix(s, t, a: _Softmax, b: _Softmax, mix_s: float, mix_t: float, mixed):
    """Mixed logits; an entry that is dead on a side that counts is dead."""
    mixed.zero_()
    for logits, weight in ((s, mix_s), (t, mix_t)):
        if weight:
            mixed.add_(logits, alpha=weight)
    for side, weight in ((a, mix_s), (b, mix_t)):
        if weight and side.dead is not None:
            mixed.masked_fill_(side.dead, -math.inf)
    return mixed


def _logit_mse(s, t, divergence, difference):
    """(rows,) values and the gradient of divergence kind "logits"; entries that are dead on either
    side are left out of both sums."""
    if s.dtype == t.dtype == difference.dtype:
        torch.sub(s, t, out=difference)
    else:
        difference.copy_(s).sub_(t)
    dead = None
    if s.device.type != "cpu" or not (s.amin() > DEAD and t.amin() > DEAD):
        dead_s, dead_t = s <= DEAD, t <= DEAD
        dead = dead_s | dead_t
        difference.masked_fill_(dead, 0)
    if divergence.centered:
        alive = s.shape[-1] if dead is None else (~dead).sum(-1, keepdim=True).clamp(min=1)
        difference.sub_(difference.sum(-1, keepdim=True) / alive)
        if dead is not None:
            difference.masked_fill_(dead, 0)
    value = difference.square().sum(-1) / s.shape[-1]
    if dead is not None:
        value.masked_fill_((dead_s != dead_t).any(-1), math.inf)
    return value, difference.mul_(2 / s.shape[-1])
