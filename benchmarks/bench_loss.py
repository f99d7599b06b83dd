"""Loss and gradient of dense logits, fastkd beside naive PyTorch, torch.compile and the peers, in
one run.

    pytest benchmarks/bench_loss.py --benchmark-json=benchmarks/results/cpu.json

`extra_info` holds what the README shows: shape, memory beyond logits and gradient, and the floor:
the bytes that must be moved (each logit read once, each gradient written once) over the measured
copy bandwidth.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from measuring import DEVICE, DTYPE, GPU, TEMPERATURE, compiled, copy_bandwidth, measure, naive

from fastkd import divergences, kd_loss

ROWS = 8192 if GPU else 512
VOCABULARIES = [32_000, 128_256, 151_936, 262_144] if GPU else [32_000, 151_936]
OTHERS = [d for d in divergences.examples() if d.name != "forward_kl"]


@cache
def logits(V, distance=1.0):
    torch.manual_seed(0)
    student = torch.randn(ROWS, V, device=DEVICE, dtype=DTYPE).mul_(3)
    teacher = torch.randn(ROWS, V, device=DEVICE, dtype=DTYPE).mul_(distance).add_(student)
    return student, teacher


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


def bench(benchmark, provider, divergence, V, distance=1.0):
    if provider == "liger" and not GPU:
        pytest.skip("needs a GPU")
    loss = compiled(naive) if provider == "compile" else PROVIDERS[provider]
    student, teacher = logits(V, distance)

    def step():
        leaf = student.detach().requires_grad_()
        loss(leaf, teacher, divergence).backward()
        return leaf.grad

    measure(
        benchmark, step, student.nbytes, provider, table="dense", divergence=divergence.name,
        rows=ROWS, V=V, distance=distance,
        floor_seconds=(2 * student.nbytes + teacher.nbytes) / copy_bandwidth(),
    )  # fmt: skip


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("V", VOCABULARIES)
def bench_forward_kl(benchmark, V, provider):
    bench(benchmark, provider, divergences.get("forward_kl"), V)


@pytest.mark.parametrize("provider", ["naive", "fastkd"])
def bench_near(benchmark, provider):
    """A student so near its teacher that every row is summed a second time, without cancellation
    (CPU)."""
    bench(benchmark, provider, divergences.get("forward_kl"), 151_936, distance=0.05)


@pytest.mark.parametrize("provider", ["naive", "liger", "fastkd"])
@pytest.mark.parametrize("divergence", OTHERS, ids=lambda d: d.name)
def bench_divergence(benchmark, divergence, provider):
    if provider == "liger" and divergence.name != "jsd":
        pytest.skip("no such loss there")
    bench(benchmark, provider, divergence, 151_936)
