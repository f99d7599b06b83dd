"""The row functions of both backends, called directly: values and gradients, diagnostics, and
vocabulary shards."""

import itertools
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, DIVERGENCES, every_divergence, logits

from fastkd import JSD, TAID, Divergence, ForwardKL, LogitMSE, Renyi, ReverseKL, reference
from fastkd.backends import softmax
from fastkd.rows import Ask, Rows, Shard

INF = math.inf
NAN = math.nan


def dense_of(backend):
    if backend == "triton":
        from fastkd.kernels.dense import dense
    else:
        from fastkd.backends.eager import dense
    return dense


def factors_of(weight, kd=0.7, ce=0.3):
    return torch.stack([weight, kd * weight, ce * weight])


def run(
    backend, student, teacher, divergence, labels=None, weight=None, wants_grad=True, plan=None,
    **asked,
):  # fmt: skip
    """((2 or 5, T) measures, (T, V) gradient), of (T, V) logits."""
    T = len(student)
    weight = torch.ones(T, device=DEVICE) if weight is None else weight
    grad = torch.full_like(student, NAN) if wants_grad else None
    teacher = None if teacher is None else teacher[None]
    rows = Rows(student[None], teacher, labels, factors_of(weight), grad)
    cut = {} if plan is None else {"plan": plan}
    return dense_of(backend)(rows, Ask(divergence, **asked), **cut), grad


