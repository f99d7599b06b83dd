"""The sparse teacher's row functions against float64, the definition on K + 1 outcomes: kernel and
row-blocked torch."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, DIVERGENCES

from fastkd import JSD, Divergence, ForwardKL, Hellinger, ReverseKL, SkewForwardKL
from fastkd.kernels.limits import LOG_FLOOR
from fastkd.rows import Ask, Rows, Sparse

INF = math.inf
POOLABLE = [d for d in DIVERGENCES if d.pooled_terms is not None]
every_poolable = pytest.mark.parametrize("divergence", POOLABLE, ids=str)
TAILS = ("bucket", "renormalize", "truncate")
every_tail = pytest.mark.parametrize("tail", TAILS)


@pytest.fixture(params=["eager", "triton"])
def topk(request):
    if request.param == "eager":
        from fastkd.backends.eager_topk import topk
    else:
        from fastkd.kernels.topk import topk
    return topk


def problem(rows=2, V=300, K=12, *, n=None, dtype=torch.float32, seed=0, spread=3.0, T=1.0):
    """A student, and the K largest entries of a teacher about one apart, at temperature T."""
    generator = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(1, rows, V, generator=generator)
    teacher = student[0] + torch.randn(rows, V, generator=generator)
    n = n or V
    logprobs, ids = F.log_softmax(teacher[:, :n].double() / T, -1).topk(K)
    order = torch.rand(rows, K, generator=generator).argsort(-1)  # nobody says that they ascend
    labels = torch.randint(V, (rows,), generator=generator)
    labels[0] = ids[0, 0]  # within S and, almost surely, outside
    return SimpleNamespace(
        student=student.to(DEVICE, dtype),
        teacher=teacher.to(DEVICE),
        ids=ids.gather(-1, order).to(DEVICE),
        logprobs=logprobs.gather(-1, order).float().to(DEVICE),
        labels=labels.to(DEVICE),
        weight=torch.rand(rows, generator=generator).add(0.5).to(DEVICE),
        n=n,
    )


def run(topk, x, divergence, tail, *, T=1.0, alpha=1.0, inplace=False, t_T=None, **asked):
    """((F, T) values, (T, V) gradient of the weighted sum of alpha D + (1 - alpha) CE)."""
    student = x.student.clone() if inplace else x.student
    count, V = x.weight.numel(), student.shape[-1]
    if inplace:
        grad = student.view(count, V)
    else:  # poisoned: all of it must be written
        grad = torch.full((count, V), math.nan, dtype=student.dtype, device=student.device)
    weight = x.weight.to(torch.float64 if student.dtype == torch.float64 else torch.float32)
    factors = torch.stack([weight, alpha * weight, (1 - alpha) * weight])
    sparse = Sparse(x.ids, x.logprobs, tail, t_T or T)
    rows = Rows(student, sparse, x.labels if alpha < 1 else None, factors, grad)
    return topk(rows, Ask(divergence, T, x.n, **asked)), grad


def outcomes(student, x, tail, T, t_T=None):
    """(rows, K + 1) log-probabilities of teacher and student, in the student's precision; pairs
    that do not count are (LOG_FLOOR, LOG_FLOOR)."""
    n, dtype = x.n, student.dtype
    present = (x.ids >= 0) & (x.ids < n)
    logits = torch.where(student[:, :n] <= -1e30, -INF, student[:, :n]) / T
    log_q = logits - logits.logsumexp(-1, keepdim=True)
    at = torch.where(present, x.ids, n)
    padded = F.pad(log_q, (0, 1), value=-INF)
    inside = padded.gather(-1, at)
    outside = padded.scatter(-1, at, -INF)
    alive = (outside > -INF).any(-1, keepdim=True)
    # Autograd's logsumexp of -inf alone has a gradient of NaN.
    rest_q = torch.where(alive, outside, 0).logsumexp(-1, keepdim=True)
    rest_q = torch.where(alive, rest_q, LOG_FLOOR)
    lp = torch.where(present, x.logprobs.to(dtype), -INF)
    rest_p = torch.full_like(rest_q, LOG_FLOOR)
    if tail == "renormalize":
        lp = lp * ((t_T or T) / T)
        lp = lp - lp.logsumexp(-1, keepdim=True)
    elif tail == "bucket":
        total = lp.logsumexp(-1, keepdim=True).clamp(max=-(2.0**-24))
        rest_p = torch.log(-torch.expm1(total))
    if tail == "truncate":
        rest_q = torch.full_like(rest_q, LOG_FLOOR)
    if tail == "bucket":
        whole = present.sum(-1, keepdim=True) == n
        rest_p, rest_q = (torch.where(whole, LOG_FLOOR, r) for r in (rest_p, rest_q))
    floored = torch.where(inside > -INF, inside, LOG_FLOOR)
    return torch.cat([lp.clamp(min=LOG_FLOOR), rest_p], -1), torch.cat([floored, rest_q], -1)


def definition(divergence, log_p, log_q, tail):
    if isinstance(divergence, Hellinger) and tail == "truncate":
        return ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1) / 2
    return divergence.formula(log_p, log_q)


def expected(x, divergence, tail, dtype, *, T=1.0, alpha=1.0, t_T=None):
    """Values (divergence, cross-entropy) and gradient of the definition, by autograd."""
    leaf = x.student.reshape(x.weight.numel(), -1).to(dtype).detach().clone().requires_grad_()
    value = definition(divergence, *outcomes(leaf, x, tail, T, t_T), tail)
    entropy = F.cross_entropy(leaf, x.labels, reduction="none") if alpha < 1 else 0 * value
    loss = torch.where(x.weight != 0, alpha * value + (1 - alpha) * entropy, 0)
    (loss * x.weight.to(dtype)).sum().backward()
    keep = x.weight != 0
    return torch.stack([value, entropy]).detach() * keep, leaf.grad * keep[:, None]


def assert_as_exact_as_torch(topk, x, divergence, tail, *, factor=2.0, rounding=1.0, **settings):
    """The rule of `common`: an error at most `factor` times that of the definition in fp32, plus a
    few roundings."""
    inplace = settings.pop("inplace", False)
    truth = expected(x, divergence, tail, torch.float64, **settings)
    plain = expected(x, divergence, tail, torch.float32, **settings)
    plain = plain[0].double(), plain[1].to(x.student.dtype).double()
    ours = run(topk, x, divergence, tail, inplace=inplace, **settings)
    for name, dtype, o, p, t in zip(
        ("value", "grad"), (torch.float32, x.student.dtype), ours, plain, truth, strict=True
    ):
        assert o.shape == t.shape and o.isfinite().all(), name
        size = max(t.abs().max().item(), 1 / x.weight.numel())
        limit = 8 * torch.finfo(torch.float32).eps * size * rounding
        limit += (dtype != torch.float32) * torch.finfo(dtype).eps * t.abs().max().item()
        limit += (dtype == torch.float16) * 2.0**-24  # its smallest step
        limit += factor * (p - t).abs().max().item()
        error = (o.double() - t).abs().max().item()
        assert error <= limit, f"{name}: error {error:.2e} > {limit:.2e} ({tail}, {settings})"
    return ours


@every_poolable
@every_tail
def test_gradient_is_the_derivative(divergence, tail):
    """Finite differences of the eager path's own values in float64: proves `pooled_terms`."""
    from fastkd.backends.eager_topk import topk

    if tail == "renormalize" and divergence.infinite_p:
        pytest.skip("+inf")
    x = problem(3, 9, 4, spread=1.0, n=8)
    x.ids[1, 2], x.ids[2] = -1, -1 if tail != "renormalize" else x.ids[2]
    x.student, x.logprobs = x.student.double(), x.logprobs.double()
    for T, alpha in ((1.0, 1.0), (2.5, 0.6)):
        grad = run(topk, x, divergence, tail, T=T, alpha=alpha)[1]
        step, differences = 1e-6, torch.zeros_like(grad)
        for v in range(x.student.shape[-1]):
            sides = []
            for sign in (1, -1):
                moved = replace_student(x, v, sign * step)
                values = run(topk, moved, divergence, tail, T=T, alpha=alpha)[0]
                sides.append(alpha * values[0] + (1 - alpha) * values[1])
            differences[:, v] = (sides[0] - sides[1]) / (2 * step) * x.weight
        torch.testing.assert_close(grad, differences, rtol=1e-6, atol=1e-8)


