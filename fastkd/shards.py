"""Vocabulary shards: each rank of a `torch.distributed` group holds a contiguous part of every row.

Two small exchanges a chunk (softmax statistics; values and slopes) make the rows whole; with a
top-k teacher it is one, of K + 7 numbers a row; each teacher of an ensemble of probabilities adds
one, of its softmax statistics. Labels, top-k lists and ensembles need the shards' sizes; LM heads
and ensembles an exchange on the chunk's length, and `vocab=n` one on the cut, for which the host
waits; a hidden state's gradient is summed. What is exchanged is gathered, and merged by every rank
in the same order: all get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.sources import LMHead, TopK


def gather(group: str) -> Callable[[Tensor], Tensor]:
    """`gather(x)`: (world, *x.shape), the x of all ranks in rank order."""
    group = resolve(group)

    def run(x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    return run


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
def sizes(V: int, group: str, like: Tensor) -> Tensor:
    """(world,) entries of every rank's shard, on the device of `like`."""
    return gather(group)(torch.full((), V, dtype=torch.int64, device=like.device))


@sizes.register_fake
def _(V, group, like):
    return like.new_empty(dist.get_world_size(resolve(group)), dtype=torch.int64)


@torch.library.custom_op("fastkd::before", mutates_args=())
def before(sizes: Tensor, group: str) -> Tensor:
    """0-d: of all ranks' `sizes`, the number of this rank's first column."""
    return sizes[: dist.get_rank(resolve(group))].sum()


@before.register_fake
def _(sizes, group):
    return sizes.new_empty(())


def cut(vocab: int, V: int, group: str, device: torch.device) -> int:
    """How many of this shard's V entries are among the vocabulary's first `vocab`; waits for the
    other ranks."""
    lengths = gather(group)(torch.tensor(V, device=device)).tolist()
    if not 1 <= vocab <= sum(lengths):
        raise ValueError(f"vocab must be between 1 and {sum(lengths)}, got {vocab}")
    return min(max(vocab - sum(lengths[: dist.get_rank(resolve(group))]), 0), V)


def from_dtensors(student, teacher, group):
    """(student, teacher, group) with DTensors replaced by this rank's shards.

    Logits may be DTensors that are sharded along the vocabulary, on both sides, or beside a top-k
    teacher. Returned as they came where there is no DTensor. An LM head's weight says nothing: FSDP
    shards it the same way, over ranks with other rows.
    """
    for name, x in (("student", student), ("teacher", teacher)):
        if isinstance(x, LMHead) and type(x.weight).__name__ == "DTensor":
            raise ValueError(
                f"the {name}'s LMHead has a DTensor as its weight: pass weight.full_tensor()"
                " (FSDP), or weight.to_local() and the group= of its vocabulary shards"
            )
    if not any(type(x).__name__ == "DTensor" for x in (student, teacher)):
        return student, teacher, group
    if group is not None:
        raise ValueError("DTensors bring their own group: pass them without group=, or to_local()")
    from torch.distributed.tensor import DTensor

    groups, local = set(), []
    for name, x in (("student", student), ("teacher", teacher)):
        if isinstance(x, TopK):
            local.append(x)
            continue
        if not isinstance(x, DTensor):
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
