"""Loss and gradient against a teacher's best 64 entries, fastkd beside naive PyTorch and
torch.compile, in one run.

    pytest benchmarks/bench_topk.py --benchmark-json=benchmarks/results/cpu.json

The floor of dense logits is the bytes that must be moved (each logit read once, each gradient
written once) over the measured copy bandwidth; that of an LM head its three matrix products alone,
timed in turns with each provider.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from measuring import (
    DEVICE,
    DTYPE,
    GPU,
    TEMPERATURE,
    compiled,
    copy_bandwidth,
    gemms,
    measure,
)

from fastkd import LMHead, TopK, kd_loss

ROWS = 8192 if GPU else 512
V = 151_936
K = 64
WIDTH = 2048 if GPU else 512


@cache
def dense():
    torch.manual_seed(0)
    return torch.randn(ROWS, V, device=DEVICE, dtype=DTYPE).mul_(3)


@cache
def head():
    torch.manual_seed(1)
    hidden = torch.randn(ROWS, WIDTH, device=DEVICE, dtype=DTYPE)
    return hidden, torch.randn(V, WIDTH, device=DEVICE, dtype=DTYPE).mul_(3 * WIDTH**-0.5)


@cache
def teacher():
    """The best of logits that are about one apart from the student's; log-probabilities in fp32."""
    ids, logprobs = [], []
    for z in dense().split(1024):
        z = F.log_softmax((z + torch.randn_like(z)).float() / TEMPERATURE, -1)
        best = z.topk(K)
        ids.append(best.indices)
        logprobs.append(best.values)
    return torch.cat(ids), torch.cat(logprobs)


def fused(student, ids, logprobs):
    return kd_loss(student, TopK(ids, logprobs, temperature=TEMPERATURE), temperature=TEMPERATURE)


def fused_head(hidden, weight, ids, logprobs):
    return fused(LMHead(hidden, weight), ids, logprobs)


def naive(student, ids, logprobs):
    """The entries that are not among the best are one more outcome."""
    log_q = F.log_softmax(student / TEMPERATURE, -1)
    rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat([log_q.gather(-1, ids), rest], -1)
    log_p = torch.cat([logprobs, torch.log1p(-logprobs.exp().sum(-1, keepdim=True))], -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TEMPERATURE**2


def naive_head(hidden, weight, ids, logprobs):
    return naive(F.linear(hidden, weight), ids, logprobs)


def step_of(loss, *inputs):
    def step():
        leaves = [x.detach().requires_grad_() for x in inputs]
        loss(*leaves, *teacher()).backward()
        return [x.grad for x in leaves]

    return step


@pytest.mark.parametrize("provider", ["fastkd", "naive", "compile"])
def bench_topk(benchmark, provider):
    loss = {"fastkd": fused, "naive": naive, "compile": compiled(naive)}[provider]
    measure(
        benchmark, step_of(loss, dense()), dense().nbytes, provider, table="topk", student="dense",
        rows=ROWS, V=V, K=K, floor_seconds=2 * dense().nbytes / copy_bandwidth(),
    )  # fmt: skip


@pytest.mark.parametrize("provider", ["fastkd", "naive"])
def bench_topk_head(benchmark, provider):
    loss = {"fastkd": fused_head, "naive": naive_head}[provider]
    measure(
        benchmark, step_of(loss, *head()), sum(x.nbytes for x in head()), provider, gemms(*head()),
        table="topk", student="head", width=WIDTH, rows=ROWS, V=V, K=K,
    )  # fmt: skip
