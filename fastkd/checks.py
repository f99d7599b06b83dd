"""What is refused, and with which words."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def shape_of(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def check_floats(what: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{what} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def check_integers(what: str, x: Any) -> None:
    if not isinstance(x, Tensor) or x.dtype not in INTEGERS:
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{what} must be an integer tensor, got {got}")


def check_number(what: str, x: Any) -> None:
    """A Python number, or a tensor that holds one: its value is looked at elsewhere (`require`)."""
    if isinstance(x, Tensor):
        if x.dim() or not x.is_floating_point():
            raise TypeError(
                f"{what} must be a number or a 0-d float tensor, got {x.dtype} of shape"
                f" {shape_of(x)}"
            )
        check_constant(what, x)
    elif isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{what} must be a number or a 0-d tensor, got {type(x).__name__}")


def check_constant(what: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(f"{what} is not differentiated, but requires grad: detach it")


def require(holds: Any, message: str, values: Any) -> None:
    """Raise on the CPU, assert on a CUDA or ROCm device, without a sync; other devices are not
    asked. `message` has {} where the values that do not hold are named."""
    if not isinstance(holds, Tensor):
        if not holds:
            raise ValueError(message.format(values))
    elif holds.device.type == "cpu" and not torch.compiler.is_compiling():
        if holds.all():
            return
        if isinstance(values, Tensor):
            bad = values.expand_as(holds)[~holds].unique().tolist()
            values = (f"{bad[:8]}…" if len(bad) > 8 else bad) if holds.dim() else bad[0]
        raise ValueError(message.format(values))
    elif holds.device.type in ("cpu", "cuda"):
        torch._assert_async(holds.all(), "fastkd: " + message.format("others"))


def require_ids(what: str, ids: Tensor, ignored: Tensor, size: int | Tensor, other: str) -> None:
    """Every id is in [0, size), or is ignored; `other` says which else may stand there."""
    inside = ignored | ((ids >= 0) & (ids < size))
    if isinstance(size, Tensor) and (size.device.type != "cpu" or torch.compiler.is_compiling()):
        size = "V"  # its number would be a sync, or is not known yet
    require(inside, f"{what} must be in [0, {size}) or {other}, got {{}}", ids)