def bits_or_close(a, b):
    """Another kernel may round in another order on a GPU, in the interpreter it does not."""
    close = dict(rtol=0, atol=0) if DEVICE == "cpu" else dict(rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(a, b, equal_nan=True, **close)


# --- Whole rows ----------------------------------------------------------


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), Renyi(2.0), LogitMSE()], ids=str)
@pytest.mark.parametrize("temperature, n", [(1.0, 150), (2.5, 140)])
def test_values_and_gradient(divergence, temperature, n, backend):
    student, teacher = logits(5, 150)
    labels = torch.tensor([0, 149, 70, 3, 145], device=DEVICE)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], device=DEVICE)
    student[2] = NAN
    options = dict(temperature=temperature, n=n)
    values, grad = run(backend, student, teacher, divergence, labels, weight, **options)
    counts = weight != 0
    z = student.double()[counts].requires_grad_()
    kd = reference.naive(z[:, :n], teacher.double()[counts, :n], divergence, temperature)
    ce = F.cross_entropy(z, labels[counts], reduction="none")
    (weight[counts] * (0.7 * kd + 0.3 * ce)).sum().backward()
    expected = torch.stack([kd, ce]).detach().float()
    torch.testing.assert_close(values[:, counts], expected, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(grad[counts], z.grad.float(), rtol=1e-4, atol=1e-6)
    assert (values[:, 2] == 0).all() and (grad[2] == 0).all()
    without, _ = run(backend, student, teacher, divergence, None, weight, **options)
    assert torch.equal(without[0], values[0]) and (without[1] == 0).all()


# --- What a divergence may be --------------------------------------------


SUMS = [
    [(0.5, ForwardKL()), (2.0, ReverseKL())],
    [(1.0, ForwardKL()), (0.25, Renyi(2.0))],
    [(0.3, LogitMSE(True)), (1.0, JSD(0.1)), (0.7, TAID(0.4))],
    [(2.0, LogitMSE()), (0.5, LogitMSE(True))],
]


@pytest.mark.parametrize("parts", SUMS, ids=str)
def test_a_sum_is_the_sum(parts, backend):
    """Of several calls, to a rounding; with entries whose value is infinite on one side."""
    student, teacher = logits(4, 150)
    student[1, :9] = teacher[2, 5:15] = -INF
    options = dict(temperature=2.0, n=140)
    value, grad = run(backend, student, teacher, sum(w * d for w, d in parts), **options)
    each = [run(backend, student, teacher, d, **options) for _, d in parts]
    for got, index in ((value[0], 0), (grad, 1)):
        one = [result[index][0] if index == 0 else result[index] for result in each]
        expected = sum(weight * x for (weight, _), x in zip(parts, one, strict=True))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    labels = torch.arange(4, device=DEVICE)
    both, joint = run(backend, student, teacher, sum(w * d for w, d in parts), labels, **options)
    _, ce = run(backend, student, None, ForwardKL(), labels)
    torch.testing.assert_close(both[0], value[0])
    torch.testing.assert_close(joint, grad + ce, rtol=1e-5, atol=1e-6)


def test_diagnostics_of_a_sum(backend):
    student, teacher = logits(3, 60)
    options = dict(diagnostics=True, temperature=2.0)
    expected = run(backend, student, teacher, JSD(), **options)[0][2:]
    mixed = 0.5 * LogitMSE() + 0.5 * JSD()
    torch.testing.assert_close(run(backend, student, teacher, mixed, **options)[0][2:], expected)
    assert (
        run(backend, student, teacher, sum(w * d for w, d in SUMS[3]), **options)[0][2:]
        .isnan()
        .all()
    )


class OnDevice(Divergence):
    """A divergence whose numbers are tensors."""

    def __init__(self, of, everything=True):
        self.of, self.everything = of, everything

    def tensor(self, x, dtype=torch.float64):
        return torch.tensor(x, dtype=dtype, device=DEVICE)

    kind = property(lambda self: self.of.kind)
    slope_sum = property(lambda self: self.of.slope_sum)
    parts = property(lambda self: ((self.tensor(1.0) if self.everything else 1.0, self),))
    numbers = property(lambda self: tuple(map(self.tensor, self.of.numbers)))
    mixing = property(lambda self: tuple(map(self.tensor, self.of.mixing)))
    infinite_p = property(lambda self: self.tensor(self.of.infinite_p, torch.bool))
    infinite_q = property(lambda self: self.tensor(self.of.infinite_q, torch.bool))
    pooled_terms = property(lambda self: tuple(map(self.tensor, self.of.pooled_terms)))

    def triton_term(self):
        return self.of.triton_term()


@every_divergence
def test_numbers_on_the_device(divergence):
    """They give what the same numbers give as launch arguments. (What torch computes with tensors
    is its divergences' affair, and is tested there.)"""
    student, teacher = logits(3, 40)
    student[1, :9] = teacher[2, 5:15] = -INF
    labels = torch.arange(3, device=DEVICE)
    for T, everything in ((1.0, True), (0.7, False)):
        expected = run("triton", student, teacher, divergence, labels, temperature=T)
        temperature = torch.tensor(T, dtype=torch.float64, device=DEVICE)
        data = OnDevice(divergence, everything)
        ours = run("triton", student, teacher, data, labels, temperature=temperature)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)
        alone = run("triton", student, teacher, divergence, labels, temperature=temperature)
        torch.testing.assert_close(alone, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_alone(dtype, backend):
    """Without a teacher: at temperature 1, whatever is asked of the divergence."""
    student, _ = logits(5, 150, dtype=dtype)
    student[1, 40:60], student[2] = -INF, NAN
    labels = torch.tensor([0, 149, 70, 3, 145], device=DEVICE)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], device=DEVICE)
    options = dict(labels=labels, weight=weight, temperature=3.0)
    values, grad = run(backend, student, None, JSD(), **options)
    counts = weight != 0
    z = student.double()[counts].requires_grad_()
    ce = F.cross_entropy(z, labels[counts], reduction="none")
    (0.3 * weight[counts] * ce).sum().backward()
    torch.testing.assert_close(values[1, counts], ce.detach().float(), rtol=2e-5, atol=1e-6)
    rtol = 1e-4 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(grad[counts], z.grad.to(dtype), rtol=rtol, atol=1e-6)
    assert (values[0] == 0).all() and (values[:, 2] == 0).all() and (grad[2] == 0).all()
    valued, none = run(backend, student, None, JSD(), wants_grad=False, **options)
    assert none is None and torch.equal(valued, values)
    diagnostics = run(backend, student, None, JSD(), diagnostics=True, **options)[0]
    assert torch.equal(diagnostics[:2], values)
    assert diagnostics[2:, counts].isnan().all() and (diagnostics[2:, 2] == 0).all()


