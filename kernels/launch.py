"""How the kernels are launched: how a launch is cut, its numbers and its constants; `scale_`."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .block import OF_ALL, int64

PROGRAMS_PER_SM = 2
MAX_REGISTERS = 128  # a thread: two programs of 8 warps fill an SM's 65,536


# --- How a launch is cut --------------------------------------------------


class DensePlan(NamedTuple):
    """`teams` of `split` programs, each with `tiles` blocks of `block` entries of a row; whether
    the programs of a team wait for each other."""

    block: int
    tiles: int
    split: int
    teams: int
    warps: int
    waits: bool


class Device(NamedTuple):
    """What a plan must know of a device."""

    programs: int = 0  # that run at the same time and wait for each other; 0: none may
    cache_bytes: int = 0  # of L2 in which the rows of all teams must stay for three phases
    warp: int = 32


def dense_plan(T: int, V: int, row_bytes: int, device: Device, heavy: bool = False) -> DensePlan:
    """Pure function of the shapes and the device.

    `heavy`: entries that take more registers. As many threads have half the entries each, in half
    the programs.
    """
    programs = device.programs
    block = max(128, min(2048, triton.next_power_of_2(V)))
    blocks = triton.cdiv(V, block)
    warps = (256 if block == 2048 else 128) // device.warp  # 16-byte loads of bf16: 8 entries each
    if heavy:
        warps, programs = 2 * warps, programs // 2
    if not programs or blocks == 1:
        return DensePlan(block, blocks, 1, T, warps, False)
    rows = max(1, device.cache_bytes // (3 * row_bytes))
    split = min(blocks, programs, max(triton.cdiv(programs, rows), triton.cdiv(programs, T)))
    # A power of two: few kernels serve all T.
    tiles = triton.next_power_of_2(triton.cdiv(blocks, split) + 1) // 2
    if triton.cdiv(blocks, tiles) > programs:
        tiles *= 2
    split = triton.cdiv(blocks, tiles)
    return DensePlan(block, tiles, split, min(T, programs // split), warps, split > 1)


def is_heavy(ask, teacher: bool = True) -> bool:
    """Whether an entry of a launch takes more registers than a plain divergence's."""
    return teacher and (len(ask.divergence.parts) > 1 or ask.diagnostics and has_softmax(ask))


