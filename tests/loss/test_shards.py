"""Vocabulary shards: two and three processes, each with a part of every row, against one with the
whole."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastkd
from fastkd import Ensemble, LMHead, TopK, kd_loss

CUTS = {2: [0, 40, 61], 3: [0, 37, 38, 61]}  # uneven, a shard of one entry
V, H, ROWS = 61, 12, (2, 7)


def whole(dtype):
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    labels = torch.arange(14).view(ROWS) * 4 + 3  # in every shard
    labels[0, 2] = -100
    other = tensor(*ROWS, V) * 3
    logprobs, ids = (other + tensor(*ROWS, V)).log_softmax(-1).topk(8)  # in every shard
    ids[0, 0], ids[0, 1], ids[0, 3] = torch.arange(8), 38 + torch.arange(8), 53 + torch.arange(8)
    ids[1, 1, ::2], ids[1, 2] = -1, -1
    every = (tensor(*ROWS, V) * 2).log_softmax(-1).sort(-1)
    # Rows that live in the first shard, or in the last, alone; an empty row of a mixture.
    masked, sparse = tensor(*ROWS, V), other.clone()
    dead = other.clone()  # a row that no rank has anything of
    dead[0, 0] = -torch.inf
    masked[0, 1, :40] = masked[0, 3, 37:] = sparse[0, 1, :40] = sparse[0, 5, 37:] = -torch.inf
    sparse[1, 1] = -torch.inf
    share = tensor(*ROWS).abs()
    share[1, ::2] = 0
    return {
        "ids": ids,
        "logprobs": logprobs,
        "every": every.indices,
        "all": every.values,
        "masked": masked,
        "dead": dead,
        "sparse": sparse,
        "share": share,
        "logits": tensor(*ROWS, V) * 3,
        "other": other,
        "hidden": tensor(*ROWS, H),
        "weight": tensor(V, H),
        "bias": tensor(V),
        "wide": tensor(*ROWS, 2 * H),
        "teacher": tensor(V, 2 * H),
    }, labels


def step(kind, x, labels, **settings):
    """(loss parts, gradients) of one case; `x` are whole tensors, or one rank's."""
    x = {name: v.clone() for name, v in x.items()}
    student, teacher = kind.split("-")
    leaves = {
        "dense": [x["logits"]],
        "masked": [x["masked"]],
        "dead": [x["dead"]],
        "head": [x["hidden"], x["weight"], x["bias"]],
    }[student]
    for leaf in leaves:
        leaf.requires_grad_()
    student = LMHead(*leaves, softcap=5.0) if student == "head" else leaves[0]
    head = LMHead(x["wide"], x["teacher"], scale=0.5)
    pairs, T = (x["ids"], x["logprobs"]), settings.get("temperature", 1.0)
    renormalized = TopK(*pairs, tail="renormalize")
    geometric = Ensemble([x["other"], head], mode="logits")
    members = [x["sparse"], renormalized, Ensemble([head, x["other"]])]
    teacher = {
        "dense": x["other"],
        "head": head,
        "ensemble": geometric,
        "mixture": Ensemble([x["other"], geometric, renormalized], weights=[1, 0, 0.5]),
        "weighted": Ensemble(members, weights=[0.5, x["share"], 1.0]),
        "bucket": TopK(*pairs, temperature=T),
        "renormalize": renormalized,
        "truncate": TopK(*pairs, tail="truncate", temperature=T),
        "every": TopK(x["every"], x["all"], temperature=T),
    }[teacher]
    parts = kd_loss(student, teacher, labels, return_parts=True, **settings)
    grads = torch.autograd.grad(parts.loss.sum() * 2, leaves)
    return [p for p in parts if p is not None], list(grads)


def part_of(x, low, high):
    columns, rows = ("logits", "other", "masked", "dead", "sparse"), ("weight", "bias", "teacher")
    return {
        name: v[..., low:high] if name in columns else v[low:high] if name in rows else v
        for name, v in x.items()
    }