@pytest.mark.parametrize("divergence", [ForwardKL(), JSD(), Renyi(2.0), LogitMSE()], ids=str)
def test_a_divergence_that_is_only_measured(divergence, backend):
    """It has no part in the gradient, not even as 0 · NaN."""
    student, teacher = logits(4, 150)
    labels = torch.arange(4, device=DEVICE)
    options = dict(temperature=2.0, n=140)
    values, _ = run(backend, student, teacher, divergence, labels, **options)
    _, expected = run(backend, student, None, divergence, labels)
    measured, grad = run(backend, student, teacher, divergence, labels, learns=False, **options)
    torch.testing.assert_close(measured, values)
    torch.testing.assert_close(grad, expected)
    teacher[1] = NAN
    measured, grad = run(backend, student, teacher, divergence, labels, learns=False, **options)
    assert measured[0, 1].isnan() and grad.isfinite().all()
    torch.testing.assert_close(grad, expected)
    _, grad = run(backend, student, teacher, divergence, learns=False, **options)
    assert (grad == 0).all()


# --- Diagnostics ---------------------------------------------------------


def expected_diagnostics(student, teacher, n, temperature):
    """In float64: (teacher's entropy, student's entropy, agreement)."""
    student, teacher = student[:, :n].double(), teacher[:, :n].double()
    entropies = [
        torch.special.entr((z / temperature).softmax(-1)).sum(-1) for z in (teacher, student)
    ]
    best = [(z == z.amax(-1, keepdim=True)) & (z > -INF) for z in (student, teacher)]
    return torch.stack([*entropies, (best[0] & best[1]).any(-1).double()])


@pytest.mark.parametrize(
    "temperature, dtype, n",
    [(1.0, torch.bfloat16, 200), (1.0, torch.float32, 190), (2.5, torch.float32, 200)],
    ids=str,
)
@pytest.mark.parametrize("divergence", [ForwardKL(), JSD(), TAID(0.4)], ids=str)
def test_diagnostics(divergence, temperature, dtype, n, backend):
    student, teacher = logits(6, 200, dtype=dtype, spread=1.0)
    student[0, :50] = teacher[0, 20:90] = -INF
    student[1] = teacher[1] = torch.arange(200) % 7  # ties: the maxima share some entries
    teacher[2] = teacher[2].neg()
    student[3, 195] = teacher[3, 195] = 50  # beyond the cut
    student[4, 5] = teacher[4, 5] = 80  # one-hot: the entropy is 0
    student[5] = NAN
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 0.0], device=DEVICE)
    labels = torch.tensor([100, 1, 2, 3, 5, -100], device=DEVICE)
    options = dict(labels=labels, weight=weight, temperature=temperature, n=n)
    values, grad = run(backend, student, teacher, divergence, diagnostics=True, **options)
    expected = expected_diagnostics(student[:5], teacher[:5], n, temperature)
    torch.testing.assert_close(values[2:, :5].double(), expected, rtol=1e-5, atol=1e-6)
    assert (values[2:4] >= 0).all() and (values[:, 5] == 0).all()
    assert expected[2].unique().tolist() == [0, 1]
    plain = run(backend, student, teacher, divergence, **options)
    bits_or_close((values[:2], grad), plain)
    valued, _ = run(
        backend, student, teacher, divergence, diagnostics=True, wants_grad=False, **options
    )
    bits_or_close(valued, values)


def test_diagnostics_without_distributions(backend):
    student, teacher = logits(3, 40)
    student[1] = -INF
    values, _ = run(backend, student, teacher, ForwardKL(), diagnostics=True)
    assert values[0, 1] == INF and not values.isnan().any()
    assert values[3, 1] == 0 and values[4, 1] == 0
    weight = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    values, _ = run(backend, student, teacher, LogitMSE(), weight=weight, diagnostics=True)
    assert values[2:, [0, 2]].isnan().all() and (values[:, 1] == 0).all()