def replace_student(x, v, step):
    student = x.student.clone()
    student[..., v] += step
    return SimpleNamespace(**{**vars(x), "student": student})


@every_poolable
@every_tail
def test_as_exact_as_torch(divergence, tail, topk):
    if tail == "renormalize" and divergence.infinite_p:
        pytest.skip("+inf")
    # Shared statistics of the cross-entropy, and its own.
    for n, T, dtype in ((300, 1.0, torch.float32), (280, 2.5, torch.bfloat16)):
        x = problem(n=n, T=T, dtype=dtype)
        assert_as_exact_as_torch(topk, x, divergence, tail, T=T, alpha=0.6)


@every_tail
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shapes(tail, dtype, topk):
    """More blocks than one with many ids in one of them, one entry, one outcome, K = V."""
    for V, K in ((9000, 64), (4097, 1), (1, 1), (7, 7)):
        x = problem(2, V, K, dtype=dtype, seed=V)
        if V == 9000:
            x.ids[0] = torch.arange(4060, 4124)  # on both sides of a block's end
            x.student[..., 4060:4124] += 8
        assert_as_exact_as_torch(topk, x, JSD(0.1), tail, alpha=0.5)


@every_tail
def test_absent_entries(tail, topk):
    """Ids below 0 or beyond the cut, in any order; their log-probabilities are not looked at."""
    for divergence in (ForwardKL(), SkewForwardKL(0.1)):
        x = problem(4, 60, 8, n=50)
        x.ids[0, ::2] = torch.tensor([-1, -100, 50, 59], device=DEVICE)
        x.ids[1, 1:] = -1
        x.logprobs[0, ::2], x.logprobs[1, 1:] = math.nan, 3.0
        for ids in (x.ids, x.ids.int()):
            x.ids = ids
            assert_as_exact_as_torch(topk, x, divergence, tail, alpha=0.5)
    x = problem(3, 60, 8)
    x.ids[1] = -1
    values, grad = run(topk, x, ForwardKL(), tail)
    assert grad.isfinite().all() and values[:, [0, 2]].isfinite().all()
    assert values[0, 1] == (INF if tail == "renormalize" else 0)
    if tail != "renormalize":
        assert grad[1].abs().max() < 1e-6


