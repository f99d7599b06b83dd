"""Values and gradients of `kd_loss` against float64, on both backends; properties; hostile
numbers."""

import math
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, assert_as_exact_as_torch, every_divergence, logits, value_and_grad
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fastkd
from fastkd import JSD, TAID, Renyi, SkewForwardKL, SkewReverseKL, kd_loss, reference
from fastkd.divergences import CANCELS

INF = math.inf


def labels_of(*shape, V, seed=0):
    labels = torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))
    labels.view(-1)[::3] = -100
    return labels.to(DEVICE)


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_gradient_is_the_derivative(divergence, temperature, alpha):
    """Finite differences in float64."""
    student, teacher = (x.double().cpu() for x in logits(2, 4, 7))
    labels = labels_of(2, 4, V=7).cpu()
    fixed = divergence
    if isinstance(divergence, TAID):  # its target is not differentiated: hold it
        t = divergence.t
        fixed, teacher = fastkd.ForwardKL(), (1 - t) * student + t * teacher
        moving = value_and_grad(
            kd_loss, student, logits(2, 4, 7)[1].double().cpu(), divergence=divergence
        )
        held = value_and_grad(kd_loss, student, teacher, divergence=fixed)
        torch.testing.assert_close(moving, held)
    options = dict(divergence=fixed, temperature=temperature, alpha=alpha)
    for reduction in ("mean", "none"):
        run = lambda z: kd_loss(z, teacher, labels, reduction=reduction, **options)  # noqa: B023, E731
        assert torch.autograd.gradcheck(run, student.requires_grad_())


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_torch(divergence, dtype, backend):
    for V, temperature, alpha in (
        (1, 1.0, 0.5),
        (2, 2.5, 0.5),
        (7, 1.0, 1.0),
        (300, 2.0, 0.7),
        (4097, 1.0, 0.5),
    ):
        student, teacher = logits(3, V, dtype=dtype, seed=V)
        options = dict(
            divergence=divergence, temperature=temperature, alpha=alpha, reduction="none"
        )
        assert_as_exact_as_torch(student, teacher, labels_of(3, V=V), **options)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_large_vocabulary(name, backend):
    """More blocks than a power of two, and more than one row in a block of the eager path."""
    student, teacher = logits(2, 3, 32_000)
    assert_as_exact_as_torch(
        student, teacher, labels_of(2, 3, V=32_000), divergence=name, temperature=2.0, alpha=0.7
    )


def test_teacher_of_another_dtype(backend):
    student, teacher = logits(5, 300)
    assert_as_exact_as_torch(student.bfloat16(), teacher, temperature=2.0, reduction="none")
    assert_as_exact_as_torch(student, teacher.half(), temperature=2.0, reduction="none")


# --- Properties ----------------------------------------------------------


@every_divergence
def test_zero_at_equality_and_never_negative(divergence, backend):
    student, _ = logits(6, 500)
    if not isinstance(divergence, TAID):
        value, grad = value_and_grad(
            kd_loss, student, student, divergence=divergence, reduction="none"
        )
        assert (value < 1e-12).all() and grad.abs().max() < 1e-6
    for step in (1e-5, 1e-3, 1e-1, 10.0):
        near = student + step * torch.randn_like(student)
        value = kd_loss(student, near, divergence=divergence, reduction="none")
        assert (value >= 0).all(), f"{value} at distance {step}"
        if divergence.kind != "logits":
            shifted = kd_loss(student + 7, near, divergence=divergence, reduction="none")
            assert (shifted >= 0).all()


@every_divergence
def test_adding_a_constant_to_either_side_changes_nothing(divergence, backend):
    if divergence.name == "logit_mse" and not divergence.centered:
        pytest.skip("compares logits, not distributions")
    student, teacher = logits(4, 300)
    # The sums below are exact.
    student, teacher = (x.mul(64).round().div(64) for x in (student, teacher))
    options = dict(divergence=divergence, temperature=2.0, reduction="none")
    value, grad = value_and_grad(kd_loss, student, teacher, **options)
    for a, b in ((3000, 0), (0, -3000), (3000, 3000)):
        other, other_grad = value_and_grad(kd_loss, student + a, teacher + b, **options)
        # Mixed and centered logits are sums, rounded at 3000 to about 1e-4; the rest does not
        # notice.
        exact = divergence.kind == "probabilities"
        torch.testing.assert_close(other, value, rtol=1e-5 if exact else 1e-3, atol=1e-7)
        torch.testing.assert_close(
            other_grad, grad, rtol=1e-4 if exact else 1e-2, atol=1e-7 if exact else 1e-5
        )


