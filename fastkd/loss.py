"""`kd_loss`: two next-token distributions over a huge vocabulary compared, without a probability
tensor.

Top-down: the function and its module, the checks, the autograd function. What is compared comes
from sources/; compare.py walks over its rows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastkd import compare, divergences, shards
from fastkd.backends import buffers
from fastkd.backends.backend import backend
from fastkd.checks import (
    check_constant,
    check_integers,
    check_number,
    require,
    require_ids,
    shape_of,
)
from fastkd.compare import WORKSPACE_BYTES, Call
from fastkd.divergences import Divergence
from fastkd.packing import Parcel, pack, tensors_of
from fastkd.rows import MEASURES
from fastkd.sources import Source, as_source
from fastkd.sources.source import leaves


class KDParts(NamedTuple):
    """What `kd_loss(return_parts=True)` returns; all but the loss are detached, on the device, and
    cost no sync. All are reduced like the loss, n_tokens apart.

    Attributes:
        loss: as without `return_parts`.
        divergence: D, without alpha and c(T) (a sum whose parts have different c(T): with it); None
            without a teacher, as all that a teacher is needed for.
        cross_entropy: of the student with the labels; None without labels.
        n_tokens: how many positions count, 0-d int64.
        teacher_entropy, student_entropy: in nats, at the loss's temperature, over the entries that
            the divergence sees; a top-k teacher's is of its outcomes. None for LogitMSE.
        top1_agreement: 1 where an entry is a maximum of both sides. None for LogitMSE.
        teacher_mass: of a top-k teacher, what its entries hold; else None.
    """

    loss: Tensor
    divergence: Tensor | None
    cross_entropy: Tensor | None
    n_tokens: Tensor
    teacher_entropy: Tensor | None = None
    student_entropy: Tensor | None = None
    top1_agreement: Tensor | None = None
    teacher_mass: Tensor | None = None


def kd_loss(
    student: Tensor | Source,
    teacher: Tensor | Source | None,
    labels: Tensor | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    alpha: float | Tensor = 1.0,
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
        student: (..., V) logits, fp32, bf16 or fp16 (arithmetic in fp32) or fp64; or an `LMHead`,
            or another source (`fastkd.sources`). Differentiated.
        teacher: logits of the same leading shape, of any of these types, an `LMHead`, a `TopK`, an
            `Ensemble` or another source; never differentiated. None, with alpha = 0: the
            cross-entropy alone.
        labels: (...) integers. Positions equal to `ignore_index` count nowhere.
        divergence: a name ("forward_kl", "reverse_kl", "jsd", …) or an object,
            `SkewForwardKL(teacher_weight=0.1)` or `0.5 * ForwardKL() + 0.5 * TVD()`.
        temperature: T > 0; divides both sides' logits in the divergence, never in the
            cross-entropy. A number, or a 0-d tensor.
        alpha: weight of the divergence, in [0, 1]; below 1 needs labels. A number, or a tensor,
            0-d or (...). The number 0 reads no teacher, unless `return_parts` asks for what only it
            can tell.
        token_weight: (...) bool or float weights w, on top of `ignore_index`.
        reduction: "mean", "sum" of w l, or "none": w l for every position, (...).
        num_items: divides the sum instead of Σ w under "mean": the token count of the whole batch
            under gradient accumulation or data parallelism, an int or a 0-d tensor. Where gradients
            are averaged over processes (DDP, FSDP), multiply the loss by their number.
        shift: position i predicts label i + 1, as in Hugging Face's causal-LM tensors; no logits
            are copied. `token_weight`, and an `alpha` of this shape, are shifted along with the
            labels.
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
            or top-k ids out of range, ids that repeat, and tensors that hold what a number must not
            be, raise ValueError on the CPU and a device assertion on a GPU, without a sync. What
            stands in positions that count nowhere is not looked at.
        RuntimeError: under `torch.func` transforms and forward-mode differentiation, and where the
            gradient is differentiated: it is computed in closed form.

    Memory:
        Dense logits: one buffer of the student's shape and type, the gradient (none with `inplace`,
        or without gradients), and at most a few KB per row. `LMHead`: one chunk's logits, the
        gradients of what requires one, where a head of low precision is trained in several chunks
        its gradient in fp32, and under autocast the weights in its type. An fp16 student's
        gradient, and an `LMHead`'s under reduction "none", is computed in the backward pass, where
        the upstream factor (loss scaling) is known; the inputs of both sides are kept until then,
        and the logits that are made here are made twice. On a CPU under Linux, up to 128 MiB are
        kept for the next call after the backward pass (`fastkd.buffers`).

    torch.compile takes Python numbers (temperature, alpha, a divergence's own) as constants, and
    compiles again for each value; a schedule is best a tensor that is filled anew.
    """
    _check_settings(
        dict(
            temperature=temperature, alpha=alpha, reduction=reduction, vocab=vocab,
            ignore_index=ignore_index, workspace_bytes=workspace_bytes,
        )
    )  # fmt: skip
    d = divergences.get(divergence)
    for name, x in (("labels", labels), ("token_weight", token_weight)):
        if shards.is_dtensor(x):
            raise TypeError(f"{name} must be a plain tensor, the same on all ranks, got a DTensor")
    student, teacher, group = shards.from_dtensors(student, teacher, group)
    group = "" if group is None else shards.name_of(group)
    s = as_source("student", student)
    t = None if teacher is None else as_source("teacher", teacher)
    _check_transforms(s, t)
    _check_student(s, shift)
    _check_teacher(s, t, d, temperature, alpha)
    _check_numbers(s.device, alpha=alpha, temperature=temperature, divergence=d)
    _check_rows(s, labels, token_weight, alpha)
    _check_num_items(num_items, reduction, s.device)
    n = _check_vocabulary(s, t, vocab, sharded=bool(group))

    # What has no part in loss and report is not read.
    learns = "by row" if isinstance(alpha, Tensor) else alpha > 0
    if not (learns or return_parts):
        t = None
    if t is None:
        temperature, vocab = 1.0, "strict"
    temperature = _wide(temperature)
    at = _positions(s, labels, token_weight, alpha, shift, ignore_index)
    sizes = None
    if group and _needs_sizes(s, t, labels, d, vocab):
        sizes = shards.sizes(s.entries, n, group, at.weight)
        n = {"strict": sizes[:, 0].sum(), "shared": sizes[:, 1].sum()}.get(vocab, vocab)
    if labels is not None:
        size = s.entries if sizes is None else sizes[:, 0].sum()
        require_ids("labels", at.labels, ~at.counts, size, "ignore_index")
    if t is not None:
        t.check_rows(at.counts, n, vocab == "strict")
    wants_entropy = labels is not None and (not _is_one(alpha) or return_parts)

    weight = _shares(at.weight.reshape(-1), reduction, num_items)
    d, c = d.compensated(temperature) if compensate else (d, 1.0)
    factors = torch.stack((weight, weight * (at.alpha * c), weight * (1 - at.alpha)))
    call = Call(
        s, t, d, temperature, vocab, learns, workspace_bytes or WORKSPACE_BYTES,
        _autocast_of(s.device), group, sizes,
    )  # fmt: skip
    spec, numbers, tensors = pack(call)
    of_student, of_teacher = len(tensors_of(s)), len(tensors_of(t))
    inputs = of_student + of_teacher
    tensors[inputs:] = [_wide(x) for x in tensors[inputs:]]
    enabled = torch.is_grad_enabled()
    wants = [enabled and x.requires_grad for x in tensors[:of_student]]
    # In the backward pass, where the upstream factors are known: fp16 would lose small gradients in
    # a cast before, and a weight's gradient cannot be scaled row by row after.
    in_backward = s.dtype == torch.float16 or (reduction == "none" and not s.row_by_row)
    overwrites = inplace and s.may_be_overwritten and not torch.compiler.is_compiling()
    weighs = [learns, wants_entropy and not _is_one(alpha)]
    how = _How(
        spec, numbers, wants, weighs, learns == "by row", in_backward, reduction == "none",
        return_parts, overwrites, _link(tensors, wants),
    )  # fmt: skip
    targets = at.labels.masked_fill(~at.counts, 0).reshape(-1) if wants_entropy else None
    loss, rows = _Loss.apply(how, targets, factors.detach(), *tensors)
    loss = loss.view(s.leading) if reduction == "none" else loss
    if not return_parts:
        return loss
    rows = rows * weight
    rows = rows.view(len(rows), *s.leading) if reduction == "none" else rows.sum(1)
    parts = dict(zip(MEASURES, rows, strict=True))
    known = {"divergence": t is not None, "cross_entropy": wants_entropy}
    softmax = t is not None and any(part.kind != "logits" for _, part in d.parts)
    known |= dict.fromkeys(MEASURES[2:5], softmax)
    known["teacher_mass"] = t is not None and t.sparse
    kd, ce, *others = (parts[name] if known[name] else None for name in MEASURES)
    return KDParts(loss, kd, ce, at.counts.sum(), *others)


