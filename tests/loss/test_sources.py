"""LM heads, ensembles, unequal vocabularies: the same loss, wherever the logits come from."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from common import COMPILER, DEVICE, DIVERGENCES, assert_same, every_divergence

import fastkd
from fastkd import Ensemble, LMHead, TopK, compare, kd_loss, reference
from fastkd.backends import matmul

V, H, ROWS = 61, 12, (3, 5)
LABELS = torch.arange(15).view(ROWS).to(DEVICE) * 4
LABELS[0, 1] = -100
LABELS[2] = -100
WIDTHS = {"student": H, "teacher": 20}


@pytest.fixture
def chunked(monkeypatch):
    """Four rows at a time."""
    monkeypatch.setattr(compare, "chunk_rows", lambda *_: 4)


def make(kind, side="student", dtype=torch.float64, seed=0, entries=V, rows=ROWS, spread=2.0):
    """A source with tensors of its own; those of a student require grad."""
    generator = torch.Generator().manual_seed(seed + (side == "teacher"))

    def tensor(*shape, size=1.0):
        x = (size * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)
        return x.requires_grad_(side == "student")

    width = WIDTHS[side]
    if kind == "dense":
        return tensor(*rows, entries, size=spread)
    if kind.startswith("head"):
        options = dict(softcap=3.0, scale=0.7) if kind == "head capped" else {}
        bias = tensor(entries) if kind in ("head capped", "head with bias") else None
        weight = tensor(entries, width, size=spread / width**0.5)
        return LMHead(tensor(*rows, width), weight, bias, **options)
    raise KeyError(kind)


def everything(x):
    """The whole distribution of (..., V) logits as a top-k list, in any order."""
    order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(5)).to(x.device)
    return order.expand(x.shape), x.detach().log_softmax(-1)[..., order]


def teachers(dtype, temperature, entries=V):
    """Every kind of teacher of one and the same distribution, and the logits of it."""
    head = make("head capped", "teacher", dtype, entries=entries)
    z = reference.logits(head)
    ids, logprobs = everything(z / temperature)
    half = torch.full(ROWS, 0.5, device=DEVICE)
    return z, {
        "dense": z,
        "head": head,
        "bucket": TopK(ids, logprobs, temperature=temperature),
        "renormalize": TopK(ids, everything(z)[1], tail="renormalize"),
        "truncate": TopK(ids, logprobs, tail="truncate", temperature=temperature),
        "mixture": Ensemble([head, z, TopK(ids, everything(z)[1], tail="renormalize")]),
        "per token": Ensemble([head, z], weights=[half, 0.5]),
        "geometric": Ensemble([z, head], weights=[0.3, 0.7], mode="logits"),
        "nested": Ensemble([Ensemble([z]), head]),
    }


def tensors_of(student):
    if isinstance(student, torch.Tensor):
        return [student]
    return [x for x in (student.hidden, student.weight, student.bias) if x is not None]


def run(loss, student, teacher, *args, **settings):
    """(value, gradients), in float64."""
    value = loss(student, teacher, *args, **settings)
    grads = torch.autograd.grad(value.sum(), tensors_of(student))
    return [value.detach().double(), *(g.double() for g in grads)]


@every_divergence
@pytest.mark.parametrize("kind", ["dense", "head", "head with bias", "head capped"])
def test_every_pair_of_sources_gives_the_same(divergence, kind):
    """Float64: values and gradients of every teacher against autograd on the explicit logits."""
    student = make(kind)
    for temperature, alpha in ((1.0, 1.0), (2.0, 0.4)):
        options = dict(divergence=divergence, temperature=temperature, alpha=alpha)
        z, sources = teachers(torch.float64, temperature)
        expected = run(reference.kd_loss, student, z, LABELS, **options)
        for name, teacher in sources.items():
            pooled = isinstance(teacher, TopK)
            if pooled and divergence.pooled_terms is None:
                continue
            if name == "renormalize" and divergence.infinite_p:
                continue
            if divergence.kind == "logits" and name in ("mixture", "per token", "nested"):
                continue
            for workspace in (None, 7 * 8 * V * 8):  # one chunk, and several of a few rows
                ours = run(kd_loss, student, teacher, LABELS, workspace_bytes=workspace, **options)
                torch.testing.assert_close(
                    ours, expected, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("kind", ["dense", "head", "head capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_backends(kind, dtype, backend, chunked):
    """Low precision: no further from float64 than the same source unfused, with the loss in
    fp32."""
    student = make(kind, dtype=dtype)
    exact = cast(student, torch.float64)
    options = dict(divergence="jsd", temperature=2.0, alpha=0.5, reduction="none")
    z, sources = teachers(dtype, 1.0)
    for name in ("dense", "head", "mixture", "geometric"):
        teacher = sources[name]
        wide = cast(teacher, torch.float64)
        truth = run(reference.kd_loss, exact, wide, LABELS, **options)
        plain = run(unfused, student, cast(teacher, dtype), LABELS, **options)
        ours = run(kd_loss, student, teacher, LABELS, **options)
        for i, (o, p, t) in enumerate(zip(ours, plain, truth, strict=True)):
            step = torch.finfo(torch.float32 if i == 0 else dtype).eps
            limit = 2 * (p - t).norm() + 4 * step * t.norm()
            assert (o - t).norm() <= limit, (name, i, (o - t).norm(), limit)


def cast(source, dtype):
    def leaf(x):
        return None if x is None else x.detach().to(dtype).requires_grad_(x.requires_grad)

    if isinstance(source, LMHead):
        return LMHead(
            leaf(source.hidden), leaf(source.weight), leaf(source.bias), softcap=source.softcap,
            scale=source.scale,
        )  # fmt: skip
    if isinstance(source, Ensemble):
        members = [cast(t, dtype) for t in source.teachers if not isinstance(t, TopK)]
        weights = source.weights if len(members) == len(source.teachers) else None
        return Ensemble(members, weights, mode=source.mode)
    return leaf(source if isinstance(source, torch.Tensor) else source.logits)


def unfused(student, teacher, labels, **options):
    """What one writes without this package: logits in the model's precision, the loss in fp32."""
    every = [reference.logits(x, options["temperature"]) for x in (student, teacher)]
    return reference.kd_loss(*(z.float() for z in every), labels, **options)


