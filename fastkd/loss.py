"""`kd_loss`: two next-token distributions over a huge vocabulary compared, without a probability
tensor.

Top-down: the function and its module, the checks, the autograd function. What is compared comes
from sources.py; compare.py walks over its rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import compare, divergences, shards
from fastkd.compare import WORKSPACE_BYTES, Settings
from fastkd.divergences import Divergence
from fastkd.sources import (
    INTEGERS,
    Dense,
    Ensemble,
    LMHead,
    Source,
    TopK,
    as_source,
    shape_of,
)


class KDParts(NamedTuple):
    """What `kd_loss(return_parts=True)` returns; all but the loss are detached, on the device, and
    cost no sync. All are reduced like the loss, n_tokens apart.

    Attributes:
        loss: as without `return_parts`.
        divergence: D, without alpha and c(T).
        cross_entropy: of the student with the labels; None without labels.
        n_tokens: how many positions count, 0-d int64.
        teacher_entropy, student_entropy: in nats, at the loss's temperature, over the entries that
            the divergence sees; a top-k teacher's is of its outcomes. None for LogitMSE.
        top1_agreement: 1 where an entry is a maximum of both sides. None for LogitMSE.
        teacher_mass: of a top-k teacher, what its entries hold; else None.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor | None
    n_tokens: Tensor
    teacher_entropy: Tensor | None = None
    student_entropy: Tensor | None = None
    top1_agreement: Tensor | None = None
    teacher_mass: Tensor | None = None


