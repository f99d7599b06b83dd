"""Numbers are data: what a schedule moves may be a tensor, and nothing waits or compiles again."""

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, logits, value_and_grad

from fastkd import (
    JSD,
    TAID,
    AlphaBeta,
    ForwardKL,
    Jeffreys,
    LMHead,
    Renyi,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TopK,
    kd_loss,
)

T = torch.tensor(2.5, device=DEVICE)


def number(x):
    return torch.tensor(x, device=DEVICE)


PAIRS = [
    (SkewForwardKL(0.25), SkewForwardKL(number(0.25))),
    (SkewForwardKL(0.0), SkewForwardKL(number(0.0))),
    (SkewReverseKL(0.75), SkewReverseKL(number(0.75))),
    (SkewReverseKL(1.0), SkewReverseKL(number(1.0))),
    (JSD(0.25), JSD(number(0.25))),
    (Jeffreys(0.25), Jeffreys(number(0.25))),
    (Jeffreys(1.0), Jeffreys(number(1.0))),
    (Renyi(2.0), Renyi(number(2.0))),
    (Renyi(0.5), Renyi(number(0.5))),
    (AlphaBeta(0.25, 0.5), AlphaBeta(number(0.25), 0.5)),
    (AlphaBeta(1.5, -0.5), AlphaBeta(1.5, number(-0.5))),
    (TAID(0.25), TAID(number(0.25))),
    (TAID(1.0), TAID(number(1.0))),
    (0.5 * ForwardKL() + JSD(0.25), ForwardKL() * number(0.5) + JSD(number(0.25))),
]


@pytest.mark.parametrize("plain, tensors", PAIRS, ids=lambda d: str(d)[:60])
def test_tensors_are_numbers(plain, tensors, backend):
    """The same value and gradient, where an entry is dead on one side too."""
    student, teacher = logits(5, 60)
    student[0, 3] = teacher[1, 7] = -torch.inf
    labels = torch.tensor([9, 1, 2, 59, -100], device=DEVICE)
    options = dict(reduction="none")
    expected = value_and_grad(
        kd_loss, student, teacher, labels, divergence=plain, temperature=2.5, alpha=0.75, **options
    )
    ours = value_and_grad(
        kd_loss, student, teacher, labels, divergence=tensors, temperature=T, alpha=number(0.75),
        **options,
    )  # fmt: skip
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


def test_other_sources(backend):
    student, teacher = logits(4, 50)
    logprobs, ids = teacher.log_softmax(-1).topk(8)
    sparse = TopK(ids, logprobs, tail="renormalize")
    numbers = [
        (Jeffreys(1.0), 2.5, 0.75),
        (Jeffreys(number(1.0)), T, number(0.75)),
    ]
    labels = torch.tensor([9, 1, -100, 49], device=DEVICE)
    results = [
        value_and_grad(
            kd_loss, student, sparse, labels, divergence=d, temperature=t, alpha=a, reduction="none"
        )
        for d, t, a in numbers
    ]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    weight, hidden = torch.randn(50, 6, device=DEVICE), torch.randn(4, 6, device=DEVICE)
    losses = [
        kd_loss(LMHead(hidden, weight), teacher, labels, divergence=d, temperature=t, alpha=a)
        for d, t, a in numbers
    ]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shift", [False, True])
def test_alpha_per_position(shift, backend):
    """Shifted along with the labels; what stands in positions that do not count is not read."""
    student, teacher = logits(2, 6, 40)
    labels = torch.randint(40, (2, 6), device=DEVICE)
    labels[0, 2] = labels[1, 5] = -100
    alpha = torch.rand(2, 6, device=DEVICE)
    alpha[0, 3], alpha[1, 1] = 0, 1
    target = F.pad(labels[:, 1:], (0, 1), value=-100) if shift else labels
    share = F.pad(alpha[:, 1:], (0, 1)) if shift else alpha

    def expected(student, teacher):
        kd = kd_loss(student, teacher, target, temperature=2.0, reduction="none")
        ce = kd_loss(student, None, target, alpha=0.0, reduction="none")
        return (share * kd + (1 - share) * ce).sum() / (target != -100).sum()

    ours = alpha.clone()
    ours[labels == -100] = torch.nan
    got = value_and_grad(
        kd_loss, student, teacher, labels, alpha=ours, temperature=2.0, shift=shift
    )
    torch.testing.assert_close(
        got, value_and_grad(expected, student, teacher), rtol=1e-5, atol=1e-7
    )


