"""Loss and gradient of hidden states and LM heads, fastkd beside naive PyTorch, torch.compile and
the peers, in one run.

    pytest benchmarks/bench_head.py --benchmark-json=benchmarks/results/cpu.json

The floor, the four matrix products alone (three where the head is frozen), is timed in turns with
each of them. Peers (liger-kernel 0.8.5, TRL 1.16) run where they are installed, on a GPU, with
their own defaults: both of Liger's add up a head's bf16 gradient in bf16.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from measuring import DEVICE, DTYPE, GPU, TEMPERATURE, compiled, gemms, measure, naive

from fastkd import JSD, ForwardKL, LMHead, kd_loss

ROWS = [8192, 1024] if GPU else [512]
V = 128_256 if GPU else 32_000
WIDTHS = (2048, 4096) if GPU else (512, 512)  # of student and teacher
BETA = {"forward_kl": 0.0, "jsd": 0.5}  # the divergences' names among the peers


@cache
def heads(rows):
    """(hidden, weight) of student and teacher, whose logits have a standard deviation of 3."""
    torch.manual_seed(0)
    return [
        (
            torch.randn(rows, H, device=DEVICE, dtype=DTYPE),
            torch.randn(V, H, device=DEVICE, dtype=DTYPE).mul_(3 * H**-0.5),
        )
        for H in WIDTHS
    ]


def fused(hidden, weight, teacher, divergence):
    return kd_loss(
        LMHead(hidden, weight), LMHead(*teacher), divergence=divergence, temperature=TEMPERATURE
    )


def naive_heads(hidden, weight, teacher, divergence):
    return naive(F.linear(hidden, weight), F.linear(*teacher), divergence)


def liger_fused(hidden, weight, teacher, divergence):
    modules = pytest.importorskip("liger_kernel.transformers", exc_type=ImportError)
    loss = modules.LigerFusedLinearJSD(BETA[divergence.name], temperature=TEMPERATURE)
    return loss(hidden, weight, *teacher, None) * TEMPERATURE**2


def liger_chunked(hidden, weight, teacher, divergence):
    modules = pytest.importorskip("liger_kernel.chunked_loss", exc_type=ImportError)
    loss = modules.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=BETA[divergence.name],
        temperature=TEMPERATURE,
    )
    labels = torch.zeros(len(hidden), dtype=torch.long, device=DEVICE)
    return loss(hidden, weight, *teacher, labels) * TEMPERATURE**2


def trl(hidden, weight, teacher, divergence):
    module = pytest.importorskip("trl.trainer.distillation_trainer", exc_type=ImportError)
    loss = module._chunked_divergence_loss(
        hidden[None],
        teacher[0][None],
        weight,
        teacher[1],
        torch.ones(1, len(hidden), dtype=torch.long, device=DEVICE),
        BETA[divergence.name],
        temperature=TEMPERATURE,
    )[0]
    return loss * TEMPERATURE**2


PEERS = {"trl": trl, "liger_fused": liger_fused, "liger_chunked": liger_chunked}
PROVIDERS = {"fastkd": fused, "naive": naive_heads, **PEERS, "compile": None}


def bench(benchmark, provider, rows, divergence, frozen=False):
    if provider in PEERS and not GPU:
        pytest.skip("needs a GPU")
    (hidden, weight), teacher = heads(rows)
    loss = compiled(naive_heads) if provider == "compile" else PROVIDERS[provider]

    def step():
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
        loss(h, w, teacher, divergence).backward()
        return h.grad, w.grad

    measure(
        benchmark, step, hidden.nbytes + (0 if frozen else weight.nbytes), provider,
        gemms(hidden, weight, teacher, trained=not frozen), table="head",
        divergence=divergence.name, rows=rows, V=V, widths=WIDTHS, frozen=frozen,
    )  # fmt: skip


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("divergence", [ForwardKL(), JSD(0.5)], ids=lambda d: d.name)
@pytest.mark.parametrize("rows", ROWS)
def bench_head(benchmark, rows, divergence, provider):
    bench(benchmark, provider, rows, divergence)


@pytest.mark.parametrize("provider", ["fastkd", "naive"])
@pytest.mark.parametrize("rows", ROWS)
def bench_frozen_head(benchmark, rows, provider):
    bench(benchmark, provider, rows, ForwardKL(), frozen=True)