def cases():
    for kind in ("dense-dense", "head-head", "dense-head", "head-ensemble"):
        for name in ("forward_kl", "reverse_kl", "jsd", fastkd.Renyi(2.0), "logit_mse"):
            yield kind, dict(divergence=name, temperature=2.0, alpha=0.5)
    centered = fastkd.LogitMSE(centered=True)
    yield "dense-dense", dict(divergence=centered, alpha=0.5)
    yield "dense-dense", dict(alpha=0.7, vocab=45)
    yield "head-dense", dict(alpha=0.7, vocab=30, divergence="tvd", temperature=2.0)
    yield "head-head", dict(alpha=0.3, workspace_bytes=30_000, shift=True, reduction="none")
    yield "dense-dense", dict(alpha=0.3, reduction="sum", divergence="hellinger")
    yield "dense-dense", dict(divergence="jeffreys")
    yield "dense-head", dict(vocab=30)  # leaves the last rank nothing
    for kind in ("dense-bucket", "head-bucket", "dense-truncate"):
        for name in ("forward_kl", "reverse_kl"):
            yield kind, dict(divergence=name, temperature=2.0, alpha=0.5)
    for kind in ("dense-renormalize", "head-renormalize"):  # some rows are +inf
        yield kind, dict(divergence="skew_forward_kl", temperature=2.0, reduction="none")
    for kind in ("dense-mixture", "dense-weighted", "head-weighted"):
        yield kind, dict(divergence="jsd", temperature=2.0, alpha=0.5)
    for kind in ("bucket", "every", "weighted"):
        yield "masked-" + kind, dict(divergence="jsd", alpha=0.6)
    for kind in ("dead-dense", "dead-bucket"):
        yield kind, dict(alpha=0.6, temperature=2.0, reduction="none")
    for kind in ("dense-bucket", "dense-renormalize", "head-truncate", "dense-weighted"):
        yield kind, dict(alpha=0.7, vocab=30, reduction="none")
    yield "dense-bucket", dict(divergence="reverse_kl", temperature=2.0, vocab=45)
    yield "head-bucket", dict(divergence="tvd", reduction="sum")
    yield "dense-every", dict(divergence="hellinger", alpha=0.2)
    for kind in ("head-bucket", "head-weighted"):
        yield kind, dict(alpha=0.3, workspace_bytes=30_000, shift=True, reduction="none")


