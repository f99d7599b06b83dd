"""Loss and gradient of dense logits, fastkd beside naive PyTorch, torch.compile and the peers, in
one run.

    pytest benchmarks/bench_loss.py --benchmark-json=benchmarks/results/cpu.json

`extra_info` holds what the README shows: shape, memory beyond logits and gradient, and the floor:
the bytes that must be moved (each logit read once, each gradient written once) over the measured
copy bandwidth.
"""

import ctypes
import time
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastkd import (
    JSD,
    TAID,
    AlphaBeta,
    Renyi,
    SkewForwardKL,
    SkewReverseKL,
    divergences,
    kd_loss,
    reference,
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
ROWS = 8192 if GPU else 512
VOCABULARIES = [32_000, 128_256, 151_936, 262_144] if GPU else [32_000, 151_936]
TEMPERATURE = 2.0
OTHERS = [
    divergences.get("reverse_kl"),
    SkewForwardKL(0.1),
    SkewReverseKL(0.9),
    JSD(0.5),
    divergences.get("jeffreys"),
    divergences.get("tvd"),
    divergences.get("hellinger"),
    Renyi(0.5),
    AlphaBeta(0.2, 0.7),
    TAID(0.5),
    divergences.get("logit_mse"),
]


@cache
def logits(V, distance=1.0):
    torch.manual_seed(0)
    student = torch.randn(ROWS, V, device=DEVICE, dtype=DTYPE).mul_(3)
    teacher = torch.randn(ROWS, V, device=DEVICE, dtype=DTYPE).mul_(distance).add_(student)
    return student, teacher


@cache
def copy_bandwidth():
    """Bytes read and written per second by a large copy."""
    source = torch.empty(2**30 if GPU else 2**27, dtype=torch.float32, device=DEVICE).fill_(1)
    target = torch.empty_like(source).fill_(1)
    best = min(timed(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.nbytes / best


def timed(run):
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def naive(student, teacher, divergence):
    if divergence.name == "forward_kl":
        log_q, p = F.log_softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
        return F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2
    return reference.naive(
        student, teacher, divergence, TEMPERATURE
    ).mean() * divergence.compensation(TEMPERATURE)


def fused(student, teacher, divergence):
    return kd_loss(student, teacher, divergence=divergence, temperature=TEMPERATURE)


def liger(student, teacher, divergence):
    modules = pytest.importorskip("liger_kernel.transformers")
    log_q = F.log_softmax(student.float() / TEMPERATURE, -1)
    if divergence.name == "forward_kl":
        loss = modules.LigerKLDIVLoss(reduction="batchmean")(
            log_q, F.softmax(teacher.float() / TEMPERATURE, -1)
        )
    elif divergence.name == "jsd":
        loss = modules.LigerJSD(beta=divergence.teacher_weight)(
            log_q, F.log_softmax(teacher.float() / TEMPERATURE, -1)
        )
    else:
        pytest.skip("no such loss there")
    return loss * TEMPERATURE**2


PROVIDERS = {"naive": naive, "compile": None, "liger": liger, "fastkd": fused}


def peak_bytes(run, student):
    """Peak memory beyond what was there before and the gradient."""
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before - student.nbytes
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def kilobytes(field):
        return int(
            next(
                line for line in status.read_text().splitlines() if line.startswith(field)
            ).split()[1]
        )

    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs left in the heap would hide this one's use
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = kilobytes("VmRSS")
    run()
    return 1024 * (kilobytes("VmHWM") - before) - student.nbytes


def measure(benchmark, provider, divergence, V, distance=1.0):
    if provider == "liger" and not GPU:
        pytest.skip("needs a GPU")
    loss = torch.compile(naive) if provider == "compile" else PROVIDERS[provider]
    student, teacher = logits(V, distance)

    def step():
        leaf = student.detach().requires_grad_()
        loss(leaf, teacher, divergence).backward()
        if GPU:
            torch.cuda.synchronize()
        return leaf.grad

    step()
    benchmark.extra_info.update(
        provider=provider, divergence=divergence.name, rows=ROWS, V=V, dtype=str(DTYPE),
        distance=distance, peak_bytes=peak_bytes(step, student),
        floor_seconds=(2 * student.nbytes + teacher.nbytes) / copy_bandwidth(),
    )  # fmt: skip
    rounds = 20 if GPU else 9 if provider in ("fastkd", "compile") else 5
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=3 if rounds > 5 else 1)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("V", VOCABULARIES)
def bench_forward_kl(benchmark, V, provider):
    measure(benchmark, provider, divergences.get("forward_kl"), V)


@pytest.mark.parametrize("provider", ["naive", "fastkd"])
def bench_near(benchmark, provider):
    """A student so near its teacher that every row is summed a second time, without cancellation
    (CPU)."""
    measure(benchmark, provider, divergences.get("forward_kl"), 151_936, distance=0.05)


@pytest.mark.parametrize("provider", ["naive", "liger", "fastkd"])
@pytest.mark.parametrize("divergence", OTHERS, ids=lambda d: d.name)
def bench_divergence(benchmark, divergence, provider):
    if provider == "liger" and divergence.name != "jsd":
        pytest.skip("no such loss there")
    measure(benchmark, provider, divergence, 151_936)
