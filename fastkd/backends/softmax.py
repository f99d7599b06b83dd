"""Softmaxes of blocks of rows in torch, with one exponential an entry, in base 2: its fastest."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.kernels.limits import DEAD, LN_2, LOG_FLOOR

BLOCK_ENTRIES = 5 * 2**16  # a thread: a few buffers of 1.25 MiB in fp32 stay in its cache
BUFFERS = 24  # of a block's size, at most: softmaxes, slopes, temporaries, what malloc keeps


def block_rows(V: int, device: torch.device) -> int:
    """How many rows are worked on at a time; each takes up to `BUFFERS` fp32 numbers an entry."""
    threads = torch.get_num_threads() if device.type == "cpu" else 64
    return max(1, threads * BLOCK_ENTRIES // V)


def blocks_of(size: int, *sides: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Blocks of at most `size` consecutive rows of (outer, length, V) tensors, as (rows, [(rows, V)
    of each side]); none crosses a boundary that a view cannot."""
    length = min(x.shape[1] for x in sides)
    count = sides[0].shape[0] * sides[0].shape[1]
    for start in range(0, count, max(length, 1)):
        for low in range(start, start + length, size):
            high = min(low + size, start + length)
            yield slice(low, high), [_rows(x, low, high) for x in sides]


def _rows(x: Tensor, low: int, high: int) -> Tensor:
    outer, offset = divmod(low, x.shape[1])
    return x[outer, offset : offset + high - low]


class Softmax(NamedTuple):
    log_p: Tensor  # (rows, V), finite
    p: Tensor
    maximum: Tensor  # (rows, 1), of the logits
    anchor: Tensor  # -maximum / (T log 2), as `scaled` has it
    log_total: Tensor  # of Σ 2^(anchor + logits / (T log 2))
    dead: Tensor | None  # where p is 0 by a logit of -inf, or None: nowhere
    empty: Tensor | None  # (rows,) without any support


def softmax(
    logits: Tensor, temperature: float, x: Tensor, p: Tensor, known: Tensor | None = None
) -> Softmax:
    """Into `x` and `p`. `known`: (rows, 2) maximum and sum of the rows that these are shards of."""
    given = None if known is None else known[:, :1]
    maximum, anchor, dead = exponentials(logits, temperature, x, p, given)
    total = p.sum(-1, keepdim=True) if known is None else known[:, 1:]
    empty = None
    if dead is not None:
        empty = total.squeeze(-1) == 0
        total = total.masked_fill(total == 0, 1)
    log_total = total.log()
    # Not 1 / total: what is rounded away from log_total must be missing from both p and log_p.
    p.mul_(torch.exp(-wide(log_total)).to(p.dtype))
    torch.add(-log_total, x, alpha=LN_2, out=x)
    if dead is not None:
        x.masked_fill_(dead, LOG_FLOOR)
    return Softmax(x, p, maximum, anchor, log_total, dead, empty)


def exponentials(
    logits: Tensor, temperature: float, x: Tensor, p: Tensor, maximum: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """anchor + logits / (T log 2) into `x` and 2^x into `p`; the (rows, 1) maximum, which is
    measured where it is not given, the anchor, and the dead entries or None."""
    dead = None
    z = logits if logits.dtype == x.dtype else x.copy_(logits)
    if maximum is None:
        maximum = z.amax(-1, keepdim=True)
        maximum.masked_fill_(maximum <= DEAD, 0)
    scale = 1 / (temperature * LN_2)
    anchor = scaled(z, maximum, scale, x)
    # Nothing is above 0, so one dead entry shows in the sum. Elsewhere than on the CPU a decision
    # on data would be a device sync.
    if x.device.type != "cpu" or not x.sum() > DEAD / 2 * scale:
        dead = (x if x.data_ptr() == logits.data_ptr() else logits) <= DEAD
        x.masked_fill_(dead, -math.inf)
    torch.exp2(x, out=p)
    return maximum, anchor, dead


def scaled(z: Tensor, maximum: Tensor, scale: float, out: Tensor) -> Tensor:
    """(z - maximum) · scale into `out`; the anchor, which was added to z · scale for it."""
    anchor = anchor_of(maximum, scale)
    if _fuses(z.device, out.dtype):
        # One multiply-add: its only rounding is the anchor's, which cancels in p.
        torch.add(anchor, z, alpha=scale, out=out)
    else:
        torch.sub(z, maximum, out=out).mul_(scale)
    return anchor


def anchor_of(maximum: Tensor, scale: float) -> Tensor:
    """-maximum · scale: rounded where it is rounded before it is added, else in float64."""
    if _fuses(maximum.device, maximum.dtype):
        return maximum * -scale
    return wide(maximum) * -wide(torch.tensor(scale, dtype=maximum.dtype))


@functools.cache
def _fuses(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device multiplies and adds with one rounding: not every CPU does."""
    if device.type != "cpu":
        return True
    step = 2.0 ** (-12 if dtype == torch.float32 else -27)
    x = torch.full((64,), 1 + step, dtype=dtype)
    return bool((torch.add(torch.full_like(x, -1 - 2 * step), x, alpha=1 + step) > 0).all())


def statistics(
    logits: Tensor, temperature: float, x: Tensor, p: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(rows, 2) maximum, -inf without support, and Σ 2^(anchor + logits / (T log 2)); the dead
    entries or None. `x` and `p` are overwritten."""
    maximum, _, dead = exponentials(logits, temperature, x, p)
    total = p.sum(-1, keepdim=True)
    return torch.cat([maximum.masked_fill(total == 0, -math.inf), total], -1), dead


def merged(stats: Tensor, temperature: float) -> Tensor:
    """(T, 2) `statistics` of whole rows from (world, T, 2) of their shards; a maximum without
    support is 0."""
    scale = 1 / (temperature * LN_2)
    high, part = stats.unbind(-1)
    maximum = high.amax(0)
    maximum.masked_fill_(maximum == -math.inf, 0)
    if _fuses(high.device, high.dtype):  # between anchors as they were rounded
        below = maximum * -scale - high * -scale
    else:
        below = (high - maximum) * scale
    rescaled = part * torch.exp2(below)
    return torch.stack([maximum, rescaled.sum(0)], -1)


def surprise(maximum: Tensor, anchor: Tensor, log_total: Tensor, at_label: Tensor) -> Tensor:
    """(rows,) -log softmax(logits)[label] at temperature 1, of (rows, 1) logits of the labels."""
    scale = torch.tensor(1 / LN_2, dtype=maximum.dtype)
    rounding = wide(maximum) * wide(scale) + wide(anchor)
    log_total = log_total - (rounding * LN_2).to(maximum.dtype)
    return (log_total + (maximum - at_label)).squeeze(-1)


def logits_at(s: Tensor, columns: Tensor, inside: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The logits in these columns; -inf where they are dead, or not `inside`."""
    x = s.gather(-1, columns.clamp(max=s.shape[-1] - 1)).to(dtype)
    dead = x <= DEAD
    return x.masked_fill_(dead if inside is None else dead | ~inside, -math.inf)


def in_shard(label: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, 1) labels that can be looked up in this shard, and whether they are in it."""
    inside = label.clamp(0, s.shape[-1] - 1)
    return inside, inside == label


def wide(x: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()