def test_diagnostics_of_parts_of_a_row():
    from fastkd.kernels.launch import DensePlan

    student, teacher = logits(4, 600)
    whole, _ = run("triton", student, teacher, JSD(), diagnostics=True)
    plan = DensePlan(128, 2, 3, 4, 4, False)
    parts, _ = run("triton", student, teacher, JSD(), diagnostics=True, plan=plan)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


# --- Vocabulary shards ---------------------------------------------------


class Ranks:
    """The ranks of a group as threads. One runs at a time (Triton's interpreter is not made for
    more) and the others while it waits in `gather`."""

    def __init__(self, world):
        self.world, self.turn = world, threading.Lock()
        self.barrier = threading.Barrier(world, timeout=60)
        self.slots, self.gathers = [None] * world, [0] * world

    def gather(self, rank, x):
        self.slots[rank] = x.clone()
        self.gathers[rank] += 1
        self.turn.release()
        try:
            self.barrier.wait()
            whole = torch.stack(self.slots)
            self.barrier.wait()
        finally:
            self.turn.acquire()
        return whole

    def __call__(self, function):
        results, errors = [None] * self.world, []

        def work(rank):
            with self.turn:
                try:
                    results[rank] = function(rank, lambda x: self.gather(rank, x))
                except BaseException as error:
                    errors.append(error)
                    self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next(
                (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
            )
        return results


def sharded(backend, sizes, student, teacher, divergence, labels=None, n=None, **options):
    """What every rank returns, and the gradient of whole rows."""
    n = student.shape[-1] if n is None else n
    starts = [0, *itertools.accumulate(sizes)]
    ranks = Ranks(len(sizes))

    def one(rank, gather):
        own = slice(starts[rank], starts[rank + 1])
        return run(
            backend, student[:, own].contiguous(), teacher[:, own].contiguous(), divergence,
            None if labels is None else labels - own.start, shard=Shard(gather, own.start, n),
            n=min(max(n - own.start, 0), sizes[rank]), **options,
        )  # fmt: skip

    results = ranks(one)
    assert ranks.gathers == [2] * len(sizes)
    values = [values for values, _ in results]
    assert all(v.shape == values[0].shape for v in values)
    for other in values[1:]:  # to the bit
        assert torch.equal(other.view(torch.int32), values[0].view(torch.int32))
    grads = [grad for _, grad in results]
    return values[0], None if grads[0] is None else torch.cat(grads, 1)


def assert_shards_are_a_row(backend, sizes, student, teacher, divergence, rtol=2e-5, **options):
    whole = run(backend, student, teacher, divergence, **options)
    shards = sharded(backend, sizes, student, teacher, divergence, **options)
    torch.testing.assert_close(shards[0], whole[0], rtol=rtol, atol=2e-6, equal_nan=True)
    if whole[1] is None:
        assert shards[1] is None
    else:
        torch.testing.assert_close(shards[1], whole[1], rtol=1e-4, atol=1e-6)


FEW = [ForwardKL(), ReverseKL(), JSD(0.5), Renyi(2.0), TAID(0.4), LogitMSE(), LogitMSE(True)]
SHARDED = [("eager", d) for d in DIVERGENCES] + [("triton", d) for d in FEW]
every_sharded = pytest.mark.parametrize("name, divergence", SHARDED, ids=str)


def hostile():
    """A row for each trouble; a label on every shard of 37, 1 and 62 entries."""
    student, teacher = logits(7, 100)
    student[1, :37] = teacher[1, :37] = -INF  # nothing in the first shard
    student[2, 37:] = teacher[2, 37:] = torch.finfo(torch.float32).min  # all of it
    student[3, 40:60] = -INF  # a value of +inf, from one shard, in the divergences that say so
    teacher[4, 5:9] = -INF
    teacher[5] += 30 * torch.arange(100, device=DEVICE).div(50).floor()  # shards far apart
    student[6] = NAN
    labels = torch.tensor([36, 37, 0, 99, 38, 50, -100], device=DEVICE)
    weight = torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0, 1.0, 0.0], device=DEVICE)
    return student, teacher, dict(labels=labels, weight=weight)


