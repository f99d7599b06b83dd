"""Compile the kernels for GPUs that are not here: `python tests/aot.py TARGET`, one JSON line per
kernel.

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

import triton
from common import DIVERGENCES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastkd import JSD, AlphaBeta, ForwardKL, Renyi
from fastkd.kernels import dense as kernels
from fastkd.kernels.topk import plan as topk_plan
from fastkd.kernels.topk import topk_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
INTEGERS = "n V s_outer s_inner t_outer t_inner T s_len t_len lag step factor_stride".split()
ALIGNED = (
    "n V s_outer s_inner t_outer t_inner".split()
)  # rows of a multiple of 16 entries, as Triton specialises them


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


def compile_dense(
    target, divergence, shared_row, ce, dtype="bf16", grad=True, aligned=True, diagnostics=False,
    phases=7,
):  # fmt: skip
    """(name, compiled, how many 128-bit loads of logits it must have)."""
    types = {n: "*fp32" for n in kernels.dense_kernel.arg_names if n.endswith("_ptr")}
    types |= dict(label_ptr="*i64", flag_ptr="*i32")
    types |= dict.fromkeys(("s_ptr", "t_ptr", "grad_ptr"), f"*{dtype}")
    programs = 264 if shared_row else 0
    p = kernels.plan(
        8192, 151_936, 4 * 151_936, programs, 30_000_000, target.warp_size, diagnostics
    )
    mean = divergence.slope_sum is None
    constants = dict(
        TERM=divergence.triton_term(), KIND=divergence.kind,
        INFINITE_P=divergence.infinite_p, INFINITE_Q=divergence.infinite_q,
        MEAN=mean, CE=ce, GRAD=grad, DIAGNOSTICS=diagnostics, PHASES=phases,
        SPLIT=p.split, SPLIT_2=triton.next_power_of_2(p.split), TILES=p.tiles, BLOCK=p.block,
    )  # fmt: skip
    options = dict(num_warps=p.warps)
    if target.backend == "cuda":
        options["maxnreg"] = kernels.MAX_REGISTERS
    compiled = compile_kernel(kernels.dense_kernel, target, types, constants, aligned, **options)
    sweeps = bin(phases & (7 if mean and grad else 3)).count("1")
    wide = 2 * sweeps * (2 if dtype == "fp32" else 1)
    if not aligned or diagnostics:  # diagnostics: fewer entries a thread
        wide = 0
    name = f"{divergence} split={p.split} ce={ce} {dtype} grad={grad}"
    return f"{name} diagnostics={diagnostics} phases={phases}", compiled, wide


def variants(target):
    cuda = target.backend == "cuda"
    for divergence in DIVERGENCES:
        if cuda:  # the largest form
            yield compile_dense(target, divergence, shared_row=True, ce="own")
        if target.arch in (90, "gfx942"):
            yield compile_dense(target, divergence, shared_row=False, ce="none")
            if divergence.kind != "logits":
                yield compile_dense(target, divergence, shared_row=False, ce="shared")
    if target.arch == 90:
        for divergence in (ForwardKL(), JSD()):
            yield compile_dense(target, divergence, True, "own", dtype="fp32")
            yield compile_dense(target, divergence, True, "own", dtype="fp16", grad=False)
            yield compile_dense(target, divergence, True, "own", aligned=False)
        for divergence in (ForwardKL(), JSD(), Renyi(2.0), AlphaBeta(0.2, 0.7)):
            yield compile_dense(target, divergence, True, "own", diagnostics=True)
        for phases in (1, 2, 4):  # vocabulary shards
            for diagnostics in (False, True) if phases == 2 else (False,):
                yield compile_dense(
                    target, JSD(), False, "own", diagnostics=diagnostics, phases=phases
                )
        yield compile_dense(target, ForwardKL(), False, "own", phases=2)
    scale = compile_kernel(
        kernels.scale_kernel,
        target,
        dict(x_ptr="*bf16", factor_ptr="*fp32"),
        dict(BLOCK=2048),
        num_warps=256 // target.warp_size,
    )
    yield "scale", scale, 1


def compile_topk(
    target, divergence, tail, ce, K, dtype="bf16", diagnostics=False, aligned=True, V=151_936
):
    """As `compile_dense`."""
    types = {n: "*fp32" for n in topk_kernel.arg_names if n.endswith("_ptr")}
    types |= dict(id_ptr="*i32", label_ptr="*i64", K="i32")
    types |= dict.fromkeys(("s_ptr", "grad_ptr"), f"*{dtype}")
    itemsize = 2 if dtype == "bf16" else 4
    p = topk_plan(V, itemsize, 132, 50_000_000, target.warp_size)
    constants = dict(
        TERM=divergence.triton_term(),
        INFINITE_P=divergence.infinite_p, INFINITE_Q=divergence.infinite_q, TAIL=tail,
        CE=ce, GRAD=True, DIAGNOSTICS=diagnostics,
        KP=triton.next_power_of_2(K + 1), BLOCK=p.block,
    )  # fmt: skip
    options = dict(num_warps=p.warps)
    if target.backend == "cuda":
        options["maxnreg"] = kernels.MAX_REGISTERS
    compiled = compile_kernel(topk_kernel, target, types, constants, aligned, **options)
    wide = 3 if aligned else 0  # of the first block, the next one, the gradient's
    what = f"V={V} {tail} K={K} ce={ce} {dtype} diagnostics={diagnostics}"
    return f"topk {divergence} {what}", compiled, wide


def topk_variants(target):
    for divergence in DIVERGENCES:
        if divergence.pooled_terms is not None:
            yield compile_topk(target, divergence, "bucket", "own", 64)
    for tail in ("bucket", "renormalize", "truncate"):
        yield compile_topk(target, ForwardKL(), tail, "shared", 100)
        yield compile_topk(target, JSD(), tail, "own", 100, diagnostics=True)
        yield compile_topk(target, JSD(), tail, "own", 100, diagnostics=True, V=32_000)
    yield compile_topk(target, ForwardKL(), "bucket", "none", 64, dtype="fp32")
    yield compile_topk(target, ForwardKL(), "bucket", "own", 64, aligned=False)


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
        local=int(numbers["LOCAL"]) + int(numbers["STACK"]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        wide_loads=len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128", sass)),
    )


if __name__ == "__main__":
    target = TARGETS[sys.argv[1]]
    for name, compiled, wide in itertools.chain(variants(target), topk_variants(target)):
        print(json.dumps(report(name, compiled, target) | dict(expected=wide)), flush=True)
