"""The row-blocked torch path: CPU, float64, and any device without Triton.

Naive PyTorch spends its time in page faults (each step makes a new (T, V) tensor) and repeated
exponentials. Here rows go through in blocks that stay in the cache, with one exponential per side
and entry, in base 2: the fastest one torch has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fastkd.backends import buffers
from fastkd.divergences import LOG_FLOOR, Divergence

LN_2 = math.log(2)
DEAD = -1e30  # a logit at or below this is -inf: torch.finfo(dtype).min is a common mask
BLOCK_ENTRIES = 5 * 2**16  # a thread: a few buffers of 1.25 MiB in fp32 stay in its cache
LEAST_ENTRIES = 3 * 2**16  # of a block: the calls on fewer cost more than their work
BUFFERS = 24  # of a block's size, at most: softmaxes, slopes, temporaries, what malloc keeps


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
    diagnostics: bool = False,
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
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
        diagnostics: whether the entropies and the agreement are wanted.
        gather: the columns are this rank's shard of a vocabulary, and every rank of the group calls
            this function at the same time; `gather(x)` is the (world, *x.shape) x of all, the same
            on each. `labels` then count from this shard's first column (one outside [0, V) is
            another rank's) and `n`, 0 to V, is this shard's. Results are those of the whole rows,
            to the bit the same on all ranks. Called twice, whatever the shapes.

    Returns:
        (2, T) divergence and cross-entropy (0 without), or (5, T) with the entropies of teacher and
        student, in nats, at `temperature`, over the entries that the divergence sees, and 1 where
        some entry is a maximum of both sides, else 0: NaN for kind "logits", which has no
        distributions. 0 where the weight is. float32, or float64 for a float64 student.
    """
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    values = torch.zeros((5 if diagnostics else 2, len(weight)), dtype=dtype, device=student.device)
    on_cpu = student.device.type == "cpu"  # elsewhere a decision on data would be a device sync
    weight = weight.to(dtype)
    all_count = on_cpu and bool((weight != 0).all())
    if divergence.kind != "logits":
        kd_scale = kd_scale / temperature
    # glibc's malloc learns from what it frees: after this it keeps the small temporaries' pages
    # instead of returning them to the system, which would cost page faults, the larger part of the
    # time, in every block.
    if on_cpu:
        torch.empty(32_000_000, dtype=torch.uint8)
    V = student.shape[-1]
    # Little beside a chunk of an LM head's rows.
    size = min(block_rows(V, student.device), max(1, len(weight) // 20, LEAST_ENTRIES // V))
    # Allocated once: what is freed in between costs page faults again.
    count = 6 if divergence.kind == "mixed" else 4
    scratch = buffers.empty((count, size, n), student, dtype)
    shared = divergence.kind != "logits" and (temperature, n) == (1, V) and gather is None
    columns = V if cross_entropy and not shared else 0
    whole = buffers.empty((2, size, columns), student, dtype)

    def blocks(grad):
        """Those with rows that count; the gradient of the others is 0."""
        for rows, s, t in _blocks(student, teacher, size):
            w = weight[rows, None]
            g = None if grad is None else grad[rows]
            if not on_cpu or all_count or w.any():
                yield rows, s, t, w, g, scratch[:, : len(s)], whole[:, : len(s)]
            elif g is not None:
                g.zero_()

    if gather is not None:
        _shards(
            blocks, values, labels if cross_entropy else None, divergence, temperature, n,
            kd_scale, ce_scale, grad, all_count, gather,
        )  # fmt: skip
    else:
        _whole_rows(
            blocks, values, labels if cross_entropy else None, divergence, temperature, n,
            kd_scale, ce_scale, grad, all_count,
        )  # fmt: skip
    if diagnostics:
        values[2:] = math.nan if divergence.kind == "logits" else values[2:].clamp(min=0)
    return values.masked_fill_(weight == 0, 0)


def _whole_rows(
    blocks, values, labels, divergence, temperature, n, kd_scale, ce_scale, grad, all_count
):
    """One pass over the rows, into `values` and `grad`."""
    diagnostics = len(values) == 5
    for rows, s, t, w, g, work, work_1 in blocks(grad):
        a, slope, measures = _terms(s[:, :n], t[:, :n], divergence, temperature, work, diagnostics)
        values[0, rows] = measures[0].clamp_(min=0)
        for row, measure in enumerate(measures[1:], 2):
            values[row, rows] = measure
        ce = None
        if labels is not None:
            shared = a is not None and temperature == 1 and n == s.shape[-1]
            b = a if shared else _softmax(s, 1.0, *work_1)
            label = labels[rows, None].clamp(min=0)
            at_label = s.gather(-1, label).to(values.dtype)
            values[1, rows] = _cross_entropy(b, at_label.masked_fill_(at_label <= DEAD, -math.inf))
            ce = b.p, label, w
        if g is not None:
            slope_sum = divergence.slope_sum
            if slope_sum is None:
                slope_sum = slope.sum(-1, keepdim=True)
            _write_gradient(g, w, slope, a, slope_sum, kd_scale, ce, ce_scale, all_count)


def _write_gradient(g, w, slope, a, slope_sum, kd_scale, ce, ce_scale, all_count):
    """Of a block of rows. `a`: the student's softmax, or None for kind "logits". `ce`: None, or the
    probabilities at T = 1, the label and its (rows, 1) share of the gradient, the row's weight."""
    # Everything has been read: from here on, the gradient may overwrite the student.
    out = g if g.dtype == w.dtype else torch.empty(g.shape, dtype=w.dtype, device=g.device)
    n = slope.shape[-1]
    kd = out[:, :n]
    if a is None:
        torch.mul(slope, kd_scale * w, out=kd)
    else:
        if torch.is_tensor(slope_sum):
            torch.mul(a.p, -slope_sum, out=kd).add_(slope)
        else:
            torch.add(slope, a.p, alpha=-slope_sum, out=kd)
        kd.mul_(w * kd_scale)
    if n < out.shape[-1]:
        out[:, n:].zero_()
    if ce is not None and ce_scale:
        p, label, share = ce
        out.addcmul_(p, w, value=ce_scale)
        out.scatter_add_(-1, label, -ce_scale * share)
    if not all_count:
        out.masked_fill_(w == 0, 0)  # an ignored row may hold anything, NaN too
    if out is not g:
        g.copy_(out)


def _shards(
    blocks, values, labels, divergence, temperature, n, kd_scale, ce_scale, grad, all_count, gather
):
    """`dense` of vocabulary shards, into `values` and `grad`: a pass over all rows for each of the
    kernels' three phases, and between them a gather."""
    softmax, mixed = divergence.kind != "logits", divergence.kind == "mixed"
    # (maximum, sum) of: student, teacher, student at T = 1, mixed logits; the label's logit. Kind
    # "logits" has instead the number of entries and Σ of the differences, nothing and the number of
    # differences.
    stats = values.new_zeros((values.shape[1], 9))
    stats[:, ::2] = -math.inf
    if not softmax:
        stats[:, 0] = n
    for rows, s, t, _, _, work, work_1 in blocks(None):
        x, y = s[:, :n], t[:, :n]
        if n and softmax:
            stats[rows, 0:2], dead_s = _statistics(x, temperature, *work[:2])
            stats[rows, 2:4], dead_t = _statistics(y, temperature, *work[:2])
            if mixed:
                z = _mix(x, y, dead_s, dead_t, *divergence.mixing, work[0])
                stats[rows, 6:8], _ = _statistics(z, temperature, *work[:2])
        elif n:
            dead, _ = _difference(x, y, work[0])
            stats[rows, 1] = work[0].sum(-1)
            stats[rows, 3] = n if dead is None else (~dead).sum(-1).to(stats.dtype)
        if labels is not None:
            stats[rows, 4:6], _ = _statistics(s, 1.0, *work_1)
            label, here = _in_shard(labels[rows, None], s)
            at_label = s.gather(-1, label).to(stats.dtype)
            stats[rows, 8:] = at_label.masked_fill(~here | (at_label <= DEAD), -math.inf)
    stats = gather(stats)
    known = _meet(stats[..., :8], temperature, softmax)
    if labels is not None:  # of all rows at once: the same bits whatever a rank's blocks are
        maximum, total = known[:, 4:5], known[:, 5:6]
        log_total = total.masked_fill(total == 0, 1).log()
        anchor = maximum * -(1 / LN_2)
        values[1] = _surprise(maximum, anchor, log_total, stats[..., 8:].amax(0))

    sums = values.new_zeros((values.shape[1], len(values) if softmax else 2))
    late = divergence.slope_sum is None  # then the gradient waits for the third phase

    def sweep(value, grad, slope_sum):
        """The second phase or the third, the gradient in either."""
        for rows, s, t, w, g, work, work_1 in blocks(grad):
            a, slope = None, work[0]
            if n:
                a, slope, measures = _terms(
                    s[:, :n], t[:, :n], divergence, temperature, work,
                    value and sums.shape[1] == 5, known[rows],
                )  # fmt: skip
            if n and value:
                sums[rows, 0] = measures[0]
                for column, measure in enumerate(measures[1:], 2):
                    sums[rows, column] = measure
                if late:
                    sums[rows, 1] = slope.sum(-1)
            if g is not None:
                ce = None
                if labels is not None and ce_scale:
                    label, here = _in_shard(labels[rows, None], s)
                    ce = _softmax(s, 1.0, *work_1, known[rows, 4:6]).p, label, here * w
                mean = slope_sum[rows] if torch.is_tensor(slope_sum) else slope_sum
                _write_gradient(g, w, slope, a, mean, kd_scale, ce, ce_scale, all_count)

    sweep(True, None if late else grad, divergence.slope_sum)
    parts = gather(sums)
    total = parts.sum(0).T
    if late and grad is not None:
        sweep(False, grad, total[1, :, None])
    values[0] = total[0].clamp(min=0)
    if len(total) == 5:
        values[2:] = total[2:]
        values[4].clamp_(max=1)  # a maximum on several shards is one agreement


def _in_shard(label, s):
    """(rows, 1) labels that can be looked up in this shard, and whether they are in it."""
    inside = label.clamp(0, s.shape[-1] - 1)
    return inside, inside == label


def _statistics(logits, temperature, x, p):
    """(rows, 2) maximum, -inf without support, and Σ 2^(anchor + logits / (T log 2)); the dead
    entries or None. `x` and `p` are overwritten."""
    maximum, _, dead = _exponentials(logits, temperature, x, p)
    total = p.sum(-1, keepdim=True)
    return torch.cat([maximum.masked_fill(total == 0, -math.inf), total], -1), dead


def _meet(stats, temperature, softmax):
    """(T, 8) statistics of whole rows from (world, T, 8) of their shards; a maximum without support
    is 0."""
    known = torch.empty_like(stats[0])
    for side in range(4):
        scale = 1 / ((1.0 if side == 2 else temperature) * LN_2)
        high, part = stats[..., 2 * side], stats[..., 2 * side + 1]
        maximum = high.amax(0)
        maximum.masked_fill_(maximum == -math.inf, 0)
        known[:, 2 * side] = maximum
        # Between anchors as they were rounded.
        rescaled = part * torch.exp2(maximum * -scale - high * -scale)
        known[:, 2 * side + 1] = rescaled.sum(0)
    if not softmax:
        known[:, :4] = stats[..., :4].sum(0)
    return known


def block_rows(V: int, device: torch.device) -> int:
    """How many rows are worked on at a time; each takes up to `BUFFERS` fp32 numbers an entry."""
    threads = torch.get_num_threads() if device.type == "cpu" else 64
    return max(1, threads * BLOCK_ENTRIES // V)


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


def _softmax(logits, temperature, x, p, known=None) -> _Softmax:
    """Into `x` and `p`. `known`: (rows, 2) maximum and sum of the rows that these are shards of."""
    maximum, anchor, dead = _exponentials(
        logits, temperature, x, p, None if known is None else known[:, :1]
    )
    total = p.sum(-1, keepdim=True) if known is None else known[:, 1:]
    empty = None
    if dead is not None:
        empty = total.squeeze(-1) == 0
        total = total.masked_fill(total == 0, 1)
    log_total = total.log()
    # Not 1 / total: what is rounded away from log_total must be missing from both p and log_p.
    p.mul_(torch.exp(-_wide(log_total)).to(p.dtype))
    torch.add(-log_total, x, alpha=LN_2, out=x)
    if dead is not None:
        x.masked_fill_(dead, LOG_FLOOR)
    return _Softmax(x, p, maximum, anchor, log_total, dead, empty)


def _exponentials(logits, temperature, x, p, maximum=None):
    """anchor + logits / (T log 2) into `x` and 2^x into `p`; the (rows, 1) maximum, which is
    measured where it is not given, the anchor, and the dead entries or None."""
    dead = None
    z = logits if logits.dtype == x.dtype else x.copy_(logits)
    if maximum is None:
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
    return maximum, anchor, dead


def _cross_entropy(a: _Softmax, at_label):
    """(rows,) -log softmax(logits)[label] at temperature 1, of (rows, 1) logits of the labels."""
    return _surprise(a.maximum, a.anchor, a.log_total, at_label)


def _surprise(maximum, anchor, log_total, at_label):
    scale = torch.tensor(1 / LN_2, dtype=maximum.dtype)
    rounding = _wide(maximum) * _wide(scale) + _wide(anchor)
    log_total = log_total - (rounding * LN_2).to(maximum.dtype)
    return (log_total + (maximum - at_label)).squeeze(-1)


def _terms(s, t, divergence: Divergence, temperature, work, diagnostics, known=None):
    """The student's softmax (None for kind "logits"), the slopes, and a list of (rows,) values
    and with `diagnostics` entropies and agreement. `known`: (rows, 8) statistics of the rows that
    these are shards of."""
    if divergence.kind == "logits":
        value, slope = _logit_mse(s, t, divergence, work[0], known)
        return None, slope, [value]
    a, b = (
        _softmax(x, temperature, *work[i : i + 2], None if known is None else known[:, i : i + 2])
        for i, x in ((0, s), (2, t))
    )
    sides = (b.log_p, a.log_p, b.p, a.p)
    empty = [a.empty, b.empty]
    if divergence.kind == "mixed":
        mixed = _mix(s, t, a.dead, b.dead, *divergence.mixing, work[4])
        c = _softmax(mixed, temperature, *work[4:], None if known is None else known[:, 6:])
        sides = (b.log_p, a.log_p, c.log_p, b.p, a.p, c.p)
        empty.append(c.empty)
    # Before the term overwrites what it is given:
    infinite = _infinite(a, b, empty, divergence)
    measures = []
    if diagnostics:
        measures = [-(side.p * side.log_p).sum(-1) for side in (b, a)]
        behind = (s - a.maximum).add_(t - b.maximum)  # 0 where both are at their maximum
        measures.append((behind.amax(-1) == 0).to(a.p.dtype))
    value, slope = divergence.term(*sides)
    value = value if infinite is None else value.masked_fill(infinite, math.inf)
    return a, slope, [value, *measures]


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


def _mix(s, t, dead_s, dead_t, mix_s: float, mix_t: float, mixed):
    """Mixed logits; an entry that is dead on a side that counts is dead."""
    mixed.zero_()
    for logits, weight in ((s, mix_s), (t, mix_t)):
        if weight:
            mixed.add_(logits, alpha=weight)
    for dead, weight in ((dead_s, mix_s), (dead_t, mix_t)):
        if weight and dead is not None:
            mixed.masked_fill_(dead, -math.inf)
    return mixed


def _logit_mse(s, t, divergence, difference, known=None):
    """(rows,) values and the gradient of divergence kind "logits"; entries that are dead on either
    side are left out of both sums. `known`: as in `_terms`."""
    dead, outside = _difference(s, t, difference)
    entries = s.shape[-1] if known is None else known[:, :1]
    if divergence.centered:
        if known is not None:
            total, alive = known[:, 1:2], known[:, 3:4].clamp(min=1)
        else:
            total = difference.sum(-1, keepdim=True)
            alive = entries if dead is None else (~dead).sum(-1, keepdim=True).clamp(min=1)
        difference.sub_(total / alive)
        if dead is not None:
            difference.masked_fill_(dead, 0)
    value = (difference.square().sum(-1, keepdim=True) / entries).squeeze(-1)
    if outside is not None:
        value.masked_fill_(outside, math.inf)
    return value, difference.mul_(2 / entries)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()


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