def worker(rank, world, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group = dist.group.WORLD
    low, high = CUTS[world][rank : rank + 2]
    for backend in ("eager", "triton"):
        dtype = torch.float64 if backend == "eager" else torch.float32
        x, labels = whole(dtype)
        for i, (kind, settings) in enumerate(cases()):
            if backend == "triton" and (i + 3 * world) % 6:  # the interpreter takes its time
                continue
            os.environ["FASTKD_BACKEND"] = backend
            parts, grads = step(kind, part_of(x, low, high), labels, group=group, **settings)
            os.environ["FASTKD_BACKEND"] = "eager"
            expected, slopes = step(kind, x, labels, **settings)
            cut = [
                g[..., low:high] if g.shape[-1] == V and not kind.startswith("head")
                else g[low:high] if g.shape[0] == V else g
                for g in slopes
            ]  # fmt: skip
            close = (
                dict(rtol=1e-9, atol=1e-11) if backend == "eager" else dict(rtol=1e-4, atol=1e-6)
            )
            try:
                torch.testing.assert_close(parts, expected, **close)
                torch.testing.assert_close(grads, cut, **close)
                mine = torch.cat([p.detach().flatten().double() for p in parts])
                bits = [torch.empty_like(mine) for _ in range(world)]
                dist.all_gather(bits, mine)
                assert all(torch.equal(b, bits[0]) for b in bits), "ranks differ"
            except AssertionError as error:
                raise AssertionError(f"{backend}, {kind}, {settings}: {error}") from error
    exchanges(part_of(x, low, high), labels, group)
    refused(part_of(x, low, high), labels, group)
    if world == 2:
        compiled(part_of(x, low, high), labels, group)
        dtensors(rank)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads do not always survive the interpreter's own way out


def exchanges(x, labels, group):
    """How often the ranks meet in a call: the shards' sizes once, where something depends on them,
    and what the rows need."""
    os.environ["FASTKD_BACKEND"] = "eager"
    calls, meet, add = [], dist.all_gather, dist.all_reduce
    dist.all_gather = lambda *a, **k: (calls.append("gather"), meet(*a, **k))[1]
    dist.all_reduce = lambda *a, **k: (calls.append("sum"), add(*a, **k))[1]
    try:
        head = LMHead(x["hidden"].clone().requires_grad_(), x["weight"])
        sparse = TopK(x["ids"], x["logprobs"])
        member = TopK(x["ids"], x["logprobs"], tail="renormalize")
        mixture = Ensemble([x["other"], member])
        for student, teacher, settings, expected in (
            (x["logits"], x["other"], dict(), 2),
            (x["logits"], x["other"], dict(divergence="reverse_kl"), 2),
            (x["logits"], x["other"], dict(divergence="logit_mse"), 2 + 1),
            (x["logits"], x["other"], dict(labels=labels, alpha=0.5), 2 + 1),
            (x["logits"], x["other"], dict(labels=labels, return_parts=True), 2 + 1),
            (x["logits"], x["other"], dict(vocab=45), 2 + 1),
            (x["logits"], None, dict(labels=labels, alpha=0.0), 1 + 1),
            (x["logits"], sparse, dict(), 1 + 1),
            (x["logits"], sparse, dict(labels=labels, alpha=0.5, vocab=45), 1 + 1),
            (x["logits"], mixture, dict(labels=labels, alpha=0.5), 2 + 2 + 1),
            (head, x["other"], dict(labels=labels, alpha=0.5), 2 + 1),
            (head, sparse, dict(labels=labels, alpha=0.5), 1 + 1),
        ):
            calls.clear()
            settings = dict(settings)
            kd_loss(student, teacher, settings.pop("labels", None), group=group, **settings)
            gathered = calls.count("gather")
            assert gathered == expected, f"{gathered} exchanges, not {expected}: {settings}"
            assert calls.count("sum") == (student is head)
    finally:
        dist.all_gather, dist.all_reduce = meet, add
    from fastkd import shards

    torch.library.opcheck(shards.sizes._opoverload, (V, V, group.group_name, x["logits"]))


def refused(x, labels, group):
    ids = torch.zeros(*ROWS, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\[0, 61\)"):  # another rank's ids are none of that
        kd_loss(x["logits"], TopK(ids + 61, -ids.float()), group=group)
    kd_loss(x["logits"], TopK(ids + 60, -ids.float()), group=group)
    kd_loss(x["logits"], TopK(ids + 61, -ids.float()), group=group, vocab=61)
    with pytest.raises(ValueError, match=r"\[0, 61\)"):
        kd_loss(x["logits"], x["other"], labels + 20, group=group)
    with pytest.raises(TypeError, match="group must be"):
        kd_loss(x["logits"], x["other"], group="tp")
    with pytest.raises(ValueError, match="between 1 and 61"):
        kd_loss(x["logits"], x["other"], group=group, vocab=62)


def compiled(x, labels, group):
    """Without a graph break, as without compiling."""

    def loss(logits, ids, logprobs, other, labels):
        settings = dict(alpha=0.5, group=group)
        sparse = kd_loss(logits, TopK(ids, logprobs), labels, **settings)
        return sparse + kd_loss(logits, other, labels, **settings)

    inputs = [x[name].clone() for name in ("logits", "ids", "logprobs", "other")] + [labels]
    leaf = inputs[0].requires_grad_()
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = run(*inputs)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*results)


def dtensors(rank):
    """Tensors that know how they are sharded need no group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    x, labels = whole(torch.float64)
    expected, slopes = step("dense-dense", x, labels, alpha=0.5)
    student = distribute_tensor(x["logits"], mesh, [Shard(2)]).requires_grad_()
    teacher = distribute_tensor(x["other"], mesh, [Shard(-1)])
    loss = kd_loss(student, teacher, labels, alpha=0.5)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0])
    assert isinstance(student.grad, DTensor)
    torch.testing.assert_close(student.grad.full_tensor(), slopes[0] / 2)

    ids, logprobs = x["ids"], x["logprobs"]
    expected = kd_loss(x["logits"], TopK(ids, logprobs))
    torch.testing.assert_close(kd_loss(student.detach(), TopK(ids, logprobs)), expected)

    head = LMHead(x["hidden"], distribute_tensor(x["weight"], mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="full_tensor"):  # FSDP's look the same
        kd_loss(head, LMHead(x["wide"], x["teacher"]))
    with pytest.raises(ValueError, match="Replicate"):
        kd_loss(distribute_tensor(x["logits"], mesh, [Replicate()]), teacher)
    with pytest.raises(TypeError, match="DTensor"):
        kd_loss(student, x["other"])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_shards_are_one_vocabulary(world, tmp_path):
    mp.spawn(worker, (world, tmp_path / "store"), nprocs=world)