@pytest.mark.parametrize("chunks", [2, 8, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_chunks_add_up_in_fp32(chunks, dtype, monkeypatch):
    """Gradients of a head in low precision, over many chunks: at most twice the unfused error."""
    rows = (256,)
    student = make("head with bias", dtype=dtype, rows=rows, entries=200)
    teacher = make("head", "teacher", dtype, rows=rows, entries=200)
    options = dict(temperature=2.0)
    truth = run(
        reference.kd_loss, cast(student, torch.float64), cast(teacher, torch.float64), **options
    )
    plain = run(unfused, student, teacher, None, **options)
    monkeypatch.setattr(compare, "chunk_rows", lambda *_: 256 // chunks)
    ours = run(kd_loss, student, teacher, **options)
    for name, o, p, t in zip(
        ("hidden", "weight", "bias"), *(x[1:] for x in (ours, plain, truth)), strict=True
    ):
        assert (o - t).norm() <= 2 * (p - t).norm(), name
        assert (o - t).abs().max() <= 2 * (p - t).abs().max(), name


def test_frozen_parts_get_no_gradient(backend, monkeypatch):
    """No dWeight for a frozen head, no dHidden for a frozen body."""
    student, teacher = make("head with bias", dtype=torch.float32), make("dense", "teacher")
    teacher = teacher.float()
    whole = run(kd_loss, student, teacher)
    products = []
    true_product = matmul.add_product
    monkeypatch.setattr(matmul, "add_product", lambda *a: (products.append(1), true_product(*a)))
    for names in (["hidden"], ["weight"], ["bias"], ["hidden", "bias"]):
        parts = [
            getattr(student, name).detach().requires_grad_(name in names)
            for name in ("hidden", "weight", "bias")
        ]
        products.clear()
        kd_loss(LMHead(*parts), teacher).backward()
        for x, expected in zip(parts, whole[1:], strict=True):
            assert (x.grad is not None) == x.requires_grad
            if x.requires_grad:
                assert_same(x.grad.double(), expected)
        assert bool(products) == ("weight" in names)
    with torch.no_grad():
        assert not kd_loss(student, teacher).requires_grad


def test_tied_and_shared_weights(backend):
    """One matrix is embedding and head, and the teacher's head too: a constant there."""
    weight = torch.randn(V, H, device=DEVICE, requires_grad=True)
    tokens = torch.randint(V, ROWS, device=DEVICE)
    target = torch.randn(*ROWS, H, device=DEVICE)

    def loss(kd, w, fixed):
        return kd(LMHead(F.embedding(tokens, w), w), LMHead(target, fixed), temperature=2.0)

    (ours,) = torch.autograd.grad(loss(kd_loss, weight, weight), weight)
    (expected,) = torch.autograd.grad(loss(reference.kd_loss, weight, weight.detach()), weight)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_weights(reduction, backend, chunked):
    """Upstream factors per row included, which a weight's gradient cannot take afterwards."""
    student, teacher = (make("head capped", side, torch.float32) for side in ("student", "teacher"))
    weight = torch.rand(ROWS, device=DEVICE)
    factor = torch.rand(ROWS if reduction == "none" else (), device=DEVICE) + 0.5
    for options in (dict(), dict(shift=True), dict(num_items=7)):
        if "num_items" in options and reduction != "mean":
            continue
        options |= dict(token_weight=weight, alpha=0.5, reduction=reduction, divergence="tvd")

        def scaled(loss):
            return lambda *a, **k: loss(*a, **k) * factor  # noqa: B023

        ours = run(scaled(kd_loss), student, teacher, LABELS, **options)
        expected = run(scaled(reference.kd_loss), student, teacher, LABELS, **options)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_upstream_factors_of_ignored_rows_do_not_matter():
    """sqrt(0) has an infinite slope."""
    for kind in ("dense", "head"):
        student, teacher = make(kind, dtype=torch.float32), make("dense", "teacher", torch.float32)
        loss = kd_loss(student, teacher, LABELS, reduction="none")
        for grad in torch.autograd.grad(loss.sqrt().sum(), tensors_of(student)):
            assert grad.isfinite().all() and grad.abs().sum() > 0


def test_no_positions(backend):
    for kind in ("dense", "head"):
        for options in (dict(shift=True), dict(reduction="none")):
            student = make(kind, dtype=torch.float32, rows=(2, 0))
            teacher = make("dense", "teacher", torch.float32, rows=(2, 0))
            value, *grads = run(kd_loss, student, teacher, **options)
            assert value.sum() == 0 and all((g == 0).all() for g in grads)


def test_nothing_counts_and_nothing_there(backend):
    for rows in ((4,), (0,)):
        student = make("head with bias", dtype=torch.float32, rows=rows)
        teacher = make("head", "teacher", torch.float32, rows=rows)
        labels = torch.full(rows, -100, device=DEVICE)
        value, *grads = run(kd_loss, student, teacher, labels, alpha=0.5)
        assert value == 0 and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("kind", ["head", "head capped"])
def test_masked_rows_may_hold_anything(kind, backend, chunked):
    student, teacher = (make(kind, side, torch.float32) for side in ("student", "teacher"))
    expected = run(kd_loss, student, teacher, LABELS)
    with torch.no_grad():
        student.hidden[LABELS == -100] = float("nan")
        teacher.hidden[LABELS == -100] = float("inf")
    ours = run(kd_loss, student, teacher, LABELS)
    assert_same(ours, expected)
    assert (ours[1][LABELS == -100] == 0).all()


def spoilt(source, ignored):
    """The source, with what cannot be where positions are ignored."""
    if isinstance(source, TopK):
        ids, logprobs = source.ids.clone(), source.logprobs.clone()
        ids[ignored], logprobs[ignored] = 0, 5.0  # padding: repeated ids, no log-probabilities
        ids[ignored][..., 1] = 999
        return TopK(ids, logprobs, tail=source.tail)
    z = source.clone()
    z[ignored] = torch.nan
    return z


@pytest.mark.parametrize("by", ["labels", "token_weight", "shift"])
@pytest.mark.parametrize("kind", ["dense", "bucket", "truncate", "renormalize", "mixture"])
def test_rows_that_do_not_count_are_not_looked_at(by, kind, backend):
    """Not their lists, log-probabilities, weights nor labels, whatever says that they do not."""
    generator = torch.Generator().manual_seed(0)
    student, z = (torch.randn(2, 6, V, generator=generator).to(DEVICE) for _ in range(2))
    labels = torch.randint(V, (2, 6), generator=generator).to(DEVICE)
    ignored = torch.zeros(2, 6, dtype=torch.bool, device=DEVICE)
    ignored[0, 4:] = ignored[1, 2] = True
    options, rows = {}, ignored
    if by == "token_weight":
        options["token_weight"] = (~ignored).float()
        bad = labels.masked_fill(ignored, 10_000)  # a label as good as none
    else:
        bad = labels = labels.masked_fill(ignored, -100)
    if by == "shift":
        options["shift"] = True
        rows = torch.nn.functional.pad(ignored[:, 1:], (0, 1), value=True)
    logprobs, ids = z.log_softmax(-1).topk(4)
    clean = z
    if kind in ("bucket", "truncate", "renormalize"):
        clean = TopK(ids, logprobs, tail=kind)
    elif kind == "mixture":
        share = torch.rand(2, 6, device=DEVICE) + 0.1
        lists = TopK(ids, logprobs, tail="renormalize")
        clean = Ensemble([z, lists], [share, 1.0])
    if kind == "mixture":
        wrong = share.masked_fill(rows, -1.0)
        members = [spoilt(z, rows), spoilt(lists, rows)]
        dirty = Ensemble(members, [wrong, 1.0])
    else:
        dirty = spoilt(clean, rows)
    options |= dict(divergence="skew_forward_kl", alpha=0.5)
    expected = run(kd_loss, student.requires_grad_(), clean, labels, **options)
    ours = run(kd_loss, student.masked_fill(rows[..., None], torch.nan), dirty, bad, **options)
    assert_same(ours, expected)


class Louder(LMHead):
    """A subclass is itself on the other side of the operator."""

    def reader(self, ask):
        reader = super().reader(ask)
        quiet = reader.logits
        reader.logits = lambda low, high: quiet(low, high).mul_(2)
        return reader


def test_subclasses_are_themselves(backend):
    hidden, weight = torch.randn(4, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    student = torch.randn(4, V, device=DEVICE)
    expected = kd_loss(student, LMHead(hidden, weight, scale=2.0))
    torch.testing.assert_close(kd_loss(student, Louder(hidden, weight)), expected)


# --- Unequal vocabularies ------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "head capped"])
def test_cut_vocabularies(kind, backend):
    """Padding columns on either side, for every pair: cut before the softmax; the cross-entropy
    sees the student's whole row."""
    options = dict(temperature=2.0, alpha=0.5, divergence="reverse_kl")
    for sizes, vocab in (((61, 64), "shared"), ((64, 61), "shared"), ((64, 61), 50)):
        student = make(kind, dtype=torch.float32, entries=sizes[0])
        n = min(*sizes) if vocab == "shared" else vocab
        z, sources = teachers(torch.float32, 2.0, entries=sizes[1])
        ids, logprobs = everything(z[..., :n])
        sources |= {
            "bucket": TopK(ids, (z[..., :n] / 2).log_softmax(-1)[..., ids[0, 0]], temperature=2.0),
            "mixture": Ensemble([z, torch.cat([z, z[..., :9]], -1)]),
        }
        for name in ("dense", "head", "mixture", "bucket", "geometric"):
            cut = n if name == "bucket" else vocab  # a list does not know its vocabulary
            ours = run(kd_loss, student, sources[name], LABELS % 61, vocab=cut, **options)
            expected = run(reference.kd_loss, student, z, LABELS % 61, vocab=vocab, **options)
            if name in ("head", "mixture"):  # fp32 products of another order
                torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
            else:
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    if kind == "dense":
        grad = run(kd_loss, student, z[..., :50], vocab="shared")[1]
        assert (grad[..., 50:] == 0).all() and (grad[..., :50] != 0).all()


def test_cut_lists(backend):
    """What a served teacher gave beyond the cut is not possible any more: as with dense logits, a
    student that equals the cut teacher has nothing to learn."""
    z = make("dense", "teacher", torch.float32).requires_grad_()
    ids, logprobs = everything(z)
    for tail in ("bucket", "renormalize", "truncate"):
        value, grad = run(kd_loss, z, TopK(ids, logprobs, tail=tail), vocab=30)
        assert value.abs() < 1e-6 and grad.abs().max() < 1e-6


def test_ensembles_of_teachers_without_a_say(backend):
    """Dead rows, empty lists and weights of 0 leave the other teachers' mixture, and no NaN."""
    student, z = make("dense", dtype=torch.float32), make("dense", "teacher", torch.float32)
    dead = z.clone()
    dead[0, 0] = -torch.inf
    nobody = torch.full((*ROWS, 2), -1, device=DEVICE)
    empty = TopK(nobody, torch.zeros(nobody.shape, device=DEVICE), tail="renormalize")
    expected = run(kd_loss, student, z)
    first = torch.zeros(ROWS, device=DEVICE)
    first[0, 0] = 1
    for mixture in (
        Ensemble([z, dead], weights=[1.0, 1 - first]),
        Ensemble([z, empty]),
        Ensemble([z, torch.full_like(z, torch.nan)], weights=[1.0, 0.0]),
    ):
        ours = run(kd_loss, student, mixture)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    value = kd_loss(student, Ensemble([dead]), reduction="none")
    assert value[0, 0] == torch.inf and value.isinf().sum() == 1


def test_sparse_teacher_as_served(backend):
    """The usual case: 8 of 61 entries. The bucket loses information, never gains; truncated sums
    miss the tail; ids of -1 are absent."""
    student, z = make("dense", dtype=torch.float32), make("dense", "teacher", torch.float32)
    logprobs, ids = z.detach().log_softmax(-1).topk(8)
    full = kd_loss(student, z, reduction="none")
    bucket = kd_loss(student, TopK(ids, logprobs), reduction="none")
    assert (bucket <= full + 1e-6).all() and (bucket > 0).all()
    short = ids.masked_fill(torch.arange(8, device=DEVICE) >= 5, -1)
    torch.testing.assert_close(
        kd_loss(student, TopK(short, logprobs)),
        kd_loss(student, TopK(ids[..., :5], logprobs[..., :5])),
    )
    sparse = (
        z.detach()
        .log_softmax(-1)
        .masked_fill(torch.ones_like(z).bool().scatter(-1, ids, False), -torch.inf)
    )
    for temperature in (1.0, 2.0):
        torch.testing.assert_close(
            run(kd_loss, student, TopK(ids, logprobs, tail="renormalize"), temperature=temperature),
            run(kd_loss, student, sparse, temperature=temperature),
            rtol=1e-4, atol=1e-6,
        )  # fmt: skip


# --- Around them ---------------------------------------------------------


@pytest.mark.parametrize("pair", ["dense-dense", "head-head", "dense-topk", "head-mixture"])
def test_diagnostics(pair, backend, chunked):
    kind, other = pair.split("-")
    student = make(kind, dtype=torch.float32)
    z, sources = teachers(torch.float32, 2.0)
    teacher = sources.get(other)
    if other == "topk":
        logprobs, ids = (z / 2).log_softmax(-1).topk(6)
        teacher = TopK(ids, logprobs, temperature=2.0)
    for reduction in ("mean", "none"):
        parts = kd_loss(
            student, teacher, LABELS, temperature=2.0, reduction=reduction, return_parts=True
        )
        q = F.softmax(reference.logits(student).detach() / 2, -1)
        p = F.softmax(z / 2, -1)
        counts = LABELS != -100

        def reduced(x):
            x = torch.where(counts, x, 0)  # noqa: B023
            return x if reduction == "none" else x.sum() / counts.sum()  # noqa: B023

        close = dict(rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            parts.student_entropy, reduced(torch.special.entr(q).sum(-1)), **close
        )
        agree = reduced((p.argmax(-1) == q.argmax(-1)).float())
        torch.testing.assert_close(parts.top1_agreement, agree, **close)
        if other == "topk":
            torch.testing.assert_close(parts.teacher_mass, reduced(logprobs.exp().sum(-1)), **close)
        else:
            assert parts.teacher_mass is None
            torch.testing.assert_close(
                parts.teacher_entropy, reduced(torch.special.entr(p).sum(-1)), **close
            )
    parts = kd_loss(z, z, divergence="logit_mse", return_parts=True)
    assert parts.teacher_entropy is parts.top1_agreement is None


@pytest.mark.parametrize("pair", ["head-head", "dense-bucket", "head-bucket", "head-per token"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_graph_break(pair, reduction, chunked):
    kind, other = pair.split("-")
    student = make(kind, dtype=torch.float32)
    z, sources = teachers(torch.float32, 1.0)

    def step(*tensors):
        made = tensors[0] if kind == "dense" else LMHead(*tensors)
        teacher = {
            "head": lambda: LMHead(sources["head"].hidden, sources["head"].weight),
            "bucket": lambda: TopK(sources["bucket"].ids, sources["bucket"].logprobs),
            "per token": lambda: Ensemble([z, z * 2], weights=[LABELS + 101.0, 7.0]),
        }[other]()
        parts = kd_loss(
            made, teacher, LABELS, divergence="jsd", alpha=0.5, return_parts=True,
            reduction=reduction,
        )  # fmt: skip
        return parts.loss * 3 + parts.top1_agreement

    expected = torch.autograd.grad(step(*tensors_of(student)).sum(), tensors_of(student))
    compiled = torch.compile(step, fullgraph=True, backend=COMPILER)(*tensors_of(student))
    torch.testing.assert_close(
        torch.autograd.grad(compiled.sum(), tensors_of(student)), expected, rtol=1e-4, atol=1e-6
    )


def test_loss_scaling_under_autocast():
    """fp32 hidden states (after a layer norm), products in fp16: the upstream factor comes before
    the cast."""
    student, teacher = (
        make("head", side, torch.float32, entries=5000, spread=1.0)
        for side in ("student", "teacher")
    )

    def scaled(loss, s, t):
        return loss(s, t, num_items=2**20) * 2.0**24

    truth = run(lambda s, t: scaled(reference.kd_loss, s, t), cast(student, torch.float64),
                cast(teacher, torch.float64))  # fmt: skip
    with torch.autocast(DEVICE, torch.float16):
        value = scaled(kd_loss, student, teacher)
    grads = torch.autograd.grad(value, tensors_of(student))
    for o, t in zip(grads, truth[1:], strict=True):
        assert (o.double() - t).norm() < 0.01 * t.norm()


def test_autocast(backend):
    """fp32 parameters, products in bf16 as torch would multiply them; gradients in fp32."""
    student, teacher = (make("head", side, torch.float32) for side in ("student", "teacher"))
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = run(kd_loss, student, teacher, temperature=2.0)
        logits = [F.linear(x.hidden, x.weight) for x in (student, teacher)]
        assert logits[0].dtype == torch.bfloat16
        plain = run(lambda s, t: kd_loss(*logits, temperature=2.0), student, teacher)
    torch.testing.assert_close(ours, plain, rtol=2e-2, atol=1e-4)
    mixed = LMHead(student.hidden.bfloat16(), student.weight)
    with pytest.raises(TypeError, match="bfloat16 and its weight torch.float32"):
        kd_loss(mixed, teacher)


def test_compiles_for_any_layout():
    """A transposed weight and hidden state: what the operator is said to return is what it does."""
    weight = torch.randn(H, V, device=DEVICE, requires_grad=True)
    hidden = torch.randn(H, 9, device=DEVICE, requires_grad=True)
    teacher = torch.randn(9, V, device=DEVICE)

    def step(h, w):
        return kd_loss(LMHead(h.t(), w.t()), teacher, temperature=2.0)

    expected = torch.autograd.grad(step(hidden, weight), (hidden, weight))
    compiled = torch.compile(step, fullgraph=True, backend=COMPILER)(hidden, weight)
    torch.testing.assert_close(torch.autograd.grad(compiled, (hidden, weight)), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, backend):
    from torch.utils.checkpoint import checkpoint

    student, teacher = (make("head", side, torch.float32) for side in ("student", "teacher"))
    expected = run(kd_loss, student, teacher, LABELS, alpha=0.5)

    def inner(hidden, weight):
        return kd_loss(LMHead(hidden, weight), teacher, LABELS, alpha=0.5)

    def outer(s, t):
        return checkpoint(inner, s.hidden, s.weight, use_reentrant=reentrant)

    value = outer(student, teacher).double()
    student.hidden.grad = student.weight.grad = None
    outer(student, teacher).backward()
    assert_same([value, student.hidden.grad.double(), student.weight.grad.double()], expected)


def test_graph_can_be_kept():
    student, teacher = (make("head", side, torch.float32) for side in ("student", "teacher"))
    loss = kd_loss(student, teacher)
    first = torch.autograd.grad(3 * loss, tensors_of(student), retain_graph=True)
    second = torch.autograd.grad(5 * loss, tensors_of(student), create_graph=True)
    torch.testing.assert_close([g / 3 for g in first], [g.detach() / 5 for g in second])
    with pytest.raises(RuntimeError, match="differentiated twice"):
        second[1].sum().backward()


def test_same_bits_every_time(backend, chunked):
    student, teacher = (make("head capped", side, torch.float32) for side in ("student", "teacher"))
    runs = [run(kd_loss, student, teacher, LABELS) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs for a, b in zip(other, runs[0], strict=True))


@pytest.mark.parametrize("biased", [False, True])
def test_heads_of_several_blocks_of_columns(biased):
    """Products on a CPU go by 256 columns, the last ones by themselves: as one product."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(9, 2 * 7), (600, 2 * 7), *([(600,)] if biased else [])]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors = [x[..., ::2] if x.dim() == 2 else x for x in tensors]  # strided
    hidden, weight, *bias = (x.to(DEVICE).requires_grad_() for x in tensors)
    teacher = torch.randn(9, 600, generator=generator, dtype=torch.float64).to(DEVICE)
    logits = 0.5 * hidden @ weight.T + (bias[0] if biased else 0)
    losses = [kd_loss(s, teacher) for s in (LMHead(hidden, weight, *bias, scale=0.5), logits)]
    ours, expected = (torch.autograd.grad(x, [hidden, weight, *bias]) for x in losses)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("V", [32_000, 151_936, 262_144])
def test_chunks_keep_to_the_workspace(V):
    """As many rows as fit, in even chunks; a budget below one row is refused."""
    for T in (1, 100, 1024, 8192):
        for budget in (2**24, 2**29):
            for device in ("cpu", "cuda"):
                rows = compare.chunk_rows(T, 4 * V, budget, device)
                assert 1 <= rows <= T and rows * 4 * V <= budget
    assert compare.chunk_rows(8192, 4 * V, 2**33, "cuda") == 4096
    with pytest.raises(ValueError, match=f"at least {4 * V:,}"):
        compare.chunk_rows(10, 4 * V, 4 * V - 1, "cuda")


MEMORY = """
import sys, torch
from pathlib import Path
from fastkd import LMHead, kd_loss

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1])

torch.set_num_threads(2)
for T, V in ((8, 64), (1024, 50_000)):  # the small one first: threads and code are loaded
    student = LMHead(torch.randn(T, 64, requires_grad=True), torch.randn(V, 64, requires_grad=True))
    teacher = LMHead(torch.randn(T, 32), torch.randn(V, 32))
    grads = student.hidden.nbytes + student.weight.nbytes
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = kilobytes("VmRSS")
    kd_loss(student, teacher, divergence="jsd", workspace_bytes=int(sys.argv[1])).backward()
    print(1024 * (kilobytes("VmHWM") - before) - grads)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("budget", [2**26, 2**27, 2**29])
def test_memory_keeps_to_the_workspace(budget):
    """Beyond inputs and gradients, whatever the tokens; naive logits are 205 MB a side."""
    env = os.environ | {"FASTKD_BACKEND": "eager"}
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(budget)], capture_output=True, text=True, env=env
    )
    assert run.returncode == 0, run.stderr[-2000:]
    extra = int(run.stdout.split()[-1])
    assert extra <= budget, f"{extra:,} bytes"


# --- Bad input -----------------------------------------------------------

HIDDEN, WEIGHT = torch.randn(4, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
IDS = torch.arange(12, device=DEVICE).view(4, 3)
Z = torch.randn(4, V, device=DEVICE)
HEAD, PAIRS = LMHead(HIDDEN, WEIGHT), TopK(IDS, -Z[:, :3].abs())


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, "H = 12", lambda: LMHead(HIDDEN[:, :5], WEIGHT)),
        (ValueError, "(V, H)", lambda: LMHead(HIDDEN, WEIGHT[0])),
        (ValueError, "bias must be (61,)", lambda: LMHead(HIDDEN, WEIGHT, WEIGHT[:3, 0])),
        (ValueError, "softcap", lambda: LMHead(HIDDEN, WEIGHT, softcap=0.0)),
        (ValueError, "scale", lambda: LMHead(HIDDEN, WEIGHT, scale=float("nan"))),
        (TypeError, "int64", lambda: LMHead(IDS, WEIGHT)),
        (TypeError, "weight must be a tensor", lambda: LMHead(HIDDEN, [1.0])),
        (TypeError, "hidden must be a tensor", lambda: LMHead(None, WEIGHT)),
        (TypeError, "weight must be a tensor", lambda: LMHead(HIDDEN, None)),
        (ValueError, "finite", lambda: Ensemble([Z, Z], [1e308, 1e308])),
        (ValueError, "detach", lambda: Ensemble([Z], [Z[:, 0].clone().requires_grad_()])),
        (ValueError, "num_items", lambda: kd_loss(Z, Z, num_items=float("nan"))),
        (ValueError, "vocab", lambda: fastkd.KDLoss(vocab="longest")),
        (TypeError, "ignore_index", lambda: kd_loss(Z, Z, ignore_index=None)),
        (TypeError, "integer", lambda: TopK(Z, Z)),
        (ValueError, "(4, 3) and (4, 61)", lambda: TopK(IDS, Z)),
        (ValueError, "'tail!'", lambda: TopK(IDS, Z[:, :3], tail="tail!")),
        (ValueError, "temperature", lambda: TopK(IDS, Z[:, :3], temperature=0.0)),
        (TypeError, "list of teachers", lambda: Ensemble(Z)),
        (TypeError, "teacher 1 of Ensemble", lambda: Ensemble([Z, "z"])),
        (ValueError, "differ", lambda: Ensemble([Z, Z[:2]])),
        (ValueError, "2 weights", lambda: Ensemble([Z], [1.0, 2.0])),
        (ValueError, "-1", lambda: Ensemble([Z, Z], [2.0, -1.0])),
        (ValueError, "(3,)", lambda: Ensemble([Z, Z], [2.0, torch.ones(3, device=DEVICE)])),
        (ValueError, "renormalize", lambda: Ensemble([TopK(IDS, Z[:, :3])])),
        (TypeError, "student must be", lambda: kd_loss(TopK(IDS, Z[:, :3]), Z)),
        (TypeError, "got str", lambda: kd_loss("logits", Z)),
        (ValueError, "(4, 61) and (2, 61)", lambda: kd_loss(Z, LMHead(HIDDEN[:2], WEIGHT))),
        (ValueError, "61, teacher 60", lambda: kd_loss(Z, LMHead(HIDDEN, WEIGHT[:60]))),
        (
            ValueError,
            "hidden require grad",
            lambda: kd_loss(Z, LMHead(HIDDEN.clone().requires_grad_(), WEIGHT)),
        ),
        (ValueError, "renyi", lambda: kd_loss(Z, PAIRS, divergence=fastkd.Renyi(0.5))),
        (ValueError, "logit_mse", lambda: kd_loss(Z, Ensemble([Z]), divergence="logit_mse")),
        (
            ValueError,
            "infinite",
            lambda: kd_loss(Z, TopK(IDS, Z[:, :3], tail="renormalize"), divergence="reverse_kl"),
        ),
        (ValueError, "temperature 1.0", lambda: kd_loss(Z, PAIRS, temperature=2.0)),
        (ValueError, "workspace_bytes", lambda: kd_loss(Z, HEAD, workspace_bytes=9)),
        (TypeError, "workspace_bytes", lambda: kd_loss(Z, Z, workspace_bytes=1e9)),
    ],
)  # fmt: skip
def test_bad_input(error, message, call):
    with pytest.raises(error) as caught:
        call()
    assert message.lower() in str(caught.value).lower().replace("reversekl", "reverse_kl").replace(
        "logitmse", "logit_mse"
    )