def test_an_infinite_divergence_without_weight_is_not_in_the_loss(backend):
    student, teacher = logits(2, 30)
    teacher[:, 4] = -torch.inf
    labels, alpha = torch.tensor([1, 2], device=DEVICE), torch.tensor([0.0, 0.5], device=DEVICE)
    losses, grad = value_and_grad(
        kd_loss, student, teacher, labels, divergence="reverse_kl", alpha=alpha, reduction="none"
    )
    assert losses[0].isfinite() and losses[1] == torch.inf and grad.isfinite().all()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: TAID(number(1.5)), "TAID's t must be in [0, 1], got 1.5"),
        (lambda: JSD(number(0.0)), "JSD's teacher_weight must be in (0, 1), got 0.0"),
        (lambda: Renyi(number(1.0)), "Renyi's order"),
        (lambda: AlphaBeta(number(0.5), number(-0.5)), "AlphaBeta's alpha, beta"),
    ],
)
@pytest.mark.skipif(DEVICE == "cuda", reason="a device assertion there")
def test_ranges_of_tensors(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)


def test_numbers_are_not_differentiated():
    student, teacher = logits(2, 9)
    leaf = number(0.5).requires_grad_()
    for settings in (
        lambda: dict(divergence=TAID(leaf)),
        lambda: dict(temperature=leaf),
        lambda: dict(divergence=ReverseKL() * leaf),
    ):
        with pytest.raises(ValueError, match="requires grad"):
            kd_loss(student, teacher, **settings())
    with pytest.raises(TypeError, match="0-d"):
        kd_loss(student, teacher, divergence=TAID(torch.full((2,), 0.5, device=DEVICE)))


def test_a_schedule_compiles_once(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    student, teacher = logits(3, 20)
    labels = torch.tensor([1, 2, 3], device=DEVICE)

    def step(x, t, y, w, temperature, alpha):
        return kd_loss(x * 2, t, y, divergence=TAID(w), temperature=temperature, alpha=alpha)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(100):
        numbers = [number(x) for x in (i / 100, 1 + i / 50, 1 - i / 100)]
        got = value_and_grad(compiled, student, teacher, labels, *numbers)
        if i % 33 == 0:
            expected = value_and_grad(step, student, teacher, labels, *numbers)
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_numbers_of_any_precision_are_computed_with_in_float64(dtype):
    """T = 300: its square is infinite in fp16. An fp64 student gets all digits."""
    student, teacher = (x.double() for x in logits(4, 50))
    for T, t in ((1.3, 0.1), (300.0, 0.7)):
        numbers = [torch.tensor(x, dtype=dtype, device=DEVICE) for x in (T, t)]
        losses = [
            kd_loss(student, teacher, divergence=TAID(w), temperature=temperature)
            for temperature, w in (numbers, map(float, numbers))
        ]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["dense", "bucket", "renormalize"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_teacher_without_weight_may_hold_anything(kind, divergence, backend):
    """Where alpha is 0, as where it is a missing answer: not 0 · NaN."""
    student, teacher = logits(4, 50)
    labels = torch.tensor([9, 1, 2, 49], device=DEVICE)
    alpha = torch.tensor([0.5, 0.0, 1.0, 0.0], device=DEVICE)
    results = []
    for missing in (False, True):
        logprobs, ids = teacher.log_softmax(-1).topk(8)
        says = teacher.clone() if kind == "dense" else logprobs
        if missing:
            says[alpha == 0] = torch.nan if kind == "dense" else -torch.inf
        source = says if kind == "dense" else TopK(ids, says, tail=kind)
        results.append(
            value_and_grad(
                kd_loss, student, source, labels, divergence=divergence, alpha=alpha,
                temperature=2.0 if kind != "bucket" else 1.0, reduction="none",
            )
        )  # fmt: skip
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match="on meta"):
        kd_loss(student, teacher, labels, alpha=torch.tensor(0.5, device="meta"))


@pytest.mark.skipif(DEVICE == "cuda", reason="a device assertion there")
def test_a_renormalised_list_and_an_infinite_divergence():
    student, teacher = logits(2, 9)
    logprobs, ids = teacher.log_softmax(-1).topk(3)
    sparse = TopK(ids, logprobs, tail="renormalize")
    for d in (
        Jeffreys(number(0.5)),
        SkewReverseKL(number(1.0)),
        ForwardKL() + Jeffreys(number(0.5)),
    ):
        with pytest.raises(ValueError, match="infinite where the teacher has no mass"):
            kd_loss(student, sparse, divergence=d)