@every_tail
def test_masked_rows(tail, topk):
    """They may hold anything."""
    x = problem(4, 60, 8)
    clean = run(topk, x, ForwardKL(), tail, alpha=0.5, diagnostics=True)
    x.weight[1], x.weight[3] = 0, 0
    x.student[0, 1], x.logprobs[1], x.labels[3] = math.nan, math.nan, -100
    for inplace in (False, True):
        out = run(topk, x, ForwardKL(), tail, alpha=0.5, diagnostics=True, inplace=inplace)
        for ours, other in ((out[0].T, clean[0].T), (out[1], clean[1])):
            assert (ours[[1, 3]] == 0).all() and torch.equal(ours[[0, 2]], other[[0, 2]])
    x.weight[:] = 0
    assert all((y == 0).all() for y in run(topk, x, ForwardKL(), tail, alpha=0.5))


@every_tail
def test_views_and_aliasing(tail, topk):
    """(outer, length) strides, and a gradient over the student's own memory: the same bits."""
    x = problem(4)
    for T, alpha in ((1.0, 1.0), (2.0, 0.5)):
        values, grad = run(topk, x, JSD(), tail, T=T, alpha=alpha)
        again = run(topk, x, JSD(), tail, T=T, alpha=alpha, inplace=True)
        assert torch.equal(again[0], values) and torch.equal(again[1], grad)
        wide = torch.full((2, 4, 310), math.nan, device=DEVICE)
        view = wide[:, 1:3, :300].copy_(x.student.view(2, 2, 300))
        other = run(
            topk, SimpleNamespace(**{**vars(x), "student": view}), JSD(), tail, T=T, alpha=alpha
        )
        torch.testing.assert_close(other, (values, grad), rtol=1e-6, atol=1e-8)


