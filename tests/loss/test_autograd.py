"""How the loss sits in autograd: what is kept, what is refused, what torch's own checks say."""

import pytest
import torch
from common import DEVICE, logits

import fastkd
from fastkd import Ensemble, LMHead, TopK, kd_loss
from fastkd.backends import buffers

S, T = logits(2, 5, 30)
Y = torch.randint(30, (2, 5), device=DEVICE)

# --- Tensors that are kept for the backward pass -------------------------


def sources(dtype):
    """Teachers of every kind, as a model under `torch.inference_mode` gives them."""
    teacher = T.to(dtype) + 0  # made here: an inference tensor under inference mode
    hidden = torch.ones(2, 5, 4, device=DEVICE, dtype=dtype) * 0.5
    weight = torch.linspace(-1, 1, 120, device=DEVICE, dtype=dtype).view(30, 4) * 1
    logprobs, ids = T.log_softmax(-1).topk(4)
    return [
        teacher,
        LMHead(hidden, weight),
        TopK(ids, logprobs),
        Ensemble([teacher, LMHead(hidden, weight)], weights=[T[..., 0].abs(), 1.0]),
    ]


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_teachers_under_inference_mode(kind, dtype, reduction):
    """In fp16, and from LM heads row by row, the gradient is computed in the backward pass."""
    results = []
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            teacher, labels, weight = sources(dtype)[kind], Y + 0, (Y > 3) + 0.5
        hidden = S[..., :4].to(dtype).detach().requires_grad_()
        head = torch.linspace(-2, 1, 120, device=DEVICE, dtype=dtype).view(30, 4).requires_grad_()
        logits = S.to(dtype).detach().requires_grad_()
        options = dict(alpha=0.5, token_weight=weight, reduction=reduction)
        loss = kd_loss(LMHead(hidden, head), teacher, labels, **options)
        loss = loss + kd_loss(logits, teacher, labels, **options)
        loss.sum().backward()
        results.append((loss.detach(), hidden.grad, head.grad, logits.grad))
    torch.testing.assert_close(*results)


# --- What is refused -----------------------------------------------------


def heads():
    hidden = S[..., :4].clone().requires_grad_()
    weight = torch.linspace(-2, 1, 120, device=DEVICE).view(30, 4).requires_grad_()
    return [hidden, weight], LMHead(hidden, weight)


def test_second_derivatives_are_never_zeros(backend):
    """Whichever way they are asked for."""
    functional = torch.autograd.functional
    leaf = S.clone().requires_grad_()
    for ask in (
        lambda: functional.hessian(lambda x: kd_loss(x, T), S),
        lambda: functional.hvp(lambda x: kd_loss(x, T), S, S),
        lambda: functional.jvp(lambda x: kd_loss(x, T), S, S),
    ):
        with pytest.raises(RuntimeError, match="kd_loss cannot be differentiated twice"):
            ask()
    leaves, head = heads()
    for inputs, student in (([leaf], leaf), (leaves, head)):
        for reduction in ("mean", "none"):
            loss = kd_loss(student, T, Y, alpha=0.5, reduction=reduction).sum()
            grads = torch.autograd.grad(loss, inputs, create_graph=True)
            for grad in grads:
                for x in inputs:
                    with pytest.raises(RuntimeError, match="differentiated twice"):
                        torch.autograd.grad(grad.sum(), x, allow_unused=True, retain_graph=True)


def test_transforms_are_refused_in_our_words():
    import torch.autograd.forward_ad as forward_ad

    for transform in (
        lambda: torch.func.grad(lambda x: kd_loss(x, T))(S),
        lambda: torch.func.vmap(kd_loss)(S, T),
        lambda: torch.func.jvp(lambda x: kd_loss(x, T), (S,), (S,)),
        lambda: torch.func.hessian(lambda x: kd_loss(x, T))(S),
    ):
        with pytest.raises(RuntimeError, match="kd_loss goes through no torch.func transform"):
            transform()
    with forward_ad.dual_level():
        kd_loss(S, forward_ad.make_dual(T, T).detach())
        for pair in ((forward_ad.make_dual(S, S), T), (S, forward_ad.make_dual(T, T))):
            with pytest.raises(RuntimeError, match="kd_loss has no forward-mode derivative"):
                kd_loss(*pair)
    leaf = S.clone().requires_grad_()
    losses = kd_loss(leaf, T, reduction="none").flatten()
    every = torch.eye(len(losses), device=DEVICE)
    with pytest.raises(RuntimeError, match="kd_loss goes through no torch.func transform"):
        torch.autograd.grad(losses, leaf, every, is_grads_batched=True)


