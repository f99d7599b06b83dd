"""The operator: two sources compared row by row, a chunk of rows at a time.

    chunk of rows → logits of both sides → statistics, value, gradient → student takes its gradient

Dense logits are one chunk. LM heads and ensembles make theirs, in chunks whose length follows from
the memory they may use. A top-k teacher over vocabulary shards is compared in torch on every
device.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import divergences, shards
from fastkd.backends import eager, eager_topk
from fastkd.sources import Ensemble, LMHead, TopK, unpack

WORKSPACE_BYTES = 512 * 2**20
# Rows from which a matrix product is bound by arithmetic, not by reading its weights: more of them
# take memory and save no time. Bytes and operations both grow with the width, which cancels.
ENOUGH_ROWS = {"cpu": 128}
ENOUGH_ROWS_ON_GPU = 4096
ENOUGH_BYTES = 2**25  # of a chunk's logits: fewer, of a small vocabulary, are not worth more chunks

# What is computed for each row.
ROWS = (
    "divergence", "cross_entropy", "teacher_entropy", "student_entropy", "agreement",
    "teacher_mass",
)  # fmt: skip


class Settings(NamedTuple):
    """How rows are compared, in types that an operator takes."""

    student: list[float]  # how to unpack the sources
    teacher: list[float]
    divergence: str
    numbers: list[float]
    temperature: float
    n: int  # entries that the divergence sees, of this shard
    kd_scale: float  # factors of the two gradients
    ce_scale: float
    diagnostics: bool
    workspace_bytes: int
    group: str  # of vocabulary shards, or ""


def compare(
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Tensor | None,
    weight: Tensor,
    settings: Settings,
    wants: list[bool],
    inplace: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Compare T rows.

    Args:
        student, teacher: the tensors of the packed sources.
        labels: (T,) for the cross-entropy, or None without.
        weight: (T,) of the rows in the gradient; where it is 0 a row counts nowhere.
        wants: which of the student's tensors get a gradient.
        inplace: dense logits may be overwritten by it.

    Returns:
        (F, T) numbers named by `ROWS` (2 of them without diagnostics), and the gradients, flattened
        to rows; empty tensors for those not wanted.
    """
    if inplace and any(wants):
        result = _compare(student, teacher, labels, weight, settings, wants, True)
        torch.autograd.graph.increment_version(student[0])
        return result
    return torch.ops.fastkd.compare(student, teacher, labels, weight, *settings, wants)


