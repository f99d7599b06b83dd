"""A source of anyone's own (own_source.py) is as good as a built-in one."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import DEVICE
from own_source import Int8Head

from fastkd import Ensemble, LMHead, kd_loss
from fastkd.testing import check_source

V, H, ROWS = 31, 6, (2, 3)
LABELS = torch.arange(6).view(ROWS) * 6
LABELS[1, 1] = -100
SETTINGS = dict(alpha=0.6, shift=True, temperature=2.0, divergence="jsd")


def tensors(dtype=torch.float64, seed=0, low=0, high=V):
    """(hidden, weight, steps), of some entries of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*ROWS, H, generator=generator).to(DEVICE, dtype)
    weight = torch.randint(-127, 128, (V, H), generator=generator, dtype=torch.int8).to(DEVICE)
    steps = (torch.rand(V, generator=generator) / 64).to(DEVICE, dtype)
    return hidden, weight[low:high], steps[low:high]


def whole(head):
    """The same as an LM head of floats."""
    return LMHead(head.hidden, head.steps[:, None] * head.weight)


def run(make, teacher, labels, tensors, **settings):
    """Loss, and gradients of hidden and steps."""
    hidden, weight, steps = tensors
    leaves = [hidden.clone().requires_grad_(), steps.clone().requires_grad_()]
    loss = kd_loss(make(Int8Head(leaves[0], weight, leaves[1])), teacher, labels, **settings)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def test_keeps_the_protocol():
    head = Int8Head(*tensors(torch.float32))
    expected = whole(head)
    check_source(head, logits=expected.hidden @ expected.weight.T)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_student_and_teacher(reduction, backend):
    dtype = torch.float64 if backend == "eager" else torch.float32
    close = dict(rtol=1e-9, atol=1e-12) if backend == "eager" else dict(rtol=1e-4, atol=1e-6)
    labels, settings = LABELS.to(DEVICE), SETTINGS | dict(reduction=reduction)
    teacher = Int8Head(*tensors(dtype, seed=1))
    expected = run(whole, whole(teacher), labels, tensors(dtype), **settings)
    for other in (
        teacher,
        Ensemble([teacher, whole(teacher)]),
        Ensemble([teacher, whole(teacher)], [0.2, 0.8], mode="logits"),
    ):
        ours = run(lambda x: x, other, labels, tensors(dtype), **settings)
        torch.testing.assert_close(ours, expected, **close)


def test_compiles_without_graph_break():
    hidden, weight, steps = tensors()
    teacher, labels = tensors(seed=1), LABELS.to(DEVICE)

    def loss(hidden, weight, steps, teacher, labels):
        return kd_loss(Int8Head(hidden, weight, steps), Int8Head(*teacher), labels, **SETTINGS)

    results = []
    for step in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (hidden, steps)]
        value = step(leaves[0], weight, leaves[1], teacher, labels)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    torch.testing.assert_close(*results)


def test_teacher_that_requires_grad_is_refused():
    hidden, weight, steps = tensors()
    with pytest.raises(ValueError, match="its steps require grad"):
        kd_loss(hidden @ weight.double().T, Int8Head(hidden, weight, steps.requires_grad_()))


def worker(rank, store):
    torch.set_num_threads(1)
    os.environ["FASTKD_BACKEND"] = "eager"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    low, high = [(0, 13), (13, V)][rank]
    teacher = Int8Head(*tensors(seed=1))
    value, d_hidden, d_steps = run(lambda x: x, teacher, LABELS, tensors(), **SETTINGS)
    ours = run(
        lambda x: x,
        Ensemble([Int8Head(*tensors(seed=1, low=low, high=high))]),
        LABELS,
        tensors(low=low, high=high),
        group=dist.group.WORLD,
        **SETTINGS,
    )
    torch.testing.assert_close(ours, [value, d_hidden, d_steps[low:high]])
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads do not always survive the interpreter's own way out


@pytest.mark.skipif(DEVICE != "cpu" or not dist.is_available(), reason="gloo, on a CPU")
def test_shards_are_one_vocabulary(tmp_path):
    mp.spawn(worker, (tmp_path / "store",), nprocs=2)
