"""What `kd_loss` refuses, how it sits in autograd and torch.compile, and what memory it touches."""

import sys

import pytest
import torch
from common import COMPILER, DEVICE, assert_as_exact_as_torch, assert_same, logits, value_and_grad

import fastkd
from fastkd import KDLoss, Renyi, kd_loss
from fastkd.rows import Ask, Rows
from fastkd.sources.source import as_rows

S, T = logits(2, 5, 30)
Y = torch.randint(30, (2, 5), device=DEVICE)
GRADED = torch.rand(2, 5, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize(
    "kind, words, args, options",
    [
        (ValueError, ["(2, 5, 30)", "(2, 4, 30)"], (S, T[:, :4]), {}),
        (ValueError, ["30", "29", "shared"], (S, T[..., :29]), {}),
        (ValueError, ["temperature", "0"], (S, T), {"temperature": 0}),
        (ValueError, ["temperature", "-1.5"], (S, T), {"temperature": -1.5}),
        (ValueError, ["temperature", "inf"], (S, T), {"temperature": float("inf")}),
        (TypeError, ["temperature", "(2,)"], (S, T), {"temperature": torch.ones(2)}),
        (ValueError, ["temperature", "-2.0"], (S, T), {"temperature": torch.tensor(-2.0)}),
        (ValueError, ["temperature", "nan"], (S, T), {"temperature": torch.tensor(float("nan"))}),
        (ValueError, ["alpha", "1.5"], (S, T, Y), {"alpha": torch.tensor(1.5)}),
        (ValueError, ["alpha", "(2, 4)"], (S, T, Y), {"alpha": torch.ones(2, 4)}),
        (ValueError, ["alpha", "labels"], (S, T), {"alpha": torch.tensor(1.0)}),
        (
            ValueError,
            ["alpha", "requires grad"],
            (S, T, Y),
            {"alpha": torch.rand(2, 5).requires_grad_()},
        ),
        (ValueError, ["alpha", "1.5"], (S, T, Y), {"alpha": 1.5}),
        (ValueError, ["alpha", "nan"], (S, T, Y), {"alpha": float("nan")}),
        (ValueError, ["0.5", "labels"], (S, T), {"alpha": 0.5}),
        (TypeError, ["student", "int64"], (Y, T), {}),
        (ValueError, ["teacher", "None", "alpha", "1.0"], (S, None), {}),
        (ValueError, ["alpha", "0.5"], (S, None, Y), {"alpha": 0.5}),
        (ValueError, ["labels"], (S, None), {"alpha": 0.0}),
        (TypeError, ["teacher", "str"], (S, "teacher"), {}),
        (TypeError, ["labels", "float32"], (S, T, Y.float()), {}),
        (ValueError, ["labels", "(2, 5)", "(2, 4)"], (S, T, Y[:, :4]), {}),
        (ValueError, ["30", "31"], (S, T, Y.clone().fill_(31)), {}),
        (ValueError, ["-5"], (S, T, Y.clone().fill_(-5)), {}),
        (ValueError, ["require grad", "teacher"], (S, T.clone().requires_grad_()), {}),
        (ValueError, ["kl_forward", "forward_kl", "jsd"], (S, T), {"divergence": "kl_forward"}),
        (ValueError, ["renyi", "Renyi(…)"], (S, T), {"divergence": "renyi"}),
        (TypeError, ["divergence", "int"], (S, T), {"divergence": 3}),
        (ValueError, ["V > 0", "(2, 5, 0)"], (S[..., :0], T[..., :0]), {}),
        (ValueError, ["reduction", "batchmean"], (S, T), {"reduction": "batchmean"}),
        (
            ValueError,
            ["token_weight", "(2, 4)"],
            (S, T),
            {"token_weight": torch.ones(2, 4, device=DEVICE)},
        ),
        (TypeError, ["token_weight", "int64"], (S, T), {"token_weight": Y}),
        (ValueError, ["vocab", "31"], (S, T), {"vocab": 31}),
        (ValueError, ["vocab", "padded"], (S, T), {"vocab": "padded"}),
        (ValueError, ["num_items", "sum"], (S, T), {"num_items": 3, "reduction": "sum"}),
        (ValueError, ["num_items", "(2,)"], (S, T), {"num_items": torch.ones(2)}),
        (ValueError, ["num_items", "-3"], (S, T), {"num_items": torch.tensor(-3)}),
        (
            ValueError,
            ["between 1 and 30 (student 30), got 40"],
            (S, None, Y),
            {"alpha": 0, "vocab": 40},
        ),
        (ValueError, ["group"], (S, T), {"group": object()}),
        (ValueError, ["shift", "(30,)"], (S[0, 0], T[0, 0]), {"shift": True}),
        (ValueError, ["meta", DEVICE], (S, T.to("meta")), {}),
    ],
)
def test_bad_input(kind, words, args, options):
    if DEVICE == "cuda" and any(w in ("31", "-5") for w in words) and "vocab" not in words:
        pytest.skip("labels out of range are a device assertion on a GPU, which ends the process")
    with pytest.raises(kind) as error:
        kd_loss(*args, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "make",
    [lambda: Renyi(1.0), lambda: Renyi(-2), lambda: fastkd.JSD(0.0), lambda: fastkd.TAID(1.1)],
)
def test_bad_numbers(make):
    with pytest.raises(ValueError, match="got"):
        make()


@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (0.5, -0.5), (float("nan"), 1)])
def test_alpha_beta_limits_are_refused(pair):
    with pytest.raises(ValueError, match="ForwardKL"):
        fastkd.AlphaBeta(*pair)


