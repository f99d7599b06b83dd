"""On a real GPU (`pytest -m gpu`): sizes that the interpreter cannot, programs that wait for each
other, memory."""

import pytest
import torch
from common import assert_as_exact_as_torch, every_divergence, value_and_grad

import fastkd
from fastkd import kd_loss, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def pair(T, V, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    student = torch.randn(T, V, device="cuda", dtype=dtype, generator=generator).mul_(3)
    noise = torch.randn(T, V, device="cuda", dtype=dtype, generator=generator)
    return student, noise.add_(student)


@every_divergence
@pytest.mark.parametrize("V", [151_936, 262_144])
def test_parity(divergence, V):
    student, teacher = pair(24, V)
    labels = torch.randint(V, (24,), device="cuda")
    labels[::5] = -100
    options = dict(divergence=divergence, temperature=2.0, alpha=0.7, reduction="none")
    assert_as_exact_as_torch(student, teacher, labels, **options)


@pytest.mark.parametrize("V", [7, 1000, 4097, 32_000, 50_257, 128_256])
@pytest.mark.parametrize("T", [1, 2, 333])
def test_every_plan(T, V):
    """Few and many rows, aligned or not, teams of one and of many."""
    for name in ("forward_kl", "jsd"):
        assert_as_exact_as_torch(*pair(T, V), divergence=name, temperature=2.0, reduction="none")


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_waiting_is_deterministic(name):
    """Thousands of rows through teams that meet, many times: the same bits, and no hang."""
    student, teacher = pair(4096, 32_000)
    first = value_and_grad(kd_loss, student, teacher, divergence=name)
    for _ in range(10):
        again = value_and_grad(kd_loss, student, teacher, divergence=name)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


def test_waiting_beside_other_work():
    """Another stream keeps the multiprocessors busy: the launch waits for room, and finishes."""
    student, teacher = pair(512, 151_936)
    expected = value_and_grad(kd_loss, student, teacher)
    side = torch.cuda.Stream()
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.stream(side):
        for _ in range(50):
            a = (a @ a).clamp_(-1, 1)
    for _ in range(5):
        value, grad = value_and_grad(kd_loss, student, teacher)
    torch.cuda.synchronize()
    assert torch.equal(value, expected[0]) and torch.equal(grad, expected[1])


def test_offsets_beyond_32_bits():
    T, V = 16_000, 151_936
    assert T * V > 2**31
    student, teacher = pair(T, V)
    leaf = student.requires_grad_()
    losses = kd_loss(leaf, teacher, reduction="none", inplace=False)
    losses.sum().backward()
    rows = slice(T - 4, T)
    value, grad = value_and_grad(
        reference.kd_loss, student[rows].detach().double(), teacher[rows].double(), reduction="none"
    )
    torch.testing.assert_close(losses[rows].detach().double(), value, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(leaf.grad[rows].double(), grad, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_peak_memory(inplace):
    """One gradient buffer and nothing that grows with the vocabulary; none in place."""
    student, teacher = pair(2048, 151_936)
    student.requires_grad_()
    logits = student * 1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kd_loss(logits, teacher, divergence="jsd", inplace=inplace)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= (0 if inplace else student.nbytes) + 4 * 2**20, f"{extra:,} bytes"


@every_divergence
@pytest.mark.parametrize("choice", ["eager", "triton"])
def test_no_device_sync(divergence, choice, monkeypatch):
    monkeypatch.setenv("FASTKD_BACKEND", choice)
    student, teacher = pair(64, 5000)
    labels = torch.randint(5000, (64,), device="cuda")
    leaf = student.requires_grad_()
    options = dict(alpha=0.5, divergence=divergence)
    kd_loss(leaf, teacher, labels, **options).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (kd_loss(leaf, teacher, labels, **options) / 4).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph():
    student, teacher = pair(64, 32_000)
    leaf = student.requires_grad_()
    kd_loss(leaf, teacher).backward()
    expected, leaf.grad = leaf.grad.clone(), None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad = torch.autograd.grad(kd_loss(leaf, teacher), leaf)[0]
    graph.replay()
    assert torch.equal(grad, expected)


def test_compile():
    student, teacher = pair(64, 151_936)

    def step(x, t):
        return kd_loss(x * 1.5, t, divergence=fastkd.SkewForwardKL(0.1), temperature=2.0)

    expected = value_and_grad(step, student, teacher)
    compiled = value_and_grad(torch.compile(step, fullgraph=True), student, teacher)
    torch.testing.assert_close(compiled, expected, rtol=2e-2, atol=1e-7)
