"""`a * D1 + b * D2` is a divergence: one pass, the same as a loss for each part, weighted."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from common import DEVICE, DIVERGENCES, logits, value_and_grad

import fastkd
from fastkd import (
    JSD,
    TAID,
    TVD,
    ForwardKL,
    Hellinger,
    LMHead,
    LogitMSE,
    Renyi,
    ReverseKL,
    TopK,
    kd_loss,
)

PARTS = [ForwardKL(), JSD(0.3), TVD(), Renyi(2.0), LogitMSE(), LogitMSE(centered=True)]
PAIRS = list(itertools.combinations(PARTS, 2))


def separately(student, teacher, *args, divergence, **settings):
    """A call for each part; the cross-entropy's share is split among them by weight."""
    total = sum(weight for weight, _ in divergence.parts)
    alpha = settings.pop("alpha", 1.0)
    loss = 0
    for weight, part in divergence.parts:
        own = kd_loss(student, teacher, *args, divergence=part, alpha=1.0, **settings)
        loss = loss + alpha * weight * own
        if alpha < 1:
            entropy = kd_loss(student, None, *args, alpha=0.0, **without(settings))
            loss = loss + (1 - alpha) * weight / total * entropy
    return loss


def without(settings):
    return {k: v for k, v in settings.items() if k in ("reduction", "shift", "token_weight")}


@pytest.mark.parametrize("first, second", PAIRS, ids=str)
def test_a_sum_is_the_sum_of_its_parts(first, second, backend):
    divergence = 0.3 * first + second * 2
    student, teacher = logits(4, 60)
    labels = torch.tensor([3, -100, 59, 0], device=DEVICE)
    for settings in (dict(), dict(temperature=2.0, alpha=0.6), dict(temperature=2.5, vocab=50)):
        options = dict(divergence=divergence, reduction="none", **settings)
        ours = value_and_grad(kd_loss, student, teacher, labels, **options)
        expected = value_and_grad(separately, student, teacher, labels, **options)
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-6)


def test_in_float64():
    """To the digits of the arithmetic, with the masked entries and infinities of any part."""
    student, teacher = logits(5, 40, dtype=torch.float64)
    student[0, :9] = teacher[0, 5:12] = teacher[1, 3] = student[2, 7] = -torch.inf
    options = dict(temperature=2.0, reduction="none")
    divergences = (
        0.5 * ForwardKL() + 0.5 * TVD(),
        2 * Hellinger() + 3 * TAID(0.4),
        JSD() + JSD(0.9) + LogitMSE(),
        sum([ForwardKL(), ReverseKL(), TVD()]),
        0.25 * (ForwardKL() + 2 * ReverseKL()),
    )
    for divergence in divergences:
        ours = value_and_grad(kd_loss, student, teacher, divergence=divergence, **options)
        expected = value_and_grad(separately, student, teacher, divergence=divergence, **options)
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13, msg=str(divergence))


def test_every_part_has_its_own_compensation():
    """c(T) is T² for KL and T for TVD; `KDParts.divergence` is without it where all share it."""
    student, teacher = logits(3, 30)
    kl, tvd = (kd_loss(student, teacher, divergence=d) for d in ("forward_kl", "tvd"))
    warm = [
        kd_loss(student, teacher, divergence=d, temperature=2.0, compensate=False)
        for d in ("forward_kl", "tvd")
    ]
    both = kd_loss(student, teacher, divergence=ForwardKL() + TVD(), temperature=2.0)
    torch.testing.assert_close(both, 4 * warm[0] + 2 * warm[1])
    plain = ForwardKL() + TVD()
    both = kd_loss(student, teacher, divergence=plain, temperature=2.0, compensate=False)
    torch.testing.assert_close(both, warm[0] + warm[1])
    parts = kd_loss(
        student, teacher, divergence=2 * ForwardKL() + JSD(), temperature=2.0, return_parts=True
    )
    torch.testing.assert_close(parts.loss, 4 * parts.divergence)
    assert parts.top1_agreement is not None
    torch.testing.assert_close(kd_loss(student, teacher, divergence=plain), kl + tvd)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate"])
