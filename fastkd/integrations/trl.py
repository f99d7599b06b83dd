"""TRL: `GKDTrainer` and `DistillationTrainer` with fastkd's loss."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

try:
    from trl.experimental.gkd import gkd_trainer
    from trl.trainer import distillation_trainer
except ImportError as error:
    try:
        found = f"found {version('trl')} ({error})"
    except PackageNotFoundError:
        found = "it is not installed"
    raise ImportError(f"fastkd.integrations.trl needs trl >= 1.16: {found}") from error

from fastkd.divergences import JSD, Divergence, ForwardKL, ReverseKL
from fastkd.loss import kd_loss
from fastkd.sources import LMHead

logger = logging.getLogger(__name__)

# What the first batch is compared on.
CHECKED_ROWS = 64
CHECKED_NUMBERS = 2**22  # of logits, or of a head
EPS = torch.finfo(torch.float32).eps

# The functions that are replaced, and the parameters that are known of them.
LOGITS = (
    "student_logits", "teacher_logits", "labels", "beta", "temperature", "reduction",
    "num_items_in_batch",
)  # fmt: skip
HEADS = (
    "student_hidden_states", "teacher_hidden_states", "student_lm_head_weight",
    "teacher_lm_head_weight", "completion_mask", "beta", "num_items_in_batch",
    "student_lm_head_bias", "teacher_lm_head_bias", "student_logit_scale", "teacher_logit_scale",
    "student_final_logit_softcapping", "teacher_final_logit_softcapping", "temperature",
)  # fmt: skip
TENSORS = ("hidden_states", "lm_head_weight", "lm_head_bias")  # of each side
COMPUTE_LOSS = ("self", "model", "inputs", "return_outputs", "num_items_in_batch")

_active: list[Patch] = []
_originals: list[tuple[Any, str, Any, Any]] = []  # owner, name, TRL's, ours
_checked: set[tuple] = set()  # the settings that were compared


def fused() -> Patch:
    """Make TRL's trainers use fastkd, from now until `undo`, or to the end of a `with`.

        with fused():
            trainer.train()

    | TRL's | becomes |
    |---|---|
    | `GKDTrainer.generalized_jsd_loss`, of whole logits | `kd_loss` of tensors |
    | `trl.trainer.distillation_trainer._chunked_divergence_loss` | `kd_loss` of `LMHead`s |
    | `GKDTrainer.compute_loss` | itself, times the number of processes where that is missing |

    Values and gradients of the first two stay what they are. What fastkd cannot serve goes to TRL's
    own code: `reduction="none"`, which returns a number per vocabulary entry; a teacher's logits
    that require a gradient; a beta or temperature that is a tensor; `num_items_in_batch` as a
    vector (DataParallel); heads that DeepSpeed's ZeRO-3 has sharded.

    Before its first use in each setting (beta 0, 1 or between, dtypes, reduction, with labels and
    `num_items_in_batch` or without) the loss is compared with TRL's, value and gradient, on some
    positions of the batch at hand: logits as they are with TRL's function in float64; hidden states
    and the first entries of the heads with TRL's, both in fp32. They may differ by what fp32 knows
    of a log-probability, eps · (max |z| / T + log V) on each side in each computation; and logits'
    gradients by a rounding to their dtype. Where TRL's result is not finite (logits of -inf),
    nothing is compared, and a warning says so.

    Returns:
        The `Patch`. Several may be active: TRL is itself again after the last `undo`.

    Raises:
        RuntimeError: naming the version, of a TRL whose functions are not there or take other
            parameters; and, while it trains, where the check fails, with both numbers.
    """
    return Patch()


class Patch:
    """What `fused` returns: TRL's trainers use fastkd until `undo`, or the end of a `with`."""

    def __init__(self):
        if not _active:
            _install()
        _active.append(self)

    def undo(self) -> None:
        """Give TRL its own functions back. A second time, nothing happens."""
        if self in _active:
            _active.remove(self)
            if not _active:
                _uninstall()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()