def test_module():
    loss = KDLoss(divergence="jsd", temperature=2.0, alpha=0.5)
    options = dict(divergence="jsd", temperature=2.0, alpha=0.5)
    assert loss(S, T, Y, num_items=7) == kd_loss(S, T, Y, num_items=7, **options)
    assert "JSD" in repr(loss) and "temperature=2.0" in repr(loss)
    with pytest.raises(TypeError, match="beta"):
        KDLoss(beta=0.5)
    with pytest.raises(ValueError, match="temperature"):
        KDLoss(temperature=-1)


def test_backend_choice(monkeypatch):
    monkeypatch.setenv("FASTKD_BACKEND", "cuda")
    with pytest.raises(ValueError, match="auto, triton or eager"):
        kd_loss(S, T)
    monkeypatch.setenv("FASTKD_BACKEND", "triton")
    with pytest.raises(ValueError, match="float64"):
        kd_loss(S.double(), T.double())
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="TRITON_INTERPRET"):
            kd_loss(S, T)


# --- Autograd ------------------------------------------------------------


def test_graph_can_be_kept(backend):
    leaf = S.clone().requires_grad_()
    loss = kd_loss(leaf, T, Y, alpha=0.5)
    first = torch.autograd.grad(loss * 3, leaf, retain_graph=True)[0]
    second = torch.autograd.grad(loss * 5, leaf)[0]
    torch.testing.assert_close(first / 3, second / 5)


