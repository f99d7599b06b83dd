"""Loss and gradient of TRL's two distillation losses, TRL's own code beside fastkd's under `fused`,
in one run.

    pytest benchmarks/bench_trl.py --benchmark-json=benchmarks/results/trl.json

Both are called through TRL's functions: whole logits as `GKDTrainer` gives them, of which 20
positions count nowhere; hidden states and LM heads as `DistillationTrainer` does. What `fused`
compares on the first batch is done before the clock starts. The floor of logits is the bytes that
must be moved over the measured copy bandwidth, that of heads their four matrix products alone.
"""

from contextlib import nullcontext
from functools import cache

import pytest
import torch
from measuring import DEVICE, DTYPE, GPU, copy_bandwidth, gemms, measure

pytest.importorskip("trl", exc_type=ImportError)
from trl.experimental.gkd import GKDTrainer  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

from fastkd.integrations.trl import fused  # noqa: E402

ROWS = {49_152: 4096, 262_144: 2048} if GPU else {49_152: 256, 262_144: 128}
SETTINGS = [(0.5, 1.0), (0.1, 2.0), (0.0, 1.0)]  # beta, temperature
IGNORED = 20
WIDTHS = (2048, 4096) if GPU else (512, 512)  # of student and teacher
PROVIDERS = {"trl": nullcontext, "fastkd": fused}


@cache
def logits(V):
    torch.manual_seed(0)
    s, t = (torch.randn(1, ROWS[V], V, device=DEVICE, dtype=DTYPE).mul_(3) for _ in range(2))
    labels = torch.zeros(1, ROWS[V], dtype=torch.long, device=DEVICE)
    labels[:, :IGNORED] = -100
    return s, t, labels


@cache
def heads(V):
    """(hidden, weight) of student and teacher, whose logits have a standard deviation of 3."""
    torch.manual_seed(0)
    return [
        (
            torch.randn(1, ROWS[V], H, device=DEVICE, dtype=DTYPE),
            torch.randn(V, H, device=DEVICE, dtype=DTYPE).mul_(3 * H**-0.5),
        )
        for H in WIDTHS
    ]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("beta", "temperature"), SETTINGS)
@pytest.mark.parametrize("V", ROWS)
def bench_generalized_jsd_loss(benchmark, V, beta, temperature, provider):
    s, t, labels = logits(V)

    def step():
        z = s.detach().requires_grad_()
        GKDTrainer.generalized_jsd_loss(z, t, labels, beta, temperature).backward()
        return z.grad

    with PROVIDERS[provider]():
        measure(
            benchmark, step, s.nbytes, provider, table="trl", loss="generalized_jsd_loss", V=V,
            rows=ROWS[V], beta=beta, temperature=temperature,
            floor_seconds=3 * s.nbytes / copy_bandwidth(),
        )  # fmt: skip


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("beta", "temperature"), SETTINGS)
@pytest.mark.parametrize("V", ROWS)
def bench_chunked_divergence_loss(benchmark, V, beta, temperature, provider):
    (hidden, weight), (teacher_hidden, teacher_weight) = heads(V)
    mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=DEVICE)

    def step():
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss, _, _ = distillation_trainer._chunked_divergence_loss(
            h, teacher_hidden, w, teacher_weight, mask, beta, temperature=temperature
        )
        loss.backward()
        return h.grad, w.grad

    with PROVIDERS[provider]():
        measure(
            benchmark, step, hidden.nbytes + weight.nbytes, provider,
            gemms(hidden[0], weight, (teacher_hidden[0], teacher_weight)), table="trl",
            loss="_chunked_divergence_loss", V=V, rows=ROWS[V], widths=WIDTHS, beta=beta,
            temperature=temperature,
        )  # fmt: skip
