"""Vocabulary shards: each rank of a `torch.distributed` group holds a contiguous part of every row.

The shards' sizes are exchanged once a call, where something depends on them: labels, top-k lists,
the length of a chunk, a cut to n entries. Then two small exchanges a chunk (softmax statistics;
values and slopes) make the rows whole; with a top-k teacher it is one, of K + 7 numbers a row; each
teacher of an ensemble of probabilities adds one, of its softmax statistics; the cross-entropy alone
takes one. A hidden state's gradient is summed. What is exchanged is gathered, and merged by every
rank in the same order: all get the same bits.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.packing import tensors_of
from fastkd.rows import Shard
from fastkd.sources import Source


def gather(x: Tensor, group: str) -> Tensor:
    """(world, *x.shape), the x of all ranks in rank order."""
    group = resolve(group)
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


def total(x: Tensor, group: str) -> Tensor:
    """Sum over the ranks, in fp32."""
    whole = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    dist.all_reduce(whole, group=resolve(group))
    return whole.to(x.dtype)


def name_of(group) -> str:
    """How a group goes through an operator."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group= needs torch.distributed to be initialised")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed group, got {type(group).__name__}")
    return group.group_name


def resolve(name: str):
    """The group of that name."""
    return dist.distributed_c10d._resolve_process_group(name)


@torch.library.custom_op("fastkd::shard_sizes", mutates_args=())
def sizes(V: int, n: int, group: str, like: Tensor) -> Tensor:
    """(world, 2) of every rank: the student's entries and how many both sides have, on the device
    of `like`."""
    # Filled on the device: a copy would be a sync.
    own = [torch.full((), x, dtype=torch.int64, device=like.device) for x in (V, n)]
    return gather(torch.stack(own), group)


@sizes.register_fake
def _(V, n, group, like):
    return like.new_empty((dist.get_world_size(resolve(group)), 2), dtype=torch.int64)


def shard(group: str, known: Tensor, vocab: str | int) -> tuple[Shard, int]:
    """This rank's shard, and how many of its entries the divergence sees, of all `sizes`; the host
    waits for them where the vocabulary is cut to n entries."""
    rank = dist.get_rank(resolve(group))
    if isinstance(vocab, int):
        lengths = known[:, 1].tolist()
        if vocab > sum(lengths):
            raise ValueError(f"vocab must be between 1 and {sum(lengths)}, got {vocab}")
        n, whole = min(max(vocab - sum(lengths[:rank]), 0), lengths[rank]), vocab
    else:
        column = 0 if vocab == "strict" else 1
        n, whole = None, known[:, column].sum()
    meet, add = functools.partial(gather, group=group), functools.partial(total, group=group)
    return Shard(meet, first=known[:rank, 0].sum(), n=whole, total=add), n


def widest(known: Tensor) -> tuple[int, int]:
    """The most entries that a rank's student has, and that both its sides have; the host waits."""
    V, n = known.amax(0).tolist()
    return V, max(n, 1)


def is_dtensor(x: object) -> bool:
    return type(x).__name__ == "DTensor"


def from_dtensors(student, teacher, group):
    """(student, teacher, group) with DTensors replaced by this rank's shards.

    Logits may be DTensors that are sharded along the vocabulary, on both sides, or beside a top-k
    teacher or none. Returned as they came where there is no DTensor. Inside of a source they say
    nothing: FSDP shards an LM head's weight the same way, over ranks with other rows.
    """
    for name, x in (("student", student), ("teacher", teacher)):
        if isinstance(x, Source) and any(map(is_dtensor, tensors_of(x))):
            raise ValueError(
                f"the {name}'s {type(x).__name__} has a DTensor in it: pass its full_tensor()"
                " (FSDP), or its to_local() and the group= of the vocabulary shards"
            )
    if not is_dtensor(student) and not is_dtensor(teacher):
        return student, teacher, group
    if group is not None:
        raise ValueError("DTensors bring their own group: pass them without group=, or to_local()")
    groups, local = set(), []
    for name, x in (("student", student), ("teacher", teacher)):
        if x is None or (isinstance(x, Source) and x.sparse):
            local.append(x)
            continue
        if not is_dtensor(x):
            raise TypeError(
                f"the other side is a DTensor: {name} must be one with the same shards, got"
                f" {type(x).__name__}"
            )
        sharded = [i for i, p in enumerate(x.placements) if p.is_shard()]
        partial = any(p.is_partial() for p in x.placements)
        if partial or len(sharded) != 1 or x.placements[sharded[0]].dim % x.dim() != x.dim() - 1:
            raise ValueError(
                f"{name} must be sharded along the vocabulary alone (Shard(-1)), got placements"
                f" {x.placements}"
            )
        groups.add(x.device_mesh.get_group(sharded[0]))
        local.append(x.to_local())
    if len(groups) > 1:
        raise ValueError("student and teacher are sharded over different groups")
    return *local, groups.pop()