class Settings(TypedDict, total=False):
    """The keyword settings of `kd_loss` that a `KDLoss` keeps."""

    divergence: str | Divergence
    temperature: float | Tensor
    alpha: float | Tensor
    reduction: str
    ignore_index: int
    shift: bool
    compensate: bool
    vocab: str | int
    group: Any
    inplace: bool
    workspace_bytes: int | None
    return_parts: bool


_PARAMETERS = inspect.signature(kd_loss).parameters
_DEFAULTS = {name: _PARAMETERS[name].default for name in Settings.__annotations__}


class KDLoss(torch.nn.Module):
    """`kd_loss` as a module: settings at construction, tensors in the call.

    Args:
        **settings: the keyword arguments of `kd_loss`, but `token_weight` and `num_items`.

    Raises:
        TypeError, ValueError: unknown settings, or values that `kd_loss` would refuse.
    """

    def __init__(self, **settings: Unpack[Settings]):
        super().__init__()
        unknown = sorted(set(settings) - set(_DEFAULTS))
        if unknown:
            raise TypeError(f"unknown settings {unknown}; known: {sorted(_DEFAULTS)}")
        self.settings = _DEFAULTS | settings
        self.settings["divergence"] = divergences.get(self.settings["divergence"])
        _check_settings(self.settings)

    def forward(
        self,
        student: Tensor | Source,
        teacher: Tensor | Source | None,
        labels: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor | KDParts:
        return kd_loss(
            student, teacher, labels, token_weight=token_weight, num_items=num_items,
            **self.settings,
        )  # fmt: skip

    def extra_repr(self) -> str:
        changed = (
            f"{name}={value}"
            for name, value in self.settings.items()
            if name == "divergence" or value is not _DEFAULTS[name]
        )
        return ", ".join(changed)


# For `help` and completion: the settings by name.
KDLoss.__signature__ = inspect.Signature([_PARAMETERS[name] for name in _DEFAULTS])


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Of those that are numbers or words; tensors are looked at with the rows."""
    temperature, alpha = settings["temperature"], settings["alpha"]
    check_number("temperature", temperature)
    message = "temperature must be positive and finite, got {}"
    require((temperature > 0) & (temperature < math.inf), message, temperature)
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise TypeError(f"alpha must be a number or a float tensor, got {alpha.dtype}")
        check_constant("alpha", alpha)
    else:
        check_number("alpha", alpha)
        require(0 <= alpha <= 1, "alpha must be in [0, 1], got {}", alpha)
    if settings["reduction"] not in ("mean", "sum", "none"):
        raise ValueError(
            f"reduction must be 'mean', 'sum' or 'none', got {settings['reduction']!r}"
        )
    workspace_bytes, ignore_index = settings["workspace_bytes"], settings["ignore_index"]
    if workspace_bytes is not None:
        if not _is_int(workspace_bytes):
            raise TypeError(
                f"workspace_bytes must be an int or None, got {type(workspace_bytes).__name__}"
            )
        if workspace_bytes <= 0:
            raise ValueError(f"workspace_bytes must be positive, got {workspace_bytes}")
    if not _is_int(ignore_index):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    vocab = settings["vocab"]
    if vocab not in ("strict", "shared") and not (_is_int(vocab) and vocab > 0):
        raise ValueError(
            f"vocab must be 'strict', 'shared' or a positive number of entries, got {vocab!r}"
        )


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_one(alpha: float | Tensor) -> bool:
    return not isinstance(alpha, Tensor) and alpha == 1


class _Positions(NamedTuple):
    """What is said of every position, as the logits are numbered."""

    weight: Tensor  # (...), 0 where a position counts nowhere
    counts: Tensor  # (...) bool
    labels: Tensor | None  # (...) int64
    alpha: float | Tensor  # a number, or (T,)


def _positions(s: Source, labels, token_weight, alpha, shift: bool, ignore_index: int):
    leading, dtype = s.leading, torch.float64 if s.dtype == torch.float64 else torch.float32
    if token_weight is None:
        weight = torch.ones(leading, dtype=dtype, device=s.device)
    else:
        weight = token_weight.to(dtype)
    labels = None if labels is None else labels.long()
    per_position = isinstance(alpha, Tensor) and alpha.dim() > 0
    if shift and leading[-1]:
        weight = F.pad(weight[..., 1:], (0, 1))
        labels = None if labels is None else F.pad(labels[..., 1:], (0, 1), value=ignore_index)
        alpha = F.pad(alpha[..., 1:], (0, 1)) if per_position else alpha
    if labels is not None:
        weight = weight.masked_fill(labels == ignore_index, 0)
    counts = weight != 0
    if isinstance(alpha, Tensor):
        alpha = alpha.masked_fill(~counts, 0) if per_position else alpha
        require((alpha >= 0) & (alpha <= 1), "alpha must be in [0, 1], got {}", alpha)
        alpha = alpha.to(dtype).reshape(-1) if per_position else alpha.to(dtype)
    return _Positions(weight, counts, labels, alpha)


def _shares(weight: Tensor, reduction: str, num_items: int | Tensor | None) -> Tensor:
    """Each row's share in the loss."""
    if reduction != "mean":
        return weight
    total = weight.sum() if num_items is None else num_items
    if isinstance(total, Tensor):
        return weight / torch.where(total == 0, 1, total)
    return weight / (total or 1)


def _autocast_of(device: torch.device) -> str:
    """The type of the caller's autocast, or ""."""
    if not torch.is_autocast_enabled(device.type):
        return ""
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")


def _check_transforms(*sources: Source | None) -> None:
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(_CLOSED_FORM.format("goes through no torch.func transform"))
    if forward_ad._current_level >= 0:
        for x in tensors_of(sources):
            if forward_ad.unpack_dual(x).tangent is not None:
                raise RuntimeError(_CLOSED_FORM.format("has no forward-mode derivative"))


def _check_numbers(device: torch.device, **numbers: Any) -> None:
    """Those that are tensors are where they can be read: on the host, or beside the student."""
    for name, value in numbers.items():
        for x in tensors_of(value):
            if x.device.type not in ("cpu", device.type):
                raise ValueError(f"{name} is on {x.device}, the student on {device}")


def _wide(x: Any) -> Any:
    """A number that is a tensor, in float64: what follows from it is rounded once, in the end."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.device.type != "mps":
        return x.double()
    return x


def _check_num_items(num_items, reduction: str, device: torch.device) -> None:
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items divides the mean, but reduction is {reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0 or num_items.requires_grad:
            raise ValueError(
                "num_items must be a number or a 0-d tensor that does not require grad, got shape"
                f" {shape_of(num_items)}"
            )
        if num_items.device.type not in ("cpu", device.type):
            raise ValueError(f"num_items is on {num_items.device}, the student on {device}")
        message = "num_items must be finite and not negative, got {}"
        require((num_items >= 0) & (num_items < math.inf), message, num_items)
    elif isinstance(num_items, bool) or not isinstance(num_items, (int, float)):
        raise TypeError(
            f"num_items must be a number or a 0-d tensor, got {type(num_items).__name__}"
        )
    elif not 0 <= num_items < math.inf:
        raise ValueError(f"num_items must be finite and not negative, got {num_items}")


def _check_student(s: Source, shift: bool) -> None:
    if type(s).student is Source.student:
        raise TypeError(
            "student must be a tensor of logits, an LMHead or another source with gradients, got"
            f" {type(s).__name__}"
        )
    s.dtype  # noqa: B018 - raises where the dtypes of an LM head disagree
    if shift and not s.leading:
        raise ValueError(f"shift needs (..., length, V) logits, got shape {s.shape}")


def _check_teacher(
    s: Source, t: Source | None, d: Divergence, temperature: float | Tensor, alpha: float | Tensor
) -> None:
    if t is None:
        if isinstance(alpha, Tensor) or alpha != 0:
            raise ValueError(
                f"teacher is None: only the cross-entropy is left, with alpha = 0, got {alpha}"
            )
        return
    t.dtype  # noqa: B018
    if s.leading != t.leading:
        raise ValueError(
            "student and teacher must agree in all dimensions but the last, got shapes"
            f" {s.shape} and {t.shape}"
        )
    if t.device != s.device:
        raise ValueError(f"teacher is on {t.device}, the student on {s.device}")
    if t.differentiated:
        raise ValueError(
            f"the teacher is never differentiated, but its {', '.join(t.differentiated)} require"
            " grad: compute them under no_grad"
        )
    t.check(d, temperature)


def _check_rows(s: Source, labels, token_weight, alpha) -> None:
    """Shapes and types; values are looked at where they count."""
    for name, x in (("labels", labels), ("token_weight", token_weight), ("alpha", alpha)):
        if isinstance(x, Tensor) and x.dim() and x.device != s.device:
            raise ValueError(f"{name} is on {x.device}, the student on {s.device}")
    if labels is not None:
        check_integers("labels", labels)
        if labels.shape != s.leading:
            raise ValueError(
                "labels must have the shape of the logits without the last dimension,"
                f" {tuple(s.leading)}, got {shape_of(labels)}"
            )
    elif isinstance(alpha, Tensor) or alpha < 1:
        what = f"a tensor of shape {shape_of(alpha)}" if isinstance(alpha, Tensor) else alpha
        raise ValueError(f"alpha = {what} mixes in the cross-entropy, which needs labels")
    if isinstance(alpha, Tensor) and alpha.shape not in ((), s.leading):
        raise ValueError(
            f"alpha must be a number, a 0-d tensor or of shape {tuple(s.leading)}, got"
            f" {shape_of(alpha)}"
        )
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
        check_constant("token_weight", token_weight)


def _check_vocabulary(s: Source, t: Source | None, vocab: str | int, sharded: bool) -> int:
    """How many entries both sides have, of this shard, before a cut to a number of them."""
    V = s.entries
    sizes = [] if t is None else [x.entries for x in leaves(t) if x.entries is not None]
    smallest = min([V, *sizes])
    if vocab == "strict" and smallest != max([V, *sizes]):
        other = next(size for size in sizes if size != V)
        raise ValueError(
            f"the vocabularies differ: student {V}, teacher {other} entries. If the first"
            f" {smallest} are the same tokens (padding columns), pass vocab='shared'; else the two"
            " models need one tokenizer"
        )
    if isinstance(vocab, int):
        if not sharded and vocab > smallest:
            sides = ", ".join([f"student {V}", *(f"teacher {size}" for size in sizes)])
            raise ValueError(f"vocab must be between 1 and {smallest} ({sides}), got {vocab}")
        return smallest if sharded else vocab
    return smallest


def _needs_sizes(s: Source, t: Source | None, labels, d: Divergence, vocab: str | int) -> bool:
    """Whether anything depends on the sizes of the other ranks' shards."""
    alone = s.alone_in_shards and (t is None or t.alone_in_shards)
    means = any(part.kind == "logits" for _, part in d.parts)
    return labels is not None or means or not alone or isinstance(vocab, int)


_CLOSED_FORM = (
    "kd_loss {}: its gradient is computed in closed form, once, in the forward pass. Use backward()"
    " or torch.autograd.grad, or fastkd.reference.kd_loss, which autograd differentiates"
)


class _How(NamedTuple):
    """Constants of `_Loss`."""

    spec: str  # of the packed call, and its numbers
    numbers: list[float]
    wants: list[bool]  # which of the student's tensors get a gradient
    weighs: list[bool]  # whether divergence and cross-entropy are in the loss
    by_row: bool  # whether with another weight in every row
    in_backward: bool  # when it is computed: with the upstream factors, or forwards
    per_row: bool  # losses of rows, not their sum
    diagnostics: bool
    inplace: bool
    link: Tensor | None  # to the student's graph


class _Loss(torch.autograd.Function):
    """Weighted losses of T rows, or their sum. The gradients are computed forwards, once per
    weight, and backwards only scaled; or backwards."""

    @staticmethod
    def forward(ctx, how: _How, labels, factors, *tensors):
        later = how.in_backward and any(how.wants)
        now = [False] * len(how.wants) if later else how.wants
        call = Parcel(how.spec, how.numbers, list(tensors))
        rows, grads = compare.compare(call, labels, factors, now, how.diagnostics, how.inplace)
        ctx.how, ctx.later, ctx.count = how, later, len(tensors)
        # Inference tensors cannot be saved for the backward pass; they are kept beside.
        saved = [labels, *tensors] if later else grads
        ctx.beside = [_keeps(x) for x in saved]
        saved = [None if kept is not None else x for x, kept in zip(saved, ctx.beside, strict=True)]
        ctx.save_for_backward(factors, *saved)
        kd, ce = rows[0] * factors[1], rows[1] * factors[2]
        if how.by_row:  # some factors are 0 where the value may be infinite
            kd, ce = torch.where(factors[1] == 0, 0, kd), torch.where(factors[2] == 0, 0, ce)
        loss = kd + ce if all(how.weighs) else kd if how.weighs[0] else ce
        ctx.mark_non_differentiable(rows)
        return loss if how.per_row else loss.sum(), rows

    @staticmethod
    def backward(ctx, upstream, _rows):
        how = ctx.how
        batched = torch._C._functorch.is_legacy_batchedtensor
        if not torch.compiler.is_compiling() and batched(upstream):  # is_grads_batched=True
            raise RuntimeError(_CLOSED_FORM.format("goes through no torch.func transform"))
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # create_graph=True
        factors, *saved = ctx.saved_tensors
        links, upstream = (how.link, upstream), upstream.detach()
        saved = [x if kept is None else kept for x, kept in zip(saved, ctx.beside, strict=True)]
        if not torch.compiler.is_compiling() and not _graph_is_kept():
            ctx.beside = [None] * len(saved)
        if upstream.dim() and len(upstream) and upstream.stride(0) == 0:
            upstream = upstream[0]  # the factor of a sum over the rows, expanded
        if upstream.dim():  # whatever is made of a row that does not count
            upstream = torch.where(factors[0] != 0, upstream, 0)
        if ctx.later:
            labels, *tensors = saved
            call = Parcel(how.spec, how.numbers, tensors)
            inplace = how.inplace and not _graph_is_kept()
            factors = factors * upstream
            _, grads = compare.compare(call, labels, factors, how.wants, False, inplace)
        else:
            grads = [
                _scale(grad, upstream) if wanted else grad
                for grad, wanted in zip(saved, how.wants, strict=True)
            ]
        grads = [g if wanted else None for g, wanted in zip(grads, how.wants, strict=True)]
        if again:
            grads = [g if g is None else _OnlyOnce.apply(g, *links) for g in grads]
        if not torch.compiler.is_compiling():
            buffers.trim_after_backward()
        return (*[None] * 3, *grads, *[None] * (ctx.count - len(grads)))


class _OnlyOnce(torch.autograd.Function):
    """A gradient that must not be differentiated, nor pass for a constant: `link` ties it to the
    student's graph, `upstream` to that of its factor."""

    @staticmethod
    def forward(ctx, grad, link, upstream):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _grad):
        raise RuntimeError(_CLOSED_FORM.format("cannot be differentiated twice"))