@every_sharded
def test_shards(name, divergence, monkeypatch):
    monkeypatch.setattr(softmax, "BLOCK_ENTRIES", 100)  # several blocks of rows, more on some ranks
    student, teacher, options = hostile()
    options |= dict(diagnostics=True)
    cases = [((37, 1, 62), 2.0, 38), ((55, 45), 1.0, 100)]  # the third shard is cut away
    if name == "eager":
        cases += [((37, 1, 62), 1.0, 100), ((55, 45), 2.0, 90)]
    for sizes, temperature, n in cases:
        assert_shards_are_a_row(
            name, sizes, student, teacher, divergence, temperature=temperature, n=n, **options
        )


@pytest.mark.parametrize("divergence", [ForwardKL(), JSD(), LogitMSE(True)], ids=str)
def test_shards_of_less(divergence, backend):
    """Without gradient, cross-entropy or diagnostics; another dtype; a row without support."""
    student, teacher, options = hostile()
    sizes = (37, 63)
    assert_shards_are_a_row(
        backend, sizes, student, teacher, divergence, wants_grad=False, **options
    )
    assert_shards_are_a_row(backend, sizes, student, teacher, divergence, weight=options["weight"])
    student[5] = -INF
    student, teacher = student.bfloat16(), teacher.half()
    values, grad = sharded(backend, sizes, student, teacher, divergence, **options)
    expected, expected_grad = run(backend, student, teacher, divergence, **options)
    torch.testing.assert_close(values, expected, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=2e-2, atol=1e-3)
    assert values[0, 5] == INF and grad.isfinite().all()


@every_divergence
def test_shards_in_float64(divergence):
    student, teacher = (x.double() for x in logits(4, 100))
    weight = torch.ones(4, dtype=torch.float64, device=DEVICE)
    labels = torch.tensor([3, 40, 99, 50], device=DEVICE)
    whole = run("eager", student, teacher, divergence, labels, weight, temperature=2.0)
    starts = (0, 10, 55, 100)

    def one(rank, gather):
        own = slice(starts[rank], starts[rank + 1])
        return run(
            "eager", student[:, own], teacher[:, own], divergence, labels - own.start, weight,
            temperature=2.0, shard=Shard(gather, own.start, 100), n=own.stop - own.start,
        )  # fmt: skip

    results = Ranks(3)(one)
    torch.testing.assert_close(results[0][0], whole[0], rtol=1e-11, atol=1e-13)
    grad = torch.cat([grad for _, grad in results], 1)
    torch.testing.assert_close(grad, whole[1], rtol=1e-9, atol=1e-13)


def test_gradient_of_a_shard_over_its_logits(backend):
    student, teacher = logits(4, 100)
    labels = torch.tensor([3, 40, 99, 50], device=DEVICE)
    factors = factors_of(torch.ones(4, device=DEVICE))
    for divergence in (ForwardKL(), JSD()):
        expected = sharded(backend, (60, 40), student, teacher, divergence, labels, temperature=2.0)
        shards = [x.contiguous() for x in student.split((60, 40), 1)]
        targets = [x.contiguous() for x in teacher.split((60, 40), 1)]

        def one(rank, gather, divergence=divergence, shards=shards, targets=targets):
            s, first = shards[rank], 60 * rank
            ask = Ask(divergence, 2.0, n=s.shape[1], shard=Shard(gather, first, 100))
            rows = Rows(s[None], targets[rank][None], labels - first, factors, s)
            return dense_of(backend)(rows, ask)

        values = Ranks(2)(one)
        assert torch.equal(values[0], expected[0]) and torch.equal(
            torch.cat(shards, 1), expected[1]
        )