@every_poolable
def test_pooling_is_the_whole_divergence(divergence, topk):
    """Bucket: at most the full divergence, and that at K = n. Renormalize: exactly it, of a
    teacher that is 0 elsewhere."""
    x = problem(2, 40, 40)
    log_q = x.student[0].double().log_softmax(-1)
    log_p = x.teacher.double().log_softmax(-1)
    full = divergence.formula(log_p, log_q)
    every = run(topk, x, divergence, "bucket")[0][0].double()
    torch.testing.assert_close(every, full, rtol=1e-5, atol=1e-7)
    for K in (1, 20):
        x = problem(2, 40, K)
        part = run(topk, x, divergence, "bucket")[0][0].double()
        assert (part <= full * (1 + 1e-4)).all() and (part >= 0).all()
        if not divergence.infinite_p:
            zeros = torch.full_like(log_q, LOG_FLOOR)
            sparse = zeros.scatter(-1, x.ids, x.logprobs.double().log_softmax(-1))
            renormalized = run(topk, x, divergence, "renormalize")[0][0].double()
            torch.testing.assert_close(
                renormalized, divergence.formula(sparse, log_q), rtol=1e-5, atol=1e-7
            )


def test_renormalize_at_another_temperature_and_precision(topk):
    for T, t_T in ((2.0, 1.0), (1.0, 3.0)):
        x = problem(2, 60, 8, T=t_T)
        x.logprobs = x.logprobs.to(torch.bfloat16 if T == 1 else torch.float64)
        assert_as_exact_as_torch(topk, x, JSD(), "renormalize", T=T, t_T=t_T, alpha=0.5)


@every_tail
def test_a_sum_is_the_sum(tail, topk):
    parts = [(0.5, ForwardKL()), (2.0, JSD(0.3)), (1.0, Hellinger())]
    x = problem()
    value, grad = run(topk, x, sum(w * d for w, d in parts), tail, T=2.0)
    each = [run(topk, x, d, tail, T=2.0) for _, d in parts]
    expected = sum(w * one[0][0] for (w, _), one in zip(parts, each, strict=True))
    torch.testing.assert_close(value[0], expected, rtol=1e-5, atol=1e-6)
    expected = sum(w * one[1] for (w, _), one in zip(parts, each, strict=True))
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


class OnDevice(Divergence):
    """A divergence whose numbers are tensors."""

    def __init__(self, of):
        self.of = of

    parts = property(lambda self: ((1.0, self),))
    numbers = property(lambda self: tuple(map(on_device, self.of.numbers)))
    pooled_terms = property(lambda self: tuple(map(on_device, self.of.pooled_terms)))
    infinite_p = property(lambda self: on_device(self.of.infinite_p).bool())
    infinite_q = property(lambda self: on_device(self.of.infinite_q).bool())

    def triton_term(self):
        return self.of.triton_term()


def on_device(x):
    return torch.tensor(float(x), dtype=torch.float64, device=DEVICE)


@every_poolable
@every_tail
def test_numbers_on_the_device(divergence, tail):
    """They give what the same numbers give as launch arguments."""
    from fastkd.kernels.topk import topk

    x = problem()
    x.student[0, 1, ::3] = -INF
    for T, labels in ((1.0, 0.5), (0.7, 1.0)):
        expected = run(topk, x, divergence, tail, T=T, alpha=labels, t_T=2.0)
        ours = run(topk, x, OnDevice(divergence), tail, T=on_device(T), alpha=labels, t_T=2.0)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


@every_tail
def test_a_divergence_that_is_only_measured(tail, topk):
    """It has no part in the gradient, not even as 0 · NaN."""
    for T in (1.0, 2.0):
        x = problem(T=T)
        values, _ = run(topk, x, JSD(), tail, T=T, alpha=0.5)
        measured, grad = run(topk, x, JSD(), tail, T=T, alpha=0.5, learns=False)
        assert torch.equal(measured, values)
        z = x.student[0].double().requires_grad_()
        (F.cross_entropy(z, x.labels, reduction="none") * x.weight / 2).sum().backward()
        torch.testing.assert_close(grad.double(), z.grad, rtol=1e-4, atol=1e-6)
        x.logprobs[0, 0] = math.nan
        measured, again = run(topk, x, JSD(), tail, T=T, alpha=0.5, learns=False)
        assert measured[0, 0].isnan() and torch.equal(again, grad)
        assert (run(topk, x, JSD(), tail, T=T, learns=False)[1] == 0).all()


# --- Hostile numbers -----------------------------------------------------