def _link(tensors: list[Tensor], wants: list[bool]) -> Tensor | None:
    """Of the graph of the student's tensors, without their data: an empty sum."""
    if torch.compiler.is_compiling() or not any(wants):
        return None
    wanted = [x for x, wanted in zip(tensors, wants, strict=False) if wanted]
    return sum((x if x.dim() else x[None])[:0].sum() for x in wanted)


def _keeps(x: Tensor | None) -> Tensor | None:
    inference = x is not None and not torch.compiler.is_compiling() and x.is_inference()
    return x if inference else None


def _scale(grad: Tensor, upstream: Tensor) -> Tensor:
    """`grad` times one factor, or one for each row."""
    if torch.compiler.is_compiling():
        factor = upstream.view(*grad.shape[:-1], 1) if upstream.dim() else upstream
        return (
            _scaled(grad, factor) if grad.device.type == "cpu" else (grad * factor).to(grad.dtype)
        )
    grad = grad.clone() if _graph_is_kept() else grad
    if grad.numel():
        rows = grad.view(-1, grad.shape[-1]) if grad.dim() else grad.view(1, 1)
        backend(grad.device, grad.dtype).scale_(rows, upstream)
    return grad


@torch.library.custom_op("fastkd::scaled", mutates_args=())
def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """Their product, in compiled code on a CPU: there, too, kept memory is given back after the
    backward pass."""
    buffers.trim_after_backward()
    return (grad * factor).to(grad.dtype)


@_scaled.register_fake
def _(grad, factor):
    return torch.empty_like(grad)


def _graph_is_kept() -> bool:
    """Whether the gradient may be asked for again, so that what is saved must stay as it is."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