def test_ids_of_a_type_that_does_not_hold_the_vocabulary():
    student = torch.randn(2, 40_000, device=DEVICE)
    ids, logprobs = torch.arange(8).view(2, 4).to(DEVICE), torch.full((2, 4), -3.0, device=DEVICE)
    small, large = (kd_loss(student, TopK(ids.to(t), logprobs)) for t in (torch.int16, torch.int64))
    assert torch.equal(small, large)


@pytest.mark.skipif(DEVICE != "cpu", reason="a device assertion on a GPU")
def test_bad_ids():
    for ids, message in ((61, "61"), (0, "distinct")):
        wrong = IDS.clone()
        wrong[1, 1:] = ids
        wrong[1, 1] = 0
        wrong[1, 0] = 7
        with pytest.raises(ValueError, match=message):
            kd_loss(Z, TopK(wrong, -IDS.float()))
    with pytest.raises(ValueError, match="positive"):
        kd_loss(Z, TopK(IDS, Z[:, :3].abs() + 1))
    with pytest.raises(ValueError, match="nan"):
        kd_loss(Z, TopK(IDS, Z[:, :3] * torch.nan))
    for weights in ([2.0, -1.0], [-1.0, -3.0]):
        with pytest.raises(ValueError, match="not negative"):
            kd_loss(Z, Ensemble([Z, Z], torch.tensor(weights)))
    with pytest.raises(ValueError, match="sum of Ensemble's weights must be positive, got .0.0"):
        kd_loss(Z, Ensemble([Z, Z], torch.zeros(2)))