@every_poolable
@pytest.mark.parametrize("side", ["inside", "outside"])
def test_cancellation(divergence, side, topk):
    """All but 1e-7 of the student's mass on one side of S, and of the teacher's: 1 - Σ would have
    no digit."""
    x = problem(1, spread=1.0)
    inside = torch.zeros(1, 300, dtype=torch.bool, device=DEVICE).scatter_(-1, x.ids, True)
    x.student[0][inside if side == "outside" else ~inside] -= 18
    if side == "inside":
        x.ids, x.logprobs = x.ids[:, :3], x.logprobs[:, :3]
        x.logprobs[:] = torch.tensor([-2e-6, -14.0, -16.0], device=DEVICE)
    for tail in TAILS:
        if tail != "renormalize" or not divergence.infinite_p:
            ours = assert_as_exact_as_torch(topk, x, divergence, tail)
            if tail == "bucket":
                truth = expected(x, divergence, tail, torch.float64)
                torch.testing.assert_close(ours[0].double(), truth[0], rtol=3e-5, atol=1e-12)


@every_poolable
def test_a_complement_that_underflows(divergence, topk):
    """q of the rest is 0 in fp32, and of S: no NaN from 0/0, no overflow of p/q."""
    for sign, T in ((1, 1.0), (-1, 2.5)):
        x = problem(1, spread=1.0)
        inside = torch.zeros(1, 300, dtype=torch.bool, device=DEVICE).scatter_(-1, x.ids, True)
        x.student[0][inside] += sign * 300
        for tail in TAILS:
            if tail != "renormalize" or not divergence.infinite_p:
                assert_as_exact_as_torch(topk, x, divergence, tail, T=T, alpha=0.5)


def test_logprobs_that_sum_to_more_than_one(topk):
    """Rounded to bf16 they may: p_rest is floored, and reverse KL stays finite."""
    x = problem()
    for total in (0.0, 1e-7, 1e-3):
        x.logprobs = x.logprobs.log_softmax(-1) + total
        for divergence in (ReverseKL(), ForwardKL(), JSD()):
            values, grad = run(topk, x, divergence, "bucket")
            assert values.isfinite().all() and grad.isfinite().all() and (values >= 0).all()
            log_p, log_q = outcomes(x.student[0].double(), x, "bucket", 1.0)
            excess = log_p.exp().sum(-1) - 1
            truth = divergence.formula(log_p, log_q) - divergence.pooled_terms[0] * excess
            torch.testing.assert_close(values[0].double(), truth, rtol=1e-4, atol=1e-5)


@every_tail
@pytest.mark.parametrize("dead", [-INF, torch.finfo(torch.float32).min], ids=["inf", "finfo.min"])
def test_dead_logits(tail, dead, topk):
    for divergence in (ForwardKL(), ReverseKL(), JSD()):
        if tail == "renormalize" and divergence.infinite_p:
            continue
        x = problem()
        x.student[0, :, ::2] = dead  # some at ids, most not
        x.labels[:] = 1
        values, grad = run(topk, x, divergence, tail, alpha=0.5)
        assert grad.isfinite().all() and not values.isnan().any()
        hit = (x.student[0].gather(-1, x.ids) <= -1e30).any(-1)
        assert hit.all()
        if divergence.infinite_q:
            assert (values[0] == INF).all()
        else:
            truth = expected(x, divergence, tail, torch.float64, alpha=0.5)
            torch.testing.assert_close(values.double(), truth[0], rtol=1e-5, atol=1e-6)
        x.student = problem().student
        inside = torch.zeros(2, 300, dtype=torch.bool, device=DEVICE).scatter_(-1, x.ids, True)
        outside = ~inside
        x.student[0][outside & (torch.arange(300, device=DEVICE) > 40)] = dead
        assert_as_exact_as_torch(topk, x, divergence, tail)
        # The rest is impossible for the student.
        x.student[0][outside] = dead
        values, grad = run(topk, x, divergence, tail)
        assert grad.isfinite().all() and not values.isnan().any()
        assert (values[0] == INF).all() == (tail == "bucket" and divergence.infinite_q)
        x.logprobs = x.logprobs.log_softmax(-1)  # and for the teacher: only roundings are left
        assert run(topk, x, divergence, tail)[0].isfinite().all()
        x.student[0, 1] = dead
        values, grad = run(topk, x, divergence, tail)
        assert values[0].isinf().tolist() == [False, True]
        assert grad.isfinite().all()


