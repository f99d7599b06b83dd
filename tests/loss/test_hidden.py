"""Losses between hidden states against literal definitions in float64; masks; degenerate points."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, value_and_grad

from fastkd import hidden
from fastkd.hidden import cosine_loss, hidden_mse_loss, rkd_angle_loss, rkd_distance_loss

PER_POSITION = [cosine_loss, hidden_mse_loss]
RELATIONAL = [rkd_distance_loss, rkd_angle_loss]
every_loss = pytest.mark.parametrize("loss", PER_POSITION + RELATIONAL, ids=lambda f: f.__name__)
per_position = pytest.mark.parametrize("loss", PER_POSITION, ids=lambda f: f.__name__)
relational = pytest.mark.parametrize("loss", RELATIONAL, ids=lambda f: f.__name__)


def states(*shape, dtype=torch.float64, teacher_width=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(*shape, generator=generator, dtype=torch.float64)
    teacher = torch.randn(
        *shape[:-1], teacher_width or shape[-1], generator=generator, dtype=torch.float64
    )
    return student.to(DEVICE, dtype), teacher.to(DEVICE, dtype)


# --- The definitions, one position, pair or triple at a time ---------------


def huber(x):
    return x**2 / 2 if abs(x) <= 1 else abs(x) - 0.5


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def mean(xs):
    xs = list(xs)
    return math.fsum(xs) / len(xs) if xs else 0.0


def literal_cosine(s, t):
    return 1 - dot(s, t) / (math.hypot(*s) * math.hypot(*t))


def literal_mse(s, t):
    return mean((a - b) ** 2 for a, b in zip(s, t, strict=True))


def literal_distance(s, t):
    def relative(points):
        d = {(i, j): math.dist(points[i], points[j]) for i, j in pairs}
        mu = mean(x for x in d.values() if x > 0) or 1.0
        return {pair: x / mu for pair, x in d.items()}

    pairs = list(itertools.permutations(range(len(s)), 2))
    a, b = relative(s), relative(t)
    return mean(huber(a[pair] - b[pair]) for pair in pairs)


def literal_angle(s, t):
    def cosine(points, i, j, k):
        u = [a - b for a, b in zip(points[i], points[j], strict=True)]
        v = [a - b for a, b in zip(points[k], points[j], strict=True)]
        size = math.hypot(*u) * math.hypot(*v)
        return dot(u, v) / size if size else 0.0

    triples = itertools.permutations(range(len(s)), 3)
    return mean(huber(cosine(s, *triple) - cosine(t, *triple)) for triple in triples)


LITERAL = {
    cosine_loss: literal_cosine,
    hidden_mse_loss: literal_mse,
    rkd_distance_loss: literal_distance,
    rkd_angle_loss: literal_angle,
}


@per_position
def test_definition_per_position(loss):
    student, teacher = states(2, 3, 5)
    weight = torch.tensor([[1.0, 0.0, 2.5], [0.5, 1.0, 0.0]], dtype=torch.float64, device=DEVICE)
    each = [
        [LITERAL[loss](s, t) for s, t in zip(a, b, strict=True)]
        for a, b in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    each = torch.tensor(each, dtype=torch.float64, device=DEVICE)
    for w in (None, weight, weight != 0, (weight != 0).long()):
        used = torch.ones_like(weight) if w is None else w.double()
        for reduction, truth in (
            ("none", used * each),
            ("sum", (used * each).sum()),
            ("mean", (used * each).sum() / used.sum()),
        ):
            value = loss(student, teacher, w, reduction=reduction)
            torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-14)


@relational
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_definition_of_relations(loss, chunk):
    """Sets of 6, 4, 2 and no points, of which some coincide, at different widths."""
    student, teacher = states(2, 2, 6, 5, teacher_width=3)
    student[0, 0, 1] = student[0, 0, 4]
    teacher[0, 0, 2] = teacher[0, 0, 3]
    mask = torch.zeros(2, 2, 6, dtype=torch.bool, device=DEVICE)
    mask[0, 0], mask[0, 1, [0, 2, 3, 5]], mask[1, 0, [1, 4]] = True, True, True
    each = torch.tensor(
        [
            LITERAL[loss](student[b][mask[b]].tolist(), teacher[b][mask[b]].tolist())
            for b in itertools.product(range(2), range(2))
        ],
        dtype=torch.float64,
        device=DEVICE,
    ).view(2, 2)
    counting = 3 if loss is rkd_distance_loss else 2  # sets with a pair, a triple
    for reduction, truth in (
        ("none", each),
        ("sum", each.sum()),
        ("mean", each.sum() / counting),
    ):
        value = loss(student, teacher, mask, reduction=reduction, chunk=chunk)
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-14)
    whole = LITERAL[loss](student[0, 0].tolist(), teacher[0, 0].tolist())
    assert loss(student[0, 0], teacher[0, 0], chunk=chunk).item() == pytest.approx(whole, rel=1e-12)


@every_loss
def test_gradient_is_the_derivative(loss):
    student, teacher = states(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0]], device=DEVICE)
    for reduction in ("mean", "none"):
        run = lambda s: loss(s, teacher, mask, reduction=reduction)  # noqa: B023, E731
        assert torch.autograd.gradcheck(run, student.requires_grad_())


@relational
def test_chunks_change_nothing(loss):
    student, teacher = states(2, 7, 4)
    whole = value_and_grad(loss, student, teacher)
    for chunk in (1, 2, 7, 100):
        torch.testing.assert_close(value_and_grad(loss, student, teacher, chunk=chunk), whole)


def test_default_chunk_follows_the_budget(monkeypatch):
    student, teacher = states(2, 7, 4)
    whole = value_and_grad(rkd_angle_loss, student, teacher)
    monkeypatch.setattr(hidden, "CHUNK_ENTRIES", 2 * 2 * 7 * (7 + 4))
    assert hidden._check_sets(student, teacher, None, "mean", None)[1] == 2
    torch.testing.assert_close(value_and_grad(rkd_angle_loss, student, teacher), whole)


def test_chunks_keep_no_cube():
    """What stays until the backward pass is far below N³ numbers."""
    kept = []
    student, teacher = states(24, 4)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        rkd_angle_loss(student.requires_grad_(), teacher, chunk=2)
    assert sum(kept) < 24**2


# --- Masks -----------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_masked_positions_do_not_matter(loss, junk):
    student, teacher = states(2, 6, 3)
    mask = torch.ones(2, 6, dtype=torch.bool, device=DEVICE)
    mask[0, 2] = mask[1, 4] = mask[1, 5] = False
    value, grad = value_and_grad(loss, student, teacher, mask)
    for side in (student, teacher):
        side[~mask] = junk
    other, other_grad = value_and_grad(loss, student, teacher, mask)
    assert torch.equal(value, other) and torch.equal(grad, other_grad)
    assert (grad[~mask] == 0).all() and (grad[mask] != 0).any(-1).all()
    if loss in RELATIONAL:
        each = loss(student, teacher, mask, reduction="none")
        for b in range(2):
            alone = loss(student[b][mask[b]], teacher[b][mask[b]])
            torch.testing.assert_close(each[b], alone)


def test_masked_positions_do_not_reach_the_projection():
    student, teacher = states(2, 4, 3, teacher_width=5)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]], device=DEVICE)
    student[mask == 0] = math.nan
    projection = torch.nn.Linear(3, 5, dtype=torch.float64, device=DEVICE)
    value, grad = value_and_grad(hidden_mse_loss, student, teacher, mask, projection=projection)
    expected = F.mse_loss(projection(student[mask == 1]), teacher[mask == 1])
    torch.testing.assert_close(value, expected.detach())
    ours = [p.grad for p in projection.parameters()]
    torch.testing.assert_close(ours, list(torch.autograd.grad(expected, projection.parameters())))
    assert (grad[mask == 0] == 0).all()


@every_loss
@pytest.mark.parametrize("shape", [(2, 4, 3), (0, 4, 3), (2, 0, 3)], ids=str)
def test_nothing_to_compare(loss, shape):
    student, teacher = states(*shape)
    student.fill_(math.nan)
    mask = torch.zeros(shape[:-1], dtype=torch.long, device=DEVICE)
    masks = [mask] if student.numel() else [mask, None]
    for mask, reduction in itertools.product(masks, ("mean", "sum", "none")):
        value, grad = value_and_grad(loss, student, teacher, mask, reduction=reduction)
        expected = shape[:-1] if loss in PER_POSITION else shape[:-2]
        assert value.shape == (expected if reduction == "none" else ())
        assert (value == 0).all() and (grad == 0).all()


@relational
def test_sets_too_small(loss):
    for n in range(2 if loss is rkd_distance_loss else 3):
        value, grad = value_and_grad(loss, *states(n, 4))
        assert value == 0 and (grad == 0).all()


# --- Properties --------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_at_equality(loss, dtype):
    student, _ = states(2, 6, 32, dtype=dtype)
    value, grad = value_and_grad(loss, student, student.clone())
    assert value == 0 and grad.abs().max() <= 1e-7


def test_cosine_does_not_cancel():
    """A student within 1e-4 of the teacher: 1 - cos in fp32 has no digit left."""
    student, noise = states(4, 64)
    student, teacher = student.float(), (student + 1e-4 * noise).float()
    truth = cosine_loss(student.double(), teacher.double(), reduction="none")
    assert truth.max() < 1e-7
    value = cosine_loss(student, teacher, reduction="none").double()
    torch.testing.assert_close(value, truth, rtol=1e-3, atol=0)


def test_cosine_with_zero_vectors_and_extreme_sizes():
    student, teacher = states(5, 4, dtype=torch.float32)
    plain, plain_grad = value_and_grad(cosine_loss, student, teacher, reduction="none")
    student[0], teacher[1], student[2], teacher[2] = 0, 0, 0, 0
    value, grad = value_and_grad(cosine_loss, student, teacher, reduction="none")
    assert (value[:3] == 1).all() and (grad[:3] == 0).all()
    assert torch.equal(value[3:], plain[3:]) and torch.equal(grad[3:], plain_grad[3:])
    for size in (2.0**100, 2.0**-100):  # whose squares fp32 does not hold
        value, grad = value_and_grad(cosine_loss, student * size, teacher / size, reduction="none")
        torch.testing.assert_close(value[3:], plain[3:])
        torch.testing.assert_close(grad[3:] * size, plain_grad[3:])
    value = cosine_loss(student, -3 * student, reduction="none")
    torch.testing.assert_close(value[3:], torch.full_like(value[3:], 2.0))


@relational
def test_rotating_shifting_and_scaling_change_nothing(loss):
    student, teacher = states(2, 6, 4)
    rotation = torch.linalg.qr(states(4, 4, seed=1)[0])[0]
    value = loss(student, teacher)
    for other in (student @ rotation, student + 100, 7 * student, 0.1 * student @ rotation - 3):
        torch.testing.assert_close(loss(other, teacher), value)
        torch.testing.assert_close(loss(teacher, other), loss(teacher, student))
        assert loss(other, student) < 1e-24


@relational
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_coincident_points(loss, dtype):
    student, teacher = states(6, 4, dtype=dtype)
    student[1:4] = student[0]
    for a, b in ((student, teacher), (teacher, student), (student, student.clone())):
        value, grad = value_and_grad(loss, a, b)
        assert value.isfinite() and grad.isfinite().all()
        truth = LITERAL[loss](a.double().tolist(), b.double().tolist())
        assert value.item() == pytest.approx(truth, rel=1e-5, abs=1e-12)
    value, grad = value_and_grad(loss, torch.ones_like(student), teacher)
    assert value > 0 and (grad == 0).all()


@relational
def test_coincident_points_get_no_gradient_from_each_other(loss):
    """So that the gradient is as invariant as the value: points twice as far apart, half of it."""
    student, teacher = states(6, 4)
    student[1:3] = student[0]
    grad, half = (value_and_grad(loss, size * student, teacher)[1] for size in (1, 2))
    assert grad.abs().max() > 0
    torch.testing.assert_close(2 * half, grad)


@relational
def test_near_points_far_from_the_origin(loss):
    """Distances from |a|² + |b|² - 2ab would be noise here."""
    student, teacher = states(6, 4)
    student = (1000 + student).float()
    student[1] = student[0] + 2**-10
    teacher = teacher.float()
    ours, truth = (value_and_grad(loss, s, teacher) for s in (student, student.double()))
    torch.testing.assert_close([x.double() for x in ours], list(truth), rtol=1e-4, atol=1e-6)


# --- Types, autocast, torch.compile ------------------------------------------


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_fp32(loss, dtype):
    student, teacher = states(2, 6, 16, dtype=dtype)
    truth, truth_grad = value_and_grad(loss, student.double(), teacher.double())
    for other in (teacher, teacher.float()):
        for enabled in (False, True):
            leaf = student.clone().requires_grad_()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
                value = loss(leaf, other)
            value.backward()
            value, grad = value.detach(), leaf.grad
            assert value.dtype == torch.float32 and grad.dtype == dtype
            torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-7)
            step = torch.finfo(dtype).eps
            torch.testing.assert_close(
                grad.double(), truth_grad, rtol=step, atol=step * truth_grad.abs().max().item()
            )


def test_projection_of_another_type():
    student, teacher = states(2, 4, 3, teacher_width=5, dtype=torch.bfloat16)
    projection = torch.nn.Linear(3, 5, device=DEVICE)
    value, grad = value_and_grad(hidden_mse_loss, student, teacher, projection=projection)
    expected = F.mse_loss(projection(student.float()), teacher.float())
    torch.testing.assert_close(value.float(), expected.detach())
    assert grad.abs().sum() > 0 and projection.weight.grad.abs().sum() > 0
    wide = hidden_mse_loss(student, teacher, projection=lambda s: F.pad(s, (0, 2)))
    torch.testing.assert_close(wide, F.mse_loss(F.pad(student.float(), (0, 2)), teacher.float()))


@pytest.mark.parametrize(
    ("loss", "options"),
    [(loss, {}) for loss in PER_POSITION + RELATIONAL]
    + [(loss, {"chunk": 3}) for loss in RELATIONAL],
)
def test_compiles_in_one_graph(loss, options):
    student, teacher = states(2, 7, 3, dtype=torch.float32)
    mask = torch.ones(2, 7, dtype=torch.long, device=DEVICE)
    mask[0, 2] = 0
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for m in (None, mask):
        ours = value_and_grad(compiled, student, teacher, m, **options)
        torch.testing.assert_close(ours, value_and_grad(loss, student, teacher, m, **options))


# --- Errors ------------------------------------------------------------------


@every_loss
def test_errors(loss):
    student, teacher = states(2, 4, 3)
    for error, message, arguments, settings in (
        (TypeError, "student must be a tensor", (1, teacher), {}),
        (TypeError, "teacher must be float32", (student, teacher.long()), {}),
        (ValueError, r"H > 0, got shape \(2, 4, 0\)", (student, teacher[..., :0]), {}),
        (ValueError, r"\(2, 4, 3\) and \(2, 3, 3\)", (student, teacher[:, 1:]), {}),
        (ValueError, "never differentiated", (student, teacher.clone().requires_grad_()), {}),
        (TypeError, "mask must be a tensor", (student, teacher, [1]), {}),
        (TypeError, "complex", (student, teacher, torch.ones(2, 4, dtype=torch.complex64)), {}),
        (ValueError, r"shape \(2, 4\), got \(4,\)", (student, teacher, torch.ones(4) > 0), {}),
        (ValueError, "is on meta", (student, teacher.to("meta")), {}),
        (ValueError, "'batchmean'", (student, teacher), {"reduction": "batchmean"}),
    ):
        with pytest.raises(error, match=message):
            loss(*arguments, **settings)


def test_errors_of_one_loss():
    student, teacher = states(2, 4, 3, teacher_width=5)
    for loss in PER_POSITION:
        with pytest.raises(ValueError, match="widths differ: student 3, teacher 5"):
            loss(student, teacher)
        weight = torch.ones(2, 4, requires_grad=True)
        with pytest.raises(ValueError, match="mask is not differentiated"):
            loss(student, student, weight)
    with pytest.raises(TypeError, match="projection must be a module or function, got int"):
        hidden_mse_loss(student, teacher, projection=5)
    with pytest.raises(ValueError, match=r"\(2, 4, 5\), got \(2, 4, 3\)"):
        hidden_mse_loss(student, teacher, projection=torch.nn.Identity())
    for loss in RELATIONAL:
        with pytest.raises(TypeError, match="bool or integer tensor, got torch.float32"):
            loss(student, teacher, torch.ones(2, 4))
        with pytest.raises(ValueError, match=r"\(..., N, H\) embeddings, got \(3,\)"):
            loss(student[0, 0], teacher[0, 0])
        with pytest.raises(ValueError, match="at least 1, got 0"):
            loss(student, teacher, chunk=0)
        with pytest.raises(TypeError, match="number of points, got float"):
            loss(student, teacher, chunk=1.5)
