"""What the benchmarks share: the device, the clock, the memory meter, and the floor and the naive
loss beside ours."""

import ctypes
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from fastkd import reference
from fastkd.backends import buffers
from fastkd.divergences import Divergence

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
TEMPERATURE = 2.0


def timed(run: Callable) -> float:
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@cache
def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(2**30 if GPU else 2**27, dtype=torch.float32, device=DEVICE).fill_(1)
    target = torch.empty_like(source).fill_(1)
    best = min(timed(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.nbytes / best


def peak_bytes(run: Callable, result_bytes: int) -> int | None:
    """Peak memory beyond what was there before and the result, the gradients."""
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before - result_bytes
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def kilobytes(field):
        return int(
            next(
                line for line in status.read_text().splitlines() if line.startswith(field)
            ).split()[1]
        )

    # What earlier runs left would hide this one's use.
    buffers.release()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = kilobytes("VmRSS")
    run()
    return 1024 * (kilobytes("VmHWM") - before) - result_bytes


def measure(
    benchmark, step: Callable, result_bytes: int, provider: str, floor: Callable | None = None,
    **info,
) -> None:  # fmt: skip
    """Time `step`, which returns gradients of `result_bytes` in all, and save `info` with it.

    `floor` is timed before every round, so that a machine that is slower for a while is so for
    both; its median is saved as `floor_seconds`.
    """

    def run():
        result = step()
        if GPU:
            torch.cuda.synchronize()
        return result

    run()
    benchmark.extra_info.update(
        info, provider=provider, dtype=str(DTYPE), peak_bytes=peak_bytes(run, result_bytes)
    )
    ours = provider == "fastkd"
    rounds = (20 if ours else 10) if GPU else 9 if ours or provider == "compile" else 7
    if ours and floor is not None and not GPU:
        rounds = 21  # products vary by a third from one second to the next on a shared machine
    floors = []
    setup = None if floor is None else lambda: floors.append(timed(floor))
    benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=3 if GPU else 1)
    if floors:
        benchmark.extra_info["floor_seconds"] = statistics.median(floors[-rounds:])


def compiled(loss: Callable) -> Callable:
    """One graph for each shape: else the second one would get symbolic sizes, and slower code."""
    return torch.compile(loss, dynamic=False)


def naive(student, teacher, divergence: Divergence):
    """What one writes in torch, of two tensors of logits."""
    if divergence.name == "forward_kl":
        log_q, p = F.log_softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
        return F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2
    return reference.naive(
        student, teacher, divergence, TEMPERATURE
    ).mean() * divergence.compensation(TEMPERATURE)


def gemms(hidden, weight, teacher: tuple | None = None, trained: bool = True) -> Callable:
    """A step of the matrix products that LM heads cannot do without, whole, into memory that is
    there already: the student's logits, the teacher's (hidden, weight), and both gradients, or
    dHidden alone."""
    logits = hidden.new_empty(len(hidden), len(weight))
    target = torch.empty_like(logits)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def step():
        torch.mm(hidden, weight.t(), out=logits)
        if teacher is not None:
            torch.mm(teacher[0], teacher[1].t(), out=target)
        torch.mm(logits, weight, out=d_hidden)  # any numbers will do for the logits' gradient
        if trained:
            torch.mm(logits.t(), hidden, out=d_weight)

    return step
