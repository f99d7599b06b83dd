"""On a real GPU (`pytest -m gpu`): sizes that the interpreter cannot, programs that wait for each
other, memory."""

import pytest
import torch
from common import assert_as_exact_as_torch, every_divergence, value_and_grad

import fastkd
from fastkd import Ensemble, LMHead, TopK, kd_loss, reference
from fastkd.rows import Ask, Rows

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


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_numbers_on_the_device(name):
    """A temperature that is a tensor: what a number gives, through teams, without a sync."""
    from fastkd.kernels.dense import dense

    student, teacher = pair(64, 151_936)
    factors = torch.ones(3, 64, device="cuda")
    results = []
    for temperature in (2.0, torch.tensor(2.0, device="cuda")):
        for mode in ("default", "error"):  # the second time nothing is compiled
            grad = torch.empty_like(student)
            rows = Rows(student[None], teacher[None], None, factors, grad)
            torch.cuda.set_sync_debug_mode(mode)
            try:
                measures = dense(rows, Ask(fastkd.divergences.get(name), temperature))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        results.append((measures, grad.float()))
    torch.testing.assert_close(results[1], results[0], rtol=2**-7, atol=1e-7)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-8)


def test_cross_entropy_alone():
    """The row function without a teacher, through teams."""
    from fastkd.kernels.dense import dense

    student, _ = pair(24, 151_936)
    labels = torch.randint(151_936, (24,), device="cuda")
    grad = torch.empty_like(student)
    rows = Rows(student[None], None, labels, torch.ones(3, 24, device="cuda"), grad)
    measures = dense(rows, Ask(fastkd.ForwardKL()))
    z = student.double().requires_grad_()
    ce = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    ce.sum().backward()
    torch.testing.assert_close(measures[1].double(), ce.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), z.grad, rtol=2**-7, atol=1e-7)


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


# --- Other sources -------------------------------------------------------


def heads(T, V, widths=(64, 96), dtype=torch.bfloat16, **options):
    """LM heads of student and teacher, of which the student's requires grad."""
    generator = torch.Generator("cuda").manual_seed(0)
    both = []
    for H in widths:
        hidden, weight = (
            torch.randn(n, H, device="cuda", generator=generator).to(dtype) for n in (T, V)
        )
        both.append(LMHead(hidden, weight.mul_(3 * H**-0.5), **options))
    for x in (both[0].hidden, both[0].weight):
        x.requires_grad_()
    return both


def gradients(loss, student, teacher, *args, **settings):
    value = loss(student, teacher, *args, **settings)
    grads = torch.autograd.grad(value.mean(), (student.hidden, student.weight))
    return [value.detach().double(), *(g.double() for g in grads)]


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("workspace", [2**26, None])
def test_heads(softcap, workspace):
    """In one chunk and in several: no further from float64 than bf16 logits with a loss in fp32."""
    V = 151_936
    student, teacher = heads(160, V, softcap=softcap)
    labels = torch.randint(V, (160,), device="cuda")
    labels[::7] = -100
    options = dict(temperature=2.0, alpha=0.5)

    def unfused(s, t, *args, **settings):
        return reference.kd_loss(
            reference.logits(s).float(), reference.logits(t).float(), *args, **settings
        )

    def wide(head):
        hidden, weight = (x.detach().double().requires_grad_() for x in (head.hidden, head.weight))
        return LMHead(hidden, weight, softcap=softcap)

    truth = gradients(reference.kd_loss, wide(student), reference.logits(wide(teacher)).detach(),
                      labels, **options)  # fmt: skip
    plain = gradients(unfused, student, teacher, labels, **options)
    ours = gradients(kd_loss, student, teacher, labels, workspace_bytes=workspace, **options)
    for name, o, p, t in zip(("value", "hidden", "weight"), ours, plain, truth, strict=True):
        assert (o - t).norm() <= 2 * (p - t).norm() + 1e-6 * t.norm(), name