def test_teacher_entries_of_probability_zero(topk):
    x = problem(2, 60, 8)
    x.logprobs[:, 3] = -INF
    for tail in TAILS:
        assert_as_exact_as_torch(topk, x, ForwardKL(), tail)
        values, grad = run(topk, x, ReverseKL(), tail)
        assert (values[0] == INF).all() and grad.isfinite().all()


def test_nan_is_not_hidden(topk):
    for place in ("inside", "outside", "teacher"):
        x = problem(2, 60, 8)
        if place == "teacher":
            x.logprobs[0, 0] = math.nan
        else:
            inside = x.ids[0, 0].item()
            outside = min(set(range(60)) - set(x.ids[0].tolist()))
            x.student[0, 0, inside if place == "inside" else outside] = math.nan
        for tail in TAILS:
            assert run(topk, x, ForwardKL(), tail)[0][0].isnan().tolist() == [True, False]


@pytest.mark.parametrize("offset", [3000.0, -3000.0])
def test_an_offset_changes_nothing(offset, topk):
    x = problem()
    x.student = x.student.mul(64).round().div(64)
    for tail in TAILS:
        for T in (1.0, 2.0):
            clean = run(topk, x, JSD(), tail, T=T, alpha=0.5)
            moved = SimpleNamespace(**{**vars(x), "student": x.student + offset})
            shifted = run(topk, moved, JSD(), tail, T=T, alpha=0.5)
            torch.testing.assert_close(shifted, clean, rtol=2e-5, atol=1e-7)


# --- Diagnostics, sampling -----------------------------------------------


@every_tail
def test_diagnostics(tail, topk):
    for T, n, offset in ((1.0, 300, 0.0), (2.5, 280, 0.0), (1.0, 300, 2000.0)):
        x = problem(6, 300, 12, n=n, T=T, spread=1.0)
        x.student = x.student + offset
        x.student[0, 3, 5] = -INF
        x.student[0, 0, x.ids[0, x.logprobs[0].argmax()]] += 30
        x.student[0, 1, n - 1] += 30
        x.ids[4, 3], x.ids[5] = -1, -1
        values = run(topk, x, JSD(), tail, T=T, alpha=0.5, diagnostics=True)[0].double()
        plain = run(topk, x, JSD(), tail, T=T, alpha=0.5)[0]
        assert torch.equal(values[:2], plain.double())
        present = x.ids >= 0
        lp = torch.where(present, x.logprobs.double(), -INF)
        log_p = outcomes(x.student[0].double(), x, tail, T)[0].nan_to_num(LOG_FLOOR)
        student = x.student[0, :, :n].double() / T
        best = x.ids.gather(-1, lp.argmax(-1, keepdim=True)).squeeze(-1)
        truth = torch.stack([
            torch.special.entr(log_p.exp()).sum(-1),
            torch.distributions.Categorical(logits=student.clamp(min=-1e4)).entropy(),
            (student.argmax(-1) == best).double(),
            lp.exp().sum(-1),
        ])  # fmt: skip
        assert truth[2].tolist()[:2] == [1, 0] and truth[2, 5] == 0
        torch.testing.assert_close(values[2:], truth, rtol=1e-5, atol=1e-6)


def test_sampled_supports_are_unbiased(topk):
    """Ids drawn from p with probabilities counts / N and tail "truncate": the gradient of forward
    KL, on average over all sequences of draws."""
    V, N = 4, 3
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    student = torch.tensor([0.5, -1.0, 0.3, 1.2])
    draws = list(itertools.product(range(V), repeat=N))
    ids = torch.full((len(draws), N), -1)
    counts = torch.ones(len(draws), N)
    for row, draw in enumerate(draws):
        for k, v in enumerate(sorted(set(draw))):
            ids[row, k], counts[row, k] = v, draw.count(v)
    x = SimpleNamespace(
        student=student.expand(1, len(draws), V).contiguous().to(DEVICE),
        ids=ids.to(DEVICE),
        logprobs=(counts / N).log().to(DEVICE),
        labels=None,
        weight=torch.tensor([p[list(draw)].prod() for draw in draws]).float().to(DEVICE),
        n=V,
    )
    mean = run(topk, x, ForwardKL(), "truncate", T=2.0)[1].double().sum(0).cpu()
    truth = ((student.double() / 2).softmax(-1) - p) / 2
    torch.testing.assert_close(mean, truth, rtol=0, atol=1e-6)
