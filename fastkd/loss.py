"""`kd_loss`: two next-token distributions over a huge vocabulary compared, without a probability
tensor.

Top-down: the function and its module, the checks, the autograd function, the operator that picks a
backend.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import divergences, eager
from fastkd.divergences import Divergence

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class KDParts(NamedTuple):
    """What `kd_loss(return_parts=True)` returns; all but the loss are detached, on the device, and
    cost no sync.

    Attributes:
        loss: as without `return_parts`.
        divergence: D, reduced like the loss, without alpha and c(T).
        cross_entropy: of the student with the labels, reduced like the loss; None without labels.
        n_tokens: how many positions count, 0-d int64.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor | None
    n_tokens: Tensor


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    alpha: float = 1.0,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    compensate: bool = True,
    vocab: str | int = "strict",
    group: Any = None,
    inplace: bool = False,
    workspace_bytes: int | None = None,
    return_parts: bool = False,
) -> Tensor | KDParts:
    """Distillation loss of a student's next-token distribution against a teacher's.

        p = softmax(teacher / T),  q = softmax(student / T)
        l = alpha · c(T) · D(p, q) + (1 - alpha) · cross_entropy(student, label), per position
        loss = Σ w l / Σ w, under reduction "mean"

    The gradient is computed in the forward pass, while the logits are in the cache, and kept for
    the backward pass.

    Args:
        student: (..., V) logits; fp32, bf16 or fp16 (arithmetic in fp32), or fp64. Differentiated.
        teacher: (..., V) logits of the same leading shape, of any of these types; never
        differentiated.
        labels: (...) integers. Positions equal to `ignore_index` count nowhere.
        divergence: a name ("forward_kl", "reverse_kl", "jsd", …) or an object,
        `SkewForwardKL(teacher_weight=0.1)`.
        temperature: T > 0; divides both sides' logits in the divergence, never in the
        cross-entropy.
        alpha: weight of the divergence, in [0, 1]; below 1 needs labels.
        token_weight: (...) bool or float weights w, on top of `ignore_index`.
        reduction: "mean", "sum" of w l, or "none": w l for every position, (...).
        num_items: divides the sum instead of Σ w under "mean": the token count of the whole batch
            under gradient accumulation or data parallelism, an int or a 0-d tensor. Where gradients
            are averaged over processes (DDP, FSDP), multiply the loss by their number.
        shift: position i predicts label i + 1, as in Hugging Face's causal-LM tensors; no logits
            are copied. `token_weight` is shifted along with the labels.
        compensate: multiply value and gradient by c(T) = T² (T for TVD, 1 for LogitMSE).
        vocab: "strict": both vocabularies have one size; "shared": both are cut to the smaller; an
            int: to the first n entries. The cut is made before the softmax; the cross-entropy sees
            the student's whole row.
        group: reserved for vocabulary shards; must be None.
        inplace: the gradient may overwrite the student's logits, which saves a (T, V) buffer.
            Nothing may read the logits afterwards; autograd complains if something saved them.
            Ignored under torch.compile.
        workspace_bytes: budget for LM heads; dense logits need none.
        return_parts: return `KDParts`.

    Returns:
        A float32 (fp64 for an fp64 student) scalar, or (...) losses for "none". Without any
        counting position it is 0, connected to the graph, with gradient 0. +inf where the
        divergence is by definition, with a finite gradient.

    Raises:
        ValueError, TypeError: naming the shapes, dtypes or values received, before any work. Labels
            out of range raise ValueError on the CPU and a device assertion on a GPU, without a
            sync.

    Memory:
        One buffer of the student's shape and type, the gradient (none with `inplace`, or without
        gradients), and a few numbers per row. An fp16 student's gradient is computed in the
        backward pass, so that the upstream factor (loss scaling) is applied before the cast; the
        logits of both sides are kept until then.
    """
    d = divergences.get(divergence)
    if shift and isinstance(student, Tensor) and student.dim() < 2:
        raise ValueError(f"shift needs (..., length, V) logits, got shape {tuple(student.shape)}")
    n = _check(
        student,
        teacher,
        labels,
        d,
        temperature,
        alpha,
        token_weight,
        reduction,
        num_items,
        vocab,
        group,
    )
    labels = None if labels is None else labels.long()
    leading, V = student.shape[:-1], student.shape[-1]
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32

    weight = (
        torch.ones(leading, dtype=dtype, device=student.device)
        if token_weight is None
        else token_weight.to(dtype)
    )
    if shift:
        weight = F.pad(weight[..., 1:], (0, 1))
        labels = None if labels is None else F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    if labels is not None:
        ignored = labels == ignore_index
        _check_range(labels, ignored, V)
        weight = weight.masked_fill(ignored, 0)
        labels = labels.masked_fill(ignored, 0).reshape(-1)
    if student.numel() == 0:
        nothing = student.sum(-1).to(dtype) * 0
        loss = nothing if reduction == "none" else nothing.sum()
        parts = KDParts(
            loss,
            loss.detach(),
            None if labels is None else loss.detach(),
            loss.new_zeros((), dtype=torch.int64),
        )
        return parts if return_parts else loss

    weight = weight.reshape(-1).contiguous()
    if reduction == "mean":
        total = weight.sum() if num_items is None else num_items
        coefficient = (
            weight / torch.where(total == 0, 1, total)
            if isinstance(total, Tensor)
            else weight / (total or 1)
        )
    else:
        coefficient = weight
    c = d.compensation(temperature) if compensate else 1.0
    wants_entropy = labels is not None and (alpha < 1 or return_parts)
    loss, value, entropy = _Loss.apply(
        student, teacher, labels if wants_entropy else None, coefficient,
        *divergences.pack(d), float(temperature), n, float(alpha * c), float(1 - alpha),
        student.requires_grad and torch.is_grad_enabled(),
        inplace and not torch.compiler.is_compiling(),
    )  # fmt: skip

    def reduce(rows: Tensor) -> Tensor:
        return rows.view(leading) if reduction == "none" else rows.sum()

    loss = reduce(loss)
    if not return_parts:
        return loss
    value = reduce(value * coefficient)
    entropy = reduce(entropy * coefficient) if wants_entropy else None
    return KDParts(loss, value, entropy, (weight != 0).sum())