def kd_loss(
    student: Tensor | LMHead,
    teacher: Tensor | LMHead | TopK | Ensemble,
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
        student: (..., V) logits, fp32, bf16 or fp16 (arithmetic in fp32) or fp64; or an `LMHead`.
            Differentiated.
        teacher: logits of the same leading shape, of any of these types, an `LMHead`, a `TopK` or
            an `Ensemble`; never differentiated.
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
        group: a `torch.distributed` group whose ranks each hold one contiguous shard of the
            vocabulary, in rank order: of the logits, or of the LM head's weight and bias, the same
            entries on both sides ("shared" cuts each shard). Everything else, labels and top-k ids
            with global numbers too, is the same on all ranks, and so is the result. A hidden
            state's gradient is summed over the ranks. Implied by DTensors that are sharded along
            the vocabulary.
        inplace: the gradient may overwrite the student's logits, which saves a (T, V) buffer.
            Nothing may read the logits afterwards; autograd complains if something saved them.
            Ignored under torch.compile, for a leaf tensor, and by an `LMHead`, which never needs
            that buffer.
        workspace_bytes: what the logits of one chunk may take where they are made here, by LM heads
            and ensembles; 512 MiB. Dense logits need none.
        return_parts: return `KDParts`.

    Returns:
        A float32 (fp64 for an fp64 student) scalar, or (...) losses for "none". Without any
        counting position it is 0, connected to the graph, with gradient 0. +inf where the
        divergence is by definition, with a finite gradient.

    Raises:
        ValueError, TypeError: naming the shapes, dtypes or values received, before any work. Labels
            or top-k ids out of range, and ids that repeat, raise ValueError on the CPU and a device
            assertion on a GPU, without a sync.

    Memory:
        Dense logits: one buffer of the student's shape and type, the gradient (none with `inplace`,
        or without gradients), and at most a few KB per row. `LMHead`: one chunk's logits, the
        gradients of what requires one, where a head of low precision is trained in several chunks
        its gradient in fp32, and under autocast the weights in its type. An fp16 student's
        gradient, and an `LMHead`'s under reduction "none", is computed in the backward pass, where
        the upstream factor (loss scaling) is known; the inputs of both sides are kept until then,
        and the logits that are made here are made twice. On a CPU under Linux, large blocks are
        kept for the next call (`fastkd.buffers`).

    torch.compile takes the numbers (temperature, alpha, a divergence's own) as constants: a
    schedule of them compiles again for each value.
    """
    _check_settings(temperature, alpha, reduction, vocab, ignore_index, workspace_bytes)
    d = divergences.get(divergence)
    for name, x in (("labels", labels), ("token_weight", token_weight)):
        if type(x).__name__ == "DTensor":
            raise TypeError(f"{name} must be a plain tensor, the same on all ranks, got a DTensor")
    student, teacher, group = shards.from_dtensors(student, teacher, group)
    group = "" if group is None else shards.name_of(group)
    s, t = as_source("student", student), as_source("teacher", teacher)
    _check_sources(s, t, d, temperature)
    _check_rows(s, labels, token_weight, alpha, num_items, reduction)
    n = _check_vocabulary(s, t, vocab, group)
    leading, V = s.leading, s.entries
    if shift and not leading:
        raise ValueError(f"shift needs (..., length, V) logits, got shape {s.shape}")
    dtype = torch.float64 if s.dtype == torch.float64 else torch.float32

    weight = (
        torch.ones(leading, dtype=dtype, device=s.device)
        if token_weight is None
        else token_weight.to(dtype)
    )
    labels = None if labels is None else labels.long()
    if shift and s.leading[-1]:
        weight = F.pad(weight[..., 1:], (0, 1))
        labels = None if labels is None else F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    if labels is not None:
        ignored = labels == ignore_index
        sizes = shards.sizes(V, group, labels) if group else None
        _check_range("labels", labels, ignored, V if sizes is None else sizes.sum())
        weight = weight.masked_fill(ignored, 0)
        labels = labels.masked_fill(ignored, 0).reshape(-1)
        if group:  # this shard's own numbering
            labels = labels - shards.before(sizes, group)
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
    student_spec, student_tensors = s.pack()
    teacher_spec, teacher_tensors = t.pack()
    settings = Settings(
        student_spec, teacher_spec, *divergences.pack(d), float(temperature), n, float(alpha * c),
        float(1 - alpha), return_parts, workspace_bytes or WORKSPACE_BYTES, group,
    )  # fmt: skip
    loss, rows = _Loss.apply(
        labels if wants_entropy else None, coefficient, settings,
        [x.requires_grad and torch.is_grad_enabled() for x in student_tensors],
        # In the backward pass, where the upstream factors are known: fp16 would lose small
        # gradients in a cast before, and a weight's gradient cannot be scaled row by row after.
        s.dtype == torch.float16 or (reduction == "none" and isinstance(s, LMHead)),
        reduction == "none",
        inplace and isinstance(s, Dense) and s.tensor.is_contiguous()
        and not (s.tensor.is_leaf and s.tensor.requires_grad or torch.compiler.is_compiling()),
        *student_tensors, *teacher_tensors,
    )  # fmt: skip
    loss = loss.view(leading) if reduction == "none" else loss
    if not return_parts:
        return loss
    rows = rows * coefficient
    rows = rows.unflatten(1, leading) if reduction == "none" else rows.sum(1)
    parts = dict(zip(compare.ROWS, rows, strict=False))
    entropies = (parts["teacher_entropy"], parts["student_entropy"], parts["agreement"])
    return KDParts(
        loss,
        parts["divergence"],
        parts["cross_entropy"] if wants_entropy else None,
        (weight != 0).sum(),
        *((None, None, None) if d.kind == "logits" else entropies),
        parts.get("teacher_mass"),
    )


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
            *(
                self.settings[name]
                for name in (
                    "temperature",
                    "alpha",
                    "reduction",
                    "vocab",
                    "ignore_index",
                    "workspace_bytes",
                )  # fmt: skip
            )
        )

    def forward(
        self,
        student: Tensor | LMHead,
        teacher: Tensor | LMHead | TopK | Ensemble,
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


def _check_settings(temperature, alpha, reduction, vocab, ignore_index, workspace_bytes) -> None:
    for name, value in (("temperature", temperature), ("alpha", alpha)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if workspace_bytes is not None:
        if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
            raise TypeError(
                f"workspace_bytes must be an int or None, got {type(workspace_bytes).__name__}"
            )
        if workspace_bytes <= 0:
            raise ValueError(f"workspace_bytes must be positive, got {workspace_bytes}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    number = isinstance(vocab, int) and not isinstance(vocab, bool)
    if vocab not in ("strict", "shared") and not (number and vocab > 0):
        raise ValueError(
            f"vocab must be 'strict', 'shared' or a positive number of entries, got {vocab!r}"
        )


def _check_num_items(num_items, reduction, device) -> None:
    if reduction != "mean":
        raise ValueError(
            f"num_items divides under reduction 'mean' only, got reduction {reduction!r}"
        )
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0 or num_items.requires_grad:
            raise ValueError(
                "num_items must be a number or a 0-d tensor that does not require grad, got shape"
                f" {shape_of(num_items)}"
            )
        if num_items.device.type not in ("cpu", device.type):
            raise ValueError(f"num_items is on {num_items.device}, the student on {device}")
    elif isinstance(num_items, bool) or not isinstance(num_items, (int, float)):
        raise TypeError(
            f"num_items must be a number or a 0-d tensor, got {type(num_items).__name__}"
        )
    elif not 0 <= num_items < math.inf:
        raise ValueError(f"num_items must be finite and not negative, got {num_items}")


def _check_sources(s: Source, t: Source, d: Divergence, temperature: float) -> None:
    if not isinstance(s, (Dense, LMHead)):
        raise TypeError(f"student must be a tensor of logits or an LMHead, got {type(s).__name__}")
    for source in (s, t):
        source.dtype  # noqa: B018 - raises where the dtypes of an LM head disagree
    if s.leading != t.leading:
        raise ValueError(
            "student and teacher must agree in all dimensions but the last, got shapes"
            f" {s.shape} and {t.shape}"
        )
    if t.device != s.device:
        raise ValueError(f"teacher is on {t.device}, the student on {s.device}")
    _check_constant(t)
    if d.kind == "logits" and (
        any(isinstance(x, TopK) for x in _members(t))
        or (isinstance(t, Ensemble) and t.mode == "probabilities")
    ):
        raise ValueError(f"{d} compares logits, of which {type(t).__name__} has none")
    if isinstance(t, TopK):
        _check_topk(t, d, temperature)


def _check_topk(t: TopK, d: Divergence, temperature: float) -> None:
    if d.pooled_terms is None:
        raise ValueError(
            f"{d} is no sum over outcomes that may be pooled, as a top-k teacher's tail is"
        )
    if t.tail == "renormalize" and d.infinite_p:
        raise ValueError(
            f"{d} is infinite where the teacher has no mass: outside a renormalised top-k teacher"
            " everywhere; use tail='bucket'"
        )
    if t.tail != "renormalize" and temperature != t.temperature:
        raise ValueError(
            f"the top-k log-probabilities are at temperature {t.temperature}, the loss at"
            f" {temperature}: exact only with tail='renormalize', got tail={t.tail!r}"
        )


def _members(t: Source) -> list[Source]:
    if not isinstance(t, Ensemble):
        return [t]
    return [x for member in t.teachers for x in _members(member)]


def _check_constant(t: Source) -> None:
    """An LM head's own weight may be trained elsewhere, tied to the student's even: here it is a
    constant."""
    for source in _members(t):
        for what, x in (
            ("logits", getattr(source, "tensor", None)),
            ("hidden state", getattr(source, "hidden", None)),
            ("log-probabilities", getattr(source, "logprobs", None)),
        ):
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"the teacher is never differentiated, but its {what} require grad: compute"
                    " them under no_grad"
                )


def _check_rows(s: Source, labels, token_weight, alpha, num_items, reduction) -> None:
    if num_items is not None:
        _check_num_items(num_items, reduction, s.device)
    for name, x in (("labels", labels), ("token_weight", token_weight)):
        if isinstance(x, Tensor) and x.device != s.device:
            raise ValueError(f"{name} is on {x.device}, the student on {s.device}")
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
            got = getattr(labels, "dtype", type(labels).__name__)
            raise TypeError(f"labels must be an integer tensor, got {got}")
        if labels.shape != s.leading:
            raise ValueError(
                "labels must have the shape of the logits without the last dimension,"
                f" {tuple(s.leading)}, got {shape_of(labels)}"
            )
    elif alpha < 1:
        raise ValueError(f"alpha = {alpha} mixes in the cross-entropy, which needs labels")
    if token_weight is not None:
        if not isinstance(token_weight, Tensor) or not (
            token_weight.dtype == torch.bool or token_weight.is_floating_point()
        ):
            got = getattr(token_weight, "dtype", type(token_weight).__name__)
            raise TypeError(f"token_weight must be a bool or float tensor, got {got}")
        if token_weight.shape != s.leading:
            raise ValueError(
                f"token_weight must have the shape {tuple(s.leading)}, got {shape_of(token_weight)}"
            )
        if token_weight.requires_grad:
            raise ValueError("token_weight is not differentiated, but requires grad: detach it")


def _check_vocabulary(s: Source, t: Source, vocab, group: str) -> int:
    """How many entries the divergence sees, of this shard."""
    V = s.entries
    members = _members(t)
    smallest = min([V, *(x.entries for x in members if x.entries is not None)])
    if vocab == "strict":
        for x in members:
            if x.entries not in (None, V):
                raise ValueError(
                    f"the vocabularies differ: student {V}, teacher {x.entries} entries."
                    f" If the first {smallest} are the same tokens (padding columns),"
                    " pass vocab='shared'; else the two models need one tokenizer"
                )
        n = V
    elif vocab == "shared":
        n = smallest
    elif group:
        n = shards.cut(vocab, smallest, group, s.device)
    elif not 1 <= vocab <= smallest:
        sizes = ", ".join(str(x.entries) for x in members if x.entries is not None)
        raise ValueError(
            f"vocab must be between 1 and {smallest} (student {V}, teacher {sizes}), got {vocab}"
        )
    else:
        n = vocab
    lists = [x for x in members if isinstance(x, TopK)]
    N = shards.sizes(n, group, lists[0].ids).sum() if group and lists else n
    for x in lists:
        ids = x.ids.long()  # N may be more than a smaller type holds
        # Under "strict" an id beyond the vocabulary is a mistake; a cut leaves it out.
        absent = ids < 0 if vocab == "strict" else (ids < 0) | (ids >= N)
        _check_range("top-k ids", ids, absent, N)
        ordered = torch.where(ids < 0, -1, ids).sort(-1).values
        repeated = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        message = "top-k ids must be distinct in a row, got {} twice"
        _require(~repeated, message, ordered[..., 1:])
        message = "top-k log-probabilities must not be positive, got {}"
        _require(absent | ~(x.logprobs > 0.01), message, x.logprobs)
    if isinstance(t, Ensemble) and isinstance(t.weights, Tensor):
        message = "Ensemble's weights must be finite and not negative"
        _require(t.weights.isfinite() & (t.weights >= 0), message, t.weights)
    return n


def _check_range(what: str, ids: Tensor, ignored: Tensor, V: int | Tensor) -> None:
    absent = "ignore_index" if what == "labels" else "-1"
    inside = ignored | ((ids >= 0) & (ids < V))
    if isinstance(V, Tensor) and (V.device.type != "cpu" or torch.compiler.is_compiling()):
        V = "V"  # its number would be a sync, or is not known yet
    _require(inside, f"{what} must be in [0, {V}) or {absent}, got {{}}", ids)


def _require(holds: Tensor, message: str, values: Tensor) -> None:
    """Raise on the CPU, assert on the device elsewhere: no sync."""
    if holds.device.type == "cpu" and not torch.compiler.is_compiling():
        if not holds.all():
            bad = values[~holds].unique().tolist()
            raise ValueError(message.format(f"{bad[:8]}{'…' if len(bad) > 8 else ''}"))
    elif holds.device.type in ("cpu", "cuda"):
        torch._assert_async(holds.all(), "fastkd: " + message.format("others"))


class _Loss(torch.autograd.Function):
    """Weighted losses of T rows, or their sum. The gradients are computed forwards, once per
    weight, and backwards only scaled; or backwards (`later`)."""

    @staticmethod
    def forward(ctx, labels, weight, settings, wants, later, per_row, inplace, *tensors):
        count = len(wants)
        later = later and any(wants)
        now = [False] * count if later else wants
        rows, grads = compare.compare(
            list(tensors[:count]), list(tensors[count:]), labels, weight, settings, now, inplace
        )
        ctx.settings = settings._replace(diagnostics=False)  # reported once, forwards
        ctx.wants, ctx.later, ctx.inplace = wants, later, inplace
        ctx.shapes, ctx.count = [x.shape for x in tensors[:count]], len(tensors)
        ctx.save_for_backward(weight, *([labels, *tensors] if later else grads))
        loss = torch.zeros_like(rows[0])
        for row, scale in ((0, settings.kd_scale), (1, settings.ce_scale)):
            if scale:
                loss = loss + scale * rows[row]
        loss = loss * weight
        ctx.mark_non_differentiable(rows)
        return loss if per_row else loss.sum(), rows

    @staticmethod
    def backward(ctx, upstream, _rows):
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # create_graph=True
        upstream, count = upstream.detach(), len(ctx.wants)
        weight, *saved = ctx.saved_tensors
        if upstream.dim() and len(upstream) and upstream.stride(0) == 0:
            upstream = upstream[0]  # the factor of a sum over the rows, expanded
        if upstream.dim():  # whatever is made of a row that does not count
            upstream = torch.where(weight != 0, upstream, 0)
        if ctx.later:
            labels, *tensors = saved
            inplace = ctx.inplace and not _graph_is_kept()
            grads = compare.compare(
                tensors[:count], tensors[count:], labels, weight * upstream, ctx.settings,
                ctx.wants, inplace,
            )[1]  # fmt: skip
        else:
            grads = [
                _scale(grad, upstream) if wanted else None
                for grad, wanted in zip(saved, ctx.wants, strict=True)
            ]
        grads = [
            grad.view(shape) if wanted else None
            for grad, shape, wanted in zip(grads, ctx.shapes, ctx.wants, strict=True)
        ]
        if again:
            anchor = torch.zeros((), requires_grad=True)
            grads = [g if g is None else _OnlyOnce.apply(g, anchor) for g in grads]
        return (*[None] * 7, *grads, *[None] * (ctx.count - count))


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
    """`grad` times one factor, or one for each row."""
    if torch.compiler.is_compiling():
        return (grad * (upstream[:, None] if upstream.dim() else upstream)).to(grad.dtype)
    grad = grad.clone() if _graph_is_kept() else grad
    if compare.uses_triton(grad.device, grad.dtype):
        from fastkd.kernels.dense import scale_
    else:
        from fastkd.backends.eager import scale_
    scale_(grad if grad.dim() == 2 else grad[None], upstream)
    return grad


def _graph_is_kept() -> bool:
    """Whether the gradient may be asked for again, so that what is saved must stay as it is."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
