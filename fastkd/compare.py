"""The operator: two sources compared row by row, a chunk of rows at a time.

    chunk of rows → logits of both sides → statistics, value, gradient → student takes its gradient

Dense logits are one chunk. LM heads and ensembles make theirs, in chunks whose length follows from
the memory they may use. A top-k teacher over vocabulary shards is compared in torch on every
device.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd import shards
from fastkd.backends import buffers
from fastkd.backends.backend import EAGER, Backend, backend
from fastkd.backends.softmax import BUFFERS, block_rows
from fastkd.divergences import Divergence
from fastkd.packing import Packed, Parcel, replace_tensors, unpack
from fastkd.rows import MEASURES, Ask, Rows
from fastkd.sources import Reader, Source

WORKSPACE_BYTES = 512 * 2**20
# Rows from which a matrix product is bound by arithmetic, not by reading its weights: more of them
# take memory and save no time. Bytes and operations both grow with the width, which cancels.
ENOUGH_ROWS = {"cpu": 128}
ENOUGH_ROWS_ON_GPU = 4096
ENOUGH_BYTES = 2**25  # of a chunk's logits: fewer, of a small vocabulary, are not worth more chunks


@dataclass(frozen=True, eq=False)
class Call(Packed):
    """What `kd_loss` was asked, but for labels, weights and alpha. It goes through the operator
    packed; the student's tensors come first."""

    student: Source
    teacher: Source | None  # None: the cross-entropy alone
    divergence: Divergence
    temperature: float | Tensor
    vocab: str | int
    learns: bool | str  # `Ask.learns`
    workspace_bytes: int
    autocast: str  # the type that the caller's autocast has, or ""
    group: str  # of vocabulary shards, or ""
    sizes: Tensor | None  # of all ranks' shards (`shards.sizes`), where something depends on them


def compare(
    parcel: Parcel,
    labels: Tensor | None,
    factors: Tensor,
    wants: list[bool],
    diagnostics: bool,
    inplace: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Compare T rows.

    Args:
        parcel: a packed `Call`.
        labels: (T,) for the cross-entropy, or None without.
        factors: (3, T): each row's weight, and its factors in the gradients of divergence and
            cross-entropy. Where the weight is 0 a row counts nowhere.
        wants: which of the student's tensors get a gradient.
        diagnostics: whether the measures after the second are wanted.
        inplace: dense logits may be overwritten by it.

    Returns:
        (F, T) numbers named by `MEASURES` (2 of them without diagnostics), and the gradients, of
        the tensors' shapes; empty tensors for those not wanted.
    """
    # `_Loss` differentiates, not the operator.
    parcel = Parcel(parcel.spec, parcel.numbers, [x.detach() for x in parcel.tensors])
    if inplace and any(wants):
        result = _compare(parcel, labels, factors, wants, diagnostics, True)
        torch.autograd.graph.increment_version(parcel.tensors[0])
        return result
    return _operator(*parcel, labels, factors, wants, diagnostics)


@torch.library.custom_op("fastkd::compare", mutates_args=())
def _operator(
    spec: str,
    numbers: list[float],
    tensors: list[Tensor],
    labels: Tensor | None,
    factors: Tensor,
    wants: list[bool],
    diagnostics: bool,
) -> tuple[Tensor, list[Tensor]]:
    """One opaque node for torch.compile."""
    result = _compare(Parcel(spec, numbers, tensors), labels, factors, wants, diagnostics)
    if not any(wants):  # no backward pass will
        buffers.trim()
    return result


@_operator.register_fake
def _(spec, numbers, tensors, labels, factors, wants, diagnostics):
    count = len(MEASURES) if diagnostics else 2
    grads = [
        x.new_empty(x.shape if wanted else 0) for x, wanted in zip(tensors, wants, strict=False)
    ]
    return factors.new_empty((count, factors.shape[1])), grads


@torch.no_grad()
def _compare(parcel, labels, factors, wants, diagnostics, inplace=False):
    call: Call = unpack(parcel)
    student, device = call.student, call.student.device
    with _autocast(device, call.autocast):  # it says of which type a source's logits are
        serves = backend(device, student.dtype)
        if call.teacher is not None and call.teacher.sparse and call.group:
            serves = EAGER  # no kernel
        ask = _ask(call, diagnostics)
        s = student.student(ask, wants, inplace)
        t = None if call.teacher is None else call.teacher.reader(ask)
    with _autocast(device, ""):
        measures = _walk(call, serves, s, t, labels, factors)
        grads = s.finish()
    return measures, [
        x.new_empty(0) if grad is None else grad.view(x.shape)
        for grad, x in zip(grads, parcel.tensors, strict=False)
    ]


def _autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Autocast to that type, or none."""
    if not dtype and not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype) if dtype else None, bool(dtype))


