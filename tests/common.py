"""What the loss's tests share: the divergences, the backends, and the rule by which errors are
judged."""

import pytest
import torch

import fastkd
from fastkd import (
    JSD,
    TAID,
    TVD,
    AlphaBeta,
    ForwardKL,
    Hellinger,
    Jeffreys,
    LogitMSE,
    Renyi,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    divergences,
    kd_loss,
    reference,
)

DIVERGENCES = [
    ForwardKL(),
    ReverseKL(),
    SkewForwardKL(0.1),
    SkewForwardKL(0.0),
    SkewReverseKL(0.9),
    SkewReverseKL(1.0),
    JSD(0.5),
    JSD(0.1),
    Jeffreys(0.3),
    TVD(),
    Hellinger(),
    Renyi(0.5),
    Renyi(2.0),
    AlphaBeta(0.2, 0.7),
    AlphaBeta(1.5, -0.5),
    TAID(0.4),
    LogitMSE(),
    LogitMSE(centered=True),
]
# And what has been added since, with its own numbers.
DIVERGENCES += [d for d in divergences.examples() if type(d) not in set(map(type, DIVERGENCES))]
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# torch.compile's own C++ does not build without vector instructions.
SCALAR = torch.backends.cpu.get_cpu_capability() == "DEFAULT"
COMPILER = "aot_eager" if SCALAR else "inductor"


def logits(*shape, dtype=torch.float32, seed=0, spread=3.0):
    """(student, teacher): apart by about one."""
    generator = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(*shape, generator=generator)
    teacher = student + torch.randn(*shape, generator=generator)
    return student.to(DEVICE, dtype), teacher.to(DEVICE, dtype)


def value_and_grad(loss, student, teacher, *args, **settings):
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, teacher, *args, **settings)
    value.sum().backward()
    return value.detach().double(), leaf.grad.double()


def assert_same(ours, expected):
    """Tensors that are computed in fp32, on two ways: equal up to some roundings of the largest
    entry. (In another order, or with other instructions, a sum rounds otherwise.)"""
    ours, expected = ([x] if isinstance(x, torch.Tensor) else x for x in (ours, expected))
    for o, e in zip(ours, expected, strict=True):
        assert o.shape == e.shape and (o.isnan() == e.isnan()).all()
        largest = e.masked_fill(~e.isfinite(), 0).abs().max().item() if e.numel() else 0.0
        limit = 16 * torch.finfo(torch.float32).eps * largest
        torch.testing.assert_close(o, e, rtol=0, atol=limit, equal_nan=True)


def assert_as_exact_as_torch(student, teacher, labels=None, factor=2.0, **settings):
    """Our error against float64 is at most `factor` times plain torch's in fp32, plus a few
    roundings of its terms: probabilities, averaged."""
    wide, single = (None, None) if teacher is None else (teacher.double(), teacher.float())
    truth = value_and_grad(reference.kd_loss, student.double(), wide, labels, **settings)
    plain = value_and_grad(reference.kd_loss, student.float(), single, labels, **settings)
    plain = plain[0], plain[1].to(student.dtype).double()
    ours = value_and_grad(kd_loss, student, teacher, labels, **settings)
    divergence = fastkd.divergences.get(settings.get("divergence", "forward_kl"))
    # Roundings grow with the terms: α-β terms are 1/(αβ) times the value, and exp(z) has |z|.
    size = 1 / abs(divergence.alpha * divergence.beta) if divergence.name == "alpha_beta" else 1
    size *= min(max(1, student.abs().max().item() / 16), 8)
    for name, dtype, o, p, t in zip(
        ("value", "grad"), (torch.float32, student.dtype), ours, plain, truth, strict=True
    ):
        assert o.shape == t.shape and o.isfinite().all(), name
        rounding = (
            8
            * torch.finfo(torch.float32).eps
            * max(t.abs().max().item(), 1 / student[..., 0].numel())
            * size
        )
        rounding += (dtype != torch.float32) * torch.finfo(dtype).eps * t.abs().max().item()
        if dtype == torch.float16:
            rounding += 2.0**-24  # its smallest step
        error, limit = (o - t).abs().max().item(), factor * (p - t).abs().max().item() + rounding
        assert error <= limit, f"{name}: error {error:.2e} > {limit:.2e} ({settings})"
