"""Losses between hidden states rather than logits: cosine, mean squared error, relational.

Plain torch, which torch.compile fuses. Hidden states are a hundred times narrower than a
vocabulary: there is nothing here that a kernel of our own would save.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHUNK_ENTRIES = 2**24  # of one buffer of the relational losses: 64 MiB in fp32


def cosine_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """One minus the cosine between the hidden states of student and teacher.

        l = 1 - s·t / (|s| |t|) = ½ |s/|s| - t/|t||², per position
        loss = Σ w l / Σ w, under reduction "mean"

    The second form is the one computed: it does not cancel where the two agree. The cosine with a
    zero vector is 0, as in torch: l = 1, with gradient 0.

    Args:
        student: (..., H) hidden states; fp32, bf16 or fp16 (arithmetic in fp32), or fp64.
            Differentiated.
        teacher: of the same shape, of any of these types; never differentiated.
        mask: (...) bool, integer (an attention mask) or float weights w. What is at a position of
            weight 0, NaN even, has no influence. None: all positions count alike.
        reduction: "mean", "sum" of w l, or "none": w l for every position, (...).

    Returns:
        A float32 (fp64 for an fp64 student) scalar, or (...) losses for "none". Without any
        counting position it is 0, connected to the graph, with gradient 0.

    Raises:
        ValueError, TypeError: naming the shapes, dtypes or values received, before any work.

    References:
        Sanh et al.: DistilBERT, a distilled version of BERT (2019).
    """
    _check(student, teacher, mask, reduction)
    _check_widths(student, teacher, "")
    s, t, weight = _prepare(student, teacher, mask)
    (s, s_is_zero), (t, t_is_zero) = _unit(s), _unit(t)
    rows = (s - t).square().sum(-1) / 2
    return _reduce(torch.where(s_is_zero | t_is_zero, 1, rows), weight, reduction)


def hidden_mse_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    projection: Callable[[Tensor], Tensor] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean squared error between the hidden states of student and teacher.

        l = 1/H Σ_h (projection(s)_h - t_h)², per position
        loss = Σ w l / Σ w, under reduction "mean"

    Args:
        student: (..., H_s) hidden states; fp32, bf16 or fp16 (arithmetic in fp32), or fp64.
            Differentiated.
        teacher: (..., H) hidden states, of any of these types; never differentiated.
        mask: (...) bool, integer (an attention mask) or float weights w. What is at a position of
            weight 0, NaN even, has no influence. None: all positions count alike.
        projection: a module or function from (..., H_s) to (..., H), position by position, such as
            `nn.Linear(H_s, H)`; needed where the widths differ. It is trained along, so its
            parameters belong in the optimizer. A module gets the states in its parameters' type.
        reduction: "mean", "sum" of w l, or "none": w l for every position, (...).

    Returns:
        A float32 (fp64 for an fp64 student) scalar, or (...) losses for "none". Without any
        counting position it is 0, connected to the graph, with gradient 0.

    Raises:
        ValueError, TypeError: naming the shapes, dtypes or values received, before any work; what
            the projection returns is checked after it.

    References:
        Jiao et al.: TinyBERT (2020). Romero et al.: FitNets (2015).
    """
    _check(student, teacher, mask, reduction)
    if projection is None:
        _check_widths(student, teacher, ": pass a projection")
    elif not callable(projection):
        raise TypeError(f"projection must be a module or function, got {type(projection).__name__}")
    s, t, weight = _prepare(student, teacher, mask)
    if projection is not None:
        # Masked positions are zero already: a NaN there would reach the projection's gradient.
        s = projection(s.to(_input_dtype(projection, student.dtype)))
        if not isinstance(s, Tensor) or s.shape != teacher.shape:
            got = tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__
            raise ValueError(
                f"projection must return the teacher's shape, {tuple(teacher.shape)}, got {got}"
            )
        s = s.to(t.dtype)
    return _reduce((s - t).square().mean(-1), weight, reduction)