def test_inference_tensors_are_let_go():
    """As saved tensors are, with the graph."""
    import weakref

    student = S.half().requires_grad_()
    with torch.inference_mode():
        teacher = T.half() * 1
    kept = weakref.ref(teacher.untyped_storage())
    loss = kd_loss(student, teacher)
    del teacher
    assert kept() is not None
    loss.backward()
    assert kept() is None


def test_measures_are_reported_once(monkeypatch):
    """Forwards, also where the gradient is computed in the backward pass."""
    from fastkd import compare

    asked, operator = [], compare._operator
    monkeypatch.setattr(compare, "_operator", lambda *a: (asked.append(a[-1]), operator(*a))[1])
    student = S.half().requires_grad_()
    kd_loss(student, T.half(), return_parts=True).loss.backward()
    assert asked == [True, False] and student.grad.isfinite().all()


def test_the_logits_are_not_kept():
    """What refuses second derivatives holds none of the student's data."""
    import weakref

    leaf = S.clone().requires_grad_()
    own = leaf * 2
    storage = weakref.ref(own.untyped_storage())
    loss = kd_loss(own, T)
    del own
    assert storage() is None
    loss.backward()


# --- What torch says -----------------------------------------------------


class Step(torch.nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.head, self.fused = torch.nn.Linear(4, 30, device=DEVICE), fused

    def forward(self, hidden, teacher, labels):
        student = self.head(hidden)
        if self.fused:
            student = LMHead(hidden, self.head.weight, self.head.bias)
        return kd_loss(student, teacher, labels, alpha=0.5, shift=True)


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "head"])
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(fused, strict):
    model, hidden = Step(fused), torch.randn(2, 5, 4, device=DEVICE)
    exported = torch.export.export(model, (hidden, T, Y), strict=strict)
    other = hidden.flip(0)
    torch.testing.assert_close(exported.module()(other, T, Y), model(other, T, Y))


def test_operators_are_what_they_say(monkeypatch):
    """torch.library.opcheck of the calls that losses make; test_shards.py has the other one."""
    from fastkd import compare, loss

    calls, operator = [], compare._operator
    monkeypatch.setattr(compare, "_operator", lambda *a: (calls.append(a), operator(*a))[1])
    leaves, head = heads()
    logprobs, ids = T.log_softmax(-1).topk(4)
    torch.library.opcheck(loss._scaled._opoverload, (torch.rand(5, 30), torch.rand(5, 1)))
    temperature = torch.tensor(2.0, device=DEVICE)
    kd_loss(S.clone().requires_grad_(), T, Y, alpha=0.5, return_parts=True)
    kd_loss(head, TopK(ids, logprobs, tail="renormalize"), temperature=temperature)
    kd_loss(head, None, Y, alpha=0.0)
    assert len(calls) == 3
    for call in calls:
        torch.library.opcheck(operator._opoverload, call)


# --- Memory --------------------------------------------------------------


@pytest.mark.skipif(not buffers._KEEPS or DEVICE != "cpu", reason="memory is kept on Linux")
def test_kept_memory_does_not_add_to_the_step(monkeypatch):
    """After a backward pass no more than `KEPT` bytes lie unused, and after one without either."""
    monkeypatch.setattr(buffers, "KEPT", 2**21)
    buffers.release()
    hidden, weight = torch.randn(64, 8), torch.randn(40_000, 8)
    for wanted in (True, False, "compiled"):
        run = kd_loss
        if wanted == "compiled":
            run = torch.compile(kd_loss, backend="aot_eager")
        student = LMHead(hidden.clone().requires_grad_(bool(wanted)), weight)
        loss = run(student, LMHead(hidden, weight))
        if wanted:
            assert sum(map(len, buffers._free())) > 2**22  # the chunk's logits
            loss.backward()
        assert sum(map(len, buffers._free())) <= 2**21
    assert fastkd.buffers is buffers
