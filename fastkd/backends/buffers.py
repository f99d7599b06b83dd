"""Memory for large tensors on the CPU, kept from one call to the next.

The C library returns large blocks to the system, and the first touch of new pages costs a good part
of the time. Blocks that no tensor uses any more are used again by the next call that fits; one that
fits none frees them all. After a backward pass only `KEPT` bytes of them stay, so that they do not
add to the peak of a training step, and `release()` frees all.
"""

from __future__ import annotations

import functools
import math
import mmap
import sys
import threading

import torch

SMALLEST = 2**20  # bytes; below, the C library does the same
KEPT = 2**27  # bytes that may stay unused
_blocks: list[mmap.mmap] = []
_lock = threading.Lock()


def empty(
    shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`torch.empty` of the type (or `dtype`) and on the device of `like`."""
    dtype = dtype or like.dtype
    count = math.prod(shape)
    size = count * dtype.itemsize
    if not _KEEPS or like.device.type != "cpu" or size < SMALLEST:
        return torch.empty(shape, dtype=dtype, device=like.device)
    with _lock:
        fitting = [block for block in _free() if size <= len(block) <= 2 * size]
        if not fitting:
            _release()
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            fitting = [mmap.mmap(-1, size, flags=flags)]
            fitting[0].madvise(mmap.MADV_HUGEPAGE)  # advice only
            _blocks.extend(fitting)
        # The tensor's storage holds a reference to the block for as long as it lives.
        return torch.frombuffer(min(fitting, key=len), dtype=dtype, count=count).view(shape)


@functools.cache
def teach_malloc() -> None:
    """glibc's malloc learns from what it frees: after this it keeps the pages of temporaries up to
    this size, instead of returning them to the system, which would cost page faults in every block
    of rows. Once a process."""
    torch.empty(32_000_000, dtype=torch.uint8)


def release() -> None:
    """Give the memory that no tensor uses back to the system."""
    with _lock:
        _release()


def _release() -> None:
    unused = {id(block) for block in _free()}
    _blocks[:] = [block for block in _blocks if id(block) not in unused]


def trim() -> None:
    """Give back all but `KEPT` bytes of what no tensor uses, the largest blocks first."""
    with _lock:
        kept, gone = 0, set()
        for block in sorted(_free(), key=len):
            kept += len(block)
            if kept > KEPT:
                gone.add(id(block))
        _blocks[:] = [block for block in _blocks if id(block) not in gone]


def trim_after_backward() -> None:
    """`trim` when the backward pass that runs now has ended: gradients are on their way."""
    if _blocks and torch._C._current_graph_task_id() != -1:
        torch.autograd.Variable._execution_engine.queue_callback(trim)


def _references(blocks: list) -> list[int]:
    return [sys.getrefcount(block) for block in blocks]


# Of a block that only its list refers to, counted in the same way: Pythons differ.
_UNUSED = _references([object()])[0]
_KEEPS = sys.platform == "linux" and getattr(sys, "_is_gil_enabled", lambda: True)()


def _free() -> list[mmap.mmap]:
    counts = _references(_blocks)
    return [block for block, n in zip(_blocks, counts, strict=True) if n <= _UNUSED]