class KDLoss(torch.nn.Module):
    """`kd_loss` as a module: settings at construction, tensors in the call.

    Args:
        **settings: the keyword arguments of `kd_loss`, but `token_weight` and `num_items`.

    Raises:
        TypeError, ValueError: unknown settings, or values that `kd_loss` would refuse.
    """

    def __init__(self, **settings):
        super().__init__()
        known = set(kd_loss.__kwdefaults__) - {"token_weight", "num_items"}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise TypeError(f"unknown settings {unknown}; known: {sorted(known)}")
        self.settings = {name: kd_loss.__kwdefaults__[name] for name in sorted(known)} | settings
        self.settings["divergence"] = divergences.get(self.settings["divergence"])
        _check_settings(
            self.settings["temperature"], self.settings["alpha"], self.settings["reduction"]
        )

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor | KDParts:
        return kd_loss(
            student,
            teacher,
            labels,
            token_weight=token_weight,
            num_items=num_items,
            **self.settings,
        )

    def extra_repr(self) -> str:
        changed = {
            k: v
            for k, v in self.settings.items()
            if k == "divergence" or v != kd_loss.__kwdefaults__[k]
        }
        return ", ".join(f"{k}={v}" for k, v in changed.items())


def _check_settings(temperature, alpha, reduction) -> None:
    for name, value in (("temperature", temperature), ("alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _check(
    student,
    teacher,
    labels,
    divergence,
    temperature,
    alpha,
    token_weight,
    reduction,
    num_items,
    vocab,
    group,
) -> int:
    """Raise what the contract promises; return how many entries the divergence sees."""
    _check_settings(temperature, alpha, reduction)
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor of logits, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64 logits, got {x.dtype}"
            )
        if x.dim() == 0 or x.shape[-1] == 0:
            raise ValueError(
                f"{name} must be (..., V) logits with V > 0, got shape {tuple(x.shape)}"
            )
    if student.shape[:-1] != teacher.shape[:-1]:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(
            f"student and teacher must agree in all dimensions but the last, got shapes {shapes}"
        )
    if teacher.requires_grad:
        raise ValueError(
            "the teacher is never differentiated, but its logits require grad:"
            " compute them under no_grad"
        )
    for name, x in (("teacher", teacher), ("labels", labels), ("token_weight", token_weight)):
        if isinstance(x, Tensor) and x.device != student.device:
            raise ValueError(f"{name} is on {x.device}, the student on {student.device}")
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
            got = getattr(labels, "dtype", type(labels).__name__)
            raise TypeError(f"labels must be an integer tensor, got {got}")
        if labels.shape != student.shape[:-1]:
            expected, got = tuple(student.shape[:-1]), tuple(labels.shape)
            raise ValueError(
                "labels must have the shape of the logits without the last dimension,"
                f" {expected}, got {got}"
            )
    elif alpha < 1:
        raise ValueError(f"alpha = {alpha} mixes in the cross-entropy, which needs labels")
    if token_weight is not None:
        if not isinstance(token_weight, Tensor) or not (
            token_weight.dtype == torch.bool or token_weight.is_floating_point()
        ):
            got = getattr(token_weight, "dtype", type(token_weight).__name__)
            raise TypeError(f"token_weight must be a bool or float tensor, got {got}")
        if token_weight.shape != student.shape[:-1]:
            expected, got = tuple(student.shape[:-1]), tuple(token_weight.shape)
            raise ValueError(f"token_weight must have the shape {expected}, got {got}")
        if token_weight.requires_grad:
            raise ValueError("token_weight is not differentiated, but requires grad: detach it")
    if num_items is not None:
        if reduction != "mean":
            raise ValueError(
                f"num_items divides under reduction 'mean' only, got reduction {reduction!r}"
            )
        if not isinstance(num_items, Tensor) and (
            isinstance(num_items, bool) or not isinstance(num_items, (int, float))
        ):
            raise TypeError(
                f"num_items must be a number or a 0-d tensor, got {type(num_items).__name__}"
            )
        if isinstance(num_items, Tensor) and num_items.dim() != 0:
            raise ValueError(
                f"num_items must be a number or a 0-d tensor, got shape {tuple(num_items.shape)}"
            )
        if not isinstance(num_items, Tensor) and num_items < 0:
            raise ValueError(f"num_items must not be negative, got {num_items}")
    if group is not None:
        raise ValueError(
            "vocabulary shards (group=) are not supported yet: pass whole rows of logits"
        )
    V_s, V_t = student.shape[-1], teacher.shape[-1]
    if vocab == "strict":
        if V_s != V_t:
            raise ValueError(
                f"the vocabularies differ: student {V_s}, teacher {V_t} entries."
                f" If the first {min(V_s, V_t)} are the same tokens (padding columns),"
                " pass vocab='shared'; else the two models need one tokenizer"
            )
        return V_s
    if vocab == "shared":
        return min(V_s, V_t)
    if isinstance(vocab, bool) or not isinstance(vocab, int):
        raise ValueError(f"vocab must be 'strict', 'shared' or a number of entries, got {vocab!r}")
    if not 1 <= vocab <= min(V_s, V_t):
        raise ValueError(
            f"vocab must be between 1 and {min(V_s, V_t)} (student {V_s}, teacher {V_t}),"
            f" got {vocab}"
        )
    return vocab