@pytest.mark.skipif(DEVICE == "cuda", reason="of CPUs")
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_cpus_without_fused_multiply_adds(name, monkeypatch):
    """Far from 0, too, the softmaxes lose nothing; the cross-entropy's and a list's either."""
    from fastkd.backends import softmax

    student, teacher = (x.mul(64).round().div(64) for x in logits(4, 300))
    labels = torch.tensor([3, 299, -100, 0])
    logprobs, ids = teacher.log_softmax(-1).topk(8)
    results = []
    for offset in (0, 3000):
        monkeypatch.setattr(softmax, "_fuses", lambda *_: False)
        for source in (teacher + offset, fastkd.TopK(ids, logprobs)):
            options = dict(divergence=name, alpha=0.5, reduction="none")
            results.append(value_and_grad(kd_loss, student + offset, source, labels, **options))
    for here, far in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(far, here, rtol=1e-5, atol=1e-7)
    assert_as_exact_as_torch(student, teacher, labels, divergence=name, temperature=2.0, alpha=0.5)


@every_divergence
@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_small_divergences_do_not_cancel(divergence, offset, backend):
    """A student within 0.01 of the teacher at V = 151,936: plain torch is off by percents."""
    student, _ = logits(2, 151_936, spread=1.0)
    student = student.mul(4096).round().div(4096)
    noise = (torch.randn(student.shape, generator=torch.Generator().manual_seed(1)) * 0.01).to(
        DEVICE
    )
    teacher = student + noise.mul(4096).round().div(4096)
    student = student + offset
    if divergence.name == "logit_mse":
        teacher = teacher + offset
    truth = reference.naive(student.double(), teacher.double(), divergence, 1.0)
    assert 0 < truth.max() < CANCELS
    value = kd_loss(student, teacher, divergence=divergence, reduction="none").double()
    relative = ((value - truth) / truth).abs().max().item()
    # Mixed logits (Rényi, TAID) are rounded before the softmax, an offset of 3000 to 1e-4:
    # not ours to undo.
    assert relative < (1e-2 if offset and divergence.kind == "mixed" else 2e-5), relative


def test_limits(backend):
    student, teacher = logits(5, 200)

    def value(divergence):
        return kd_loss(student, teacher, divergence=divergence)

    forward, backward = value("forward_kl"), value("reverse_kl")
    close = dict(rtol=5e-3, atol=0)
    torch.testing.assert_close(value(JSD(1e-4)) / 1e-4, forward, **close)
    torch.testing.assert_close(value(JSD(1 - 1e-4)) / 1e-4, backward, **close)
    torch.testing.assert_close(value(SkewForwardKL(1e-4)), forward, **close)
    torch.testing.assert_close(value(SkewReverseKL(1 - 1e-4)), backward, **close)
    torch.testing.assert_close(value(Renyi(1 - 1e-4)), forward, **close)
    torch.testing.assert_close(value(fastkd.AlphaBeta(1.0, 1e-4)), forward, **close)
    torch.testing.assert_close(value(fastkd.AlphaBeta(1e-4, 1.0)), backward, **close)
    torch.testing.assert_close(value(TAID(1.0)), forward)
    torch.testing.assert_close(value(fastkd.Jeffreys(1.0)), forward)
    assert value(TAID(0.0)) == 0
    bounded = value(JSD(0.5)), value("hellinger"), value("tvd")
    assert bounded[0] <= math.log(2) and bounded[1] <= 1 and bounded[2] <= 1


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    V=st.integers(1, 70),
    rows=st.integers(1, 5),
    cut=st.integers(0, 5),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    alpha=st.sampled_from([0.0, 0.4, 1.0]),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    index=st.integers(0, 17),
    seed=st.integers(0, 10**6),
)
@example(V=26, rows=2, cut=4, temperature=3.0, alpha=1.0, spread=0.01, index=10, seed=8801)
def test_sweep(backend, V, rows, cut, temperature, alpha, spread, index, seed):
    """Any shape, cut, temperature, mixture and spread agrees with the reference."""
    from common import DIVERGENCES

    student, teacher = logits(rows, V + cut, seed=seed, spread=spread)
    options = dict(
        divergence=DIVERGENCES[index], temperature=temperature, alpha=alpha, vocab="shared"
    )
    assert_as_exact_as_torch(
        student, teacher[:, :V], labels_of(rows, V=V + cut, seed=seed), factor=4, **options
    )