def test_top_k_teachers(tail, backend):
    student, teacher = logits(4, 50)
    logprobs, ids = (teacher / 2).log_softmax(-1).topk(8)
    sparse = TopK(ids, logprobs, tail=tail, temperature=2.0)
    labels = torch.tensor([3, -100, 49, 0], device=DEVICE)
    divergence = 0.5 * ForwardKL() + 2 * Hellinger()
    options = dict(divergence=divergence, temperature=2.0, alpha=0.7, reduction="none")
    ours = value_and_grad(kd_loss, student, sparse, labels, **options)
    expected = value_and_grad(separately, student, sparse, labels, **options)
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-6)
    with pytest.raises(ValueError, match="pooled"):
        kd_loss(student, sparse, divergence=ForwardKL() + TAID(0.5), temperature=2.0)


def test_lm_heads(backend):
    generator = torch.Generator().manual_seed(0)
    make = [torch.randn(*s, generator=generator).to(DEVICE) for s in ((9, 6), (40, 6), (9, 40))]
    hidden, weight, teacher = make
    grads = []
    for run in (kd_loss, separately):
        head = LMHead(hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        loss = run(head, teacher, divergence=0.3 * ReverseKL() + TVD(), temperature=2.0)
        loss.backward()
        grads.append((loss.detach(), head.hidden.grad, head.weight.grad))
    torch.testing.assert_close(*grads, rtol=2e-5, atol=1e-6)


def test_sums_of_all_kinds_name_themselves():
    for d in DIVERGENCES:
        assert str(d) in str(0.5 * d + 1.5 * TVD())
    assert str(0.5 * ForwardKL() + TVD()) == "0.5 * ForwardKL() + 1.0 * TVD()"


@pytest.mark.parametrize("weight", [0, -1.0, float("inf"), float("nan"), torch.tensor(-1.0)])
def test_weights_are_positive(weight):
    with pytest.raises(ValueError, match="weight of a divergence must be positive"):
        ForwardKL() * weight


def test_what_cannot_be_added():
    with pytest.raises(ValueError, match="TAID.*Renyi"):
        TAID(0.5) + Renyi(2.0)
    with pytest.raises(TypeError):
        ForwardKL() + 1
    with pytest.raises(TypeError, match="weight of a divergence"):
        ForwardKL() * "2"


@dataclass(frozen=True)
class Warm(fastkd.Divergence):
    """Forward KL with a compensation that depends on its number."""

    power: float = 1.0
    name = "warm"
    slope_sum = -1.0
    infinite_q = True

    def compensation(self, temperature):
        return temperature**self.power

    formula, term = ForwardKL.formula, ForwardKL.term


def test_compensations_of_one_class_may_differ():
    student, teacher = (x.double() for x in logits(3, 30))
    options = dict(temperature=2.0)
    parts = [kd_loss(student, teacher, divergence=Warm(k), **options) for k in (1.0, 3.0)]
    both = kd_loss(student, teacher, divergence=0.5 * Warm(1.0) + 2 * Warm(3.0), **options)
    torch.testing.assert_close(both, 0.5 * parts[0] + 2 * parts[1])


def test_tensors_as_weights_are_traced():
    def step(x, t, w):
        divergence = fastkd.Sum((w, 1 - w), (ForwardKL(), TVD()))
        return kd_loss(x * 2, t, divergence=divergence)

    student, teacher = logits(3, 30)
    weight = torch.tensor(0.25, device=DEVICE)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = kd_loss(student * 2, teacher, divergence=0.25 * ForwardKL() + 0.75 * TVD())
    torch.testing.assert_close(compiled(student, teacher, weight), expected)