def _check_range(labels: Tensor, ignored: Tensor, V: int) -> None:
    inside = ignored | ((labels >= 0) & (labels < V))
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        if not inside.all():
            bad = labels[~inside].unique().tolist()
            raise ValueError(
                f"labels must be in [0, {V}) or ignore_index,"
                f" got {bad[:8]}{'…' if len(bad) > 8 else ''}"
            )
    elif labels.device.type in ("cpu", "cuda"):
        torch._assert_async(inside.all(), f"fastkd: labels must be in [0, {V}) or ignore_index")


class _Loss(torch.autograd.Function):
    """Weighted losses of T rows. The gradient is computed forwards, once per weight; backwards it
    is only scaled."""

    @staticmethod
    def forward(
        ctx, student, teacher, labels, weight,
        name, numbers, temperature, n, kd_scale, ce_scale, wants_grad, inplace,
    ):  # fmt: skip
        # fp16 loses small gradients in a cast before the upstream factor is known: it takes the
        # gradient backwards.
        later = wants_grad and student.dtype == torch.float16
        now = wants_grad and not later
        ctx.settings = (name, numbers, temperature, n, kd_scale, ce_scale)
        ctx.later, ctx.inplace, ctx.shape = later, inplace, student.shape
        value, entropy, grad = _run(student, teacher, labels, weight, ctx.settings, now, inplace)
        if later:
            ctx.save_for_backward(student, teacher, labels, weight)
        elif now:
            ctx.save_for_backward(grad)
        loss = torch.zeros_like(value)
        if kd_scale:
            loss = loss + kd_scale * value
        if ce_scale:
            loss = loss + ce_scale * entropy
        loss = loss * weight
        ctx.mark_non_differentiable(value, entropy)
        return loss, value, entropy

    @staticmethod
    def backward(ctx, upstream, _value, _entropy):
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # create_graph=True
        upstream = upstream.detach()
        if ctx.later:
            student, teacher, labels, weight = ctx.saved_tensors
            grad = _run(
                student, teacher, labels, weight * upstream, ctx.settings, True, ctx.inplace
            )[2]
        else:
            (grad,) = ctx.saved_tensors
            if torch.compiler.is_compiling():
                grad = (grad * upstream[:, None]).to(grad.dtype)
            else:
                grad = _scale(grad, upstream)
        grad = grad.view(ctx.shape)
        if again:
            grad = _OnlyOnce.apply(grad, torch.zeros((), requires_grad=True))
        return (grad, *[None] * 11)


