"""Compile the kernels for GPUs that are not here: `python tests/loss/aot.py TARGET`, one JSON line
per kernel.

A process of its own, because the interpreter (TRITON_INTERPRET) is chosen when the kernels are
imported.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from common import DIVERGENCES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastkd import JSD, TAID, AlphaBeta, Divergence, ForwardKL, LogitMSE, Renyi, ReverseKL
from fastkd.kernels import launch
from fastkd.kernels.dense import dense_kernel
from fastkd.kernels.topk import topk_kernel
from fastkd.rows import Ask, Sparse

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
INTEGERS = (
    "T K n V s_len s_outer s_inner t_len t_outer t_inner factor_stride number_stride lag step"
).split()
# Rows of a multiple of 16 entries, as Triton specialises them.
ALIGNED = "n V s_outer s_inner t_outer t_inner".split()
SPARSE = Sparse(None, None)


class Sum(Divergence):
    """Several divergences in one pass, as far as a kernel looks."""

    def __init__(self, *parts):
        self.every = parts

    parts = property(lambda self: self.every)
    pooled_terms = (0.5, 0.5)

    def __str__(self):
        return " + ".join(f"{weight} {d}" for weight, d in self.every)


SUMS = [
    Sum((0.5, ForwardKL()), (2.0, ReverseKL())),
    Sum((1.0, JSD()), (0.5, TAID(0.3))),
    Sum((1.0, JSD()), (0.5, TAID(0.3)), (0.1, LogitMSE(True))),
]


def on_device(divergence):
    """The same with a weight that is a tensor: all numbers lie on the device."""
    return Sum(*((torch.tensor(float(weight)), d) for weight, d in divergence.parts))


def compile_kernel(kernel, target, types, constants, aligned=True, **options):
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = types.get(name, "i32" if name in INTEGERS else "fp32")
        if name.endswith("_ptr") or (aligned and name in ALIGNED):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


class Case(NamedTuple):
    """One launch of `dense_kernel`."""

    divergence: Divergence
    team: bool = True  # whether programs share a row
    ce: str = "own"
    dtype: str = "bf16"
    grad: bool = True
    aligned: bool = True
    diagnostics: bool = False
    phases: int = 7
    teacher: bool = True

    def __str__(self):
        return " ".join(f"{name}={value}" for name, value in self._asdict().items())


def compile_dense(target, case):
    """(name, compiled, how many 128-bit loads of logits it must have)."""
    types = {n: "*fp32" for n in dense_kernel.arg_names if n.endswith("_ptr")}
    types |= dict(label_ptr="*i64", flag_ptr="*i32")
    types |= dict.fromkeys(("s_ptr", "t_ptr", "grad_ptr"), f"*{case.dtype}")
    device = launch.Device(264 if case.team else 0, 30_000_000, target.warp_size)
    temperature = 1.0 if case.ce == "shared" else 2.0
    ask = Ask(case.divergence, temperature, diagnostics=case.diagnostics)
    heavy = launch.is_heavy(ask, case.teacher)
    plan = launch.dense_plan(8192, 151_936, 4 * 151_936, device, heavy)
    constants = launch.specialise_dense(
        ask, plan, teacher=case.teacher, labels=case.ce != "none", grad=case.grad, whole=True,
        phases=case.phases,
    )  # fmt: skip
    what = constants["WHAT"]
    assert what.ce == case.ce
    types["numbers"] = ("fp32",) * len(launch.numbers_of(ask, case.teacher))
    options = launch.options(target.backend == "cuda", plan.warps)
    compiled = compile_kernel(dense_kernel, target, types, constants, case.aligned, **options)
    sweeps = bin(case.phases & (7 if what.mean else 3)).count("1")
    sides = 2 if case.teacher else 1
    expected = sides * sweeps * (2 if case.dtype == "fp32" else 1)
    if not case.aligned or heavy:  # fewer entries a thread
        expected = 0
    return str(case), compiled, expected


def dense_cases(target):
    cuda = target.backend == "cuda"
    for divergence in DIVERGENCES:
        if cuda:  # the largest form
            yield Case(divergence)
        if target.arch in (90, "gfx942"):
            yield Case(divergence, team=False, ce="none")
            if divergence.kind != "logits":
                yield Case(divergence, team=False, ce="shared")
    for divergence in (
        *SUMS,
        on_device(JSD()),
        on_device(Renyi(2.0)),
        on_device(SUMS[0]),
        on_device(SUMS[1]),
    ):
        yield Case(divergence, team=cuda)
    for team in (False, True) if cuda else (False,):
        yield Case(ForwardKL(), team, teacher=False)
    if target.arch == 90:
        for divergence in (ForwardKL(), JSD()):
            yield Case(divergence, dtype="fp32")
            yield Case(divergence, dtype="fp16", grad=False)
            yield Case(divergence, aligned=False)
        for divergence in (ForwardKL(), JSD(), Renyi(2.0), AlphaBeta(0.2, 0.7), SUMS[0]):
            yield Case(divergence, diagnostics=True)
        for phases in (1, 2, 4):  # vocabulary shards
            for diagnostics in (False, True) if phases == 2 else (False,):
                yield Case(JSD(), False, diagnostics=diagnostics, phases=phases)
        yield Case(ForwardKL(), False, phases=2)


def compile_scale(target):
    types = dict(x_ptr="*bf16", factor_ptr="*fp32")
    warps = 256 // target.warp_size
    return "scale", compile_kernel(
        launch.scale_kernel, target, types, dict(BLOCK=2048), num_warps=warps
    ), 1  # fmt: skip


class TopkCase(NamedTuple):
    """One launch of `topk_kernel`."""

    divergence: Divergence
    tail: str = "bucket"
    ce: str = "own"
    K: int = 64
    dtype: str = "bf16"
    diagnostics: bool = False
    aligned: bool = True
    V: int = 151_936

    def __str__(self):
        return "topk " + " ".join(f"{name}={value}" for name, value in self._asdict().items())


def compile_topk(target, case):
    """As `compile_dense`."""
    types = {n: "*fp32" for n in topk_kernel.arg_names if n.endswith("_ptr")}
    types |= dict(id_ptr="*i32", label_ptr="*i64")
    types |= dict.fromkeys(("s_ptr", "grad_ptr"), f"*{case.dtype}")
    itemsize = 2 if case.dtype == "bf16" else 4
    plan = launch.topk_plan(case.V, itemsize, 132, 50_000_000, target.warp_size)
    temperature = 1.0 if case.ce == "shared" else 2.0
    ask = Ask(case.divergence, temperature, diagnostics=case.diagnostics)
    constants = launch.specialise_topk(
        ask, plan, tail=case.tail, K=case.K, labels=case.ce != "none", grad=True, whole=True
    )
    assert constants["WHAT"].ce == case.ce
    types["numbers"] = ("fp32",) * len(launch.numbers_of(ask, sparse=SPARSE))
    options = launch.options(target.backend == "cuda", plan.warps)
    compiled = compile_kernel(topk_kernel, target, types, constants, case.aligned, **options)
    expected = 3 if case.aligned else 0  # of the first block, the next one, the gradient's
    return str(case), compiled, expected


def topk_cases():
    for divergence in DIVERGENCES:
        if divergence.pooled_terms is not None:
            yield TopkCase(divergence)
    for tail in ("bucket", "renormalize", "truncate"):
        yield TopkCase(ForwardKL(), tail, "shared", 100)
        yield TopkCase(JSD(), tail, K=100, diagnostics=True)
        yield TopkCase(JSD(), tail, K=100, diagnostics=True, V=32_000)
    yield TopkCase(ForwardKL(), ce="none", dtype="fp32")
    yield TopkCase(ForwardKL(), aligned=False)
    yield TopkCase(SUMS[0], "truncate")
    yield TopkCase(on_device(SUMS[0]), "truncate")


def report(name, compiled, target):
    if target.backend == "hip":
        code = compiled.asm["amdgcn"]
        spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1])
        local = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", code)[1])
        wide_loads = len(re.findall(r"(?:global|buffer)_load_dwordx4", code))
        return dict(name=name, spills=spills, local=local, wide_loads=wide_loads)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [tool, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return dict(
        name=name,
        registers=int(numbers["REG"]),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
        local=int(numbers["LOCAL"]) + int(numbers["STACK"]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        wide_loads=len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128", sass)),
    )


if __name__ == "__main__":
    target = TARGETS[sys.argv[1]]
    every = itertools.chain(
        (compile_dense(target, case) for case in dense_cases(target)),
        (compile_scale(target) for _ in range(1)),
        (compile_topk(target, case) for case in topk_cases()),
    )
    for name, compiled, expected in every:
        print(json.dumps(report(name, compiled, target) | dict(expected=expected)), flush=True)