# --- Hostile numbers -----------------------------------------------------


@every_divergence
@pytest.mark.parametrize("dead", [-INF, torch.finfo(torch.float32).min], ids=["inf", "finfo.min"])
@pytest.mark.parametrize("where", ["both", "teacher", "student", "block"])
def test_dead_entries(divergence, dead, where, backend):
    """-inf logits: an entry with p = 0 counts as its limit; no NaN, and +inf exactly where
    the definition says so."""
    student, teacher = logits(4, 4500)
    entries = slice(0, 4200) if where == "block" else slice(10, 90)
    if where != "teacher":
        student[:, entries] = dead
    if where != "student":
        teacher[:, entries] = dead
    value, grad = value_and_grad(kd_loss, student, teacher, divergence=divergence, reduction="none")
    assert grad.isfinite().all() and not value.isnan().any()
    outside = {"teacher": divergence.infinite_p, "student": divergence.infinite_q}.get(where, False)
    if divergence.name == "logit_mse":
        assert value.isinf().all() == (where in ("teacher", "student"))
        if where in ("both", "block"):
            left = (student > -1e30)[0]
            share = left.sum() / len(left)  # the mean is over all entries
            true_value, true_grad = value_and_grad(
                reference.kd_loss, student[:, left].double(), teacher[:, left].double(),
                divergence=divergence, reduction="none",
            )  # fmt: skip
            torch.testing.assert_close(value, true_value * share, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(grad[:, left], true_grad * share, rtol=1e-4, atol=1e-8)
            assert (grad[:, ~left] == 0).all()
        return
    assert (value == INF).all() if outside else value.isfinite().all()
    true_value, true_grad = value_and_grad(
        reference.kd_loss,
        student.double(),
        teacher.double(),
        divergence=divergence,
        reduction="none",
    )
    if not outside:
        torch.testing.assert_close(value, true_value, rtol=1e-5, atol=1e-7)
        alive = student > -1e30  # the reference holds the others
        torch.testing.assert_close(grad[alive], true_grad[alive], rtol=1e-4, atol=1e-6)


@every_divergence
def test_extreme_logits(divergence, backend):
    """±1e4 and one-hot rows: both probabilities underflow almost everywhere."""
    student, teacher = logits(4, 300)
    student[0, 5], teacher[0, 9] = 1e4, 1e4
    student[1], teacher[1] = 1e4 * student[1].sign(), 1e4 * teacher[1].sign()
    student[2, 3], teacher[2, 3] = -1e4, 1e4
    teacher[3] = -teacher[3] * 100
    if isinstance(divergence, fastkd.AlphaBeta) and divergence.beta < 0:
        value, grad = value_and_grad(
            kd_loss, student, teacher, divergence=divergence, reduction="none"
        )
        assert (value > 0).all() and not grad.isnan().any()  # saturates where q^beta overflows
        return
    assert_as_exact_as_torch(
        student, teacher, divergence=divergence, reduction="none", temperature=2.0
    )


def test_rows_without_support(backend):
    """A row of -inf has no distribution: +inf, no NaN in the gradient; nothing at all
    where it is ignored."""
    student, teacher = logits(3, 40)
    student[1] = -INF
    value, grad = value_and_grad(kd_loss, student, teacher, reduction="none")
    assert value[1] == INF and value[[0, 2]].isfinite().all() and grad.isfinite().all()
    labels = torch.tensor([1, -100, 2], device=DEVICE)
    teacher[1] = float("nan")
    value, grad = value_and_grad(kd_loss, student, teacher, labels, alpha=0.5, temperature=2.0)
    assert value.isfinite() and grad.isfinite().all() and (grad[1] == 0).all()


def test_nan_is_not_hidden(backend):
    student, teacher = logits(2, 40)
    student[0, 3] = float("nan")
    assert kd_loss(student, teacher, reduction="none").isnan().tolist() == [True, False]


def test_small_upstream_factors_survive_fp16(backend):
    """Loss scaling: the factor is applied before the cast, or 1/8192 flushes the gradient to
    zero."""
    student, teacher = logits(64, 2000, dtype=torch.float16, spread=1.0)

    def scaled(loss, student, teacher):
        leaf = student.detach().clone().requires_grad_()
        (loss(leaf, teacher) * 65536.0 / 128).backward()
        return leaf.grad.double()

    ours = scaled(kd_loss, student, teacher)
    truth = scaled(reference.kd_loss, student.double(), teacher.double())
    assert (ours - truth).norm() < 1e-3 * truth.norm()
    assert (ours == 0).double().mean() < 0.01


# --- Mask, weights, reduction --------------------------------------------


def test_masked_rows(backend):
    student, teacher = logits(2, 6, 50)
    labels = labels_of(2, 6, V=50)
    weight = torch.rand(2, 6, device=DEVICE)
    for options in (
        dict(),
        dict(token_weight=weight),
        dict(token_weight=weight > 0.5),
        dict(token_weight=torch.stack([weight, weight + 1], -1)[..., 0]),  # strided
        dict(token_weight=torch.tensor(0.5, device=DEVICE).expand(2, 6)),
        dict(shift=True, token_weight=weight),
    ):
        for reduction in ("mean", "sum", "none"):
            assert_as_exact_as_torch(student, teacher, reduction=reduction, **options)
            assert_as_exact_as_torch(
                student, teacher, labels, alpha=0.3, temperature=2.0, reduction=reduction, **options
            )
    value, grad = value_and_grad(kd_loss, student, teacher, labels, alpha=0.3)
    assert (grad[labels == -100] == 0).all() and (grad[labels != -100] != 0).any(-1).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counts(reduction, backend):
    """A connected zero with gradient zero, and no 0/0."""
    student, teacher = logits(2, 3, 50)
    labels = torch.full((2, 3), -100, device=DEVICE)
    value, grad = value_and_grad(kd_loss, student, teacher, labels, alpha=0.5, reduction=reduction)
    assert (value == 0).all() and (grad == 0).all()
    value, grad = value_and_grad(
        kd_loss, student[:, :0], teacher[:, :0], labels[:, :0], alpha=0.5, reduction=reduction
    )
    assert value.sum() == 0 and grad.shape == (2, 0, 50)
    assert value.shape == ((2, 0) if reduction == "none" else ())


def test_gradient_accumulation_is_exact(backend):
    """Micro-batches with unequal token counts, each divided by the whole batch's
    count, add up to one batch."""
    student, teacher = logits(4, 6, 50)
    labels = labels_of(4, 6, V=50)
    labels[0] = -100
    count = (labels != -100).sum()
    options = dict(alpha=0.5, temperature=2.0)
    value, grad = value_and_grad(kd_loss, student, teacher, labels, **options)
    parts = [
        value_and_grad(
            kd_loss,
            student[i : i + 1],
            teacher[i : i + 1],
            labels[i : i + 1],
            num_items=n,
            **options,
        )
        for i, n in zip(range(4), (count, count, int(count), int(count)), strict=True)
    ]
    torch.testing.assert_close(sum(p[0] for p in parts), value, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad, rtol=1e-6, atol=1e-9)


def test_cut_vocabulary(backend):
    """Padding columns: cut before the softmax, no gradient from the divergence, the
    cross-entropy's own still there."""
    student, teacher = logits(4, 60)
    labels = labels_of(4, V=60)
    labels[1] = 59
    for s, t, vocab in (
        (student, teacher[:, :50], "shared"),
        (student[:, :50], teacher, "shared"),
        (student, teacher, 31),
    ):
        inside = labels.clamp(max=s.shape[-1] - 1)
        assert_as_exact_as_torch(s, t, inside, vocab=vocab, temperature=2.0, alpha=0.5)
        assert_as_exact_as_torch(s, t, inside, vocab=vocab, alpha=0.5, divergence="logit_mse")
    grad = value_and_grad(kd_loss, student, teacher[:, :50], vocab="shared")[1]
    assert (grad[:, 50:] == 0).all() and (grad[:, :50] != 0).all()


def test_compensation(backend):
    student, teacher = logits(4, 60)
    for name, c in (("forward_kl", 9.0), ("tvd", 3.0), ("logit_mse", 1.0)):
        plain = value_and_grad(
            kd_loss, student, teacher, divergence=name, temperature=3.0, compensate=False
        )
        scaled = value_and_grad(kd_loss, student, teacher, divergence=name, temperature=3.0)
        torch.testing.assert_close(scaled, (plain[0] * c, plain[1] * c), rtol=1e-6, atol=1e-9)


def test_parts(backend):
    student, teacher = logits(2, 6, 50)
    labels = labels_of(2, 6, V=50)
    options = dict(alpha=0.3, temperature=2.0, return_parts=True)
    parts = kd_loss(student.requires_grad_(), teacher, labels, **options)
    assert parts.n_tokens == (labels != -100).sum()
    torch.testing.assert_close(parts.loss, 0.3 * 4 * parts.divergence + 0.7 * parts.cross_entropy)
    torch.testing.assert_close(
        parts.cross_entropy, F.cross_entropy(student.flatten(0, 1), labels.flatten()).detach()
    )
    assert not parts.divergence.requires_grad and parts.loss.requires_grad
    with_labels = kd_loss(student, teacher, labels, return_parts=True)
    assert with_labels.cross_entropy is not None
    torch.testing.assert_close(with_labels.cross_entropy, parts.cross_entropy)
    assert kd_loss(student, teacher, return_parts=True).cross_entropy is None


# --- A divergence of one's own -------------------------------------------


def test_own_divergence(backend):
    """The worked example of fastkd.divergences, on both backends."""
    from own_divergence import PearsonChi2

    student, teacher = logits(4, 300, spread=0.5)
    assert_as_exact_as_torch(student, teacher, divergence="pearson_chi2", temperature=2.0)
    assert_as_exact_as_torch(
        student, teacher, labels_of(4, V=300), divergence=PearsonChi2(), alpha=0.5
    )
    student[:2, 7] = teacher[2, 7] = -INF
    value, grad = value_and_grad(
        kd_loss, student, teacher, divergence="pearson_chi2", reduction="none"
    )
    assert (value == INF).tolist() == [True, True, False, False] and grad.isfinite().all()
    own = Path(__file__).with_name("own_divergence.py").read_text()
    example = fastkd.divergences.__doc__.partition("    @triton.jit")[2].partition("Then `fas")[0]
    example = textwrap.dedent("    @triton.jit" + example).split("\n")
    own = own[own.index("@triton.jit") :].split("\n")
    assert [line for line in example if line] == [line for line in own if line]


def test_names_belong_to_one_class():
    class Louder(fastkd.ForwardKL):
        """Without a name of its own it must not become what "forward_kl" means."""

    assert type(fastkd.divergences.get("forward_kl")) is fastkd.ForwardKL
    with pytest.raises(TypeError, match="name"):
        kd_loss(*logits(1, 5), divergence=Louder())
    with pytest.raises(ValueError, match="forward_kl"):

        class Thief(fastkd.Divergence):
            name = "forward_kl"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_labels_of_any_integer_type(dtype, backend):
    student, teacher = logits(3, 300)
    labels = torch.tensor([1, 250, 156], device=DEVICE)
    options = dict(alpha=0.5, shift=True)
    assert kd_loss(student, teacher, labels.to(dtype), **options) == kd_loss(
        student, teacher, labels, **options
    )
