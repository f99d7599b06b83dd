"""Which backend serves."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.backends import eager, eager_topk
from fastkd.rows import Ask, Rows


class Backend(NamedTuple):
    """The row functions (fastkd/rows.py), and what goes with them."""

    dense: Callable[[Rows, Ask], Tensor]
    topk: Callable[[Rows, Ask], Tensor]
    scale_: Callable[[Tensor, Tensor], Tensor]  # (T, V) times a scalar or (T,), in place
    in_blocks: bool  # whether rows are worked on in blocks, which take memory


EAGER = Backend(eager.dense, eager_topk.topk, eager.scale_, True)


def backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """Of logits on that device, of that type: Triton on GPUs, torch elsewhere and in float64;
    FASTKD_BACKEND = "auto", "triton" or "eager" chooses."""
    if not _uses_triton(device, dtype):
        return EAGER
    from fastkd.kernels.dense import dense, scale_
    from fastkd.kernels.topk import topk

    return Backend(dense, topk, scale_, False)


def _uses_triton(device: torch.device, dtype: torch.dtype) -> bool:
    choice = os.environ.get("FASTKD_BACKEND", "auto")
    if choice not in ("auto", "triton", "eager"):
        raise ValueError(f"FASTKD_BACKEND must be auto, triton or eager, got {choice!r}")
    if choice == "eager" or (
        choice == "auto" and (device.type not in ("cuda", "xpu") or dtype == torch.float64)
    ):
        return False
    if dtype == torch.float64:
        raise ValueError(
            "the Triton kernels compute in fp32, the logits are float64:"
            " use FASTKD_BACKEND=auto or eager"
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "FASTKD_BACKEND=triton on CPU tensors needs TRITON_INTERPRET=1,"
            " set before the first import"
        )
    try:
        import triton  # noqa: F401
    except ImportError:
        if choice == "triton":
            raise
        return False
    return True
