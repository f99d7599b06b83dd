"""Without a teacher: the cross-entropy alone, in the same chunks, from any student."""

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, assert_as_exact_as_torch, logits, value_and_grad

from fastkd import KDLoss, LMHead, TopK, kd_loss
from fastkd.sources import Dense

LABELS = torch.tensor([[3, -100, 49, 0, 7], [1, 2, -100, -100, 11]], device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_logits(dtype, shift, backend):
    student, _ = logits(2, 5, 50, dtype=dtype)
    labels = LABELS.clone()
    assert_as_exact_as_torch(student, None, labels, alpha=0.0, shift=shift)
    weight = torch.rand(2, 5, device=DEVICE)
    assert_as_exact_as_torch(
        student, None, labels, alpha=0.0, shift=shift, token_weight=weight, reduction="sum"
    )
    labels[0, 2] = -100
    clean = value_and_grad(kd_loss, student, None, labels, alpha=0.0, shift=shift)
    student[0, 1] = torch.nan  # does not count, shifted or not
    spoilt = value_and_grad(kd_loss, student, None, labels, alpha=0.0, shift=shift)
    assert torch.equal(clean[0], spoilt[0]) and torch.equal(clean[1], spoilt[1])
    assert (spoilt[1][0, 1] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_lm_heads_in_chunks(reduction, backend):
    """Never whole: chunks of two rows at most fit in the workspace."""
    make = torch.Generator().manual_seed(0)
    shapes = (2, 5, 6), (50, 6), (50,)
    tensors = [torch.randn(*shape, generator=make).to(DEVICE) for shape in shapes]
    grads = []
    for run in ("fused", "plain"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        if run == "fused":
            head = LMHead(*leaves, softcap=5.0)
            loss = kd_loss(
                head, None, LABELS, alpha=0.0, reduction=reduction, workspace_bytes=10_000
            )
        else:
            hidden, weight, bias = leaves
            z = 5 * torch.tanh((hidden @ weight.T + bias) / 5)
            loss = F.cross_entropy(z.flatten(0, 1), LABELS.flatten(), reduction=reduction)
            loss = loss.view(2, 5) if reduction == "none" else loss
        (loss * 3).sum().backward()
        grads.append([loss.detach(), *(x.grad for x in leaves)])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


class Unreadable(Dense):
    """A teacher that must not be read."""

    def reader(self, ask):
        raise AssertionError("the teacher was read")


def test_alpha_of_zero_reads_no_teacher(backend):
    student, teacher = logits(2, 5, 50)
    expected = value_and_grad(kd_loss, student, None, LABELS, alpha=0.0)
    for unread in (Unreadable(teacher), teacher.fill_(torch.nan)):
        got = value_and_grad(kd_loss, student, unread, LABELS, alpha=0, temperature=2.0)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    ids = torch.zeros(2, 5, 3, dtype=torch.long, device=DEVICE)  # not distinct: never looked at
    got = value_and_grad(kd_loss, student, TopK(ids, -ids.float()), LABELS, alpha=0.0)
    assert torch.equal(got[1], expected[1])
    with pytest.raises(ValueError, match="vocabularies differ"):
        kd_loss(student, teacher[..., :40], LABELS, alpha=0.0)


def test_parts(backend):
    """What only a teacher can tell is None without one; with one it is measured, and a teacher of
    NaN spoils neither loss nor gradient."""
    student, teacher = logits(2, 5, 50)
    loss = KDLoss(alpha=0.0, return_parts=True)
    alone = loss(student, None, LABELS)
    assert alone.divergence is alone.teacher_entropy is alone.top1_agreement is None
    assert alone.n_tokens == 7 and torch.equal(alone.loss, alone.cross_entropy)
    beside = loss(student, teacher, LABELS)
    torch.testing.assert_close(beside.divergence, kd_loss(student, teacher, LABELS))
    torch.testing.assert_close(beside.loss, alone.loss)
    expected = value_and_grad(kd_loss, student, None, LABELS, alpha=0.0)

    def with_nan(student, teacher):
        parts = loss(student, teacher, LABELS)
        assert parts.divergence.isnan()
        return parts.loss

    got = value_and_grad(with_nan, student, teacher.fill_(torch.nan))
    torch.testing.assert_close(got, expected)


def test_nothing_counts(backend):
    student, _ = logits(2, 50)
    labels = torch.full((2,), -100, device=DEVICE)
    value, grad = value_and_grad(kd_loss, student, None, labels, alpha=0.0)
    assert value == 0 and (grad == 0).all()