def _ask(call: Call, diagnostics: bool) -> Ask:
    """What the readers and the row functions are asked."""
    V = call.student.entries
    smaller = V
    if call.teacher is not None and call.teacher.entries is not None:
        smaller = min(V, call.teacher.entries)
    n = {"strict": V, "shared": smaller}.get(call.vocab, call.vocab)
    shard = None
    if call.group:
        sizes = call.sizes
        if sizes is None:  # nothing depends on them
            sizes = torch.empty((0, 2), dtype=torch.int64)
        shard, cut = shards.shard(call.group, sizes, call.vocab)
        n = n if cut is None else cut
    # Numbers that the host has already cost no sync.
    divergence, temperature = replace_tensors(
        (call.divergence, call.temperature), lambda x: x if x.device.type != "cpu" else float(x)
    )
    return Ask(divergence, temperature, n, diagnostics, call.learns, shard)


def _walk(
    call: Call,
    serves: Backend,
    s: Reader,
    t: Reader | None,
    labels: Tensor | None,
    factors: Tensor,
) -> Tensor:
    """The measures of all rows, chunk by chunk; the student takes its gradient."""
    T, ask = factors.shape[1], s.ask
    sparse = t is not None and call.teacher.sparse
    on_cpu = factors.device.type == "cpu"
    size = _chunk_rows(call, serves, s, t, T)
    for reader in (s, t):
        if reader is not None:
            reader.prepare(size)
    if labels is not None and ask.shard is not None:
        labels = labels - ask.shard.first  # this shard's own numbering
    measures = factors.new_zeros((len(MEASURES) if ask.diagnostics else 2, T))
    for low in range(0, T, size):
        high = min(low + size, T)
        part = slice(low, high)
        counts = factors[0, part] != 0
        if size < T and on_cpu and not counts.any():
            s.skip(low, high)
            continue
        logits = s.logits(low, high)
        grad = s.grad_of(logits, low, high)
        teacher = None if t is None else t.chunk(low, high)
        y = None if labels is None else labels[part]
        rows = Rows(logits, teacher, y, factors[:, part], grad)
        found = serves.topk(rows, ask) if sparse else serves.dense(rows, ask)
        if len(found) == len(measures) and size >= T:
            measures = found
        else:
            measures[: len(found), part] = found
        if grad is not None:
            s.take(grad, low, high, counts)
    return measures


def _chunk_rows(call: Call, serves: Backend, s: Reader, t: Reader | None, T: int) -> int:
    sparse = t is not None and call.teacher.sparse

    def needed(V: int, n: int) -> int:
        return s.row_bytes(V) + (0 if t is None or sparse else t.row_bytes(n))

    widest = call.student.entries, s.ask.n
    if call.sizes is not None and needed(1, 1):
        widest = shards.widest(call.sizes)  # the ranks must agree
    V = widest[0]
    block = block_rows(V, call.student.device) if serves.in_blocks else 0
    return chunk_rows(
        T, needed(*widest), call.workspace_bytes, call.student.device.type, block, 4 * BUFFERS * V
    )


def chunk_rows(
    T: int, row_bytes: int, workspace_bytes: int, device: str, block: int = 0, block_bytes: int = 0
) -> int:
    """Rows of a chunk: as many as the workspace holds, but no more than help, in even chunks.

    A row of logits takes `row_bytes`; up to `block` rows at a time, `block_bytes` more each while
    they are worked on.
    """
    T = max(T, 1)
    if not row_bytes:
        return T
    block_bytes = block_bytes if block else 0
    rows = workspace_bytes // (row_bytes + block_bytes)
    if rows > block:
        rows = (workspace_bytes - block * block_bytes) // row_bytes
    if rows < 1:
        raise ValueError(
            f"workspace_bytes must be at least {row_bytes + block_bytes:,}, which one row needs,"
            f" got {workspace_bytes:,}"
        )
    enough = max(ENOUGH_ROWS.get(device, ENOUGH_ROWS_ON_GPU), ENOUGH_BYTES // row_bytes)
    rows = min(rows, enough, T)
    even = -(-T // -(-T // rows))
    return min(rows, -(-even // 64) * 64)