@pytest.mark.parametrize("trained", [False, True])
def test_heads_keep_to_the_workspace(trained):
    """Beyond inputs, gradients and the fp32 sum of a trained head's gradient."""
    T, V, budget = 4096, 128_256, 2**28
    student, teacher = heads(T, V, (256, 512))
    student.weight.requires_grad_(trained)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kd_loss(student, teacher, workspace_bytes=budget).backward()
    extra = torch.cuda.max_memory_allocated() - before - student.hidden.nbytes
    extra -= 3 * student.weight.nbytes if trained else 0
    assert extra <= budget + 16 * 2**20, f"{extra:,} bytes"


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate"])
@pytest.mark.parametrize("V", [32_000, 151_936, 262_144])
@pytest.mark.parametrize("K", [1, 64, 100])
def test_sparse_teachers(tail, V, K, monkeypatch):
    """Against the torch path in float64."""
    student, z = pair(300, V)
    logprobs, ids = z.float().log_softmax(-1).topk(K)
    labels = torch.randint(V, (300,), device="cuda")
    for name in ("forward_kl", "jsd"):
        options = dict(divergence=name, alpha=0.7, reduction="none")
        teacher = TopK(ids, logprobs, tail=tail)
        ours = value_and_grad(kd_loss, student, teacher, labels, **options)
        monkeypatch.setenv("FASTKD_BACKEND", "eager")
        truth = value_and_grad(
            kd_loss, student.double(), TopK(ids, logprobs.double(), tail=tail), labels, **options
        )
        monkeypatch.delenv("FASTKD_BACKEND")
        torch.testing.assert_close(ours[0], truth[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[1], truth[1], rtol=2**-7, atol=1e-7)
        again = value_and_grad(kd_loss, student, teacher, labels, **options)
        assert torch.equal(again[0], ours[0]) and torch.equal(again[1], ours[1])


def every_source(T=64, V=5000):
    student, teacher = heads(T, V)
    dense, z = pair(T, V)
    dense.requires_grad_()
    logprobs, ids = z.float().log_softmax(-1).topk(8)
    share = torch.rand(T, device="cuda")
    return {
        "heads": (student, teacher),
        "top-k": (dense, TopK(ids, logprobs)),
        "head, top-k": (student, TopK(ids, logprobs, tail="truncate")),
        "mixture": (student, Ensemble([teacher, z], weights=[share, 1 - share])),
        "geometric": (dense, Ensemble([teacher, z], mode="logits")),
    }


@pytest.mark.parametrize("name", ["heads", "top-k", "head, top-k", "mixture", "geometric"])
def test_sources_do_not_sync(name):
    student, teacher = every_source()[name]
    labels = torch.randint(5000, (64,), device="cuda")
    kd_loss(student, teacher, labels, alpha=0.5, return_parts=True).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts = kd_loss(student, teacher, labels, alpha=0.5, return_parts=True)
        (parts.loss / 4).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_heads_compile():
    student, teacher = heads(64, 32_000)

    def step(hidden, weight):
        return kd_loss(LMHead(hidden, weight), teacher, temperature=2.0)

    inputs = student.hidden, student.weight
    expected = torch.autograd.grad(step(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True)(*inputs), inputs)
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "renyi"])
def test_diagnostics(name):
    """Their plan is another one."""
    student, teacher = pair(300, 151_936)
    divergence = fastkd.Renyi(0.5) if name == "renyi" else name
    parts = kd_loss(student, teacher, divergence=divergence, reduction="none", return_parts=True)
    plain = kd_loss(student, teacher, divergence=divergence, reduction="none")
    torch.testing.assert_close(parts.loss, plain, rtol=1e-5, atol=1e-7)
    for x, entropy in ((student, parts.student_entropy), (teacher, parts.teacher_entropy)):
        p = x.double().softmax(-1)
        torch.testing.assert_close(
            entropy.double(), torch.special.entr(p).sum(-1), rtol=1e-5, atol=1e-5
        )
    agree = (student == student.amax(-1, keepdim=True)) & (
        teacher == teacher.amax(-1, keepdim=True)
    )
    assert torch.equal(parts.top1_agreement.bool(), agree.any(-1))