def test_double_backward_is_refused(backend):
    leaf = S.clone().requires_grad_()
    (grad,) = torch.autograd.grad(kd_loss(leaf, T), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad.sum().backward()


def test_per_token_upstream(backend):
    leaf, weights = S.clone().requires_grad_(), torch.rand(2, 5, device=DEVICE)
    (kd_loss(leaf, T, reduction="none") * weights).sum().backward()
    other = value_and_grad(kd_loss, S, T, token_weight=weights, reduction="sum")[1]
    assert_same(leaf.grad.double(), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inplace(dtype, backend):
    """The gradient lies in the logits' memory, the same bits as without; a saved use of the
    logits is noticed."""
    student, teacher = S.to(dtype), T.to(dtype)
    expected = value_and_grad(kd_loss, student, teacher, Y, alpha=0.5, temperature=2.0)[1]
    weight = student.clone().requires_grad_()
    own = weight * 1
    address = own.data_ptr()
    caught = []
    own.register_hook(caught.append)
    kd_loss(own, teacher, Y, alpha=0.5, temperature=2.0, inplace=True).backward()
    assert caught[0].data_ptr() == address
    assert torch.equal(weight.grad.double(), expected)
    if dtype != torch.float16:
        own = weight.exp()  # saves its output
        loss = kd_loss(own, teacher, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_without_gradients_none_is_computed(backend, monkeypatch):
    made, true_empty = [], fastkd.backends.buffers.empty

    def empty(shape, *args):
        made.append(tuple(shape))
        return true_empty(shape, *args)

    monkeypatch.setattr(fastkd.backends.buffers, "empty", empty)
    with torch.no_grad():
        kd_loss(S.clone().requires_grad_(), T)
    kd_loss(S, T)
    assert (10, 30) not in made
    kd_loss(S.clone().requires_grad_(), T)
    assert (10, 30) in made


@pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux")
def test_memory_is_kept_but_never_shared():
    """A block serves the next tensor that fits, once nothing refers to it: no view either."""
    buffers, like, n = fastkd.backends.buffers, torch.empty(0), fastkd.buffers.SMALLEST // 4
    buffers.release()
    first = buffers.empty((2, n), like)
    address, view = first.data_ptr(), first[1].detach()
    second = buffers.empty((2, n), like)
    assert second.data_ptr() != address
    del first
    third = buffers.empty((2, n), like)
    assert third.data_ptr() not in (address, second.data_ptr()), "a view still uses it"
    view.fill_(7.0)
    del view
    again = buffers.empty((n,), like, torch.float64)
    assert again.data_ptr() == address and again.dtype == torch.float64
    del second, third, again
    assert len(buffers._blocks) == 3
    buffers.empty((64, n), like)  # fits none: what nobody uses is given back
    assert len(buffers._blocks) == 1
    buffers.release()
    assert not buffers._blocks


def test_gradients_outlive_the_next_call():
    """What a user holds is not overwritten, with memory large enough to be kept."""
    student, teacher = logits(16, 40_000)
    grads = [value_and_grad(kd_loss, student * k, teacher)[1] for k in (1, 2, 3)]
    leaf = student.clone().requires_grad_()
    kd_loss(leaf, teacher).backward()
    kept = leaf.grad
    other = student.clone().requires_grad_()
    kd_loss(other * 2, teacher).backward()
    assert_same(kept.double(), grads[0])


def test_autocast(backend):
    head = torch.nn.Linear(8, 30, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        student = head(torch.randn(4, 8, device=DEVICE))
        loss = kd_loss(student, T[0, :4])
    assert student.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert head.weight.grad.isfinite().all()


def test_same_bits_every_time(backend):
    student, teacher = logits(7, 5000)
    runs = [value_and_grad(kd_loss, student, teacher, divergence="jsd") for _ in range(3)]
    assert all(torch.equal(r[0], runs[0][0]) and torch.equal(r[1], runs[0][1]) for r in runs)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_graph_break(inplace, backend):
    def step(x, t, y):
        parts = kd_loss(
            x * 2, t, y, divergence="jsd", alpha=0.5, shift=True, return_parts=True, inplace=inplace
        )
        return parts.loss * 3

    expected = value_and_grad(step, S, T, Y)
    compiled = value_and_grad(torch.compile(step, fullgraph=True, backend=COMPILER), S, T, Y)
    assert_same(compiled, expected)


def test_shapes_and_strides(backend):
    """Any leading shape; slices and transposes give what contiguous logits give, slices
    without a copy."""
    student, teacher = logits(3, 4, 9, 40)
    options = dict(reduction="none", temperature=2.0)
    whole = kd_loss(student, teacher, **options)
    assert whole.shape == (3, 4, 9)
    torch.testing.assert_close(
        kd_loss(student[0, 0, 0], teacher[0, 0, 0], **options), whole[0, 0, 0]
    )
    student, teacher, whole = student[0], teacher[0], whole[0]
    cases = {
        "sliced": lambda x: x[:, 1:],
        "strided": lambda x: x[::2, :-2],
        "padded": lambda x: torch.nn.functional.pad(x, (0, 5))[..., :40],
        "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "batch second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": lambda x: x[:1].expand(4, -1, -1),
    }
    for name, view in cases.items():
        expected = view(whole[..., None])[..., 0] if name != "padded" else whole
        expected = whole[:1].expand(4, -1) if name == "expanded" else expected
        torch.testing.assert_close(
            kd_loss(view(student), view(teacher), **options), expected, msg=name
        )
        torch.testing.assert_close(
            kd_loss(view(student), view(teacher).contiguous(), **options), expected, msg=name
        )
    assert_as_exact_as_torch(student[:, 1:], teacher[:, :-1], temperature=2.0)
    assert as_rows(student[:, 1:]).data_ptr() == student[:, 1:].data_ptr()
    assert kd_loss(student[:, 1:].requires_grad_(), teacher[:, 1:]).requires_grad


# --- How the kernel is cut -----------------------------------------------


@pytest.mark.parametrize("split, tiles", [(1, 5), (2, 3), (3, 2), (5, 1)])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "taid", "logit_mse"])
def test_parts_of_a_row_meet(split, tiles, name):
    """A row split over programs, one launch a phase, gives what one program gives."""
    from fastkd.kernels.dense import dense
    from fastkd.kernels.launch import DensePlan

    divergence = fastkd.TAID(0.5) if name == "taid" else fastkd.divergences.get(name)
    student, teacher = (x[None] for x in logits(6, 600))
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 0.0], device=DEVICE)
    factors = torch.stack([weight, weight / 2, weight / 2])
    labels = torch.arange(0, 600, 100, device=DEVICE)
    results = []
    for plan in (DensePlan(1024, 1, 1, 6, 4, False), DensePlan(128, tiles, split, 6, 4, False)):
        grad = torch.full((6, 600), float("nan"), device=DEVICE)
        rows = Rows(student, teacher, labels, factors, grad)
        results.append((dense(rows, Ask(divergence, 2.0, n=590), plan=plan), grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("V", [1, 7, 4097, 32_000, 128_256, 151_936, 262_144])
def test_plan(V):
    """Every entry has one owner, the teams' rows fit the cache, and one team always fits the
    device."""
    from fastkd.kernels.launch import Device, dense_plan

    for T in (1, 7, 8192):
        for programs in (0, 8, 264):
            p = dense_plan(T, V, 4 * V, Device(programs, 30_000_000))
            assert p.block * p.tiles * p.split >= V > p.block * p.tiles * (p.split - 1)
            assert 1 <= p.teams <= T and (not programs or p.teams * p.split <= max(programs, T))
            assert p.waits == (p.split > 1)
            if p.waits:
                assert p.teams * p.split <= programs
