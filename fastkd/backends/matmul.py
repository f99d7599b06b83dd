"""The products of a chunk's few rows with a whole vocabulary's weights."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# On a CPU:
COLUMNS = 256  # of a block of the weights
SUM_PARTS = 4  # of a sum over the vocabulary


def linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> None:
    """out = scale · x @ weight.T + bias, of a chunk's few rows and a whole vocabulary."""
    first, beta = 0, int(bias is not None)
    if _in_blocks(x):
        # A few columns at a time, each thread its own: they are read once, and stay in the cache.
        count = len(weight) // COLUMNS
        first = count * COLUMNS
        blocks = out[:, :first].unflatten(1, (count, COLUMNS)).transpose(0, 1)
        weights = weight[:first].unflatten(0, (count, COLUMNS)).transpose(1, 2)
        added = blocks if bias is None else bias[:first].view(count, 1, COLUMNS)
        xs = x.expand(count, *x.shape)
        torch.baddbmm(added, xs, weights, beta=beta, alpha=scale, out=blocks)
    rest = out[:, first:]
    added = rest if bias is None else bias[first:]
    torch.addmm(added, x, weight[first:].t(), beta=beta, alpha=scale, out=rest)


def product(out: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """out = alpha · a @ b, of a chunk's few rows, each the sum of a whole vocabulary."""
    if not _in_blocks(a):
        torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)
        return
    # The sum in parts: threads need not share one, and shorter sums are more exact.
    n = a.shape[1] // SUM_PARTS * SUM_PARTS
    shape = (SUM_PARTS, n // SUM_PARTS)
    parts = torch.bmm(a[:, :n].unflatten(1, shape).transpose(0, 1), b[:n].unflatten(0, shape))
    torch.sum(parts, 0, out=out)
    torch.addmm(out, a[:, n:], b[n:], beta=alpha, alpha=alpha, out=out)


def _in_blocks(x: Tensor) -> bool:
    """Whether the math library takes products of blocks as they lie, and each in one thread."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def add_product(total: Tensor, a: Tensor, b: Tensor, alpha: float, first: bool) -> None:
    """total = alpha · a @ b (`first`), or added to it; low-precision factors are summed in fp32."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, alpha=alpha, out=total)
        return
    if first:
        total.zero_()
    if _accumulates_in_fp32(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, alpha=alpha, out=total)
        return
    for rows in range(0, len(a), 4096):  # the products stay small
        total[rows : rows + 4096].add_(a[rows : rows + 4096] @ b, alpha=alpha)


@functools.cache
def _accumulates_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds low-precision products to an fp32 matrix on this device: not
    everywhere, and not in every version."""
    x = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, x, x, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # no kernel here, or no such argument yet
        return False
    return True