def _install() -> None:
    trainer, module = gkd_trainer.GKDTrainer, distillation_trainer
    replaced = [
        (trainer, "generalized_jsd_loss", LOGITS, _of_logits),
        (module, "_chunked_divergence_loss", HEADS, _of_heads),
        (trainer, "compute_loss", COMPUTE_LOSS, _averaged_once),
    ]
    for owner, name, parameters, _ in replaced:
        place, function = f"{owner.__name__}.{name}", vars(owner).get(name)
        known = None if function is None else tuple(inspect.signature(function).parameters)
        if known != parameters:
            what = f"has no {place}" if known is None else f"has {place}({', '.join(known)})"
            raise RuntimeError(
                f"fastkd.integrations.trl does not know trl {version('trl')}: it {what}"
            )
    for owner, name, _, replace in replaced:
        original = vars(owner)[name]
        ours = replace(getattr(owner, name))
        if isinstance(original, staticmethod):
            ours = staticmethod(ours)
        _originals.append((owner, name, original, ours))
        setattr(owner, name, ours)
    logger.info("trl %s: GKDTrainer and DistillationTrainer use fastkd's loss", version("trl"))


def _uninstall() -> None:
    for owner, name, original, ours in _originals:
        if vars(owner)[name] is ours:  # else it is inside of another wrapper, and passes on
            setattr(owner, name, original)
    _originals.clear()
    _checked.clear()


def _replacement(original: Callable, serves: Callable, check: Callable, loss: Callable) -> Callable:
    """`loss` in place of TRL's `original`, where `serves` says so; each is given an object with the
    original's arguments."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def replacement(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        a = SimpleNamespace(**bound.arguments)
        if not (_active and _numbers_fit(a) and serves(a)):
            return original(*args, **kwargs)
        if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            check(lambda a: original(**vars(a)), a)
        return loss(a)

    return replacement


def _numbers_fit(a: SimpleNamespace) -> bool:
    if not all(isinstance(x, int | float) for x in (a.beta, a.temperature)):
        return False
    n = a.num_items_in_batch
    if n is not None and not (
        n.dim() == 0 if isinstance(n, Tensor) else isinstance(n, int | float)
    ):
        return False
    return 0 <= a.beta <= 1 and 0 < a.temperature < math.inf


def _settings(a: SimpleNamespace) -> dict[str, Any]:
    """Of `kd_loss`. TRL's beta is the teacher's weight, but its ends are the two KL divergences."""
    ends: dict[float, Divergence] = {0: ForwardKL(), 1: ReverseKL()}
    divergence = ends.get(a.beta) or JSD(teacher_weight=a.beta)
    return dict(divergence=divergence, temperature=a.temperature, compensate=False)


# Whole logits


def _of_logits(original: Callable) -> Callable:
    def serves(a):
        s, t = a.student_logits, a.teacher_logits
        return (
            s.shape == t.shape
            and (a.labels is None or a.labels.shape == s.shape[:-1])
            and (a.num_items_in_batch is not None or a.reduction in ("batchmean", "sum", "mean"))
            and not (t.requires_grad and torch.is_grad_enabled())
        )

    return _replacement(original, serves, _check_logits, _loss_of_logits)


def _loss_of_logits(a: SimpleNamespace) -> Tensor:
    counts = None if a.labels is None else a.labels != -100
    s, t = a.student_logits, a.teacher_logits.detach()
    return kd_loss(s, t, token_weight=counts, num_items=_divisor(a), **_settings(a))


def _divisor(a: SimpleNamespace) -> int | float | Tensor:
    """What TRL divides the sum over positions and entries by."""
    *leading, V = a.student_logits.shape
    if a.num_items_in_batch is not None:
        return _to(a.student_logits.device, a.num_items_in_batch)
    if a.reduction == "sum":
        return 1
    if a.labels is not None:
        counted = (a.labels != -100).sum()
        return counted if a.reduction == "batchmean" else counted * V
    # Without labels a "batchmean" divides by the first dimension alone.
    return leading[0] if a.reduction == "batchmean" else math.prod(leading) * V


def _check_logits(original: Callable, a: SimpleNamespace) -> None:
    z, t, labels = a.student_logits, a.teacher_logits, a.labels
    setting = (
        "logits", _kind(a), z.dtype, t.dtype, z.device, a.reduction, labels is None,
        a.num_items_in_batch is None,
    )  # fmt: skip
    if setting in _checked or not z.numel():
        return
    _checked.add(setting)
    V = z.shape[-1]
    rows, targets = z.numel() // V, torch.zeros(1, device=z.device)
    targets = targets.expand(rows) if labels is None else labels.reshape(-1)
    order = (targets == -100).int().argsort(stable=True)  # those that count come first
    few = max(1, min(CHECKED_ROWS, CHECKED_NUMBERS // V))
    chosen = torch.cat((order[:few], order[-1:]))
    z, t = (x.detach().reshape(-1, V)[chosen][None] for x in (z, t))
    labels = None if labels is None else targets[chosen][None]
    a = _with(a, student_logits=z, teacher_logits=t, labels=labels)

    wide = _with(a, student_logits=z.double(), teacher_logits=t.double())
    ours = _results(_loss_of_logits, a, ["student_logits"])
    theirs = _results(original, wide, ["student_logits"])
    counted = len(chosen) if labels is None else int((labels != -100).sum())
    share = counted / (float(_divisor(a)) or 1)
    error = _error(a, max(_largest(z), _largest(t)), V)
    value = error * (share + abs(theirs["loss"].item()))
    slope = value / a.temperature
    stored = torch.finfo(z.dtype)  # small fp16 numbers are a fixed distance apart
    norm = theirs["student_logits"].norm().item() + stored.smallest_normal * z.numel() ** 0.5
    rounding = stored.eps * norm
    allowed = {"loss": value, "student_logits": slope + rounding}
    _compare("GKDTrainer.generalized_jsd_loss", ours, theirs, allowed)


# Hidden states and LM heads


def _of_heads(original: Callable) -> Callable:
    def serves(a):
        weights = a.student_lm_head_weight, a.teacher_lm_head_weight
        softcaps = a.student_final_logit_softcapping, a.teacher_final_logit_softcapping
        sharded = any(hasattr(x, "ds_id") for x in weights)  # ZeRO-3's, gathered by TRL
        return not sharded and all(x is None or x > 0 for x in softcaps)

    return _replacement(original, serves, _check_heads, _loss_of_heads)


def _loss_of_heads(a: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    counts = a.completion_mask.reshape(-1) != 0
    n = counts.sum()
    divisor = n.clamp(min=1) if a.num_items_in_batch is None else a.num_items_in_batch
    divisor = _to(counts.device, divisor)
    student = _head(a, "student", counts)
    with torch.no_grad():
        teacher = _head(a, "teacher", counts)
    parts = kd_loss(student, teacher, num_items=divisor, return_parts=True, **_settings(a))
    return parts.loss, parts.student_entropy * divisor, n


def _tensors(a: SimpleNamespace, side: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states (positions, H), weight and bias of a side; whole ones of FSDP's shards."""
    names = (f"{side}_{name}" for name in TENSORS)
    hidden, *head = (getattr(a, name) for name in names)
    weight, bias = (x.full_tensor() if isinstance(x, DTensor) else x for x in head)
    return hidden.reshape(-1, hidden.shape[-1]), weight, bias