def dense_device(device: torch.device, alone: bool = False) -> Device:
    """Programs wait for each other on NVIDIA GPUs only, launched cooperatively: all of them run, or
    none. `alone`: nobody waits, one program a row."""
    if alone or not _is_nvidia(device):
        return Device(warp=64 if torch.version.hip else 32)
    found = torch.cuda.get_device_properties(device)
    return Device(PROGRAMS_PER_SM * found.multi_processor_count, found.L2_cache_size // 2)


class TopkPlan(NamedTuple):
    """`programs`, each with a row at a time in blocks of `block` entries."""

    block: int
    programs: int
    warps: int


def topk_plan(
    V: int, itemsize: int, multiprocessors: int, cache_bytes: int, warp: int = 32
) -> TopkPlan:
    """Pure function of the shapes and the device.

    An SM has 512 threads with a 16-byte load each: one program, or two where the rows of all of
    them stay in half of the L2.
    """
    per_sm = 2 if 2 * multiprocessors * V * itemsize <= cache_bytes // 2 else 1
    block = max(128, min(8192 // itemsize // per_sm, triton.next_power_of_2(V)))
    return TopkPlan(block, multiprocessors * per_sm, 512 // per_sm // warp)


def topk_device_plan(student: torch.Tensor) -> TopkPlan:
    V, itemsize = student.shape[-1], student.element_size()
    if student.device.type != "cuda":
        return topk_plan(V, itemsize, 4 if student.device.type == "cpu" else 64, 0)
    device = torch.cuda.get_device_properties(student.device)
    warp = 64 if torch.version.hip else 32
    return topk_plan(V, itemsize, device.multi_processor_count, device.L2_cache_size, warp)


# --- Constants ------------------------------------------------------------


class What(NamedTuple):
    """What a kernel computes, as constants. Tuples have an entry for each part of a divergence."""

    terms: tuple  # Triton functions; none: no teacher is read
    kinds: tuple[str, ...]  # `Divergence.kind`
    weighed: tuple[bool, ...]  # whether the part's weight is not 1
    infinite_p: tuple[bool | str, ...]  # "data": one of the numbers tells
    infinite_q: tuple[bool | str, ...]
    softmax: bool  # whether a part is of distributions, of mixed ones,
    mixed: bool
    difference: bool  # of the logits themselves
    mean: bool  # whether Σ slope must be summed before the gradient; else it is a number
    data: bool  # whether the numbers lie on the device
    ce: str  # "none", "shared" (the divergence's statistics serve) or "own" (T != 1, or n < V)
    grad: bool
    learns: bool  # whether the divergence has a part in it, or only where its factor is not 0
    by_row: bool
    diagnostics: bool
    tail: str  # of a sparse teacher
    source: str  # of the terms: an edited one is compiled again


class Cut(NamedTuple):
    """How a row is cut, as constants: a plan's `split`, the power of two above it, `tiles`, `block`
    and `waits`."""

    split: int
    split_2: int
    tiles: int
    block: int
    waits: bool


def has_softmax(ask, teacher: bool = True) -> bool:
    """Whether a part of the divergence is one of distributions."""
    return teacher and any(d.kind != "logits" for _, d in ask.divergence.parts)


def _what(ask, teacher: bool, ce: str, grad: bool, tail: str = "") -> What:
    parts = ask.divergence.parts if teacher else ()
    kinds = tuple(d.kind for _, d in parts)
    softmax = has_softmax(ask, teacher)
    terms = tuple(d.triton_term() for _, d in parts)
    learns = bool(teacher and ask.learns)
    return What(
        terms=terms,
        kinds=kinds,
        weighed=tuple(isinstance(w, torch.Tensor) or w != 1 for w, _ in parts),
        infinite_p=tuple(_known(d.infinite_p) for _, d in parts),
        infinite_q=tuple(_known(d.infinite_q) for _, d in parts),
        softmax=softmax,
        mixed="mixed" in kinds,
        difference="logits" in kinds,
        mean=grad and learns and any(d.kind != "logits" and d.slope_sum is None for _, d in parts),
        data=teacher and _on_device(ask),
        ce=ce,
        grad=grad,
        learns=learns,
        by_row=learns and ask.learns == "by row",
        diagnostics=ask.diagnostics and softmax,
        tail=tail,
        source="".join(getattr(term, "cache_key", "") for term in terms),
    )


def _on_device(ask) -> bool:
    """Whether a number is a tensor."""
    own = [x for weight, d in ask.divergence.parts for x in (weight, *d.numbers)]
    return any(isinstance(x, torch.Tensor) for x in (ask.temperature, *own))


def _known(infinite) -> bool | str:
    return "data" if isinstance(infinite, torch.Tensor) else bool(infinite)


def specialise_dense(
    ask, plan: DensePlan, *, teacher: bool, labels: bool, grad: bool, whole: bool, phases: int = 7
) -> dict:
    """The constants of a launch of `dense_kernel`.

    Args:
        ask: `fastkd.rows.Ask`.
        teacher, labels, grad: whether there are any.
        whole: whether the divergence sees all entries of the row.
        phases: 1 statistics, 2 value, 4 gradient, or the sum of several.
    """
    what = _what(ask, teacher, "own" if labels else "none", grad)
    # Not for a shard: another one may be cut. A temperature on the device is not known.
    if labels and what.softmax and whole and ask.shard is None and _is_one(ask.temperature):
        what = what._replace(ce="shared")
    cut = Cut(plan.split, triton.next_power_of_2(plan.split), plan.tiles, plan.block, plan.waits)
    return dict(PHASES=phases, WHAT=what, CUT=cut)


def specialise_topk(
    ask, plan: TopkPlan, *, tail: str, K: int, labels: bool, grad: bool, whole: bool
) -> dict:
    """The constants of a launch of `topk_kernel`; as `specialise_dense`. KP: a power of two > K."""
    shared = whole and _is_one(ask.temperature)
    ce = "none" if not labels else "shared" if shared else "own"
    what = _what(ask, True, ce, grad, tail)
    return dict(WHAT=what, KP=triton.next_power_of_2(K + 1), BLOCK=plan.block)


def _is_one(temperature) -> bool:
    return not isinstance(temperature, torch.Tensor) and temperature == 1


def options(nvidia: bool, warps: int, waits: bool = False) -> dict:
    """How a kernel is compiled and launched."""
    chosen = dict(num_warps=warps)
    if nvidia:
        chosen["maxnreg"] = MAX_REGISTERS
    if waits:
        chosen["launch_cooperative_grid"] = True
    return chosen


def options_on(device: torch.device, warps: int, waits: bool = False) -> dict:
    return options(_is_nvidia(device), warps, waits)


def _is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.version.hip


# --- Numbers --------------------------------------------------------------


def numbers_of(ask, teacher: bool = True, sparse=None) -> list:
    """`block.Numbers`, flat: floats, and 0-d tensors in float64."""
    if not teacher:
        return [0.0] * OF_ALL.value
    T, divergence = _double(ask.temperature), ask.divergence
    slope_sum, mixing, parts = 0.0, (0.0, 0.0), []
    for weight, d in divergence.parts:
        weight = _double(weight)
        if d.kind != "logits" and d.slope_sum is not None:
            slope_sum = slope_sum + weight * _double(d.slope_sum)
        if d.kind == "mixed":
            mixing = d.mixing
        parts += [weight, *d.numbers, *map(_flag, (d.infinite_p, d.infinite_q))]
    pooled = divergence.pooled_terms if sparse is not None else (0.0, 0.0)
    ratio = _double(sparse.temperature) / T if sparse is not None else 0.0
    slack = sparse.slack if sparse is not None else 0.0
    return [1 / (T * math.log(2)), 1 / T, slope_sum, *mixing, ratio, slack, *pooled, *parts]


def _double(x):
    return x.double() if isinstance(x, torch.Tensor) else x


def _flag(infinite):
    return infinite if isinstance(infinite, torch.Tensor) else float(infinite)


def pack(numbers: list, device: torch.device) -> tuple[tuple[float, ...], torch.Tensor | None]:
    """(launch arguments, None), or (placeholders, an fp32 tensor) if a number is a tensor: nothing
    is read from the device."""
    if not any(isinstance(x, torch.Tensor) for x in numbers):
        return tuple(map(float, numbers)), None
    column = [
        x.to(device, torch.float64).reshape(())
        if isinstance(x, torch.Tensor)
        else torch.full((), float(x), dtype=torch.float64, device=device)
        for x in numbers
    ]
    return (0.0,) * len(numbers), torch.stack(column).float()


# --- Launches ---------------------------------------------------------------


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return getattr(torch, device.type).device(device)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, T, V, factor_stride, BLOCK: tl.constexpr):
    """x[row] *= factor[row], in place; returns at once where one factor serves all and it is 1."""
    if factor_stride == 0:
        if tl.load(factor_ptr) == 1.0:
            return
    blocks = tl.cdiv(V, BLOCK)
    for i in range(tl.program_id(0), T * blocks, tl.num_programs(0)):
        row = int64(i // blocks)
        cols = i % blocks * BLOCK + tl.arange(0, BLOCK)
        factor = tl.load(factor_ptr + row * factor_stride).to(tl.float32)
        if factor != 1.0:
            x = tl.load(x_ptr + row * V + cols, mask=cols < V, other=0.0).to(tl.float32)
            tl.store(x_ptr + row * V + cols, x * factor, mask=cols < V)


def scale_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """(T, V) `x` times a scalar or (T,) `factor`, in place, in fp32, without a device sync."""
    T, V = x.shape
    with on(x.device):
        programs = 4 if x.device.type == "cpu" else 2048
        scale_kernel[(programs,)](
            x, factor, T, V, factor.stride(0) if factor.dim() else 0, BLOCK=2048
        )
    return x