def rkd_distance_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """Relational distillation of the distances between N embeddings.

        ψ_ij = |x_i - x_j| / μ,  μ the mean of the set's nonzero distances
        l = mean over the pairs i ≠ j of huber(ψ_ij(student) - ψ_ij(teacher)), per set
        huber(d) = d²/2 where |d| ≤ 1, else |d| - 1/2

    Rotating, shifting or scaling either side changes nothing. Points that coincide have no
    direction to move apart: that pair's distance has gradient 0. The authors' code divides by N²,
    diagonal included: its value is (N - 1)/N of this one.

    Args:
        student: (..., N, H_s): sets of N embeddings; fp32, bf16 or fp16 (arithmetic in fp32), or
            fp64. Differentiated.
        teacher: (..., N, H_t), of any of these types and any width; never differentiated.
        mask: (..., N) bool or integers: which points belong to the set. The others take part in
            nothing, whatever they hold. None: all.
        reduction: "mean" over the sets that have a pair, "sum" of l, or "none": l per set, (...).
        chunk: how many points are compared with all others at a time. Default: what keeps a
            buffer (..., chunk, N, H) at 64 MiB.

    Returns:
        A float32 (fp64 for an fp64 student) scalar, or (...) losses for "none". A set without a
        pair has loss 0, connected to the graph, with gradient 0.

    Raises:
        ValueError, TypeError: naming the shapes, dtypes or values received, before any work.

    Memory:
        A few (..., chunk, N, H) buffers at a time, made again in the backward pass, and a few
        (..., N, N) that stay.

    References:
        Park et al.: Relational Knowledge Distillation (2019).
    """
    leading, chunk = _check_sets(student, teacher, mask, reduction, chunk)
    s, t, member = _prepare_sets(student, teacher, mask)

    def relative(x: Tensor) -> Tensor:
        d = torch.cat(_per_chunk(lambda v: _away(x, v)[1], x.shape[-2], chunk), -2)
        if member is not None:
            d = d.masked_fill(~(member[:, None] & member[..., None]), 0)
        mean = d.sum((-2, -1), keepdim=True) / _positive((d > 0).sum((-2, -1), keepdim=True))
        return d / _positive(mean)

    sums = F.huber_loss(relative(s), relative(t), reduction="none").sum((-2, -1))
    n = _points(s, member)
    return _reduce_sets(sums, n * (n - 1), leading, reduction)


def rkd_angle_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """Relational distillation of the angles in the triangles of N embeddings.

        e_ij = (x_i - x_j) / |x_i - x_j|,  ψ_ijk = e_ij · e_kj, the cosine of the angle at j
        l = mean over the triples of distinct i, j, k of huber(ψ_ijk(student) - ψ_ijk(teacher))
        huber(d) = d²/2 where |d| ≤ 1, else |d| - 1/2

    Rotating, shifting or scaling either side changes nothing. Between points that coincide
    e_ij = 0, with gradient 0. The authors' code divides by N³, repeated points included.

    Args:
        student: (..., N, H_s): sets of N embeddings; fp32, bf16 or fp16 (arithmetic in fp32), or
            fp64. Differentiated.
        teacher: (..., N, H_t), of any of these types and any width; never differentiated.
        mask: (..., N) bool or integers: which points belong to the set. The others take part in
            nothing, whatever they hold. None: all.
        reduction: "mean" over the sets that have a triple, "sum" of l, or "none": l per set, (...).
        chunk: how many vertices j are worked on at a time. Default: what keeps a buffer
            (..., chunk, N, N + H) at 64 MiB.

    Returns:
        A float32 (fp64 for an fp64 student) scalar, or (...) losses for "none". A set without a
        triple has loss 0, connected to the graph, with gradient 0.

    Raises:
        ValueError, TypeError: naming the shapes, dtypes or values received, before any work.

    Memory:
        A few (..., chunk, N, N) and (..., chunk, N, H) buffers at a time, made again in the
        backward pass; never N³. The work is O(N³ H) nevertheless: 2 N³ H operations a side
        forwards, 2 TFLOP at N = H = 1024, and three times that with the gradient.

    References:
        Park et al.: Relational Knowledge Distillation (2019).
    """
    leading, chunk = _check_sets(student, teacher, mask, reduction, chunk)
    s, t, member = _prepare_sets(student, teacher, mask)
    same = torch.eye(s.shape[-2], dtype=torch.bool, device=s.device)

    def cosines(x: Tensor, v: slice) -> Tensor:
        difference, d = _away(x, v)
        none = d == 0
        if member is not None:  # no direction from or to other points, on both sides
            none = none | ~(member[:, None] & member[:, v, None])
        e = (difference / _positive(d)[..., None]).masked_fill(none[..., None], 0)
        return e @ e.mT

    def at_vertices(v: slice) -> Tensor:
        losses = F.huber_loss(cosines(s, v), cosines(t, v), reduction="none")
        return losses.masked_fill(same, 0).sum((-3, -2, -1))

    with torch.autocast(s.device.type, enabled=False):  # it would take the products in bf16
        sums = sum(_per_chunk(at_vertices, s.shape[-2], chunk))
    n = _points(s, member)
    return _reduce_sets(sums, n * (n - 1) * (n - 2), leading, reduction)