class _OnlyOnce(torch.autograd.Function):
    """A gradient that must not be differentiated: without this it would pass for a constant."""

    @staticmethod
    def forward(ctx, grad, anchor):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _grad):
        raise RuntimeError(
            "kd_loss cannot be differentiated twice: its gradient is computed in closed form"
            " (fastkd.reference.kd_loss can be)"
        )


def _scale(grad: Tensor, upstream: Tensor) -> Tensor:
    # In place, unless the graph is kept and will ask for the gradient again.
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
    grad = grad.clone() if kept else grad
    if upstream.stride(0) == 0:
        upstream = upstream[0]  # the reduction's one factor, expanded
    if _uses_triton(grad):
        from fastkd.kernels.dense import scale_
    else:
        from fastkd.eager import scale_
    return scale_(grad, upstream)


def _run(student, teacher, labels, weight, settings, wants_grad, inplace):
    """(T,) divergence and cross-entropy, and the (T, V) gradient; empty tensors for what is not
    wanted."""
    name, numbers, temperature, n, kd_scale, ce_scale = settings
    s, t = _as_rows(student), _as_rows(teacher)
    if wants_grad and inplace and student.is_contiguous():
        grad = student.detach().view(-1, student.shape[-1])
        divergence = divergences.unpack(name, numbers)
        value, entropy = _dense(
            s, t, labels, weight, divergence, temperature, n, kd_scale, ce_scale, grad
        )
        torch.autograd.graph.increment_version(student)
        return value, entropy, grad
    return torch.ops.fastkd.dense(
        s, t, labels, weight, name, numbers, temperature, n, kd_scale, ce_scale, wants_grad
    )  # fmt: skip


def _as_rows(x: Tensor) -> Tensor:
    """(outer, length, V) with unit stride along V, as a view where strides allow: `logits[:, :-1]`
    is not copied."""
    x = x.detach()
    if x.dim() == 3 and x.stride(-1) == 1 and not x.is_contiguous():
        return x
    if x.dim() == 2 and x.stride(-1) == 1:
        return x[None]
    return x.contiguous().view(1, -1, x.shape[-1])


@torch.library.custom_op("fastkd::dense", mutates_args=())
def _dense_operator(
    student: Tensor, teacher: Tensor, labels: Tensor | None, weight: Tensor,
    name: str, numbers: list[float], temperature: float, n: int,
    kd_scale: float, ce_scale: float, wants_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One opaque node for torch.compile."""
    grad = eager.empty_grad(student) if wants_grad else None
    divergence = divergences.unpack(name, numbers)
    value, entropy = _dense(
        student, teacher, labels, weight, divergence, temperature, n, kd_scale, ce_scale, grad
    )
    return value, entropy, student.new_empty(0) if grad is None else grad


@_dense_operator.register_fake
def _(
    student, teacher, labels, weight, name, numbers, temperature, n, kd_scale, ce_scale, wants_grad
):
    T, V = weight.shape[0], student.shape[2]
    grad = student.new_empty((T, V) if wants_grad else 0)
    return weight.new_empty(T), weight.new_empty(0 if labels is None else T), grad


def _dense(student, teacher, labels, weight, divergence, temperature, n, kd_scale, ce_scale, grad):
    if _uses_triton(student):
        from fastkd.kernels.dense import dense
    else:
        from fastkd.eager import dense
    value, entropy = dense(
        student, teacher, labels, weight, divergence, temperature=temperature, n=n,
        kd_scale=kd_scale, ce_scale=ce_scale, cross_entropy=labels is not None, grad=grad,
    )  # fmt: skip
    return value, value.new_empty(0) if entropy is None else entropy


def _uses_triton(x: Tensor) -> bool:
    """FASTKD_BACKEND: "auto" (Triton on GPUs), "triton" or "eager"."""
    choice = os.environ.get("FASTKD_BACKEND", "auto")
    if choice == "eager" or (
        choice == "auto" and (x.device.type not in ("cuda", "xpu") or x.dtype == torch.float64)
    ):
        return False
    if choice not in ("auto", "triton"):
        raise ValueError(f"FASTKD_BACKEND must be auto, triton or eager, got {choice!r}")
    if x.dtype == torch.float64:
        raise ValueError(
            "the Triton kernels compute in fp32, the logits are float64:"
            " use FASTKD_BACKEND=auto or eager"
        )
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
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