@torch.library.custom_op("fastkd::compare", mutates_args=())
def _operator(
    student: list[Tensor], teacher: list[Tensor], labels: Tensor | None, weight: Tensor,
    student_spec: list[float], teacher_spec: list[float], divergence: str, numbers: list[float],
    temperature: float, n: int, kd_scale: float, ce_scale: float, diagnostics: bool,
    workspace_bytes: int, group: str, wants: list[bool],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """One opaque node for torch.compile."""
    settings = Settings(
        student_spec, teacher_spec, divergence, numbers, temperature, n, kd_scale, ce_scale,
        diagnostics, workspace_bytes, group,
    )  # fmt: skip
    return _compare(student, teacher, labels, weight, settings, wants)


@_operator.register_fake
def _(
    student, teacher, labels, weight, student_spec, teacher_spec, divergence, numbers, temperature,
    n, kd_scale, ce_scale, diagnostics, workspace_bytes, group, wants,
):  # fmt: skip
    T = weight.shape[0]
    # Logits and hidden states come flattened to rows, LMHead's weight and bias as they are.
    shapes = [(T, x.shape[-1]) if i == 0 else x.shape for i, x in enumerate(student)]
    grads = [
        x.new_empty(shape if wanted else 0)
        for x, shape, wanted in zip(student, shapes, wants, strict=True)
    ]
    return weight.new_empty((_count(diagnostics, teacher_spec), T)), grads


def _count(diagnostics: bool, teacher_spec: list[float]) -> int:
    return 2 if not diagnostics else 6 if teacher_spec[0] == TopK.code else 5


@torch.no_grad()
def _compare(student, teacher, labels, weight, settings, wants, inplace=False):
    s, t = (
        unpack(iter(spec), iter([x.detach() for x in tensors]))
        for spec, tensors in ((settings.student, student), (settings.teacher, teacher))
    )
    divergence = divergences.unpack(settings.divergence, settings.numbers)
    gather = shards.gather(settings.group) if settings.group else None
    dense, topk = _backend(s.device, s.logits_dtype)
    in_blocks = not uses_triton(s.device, s.logits_dtype)
    if gather and isinstance(t, TopK):  # no kernel
        topk, in_blocks = eager_topk.topk, True
    V, n, T = s.entries, settings.n, weight.numel()
    options = dict(
        temperature=settings.temperature, n=n, kd_scale=settings.kd_scale,
        ce_scale=settings.ce_scale, cross_entropy=labels is not None,
        diagnostics=settings.diagnostics,
    )  # fmt: skip

    with torch.autocast(s.device.type, enabled=False):
        s.start(wants, inplace)
        # Of a shard that a cut leaves nothing, too: the ranks must agree that there is a need.
        needed = s.row_bytes(V) + (0 if isinstance(t, TopK) else t.row_bytes(max(n, 1)))
        widest = V
        if needed and gather:  # the ranks must agree
            largest = gather(torch.tensor([needed, V], device=s.device)).amax(0)
            needed, widest = largest.tolist()
        block = eager.block_rows(widest, s.device) if in_blocks else 0
        size = chunk_rows(
            T, needed, settings.workspace_bytes, s.device.type, block, 4 * eager.BUFFERS * widest
        )
        s.prepare(size, V)
        t.prepare(size, n)
        if gather and isinstance(t, (TopK, Ensemble)):
            t.shard(gather, shards.before(shards.sizes(V, settings.group, weight), settings.group))
        if isinstance(t, TopK):
            slack = max(2.0**-20, 8 * torch.finfo(t.dtype).eps)
            N = shards.sizes(n, settings.group, weight).sum() if gather else n
            t.cut(N)
            if gather:
                options.update(gather=gather, first=t.first, N=N)
        rows = weight.new_zeros((_count(settings.diagnostics, settings.teacher), T))
        for low in range(0, T, size):
            high = min(low + size, T)
            part = slice(low, high)
            w, y = weight[part], None if labels is None else labels[part]
            if size < T and s.device.type == "cpu" and not w.any():
                s.skip(low, high)
                continue
            logits = s.logits(low, high, V, 1.0)
            grad = s.grad_of(logits, low, high)
            if isinstance(t, TopK):
                rows[:, part] = topk(
                    logits, t.ids[part], t.logprobs[part], y, w, divergence, grad=grad,
                    tail=t.tail, teacher_temperature=t.temperature, slack=slack, **options,
                )  # fmt: skip
            else:
                target = t.logits(low, high, n, settings.temperature)
                rows[:, part] = dense(
                    logits, target, y, w, divergence, grad=grad, gather=gather, **options
                )
            if grad is not None:
                s.take(grad, low, high, w != 0)
        grads = s.finish()
        if gather and isinstance(s, LMHead) and grads[0] is not None:
            grads[0] = shards.total(grads[0], settings.group)  # each shard knows its own part
    return rows, [x.new_empty(0) if g is None else g for x, g in zip(student, grads, strict=False)]


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


def _backend(device: torch.device, dtype: torch.dtype):
    """(dense, topk) of the backend that serves these logits."""
    if uses_triton(device, dtype):
        from fastkd.kernels.dense import dense
        from fastkd.kernels.topk import topk
    else:
        from fastkd.backends.eager import dense
        from fastkd.backends.eager_topk import topk
    return dense, topk


def uses_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """FASTKD_BACKEND: "auto" (Triton on GPUs), "triton" or "eager"."""
    choice = os.environ.get("FASTKD_BACKEND", "auto")
    if choice == "eager" or (
        choice == "auto" and (device.type not in ("cuda", "xpu") or dtype == torch.float64)
    ):
        return False
    if choice not in ("auto", "triton"):
        raise ValueError(f"FASTKD_BACKEND must be auto, triton or eager, got {choice!r}")
    if dtype == torch.float64:
        raise ValueError(
            "the Triton kernels compute in fp32, the logits are float64:"
            " use FASTKD_BACKEND=auto or eager"
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "FASTKD_BACKEND=triton on CPU tensors needs TRITON_INTERPRET=1,"
            " set before the first import"
        )
    try:
        import triton  # noqa: F401
    except ImportError:
        if choice == "triton":
            raise
        return False
    return True