def _head(a: SimpleNamespace, side: str, counts: Tensor) -> LMHead:
    """The logits of the positions that count, from a product in the type that TRL multiplies in."""
    hidden, weight, bias = _tensors(a, side)
    hidden = hidden[counts]
    scale = getattr(a, f"{side}_logit_scale")
    if bias is not None:
        bias = bias.to(hidden.dtype) * scale  # TRL scales it too
    factors = hidden, weight.to(hidden.dtype), bias
    if not torch.is_grad_enabled():
        factors = (x if x is None else x.detach() for x in factors)
    softcap = getattr(a, f"{side}_final_logit_softcapping")
    return LMHead(*factors, softcap=softcap, scale=scale)


def _check_heads(original: Callable, a: SimpleNamespace) -> None:
    hidden = a.student_hidden_states
    setting = (
        "heads", _kind(a), hidden.dtype, hidden.device, a.num_items_in_batch is None,
        a.student_lm_head_bias is None, a.student_final_logit_softcapping is None,
    )  # fmt: skip
    if setting in _checked or not a.completion_mask.any():
        return
    _checked.add(setting)
    counts = a.completion_mask.reshape(-1) != 0
    device = "cpu" if _rounds_factors(hidden.device) else hidden.device
    sides = {side: _tensors(a, side) for side in ("student", "teacher")}
    widest = max(weight.shape[1] for _, weight, _ in sides.values())
    V = min(len(a.student_lm_head_weight), max(2, CHECKED_NUMBERS // widest))
    part: dict[str, Tensor | None] = {}
    largest = 0.0
    for side, (h, weight, bias) in sides.items():
        h = h.detach()[counts][:CHECKED_ROWS]
        h = torch.cat((h, torch.ones_like(h[:1])))[None]  # and one that does not count
        head = (x if x is None else x.detach()[:V] for x in (weight, bias))
        h, weight, bias = (x if x is None else x.to(device, torch.float32) for x in (h, *head))
        names = (f"{side}_{name}" for name in TENSORS)
        part |= dict(zip(names, (h, weight, bias), strict=True))
        z = _longest(h) * _longest(weight) + (0 if bias is None else _largest(bias))
        largest = max(largest, z * abs(getattr(a, f"{side}_logit_scale")))
    mask = torch.ones(h.shape[:2], device=device)
    mask[0, -1] = 0
    a = _with(a, completion_mask=mask, **part)

    names = [f"student_{name}" for name in TENSORS if part[f"student_{name}"] is not None]
    with torch.autocast(hidden.device.type, enabled=False):
        ours, theirs = (_results(loss, a, names) for loss in (_loss_of_heads, original))
    n = mask.numel() - 1
    share = n / (float(n if a.num_items_in_batch is None else a.num_items_in_batch) or 1)
    error = _error(a, largest, V)
    value = error * (share + abs(theirs["loss"].item()))
    slope = value / a.temperature * abs(a.student_logit_scale)
    reach = (_longest(a.student_lm_head_weight), _longest(a.student_hidden_states), 1.0)
    allowed = {name: slope * x for name, x in zip(names, reach, strict=False)}
    allowed |= {"loss": value, "entropy": error * (n + theirs["entropy"].item())}
    _compare("_chunked_divergence_loss", ours, theirs, allowed)


def _rounds_factors(device: torch.device) -> bool:
    """Whether products of fp32 are made in TF32 or less there: then they are compared elsewhere."""
    x = torch.full((16, 16), 1 + 2.0**-20, device=device)
    return bool((x @ torch.eye(16, device=device) != x).any())


# GKD under data parallelism


def _averaged_once(original: Callable) -> Callable:
    """`GKDTrainer.compute_loss`, whose loss is the sum over `num_items_in_batch` of all processes,
    and whose gradient data parallelism then averages, times their number: as `Trainer` and
    `SFTTrainer` do in the methods that it overrides."""
    code = getattr(inspect.unwrap(original), "__code__", None)
    mended = code is not None and "num_processes" in code.co_names  # by TRL itself

    @functools.wraps(original)
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        made = original(self, model, inputs, return_outputs, num_items_in_batch)
        counts_all = num_items_in_batch is not None and self.args.average_tokens_across_devices
        if mended or not (_active and counts_all):
            return made
        factor = self.accelerator.num_processes // self.get_tp_size()
        return (made[0] * factor, made[1]) if return_outputs else made * factor

    return compute_loss


# The check


def _kind(a: SimpleNamespace) -> float | None:
    return a.beta if a.beta in (0, 1) else None


def _with(a: SimpleNamespace, **others: Any) -> SimpleNamespace:
    return SimpleNamespace(**vars(a) | others)


def _to(device: torch.device, number: Any) -> Any:
    return number.to(device) if isinstance(number, Tensor) else number


def _largest(x: Tensor) -> float:
    return x.masked_fill(~x.isfinite(), 0).abs().max().item()


def _longest(x: Tensor) -> float:
    return x.norm(dim=-1).max().item()


def _error(a: SimpleNamespace, largest: float, V: int) -> float:
    """What fp32 knows of a log-probability, logit minus log-sum-exp, of each side and in each of
    two computations."""
    return 8 * EPS * (largest / a.temperature + math.log(V))


def _results(loss: Callable, a: SimpleNamespace, names: list[str]) -> dict[str, Tensor]:
    """The loss, its gradients wrt the arguments `names`, and the entropy where there is one."""
    with torch.enable_grad():
        leaves = {name: getattr(a, name).detach().clone().requires_grad_() for name in names}
        made = loss(_with(a, **leaves))
        value, entropy = made[:2] if isinstance(made, tuple) else (made, None)
        grads = torch.autograd.grad(value, list(leaves.values()))
    results = {"loss": value, **dict(zip(leaves, grads, strict=True))}
    results |= {} if entropy is None else {"entropy": entropy}
    return {name: x.detach().double() for name, x in results.items()}


def _compare(
    where: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], allowed: dict[str, float]
) -> None:
    release = version("trl")
    if not all(x.isfinite().all() for x in theirs.values()):
        logger.warning("trl %s: %s is not finite here, and is not compared", release, where)
        return
    for name, tolerance in allowed.items():
        apart = (ours[name] - theirs[name]).norm().item()
        if not apart <= tolerance:
            what = name if name in ("loss", "entropy") else f"norm of the gradient of {name}"
            raise RuntimeError(
                f"fastkd and trl {release} disagree in {where}: {what}"
                f" {ours[name].norm().item():.6g} against {theirs[name].norm().item():.6g}, apart"
                f" by {apart:.2g} where rounding explains {tolerance:.2g}"
            )