def test_every_divergence_says_whether_it_may_be_pooled():
    pooled = {d.name for d in DIVERGENCES if d.pooled_terms is not None}
    assert pooled == {
        "forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "jsd", "jeffreys", "tvd",
        "hellinger",
    }  # fmt: skip


class Refusing(LMHead):
    """A source that is no teacher of reverse KL."""

    def check(self, divergence, temperature):
        if divergence.name == "reverse_kl":
            raise ValueError("not under reverse KL")


def test_members_have_their_say():
    mixture = Ensemble([Z, Ensemble([Refusing(HIDDEN, WEIGHT), Z])])
    assert kd_loss(Z, mixture).isfinite()
    with pytest.raises(ValueError, match="not under reverse KL"):
        kd_loss(Z, mixture, divergence="reverse_kl")


def test_one_position_alone(backend):
    """(V,) logits: no leading shape, and parts of it."""
    student, teacher, label = Z[0], Z[1], torch.tensor(2, device=DEVICE)
    parts = kd_loss(student, teacher, label, alpha=0.5, reduction="none", return_parts=True)
    whole = kd_loss(Z[:1], Z[1:2], label[None], alpha=0.5, return_parts=True)
    assert all(x.shape == () for x in parts if x is not None)
    torch.testing.assert_close([*parts[:6]], [*whole[:6]])


def test_ensembles_made_outside_of_autocast(backend):
    """Whose members agree on a type only under it."""
    head = LMHead(HIDDEN.bfloat16(), WEIGHT)
    mixture = Ensemble([head, Z], weights=[torch.rand(4, device=DEVICE), 1.0])
    with torch.autocast(DEVICE, torch.bfloat16):
        assert kd_loss(Z, mixture).isfinite()