def _check(student, teacher, mask, reduction, *, weights: bool = True) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor of hidden states, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64 states, got {x.dtype}"
            )
        if x.dim() == 0 or x.shape[-1] == 0:
            raise ValueError(
                f"{name} must be (..., H) hidden states with H > 0, got shape {tuple(x.shape)}"
            )
    if student.shape[:-1] != teacher.shape[:-1]:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(
            f"student and teacher must agree in all dimensions but the last, got shapes {shapes}"
        )
    if teacher.requires_grad:
        raise ValueError(
            "the teacher is never differentiated, but its hidden states require grad:"
            " compute them under no_grad"
        )
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
        if mask.is_complex() or (mask.is_floating_point() and not weights):
            kinds = "a bool, integer or float" if weights else "a bool or integer"
            raise TypeError(f"mask must be {kinds} tensor, got {mask.dtype}")
        if mask.shape != student.shape[:-1]:
            expected, got = tuple(student.shape[:-1]), tuple(mask.shape)
            raise ValueError(f"mask must have the shape {expected}, got {got}")
        if mask.requires_grad:
            raise ValueError("mask is not differentiated, but requires grad: detach it")
    for name, x in (("teacher", teacher), ("mask", mask)):
        if x is not None and x.device != student.device:
            raise ValueError(f"{name} is on {x.device}, the student on {student.device}")


def _check_widths(student: Tensor, teacher: Tensor, remedy: str) -> None:
    H_s, H_t = student.shape[-1], teacher.shape[-1]
    if H_s != H_t:
        raise ValueError(f"the widths differ: student {H_s}, teacher {H_t}{remedy}")


def _check_sets(student, teacher, mask, reduction, chunk) -> tuple[torch.Size, int]:
    """Raise, or return the shape of the sets' losses and how many points a chunk has."""
    _check(student, teacher, mask, reduction, weights=False)
    if student.dim() < 2:
        raise ValueError(f"relations need (..., N, H) embeddings, got {tuple(student.shape)}")
    if chunk is None:
        width = max(student.shape[-1], teacher.shape[-1]) + student.shape[-2]
        chunk = max(1, CHUNK_ENTRIES // max(1, student.shape[:-1].numel() * width))
    elif isinstance(chunk, bool) or not isinstance(chunk, int):
        raise TypeError(f"chunk must be a number of points, got {type(chunk).__name__}")
    elif chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    return student.shape[:-2], chunk


def _prepare(student, teacher, mask) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both sides in the type of the arithmetic, zero where the mask is, and the weights."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    s, t = student.to(dtype), teacher.to(dtype)
    if mask is None:
        return s, t, None
    dead = (mask == 0)[..., None]
    return s.masked_fill(dead, 0), t.masked_fill(dead, 0), mask.to(dtype)


def _reduce(rows: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if weight is not None:
        rows = rows * weight
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    if weight is None:
        return total / max(1, rows.numel())
    count = weight.sum()
    return total / torch.where(count == 0, 1, count)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x/|x| and where x is zero. The largest entry goes first: squares neither overflow nor
    underflow, and a constant factor needs no derivative."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    zero = largest < torch.finfo(x.dtype).tiny
    x = x / largest.masked_fill(zero, 1)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(zero, 1), zero[..., 0]


def _input_dtype(projection: Callable, default: torch.dtype) -> torch.dtype:
    if isinstance(projection, torch.nn.Module):
        for parameter in projection.parameters():
            if parameter.dtype in FLOATS:
                return parameter.dtype
    return default


def _prepare_sets(student, teacher, mask) -> tuple[Tensor, Tensor, Tensor | None]:
    """(B, N, H) of both sides in the type of the arithmetic, and (B, N) membership."""
    s, t, _ = _prepare(student, teacher, mask)
    B, N = student.shape[:-2].numel(), student.shape[-2]
    member = None if mask is None else (mask != 0).reshape(B, N)
    return s.reshape(B, N, s.shape[-1]), t.reshape(B, N, t.shape[-1]), member


def _away(x: Tensor, vertices: slice) -> tuple[Tensor, Tensor]:
    """All points (B, N, H) minus each vertex, (B, vertices, N, H), and the distances; those that
    are 0 get gradient 0. |a|² + |b|² - 2ab would be a fast product, and noise for near points."""
    difference = x[:, None] - x[:, vertices, None]
    return difference, torch.linalg.vector_norm(difference, dim=-1)


def _per_chunk(run: Callable[[slice], Tensor], N: int, chunk: int) -> list[Tensor]:
    """`run` on slices of N points; with more than one, each runs again in the backward pass rather
    than keep its buffers."""
    if chunk >= N:
        return [run(slice(0, N))]
    return [
        checkpoint(run, slice(i, i + chunk), use_reentrant=False, preserve_rng_state=False)
        for i in range(0, N, chunk)
    ]


def _positive(x: Tensor) -> Tensor:
    """A divisor: 1 where x is 0."""
    return x.masked_fill(x == 0, 1)


def _points(x: Tensor, member: Tensor | None) -> Tensor:
    """How many points each set has, (B,)."""
    if member is None:
        return x.new_full((x.shape[0],), x.shape[1])
    return member.sum(-1).to(x.dtype)


def _reduce_sets(sums: Tensor, terms: Tensor, leading: torch.Size, reduction: str) -> Tensor:
    losses = sums / _positive(terms)
    if reduction == "none":
        return losses.view(leading)
    total = losses.sum()
    return total if reduction == "sum" else total / (terms > 0).sum().clamp(min=1)
