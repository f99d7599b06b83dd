"""The divergences: what each one is, and how it is computed.

p = softmax(teacher / T) and q = softmax(student / T). `teacher_weight` w always means the mixture
m = w p + (1 - w) q.

Every divergence is a frozen dataclass of numbers with

    formula      the definition in plain torch, differentiable: the truth in tests
    term         value and slope in torch, without cancellation or NaN: the eager backend
    triton_term  the same for one vocabulary entry, a Triton function: the fused kernel

The gradient follows from the slope s_v = q_v · ∂D/∂q_v, known up to a multiple of q:

    ∂D/∂z_v = (s_v - q_v Σ s) / T

Your own divergence is a subclass with a name of its own; it gets the fused kernel,
`divergence="its name"` and everything else. Pearson's χ² = Σ p²/q - 1 has the slope -p²/q, and is
+inf where q = 0 < p, which a term cannot say: its logarithms are finite.

    @triton.jit
    def chi2_term(log_p, log_q, p, q, a, b):  # a, b: the dataclass's first two numbers, or 0
        ratio = tl.exp(tl.minimum(log_p - log_q, 80.0))  # e^89 is infinite in fp32, 0 · inf a NaN
        return (p - q) * (ratio - 1), -p * ratio

    @dataclass(frozen=True)
    class PearsonChi2(fastkd.Divergence):
        name = "pearson_chi2"
        infinite_q = True

        def formula(self, log_p, log_q):
            return (2 * log_p - log_q).exp().sum(-1) - 1

        def term(self, log_p, log_q, p, q):
            ratio = (log_p - log_q).clamp(max=80).exp()
            return ((p - q) * (ratio - 1)).sum(-1), -p * ratio

        def triton_term(self):
            return chi2_term

Then `fastkd.kd_loss(student, teacher, labels, divergence="pearson_chi2")`. A built-in one does
without `triton_term`: it is found by its name in kernels/terms.py.

`fastkd.testing.check_divergence(PearsonChi2())` checks all of this, the formula against the terms
of both backends and against finite differences, and what is declared; and says what could be
declared beside (here `pooled_terms`, for top-k teachers).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.checks import check_number, require
from fastkd.packing import Packed

__all__ = [  # of the package
    "AlphaBeta",
    "Divergence",
    "ForwardKL",
    "Hellinger",
    "JSD",
    "Jeffreys",
    "LogitMSE",
    "Renyi",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "Sum",
    "TAID",
    "TVD",
]

CANCELS = 1e-2  # a divergence below this is summed again, from terms that are not negative


def kl(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """KL(p‖q) along the last dimension, with d = log(q/p).

    Σ (q - p - p d) has an error of about 1e-7: all one needs of a large divergence. A small one is
    summed again from p (e^d - 1 - d) ≥ 0. Elsewhere than on the CPU choosing would cost a device
    sync.
    """
    if p.device.type != "cpu":
        return _kl_without_cancellation(p, q, d)
    value = q.sum(-1) - p.sum(-1) - (p * d).sum(-1)
    small = (value < CANCELS).nonzero().flatten()
    if len(small):
        for rows in small.split(max(1, 2**18 // p.shape[-1])):  # the temporaries stay small
            value[rows] = _kl_without_cancellation(p[rows], q[rows], d[rows])
    return value


def _kl_without_cancellation(p, q, d):
    near = torch.expm1(d.clamp(-1, 1)).sub_(d).mul_(p)
    if p.device.type != "cpu" or not d.abs().amax() < 0.5:
        near = torch.where(d.abs() < 0.5, near, q - p - p * d)
    return near.sum(-1).clamp(min=0)


def log_mixture(d: Tensor, w: float) -> tuple[Tensor, Tensor]:
    """log(m/p) and log(m/q) of m = w p + (1 - w) q, 0 < w < 1, with d = log(q/p).

    Through the odds x = log((1 - w) q / (w p)): finite when both probabilities underflow, and
    neither is a difference of the other and d, which would lose its digits where |d| is large.
    """
    x = d + math.log((1 - w) / w)
    softplus = F.softplus(x, threshold=40)
    return softplus + math.log(w), softplus.sub_(x).add_(math.log1p(-w))


def _unit(name: str, value: float | Tensor, low_open: bool, high_open: bool) -> None:
    low, high = value > 0 if low_open else value >= 0, value < 1 if high_open else value <= 1
    interval = f"{'(' if low_open else '['}0, 1{')' if high_open else ']'}"
    require(low & high, f"{name} must be in {interval}, got {{}}", value)


@dataclass(frozen=True)
class Divergence(Packed):
    """Base of all divergences.

    A number may be a 0-d tensor, which a schedule fills anew at every step: nothing waits for the
    device, and torch.compile compiles once. `a * D1 + b * D2` with a, b > 0 is a divergence too.

    Attributes:
        name: what `kd_loss(divergence=…)` calls it.
        example: typical numbers, where they have no defaults.
        slope_sum: Σ slope of both terms where it is the same for all inputs: saves the kernel a
            pass over the vocabulary. 0 of kind "logits", whose slopes are the gradient.
        kind: "probabilities"; "mixed": the terms also get r, the softmax of (mix_teacher z_t +
            mix_student z_s) / T, detached, and have gradient q - r; "logits": the terms get the
            difference of the logits alone, less its mean times the first number, and the share that
            an entry has in a mean.
        infinite_p: D = +inf where p = 0 < q; infinite_q: where q = 0 < p. False unless it is said:
            a term cannot tell, it gets log 0 = -10,000, as the gradient then does. A 0-d bool
            tensor where it depends on a number that is one.
        pooled_terms: (c, e) of a D = Σ f(p, q) with f homogeneous of degree 1, whose outcomes may
            be pooled: over a part of the vocabulary the textbook sum is Σ (value + c (p - q)), and
            its slope is slope + e q. None: D is no such sum, and takes no top-k teacher.

    `fastkd.testing.check_divergence` checks a divergence against what it declares.
    """

    name: ClassVar[str] = ""
    example: ClassVar[tuple[float, ...]] = ()
    kind: ClassVar[str] = "probabilities"
    slope_sum: ClassVar[float | None] = None
    pooled_terms: ClassVar[tuple[float, float] | None] = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("name")  # an inherited name stays its owner's
        if name:
            owner = _REGISTRY.setdefault(name, cls)
            if (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"the divergence name {name!r} belongs to {owner.__qualname__}")
            _REGISTRY[name] = cls

    @property
    def infinite_p(self) -> bool | Tensor:
        return False

    @property
    def infinite_q(self) -> bool | Tensor:
        return False

    @property
    def mixing(self) -> tuple[float | Tensor, float | Tensor]:
        """(mix_student, mix_teacher) of kind "mixed"."""
        return 0.0, 0.0

    @property
    def parts(self) -> tuple[tuple[float | Tensor, Divergence], ...]:
        """What D is a weighted sum of: (weight, divergence) each."""
        return ((1.0, self),)

    @property
    def numbers(self) -> tuple[float | Tensor, float | Tensor]:
        """The two constants that the Triton term gets."""
        own = [getattr(self, field.name) for field in fields(self)]
        if len(own) > 2:
            raise TypeError(
                f"{type(self).__name__} has more than the two numbers a Triton term takes: override"
                " `numbers`, or use FASTKD_BACKEND=eager"
            )
        return (*(x if isinstance(x, Tensor) else float(x) for x in own), 0.0, 0.0)[:2]

    def compensation(self, temperature: float | Tensor) -> float | Tensor:
        """c(T), which keeps the gradient's size when the temperature changes."""
        return temperature**2

    def compensated(self, temperature: float | Tensor) -> tuple[Divergence, float | Tensor]:
        """The divergence and the factor that c(T) makes of it; parts of a sum have their own."""
        return self, self.compensation(temperature)

    def __rmul__(self, weight: float | Tensor) -> Sum:
        check_number("the weight of a divergence", weight)
        return Sum(tuple(weight * w for w, _ in self.parts), tuple(d for _, d in self.parts))

    __mul__ = __rmul__

    def __add__(self, other: Divergence) -> Sum:
        if not isinstance(other, Divergence):
            return NotImplemented
        weights, divergences = zip(*self.parts, *other.parts, strict=True)
        return Sum(weights, divergences)

    def __radd__(self, other: int) -> Divergence:
        return self if other == 0 else NotImplemented  # of Python's `sum`

    def formula(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The definition: (..., V) log-probabilities of teacher and student to (...) values."""
        raise TypeError(f"{type(self).__name__} has no formula")

    def reference(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """The definition on logits, differentiable wrt the student's: (..., V) to (...)."""
        return self.formula(_log_softmax(teacher, temperature), _log_softmax(student, temperature))

    def term(self, log_p, log_q, p, q):
        """(rows, V) tensors to the rows' values, as sums over V (the columns may be a shard of the
        vocabulary), and the (rows, V) slopes.

        Where there is nothing of a side its probability is 0 and its logarithm -10,000: a power of
        a ratio needs a bound (e^88 in fp32), for an infinite slope makes a NaN. Values that are
        sums of what is not negative keep their digits where p is near q.

        All but q may be overwritten, and the slopes may be what was p. Kind "mixed" gets (log_p,
        log_q, log_r, p, q, r), kind "logits" (difference, share).
        """
        raise TypeError(f"{type(self).__name__} has no torch term")

    def triton_term(self):
        """The `@triton.jit` function (log_p, log_q, p, q, a, b) -> (value, slope), the same as
        `term` of one entry, to the multiple of q that the slope leaves out, with log_r after log_q
        and r after q for kind "mixed". Default: the one of this name in kernels/terms.py."""
        from fastkd.kernels import terms  # triton is not needed before a kernel is

        if not hasattr(terms, self.name):
            raise TypeError(f"{type(self).__name__} has no Triton term: use FASTKD_BACKEND=eager")
        return getattr(terms, self.name)


_REGISTRY: dict[str, type[Divergence]] = {}


def _log_softmax(logits, temperature):
    return F.log_softmax(logits / temperature, -1)


def _definition_of_kl(log_a, log_b):
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def _log_m(log_p, log_q, w):
    return torch.logaddexp(
        log_p + math.log(w) if w else torch.full_like(log_p, -math.inf), log_q + math.log1p(-w)
    )


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p‖q) = Σ p log(p/q). Gradient (q - p)/T. Hinton, Vinyals, Dean: Distilling the Knowledge
    (2015)."""

    name = "forward_kl"
    slope_sum = -1.0
    infinite_q = True
    pooled_terms = (1.0, 0.0)

    def formula(self, log_p, log_q):
        return _definition_of_kl(log_p, log_q)

    def term(self, log_p, log_q, p, q):
        return kl(p, q, log_q.sub_(log_p)), p.neg_()


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q‖p) = Σ q log(q/p). Gradient q (d - D)/T with d = log(q/p). Gu et al.: MiniLLM (2023)."""

    name = "reverse_kl"
    infinite_p = True
    pooled_terms = (-1.0, 1.0)

    def formula(self, log_p, log_q):
        return _definition_of_kl(log_q, log_p)

    def term(self, log_p, log_q, p, q):
        d = log_p.sub_(log_q)
        return kl(q, p, d), d.mul_(q).neg_()


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(p‖m), m = w p + (1 - w) q, 0 ≤ w < 1. Ko et al.: DistiLLM (2024)."""

    teacher_weight: float = 0.1
    name = "skew_forward_kl"

    def __post_init__(self):
        _unit("SkewForwardKL's teacher_weight", self.teacher_weight, low_open=False, high_open=True)

    @property
    def infinite_q(self):
        return self.teacher_weight == 0

    @property
    def pooled_terms(self):
        return 1 - self.teacher_weight, 0.0

    def formula(self, log_p, log_q):
        return _definition_of_kl(log_p, _log_m(log_p, log_q, self.teacher_weight))

    def term(self, log_p, log_q, p, q):
        w = self.teacher_weight
        d = log_q.sub_(log_p)
        if w == 0:
            return kl(p, q, d), p.neg_()
        slope = torch.sigmoid(d + math.log((1 - w) / w)).mul_(p).neg_()  # (1 - w) q/m is a sigmoid
        return kl(p, p * w + q * (1 - w), log_mixture(d, w)[0]), slope


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q‖m), m = w p + (1 - w) q, 0 < w ≤ 1; m is not detached. Ko et al.: DistiLLM (2024), whose
    0.1 is 1 - w."""

    teacher_weight: float = 0.9
    name = "skew_reverse_kl"

    def __post_init__(self):
        _unit("SkewReverseKL's teacher_weight", self.teacher_weight, low_open=True, high_open=False)

    @property
    def infinite_p(self):
        return self.teacher_weight == 1

    @property
    def pooled_terms(self):
        return -self.teacher_weight, 1.0

    def formula(self, log_p, log_q):
        if self.teacher_weight == 1:
            return _definition_of_kl(log_q, log_p)
        return _definition_of_kl(log_q, _log_m(log_p, log_q, self.teacher_weight))

    def term(self, log_p, log_q, p, q):
        w = self.teacher_weight
        if w == 1:
            d = log_p.sub_(log_q)
            return kl(q, p, d), d.mul_(q).neg_()
        d = log_q.sub_(log_p)
        v = log_mixture(d, w)[1]
        slope = torch.sigmoid(d.add_(math.log((1 - w) / w))).add_(v)
        return kl(q, p * w + q * (1 - w), v), slope.mul_(q).neg_()


@dataclass(frozen=True)
class JSD(Divergence):
    """w KL(p‖m) + (1 - w) KL(q‖m), 0 < w < 1. Agarwal et al.: On-policy distillation, GKD (2023),
    whose beta is w."""

    teacher_weight: float = 0.5
    name = "jsd"
    pooled_terms = (0.0, 0.0)

    def __post_init__(self):
        _unit("JSD's teacher_weight", self.teacher_weight, low_open=True, high_open=True)

    def formula(self, log_p, log_q):
        w = self.teacher_weight
        log_m = _log_m(log_p, log_q, w)
        return w * _definition_of_kl(log_p, log_m) + (1 - w) * _definition_of_kl(log_q, log_m)

    def term(self, log_p, log_q, p, q):
        w = self.teacher_weight
        m = p * w + q * (1 - w)
        u, v = log_mixture(log_q.sub_(log_p), w)
        return w * kl(p, m, u) + (1 - w) * kl(q, m, v), v.mul_(q).mul_(w - 1)


@dataclass(frozen=True)
class Jeffreys(Divergence):
    """f KL(p‖q) + (1 - f) KL(q‖p), 0 ≤ f ≤ 1. Jeffreys (1946)."""

    forward_weight: float = 0.5
    name = "jeffreys"

    def __post_init__(self):
        _unit("Jeffreys's forward_weight", self.forward_weight, low_open=False, high_open=False)

    @property
    def infinite_p(self):
        return self.forward_weight < 1

    @property
    def infinite_q(self):
        return self.forward_weight > 0

    @property
    def pooled_terms(self):
        return 2 * self.forward_weight - 1, 1 - self.forward_weight

    def formula(self, log_p, log_q):
        f = self.forward_weight
        return f * _definition_of_kl(log_p, log_q) + (1 - f) * _definition_of_kl(log_q, log_p)

    def term(self, log_p, log_q, p, q):
        f = self.forward_weight
        d = log_q.sub_(log_p)
        value = f * kl(p, q, d) + (1 - f) * kl(q, p, torch.neg(d, out=log_p))
        return value, d.mul_(q).mul_(1 - f).sub_(p, alpha=f)


@dataclass(frozen=True)
class TVD(Divergence):
    """Total variation ½ Σ|p - q|; c(T) = T. Wen et al.: f-divergence minimisation for sequence
    distillation (2023)."""

    name = "tvd"
    pooled_terms = (0.0, 0.0)

    def compensation(self, temperature):
        return temperature

    def formula(self, log_p, log_q):
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)

    def term(self, log_p, log_q, p, q):
        difference = torch.sub(q, p, out=p)
        value = torch.linalg.vector_norm(difference, 1, -1) / 2
        # As in `kl`: a small one is summed again, from |p (e^d - 1)|.
        rows = value < CANCELS if value.device.type == "cpu" else slice(None)
        if isinstance(rows, slice) or rows.any():
            d = log_q[rows] - log_p[rows]
            near = torch.expm1(d.clamp(max=1)).mul_(log_p[rows].exp()).abs_()
            near = torch.where(d.abs() < 0.5, near, difference[rows].abs())
            value[rows] = near.sum(-1) / 2
        return value, difference.sign_().mul_(q).mul_(0.5)


@dataclass(frozen=True)
class Hellinger(Divergence):
    """Squared Hellinger distance 1 - Σ√(pq) = ½ Σ(√p - √q)². Hellinger (1909)."""

    name = "hellinger"
    pooled_terms = (0.0, 0.5)  # of ½ Σ(√p - √q)²

    def formula(self, log_p, log_q):
        return 1 - ((log_p + log_q) / 2).exp().sum(-1)

    def term(self, log_p, log_q, p, q):
        half = log_q.sub_(log_p).mul_(0.5 / math.log(2)).clamp_(max=87)  # p = 0: no overflow
        root = torch.exp2(half, out=log_p).mul_(p)  # √(pq)
        value = (p + q).mul_(0.5).sub_(root).sum(-1)
        # As in `kl`: a small one is summed again, from p (e^(d/2) - 1)².
        rows = value < CANCELS if value.device.type == "cpu" else slice(None)
        if isinstance(rows, slice) or rows.any():
            near = torch.expm1(half[rows].clamp(max=1) * math.log(2)).square_().mul_(p[rows]) / 2
            far = (p[rows] + q[rows]) / 2 - root[rows]
            value[rows] = torch.where(half[rows].abs() < 0.5, near, far).sum(-1)
        return value, root.mul_(-0.5)


@dataclass(frozen=True)
class Renyi(Divergence):
    """1/(a - 1) log Σ p^a q^(1-a), order a > 0, a ≠ 1. Gradient (q - r)/T with r ∝ p^a q^(1-a).
    Rényi (1961)."""

    order: float
    name = "renyi"
    example = (0.5,)
    kind = "mixed"
    slope_sum = -1.0

    def __post_init__(self):
        order = self.order
        require(
            (order > 0) & (order != 1) & (order < math.inf),
            "Renyi's order must be positive, finite and not 1 (forward KL is its limit), got {}",
            order,
        )

    @property
    def infinite_q(self):
        return self.order > 1

    @property
    def mixing(self):
        return 1 - self.order, self.order

    def formula(self, log_p, log_q):
        return torch.logsumexp(self.order * log_p + (1 - self.order) * log_q, -1) / (self.order - 1)

    def term(self, log_p, log_q, log_r, p, q, r):
        # -log Σ p^a q^(1-a) = a KL(r‖p) + (1 - a) KL(r‖q), which does not cancel.
        a = self.order
        value = kl(r, q, log_q.sub_(log_r)) + a / (1 - a) * kl(r, p, log_p.sub_(log_r))
        return value, r.neg_()


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """-1/(αβ) Σ [p^α q^β - α/(α+β) p^(α+β) - β/(α+β) q^(α+β)]; α, β, α+β ≠ 0.

    Forward KL is the limit (1, 0), reverse KL (0, 1). Negative exponents overflow: powers stop at
    2^100. Wang et al.: ABKD (2025); Cichocki, Cruces, Amari (2011).
    """

    alpha: float
    beta: float
    name = "alpha_beta"
    example = (0.2, 0.7)

    def __post_init__(self):
        a, b = self.alpha, self.beta
        finite = abs(a + b) < math.inf
        require(
            (a != 0) & (b != 0) & (a + b != 0) & finite,
            "AlphaBeta's alpha, beta and alpha + beta must be finite and not 0 (the limits (1, 0)"
            " and (0, 1) are ForwardKL and ReverseKL), got {}",
            (a, b),
        )

    @property
    def infinite_p(self):
        return (self.alpha < 0) | (self.alpha + self.beta < 0)

    @property
    def infinite_q(self):
        return (self.beta < 0) | (self.alpha + self.beta < 0)

    def formula(self, log_p, log_q):
        a, b = self.alpha, self.beta
        cross = (a * log_p + b * log_q).exp()
        powers = (a / (a + b)) * ((a + b) * log_p).exp() + (b / (a + b)) * ((a + b) * log_q).exp()
        return (powers - cross).sum(-1) / (a * b)

    def term(self, log_p, log_q, p, q):
        a, b = self.alpha, self.beta
        s = a + b
        cross = _power(a * log_p + b * log_q)
        p_s, q_s = _power(s * log_p), _power(s * log_q)
        far = (a / s * p_s + b / s * q_s - cross).div_(a * b)
        value = far.sum(-1)
        # As in `kl`: where terms cancel, p^s ((β/s) k(s d) - k(β d)) / (αβ), k(x) = e^x - 1 - x.
        rows = value < CANCELS * p_s.sum(-1) if value.device.type == "cpu" else slice(None)
        if isinstance(rows, slice) or rows.any():
            d = log_q[rows] - log_p[rows]
            near = p_s[rows] * (b / s * _expm1_minus(s * d) - _expm1_minus(b * d)) / (a * b)
            small = (d * max(abs(s), abs(b))).abs() < 0.5
            value[rows] = torch.where(small, near, far[rows]).sum(-1).clamp(min=0)
        return value, q_s.sub_(cross).div_(a)


def _power(log_x):
    limit = 100 if log_x.dtype == torch.float32 else 900  # negative exponents overflow
    return torch.exp2(log_x.mul_(1 / math.log(2)).clamp_(max=limit))


def _expm1_minus(x):
    return torch.expm1(x.clamp(-1, 1)) - x


@dataclass(frozen=True)
class TAID(Divergence):
    """KL(r‖q), r = softmax(((1 - t) stopgrad(z_s) + t z_t) / T), 0 ≤ t ≤ 1. Shing et al.: TAID
    (2025).

    The caller moves t from near 0 to 1 during training.
    """

    t: float
    name = "taid"
    example = (0.5,)
    kind = "mixed"
    slope_sum = -1.0

    def __post_init__(self):
        _unit("TAID's t", self.t, low_open=False, high_open=False)

    @property
    def infinite_q(self):
        return self.t == 1

    @property
    def mixing(self):
        return 1 - self.t, self.t

    def reference(self, student, teacher, temperature):
        mixed = (1 - self.t) * student.detach() + self.t * teacher
        return _definition_of_kl(
            _log_softmax(mixed, temperature), _log_softmax(student, temperature)
        )

    def term(self, log_p, log_q, log_r, p, q, r):
        return kl(r, q, log_q.sub_(log_r)), r.neg_()


@dataclass(frozen=True)
class LogitMSE(Divergence):
    """Mean over the vocabulary of (z_s - z_t)²; `centered` subtracts each side's mean first. No
    temperature, c = 1.

    Kim et al.: Comparing KL divergence and mean squared error in distillation (2021).
    """

    centered: bool = False
    name = "logit_mse"
    kind = "logits"
    slope_sum = 0.0

    def term(self, difference, share):
        value = difference.square().sum(-1) * share
        return value, difference.mul_(2 * share)

    def compensation(self, temperature):
        return 1.0

    def reference(self, student, teacher, temperature):
        difference = student - teacher
        if self.centered:
            difference = difference - difference.mean(-1, keepdim=True)
        return difference.square().mean(-1)


@dataclass(frozen=True)
class Sum(Divergence):
    """Σ weight · divergence, each part with its own c(T): what `0.5 * ForwardKL() + 0.5 * TVD()`
    makes. One pass; the same as the sum of a loss for each part, weighted.

    `KDParts.divergence` is the sum without c(T) where all parts have the same, else with it. A sum
    holds at most one divergence of mixed logits (TAID, Rényi). In a function that torch.compile
    traces, tensors as weights go in here: `Sum((w, 1 - w), (ForwardKL(), TVD()))`.

    Attributes:
        weights: positive numbers, or 0-d tensors. divergences: as many.
    """

    weights: tuple[float | Tensor, ...]
    divergences: tuple[Divergence, ...]
    kind = "sum"

    def __post_init__(self):
        for weight in self.weights:
            check_number("the weight of a divergence", weight)
            require(
                (weight > 0) & (weight < math.inf),
                "the weight of a divergence must be positive and finite, got {}",
                weight,
            )
        mixed = [d for d in self.divergences if d.kind == "mixed"]
        if len(mixed) > 1:
            raise ValueError(
                "a sum holds at most one divergence of mixed logits, got"
                f" {' and '.join(map(str, mixed))}"
            )

    def __str__(self):
        return " + ".join(f"{w} * {d}" for w, d in self.parts)

    @property
    def parts(self):
        return tuple(zip(self.weights, self.divergences, strict=True))

    @property
    def infinite_p(self):
        return _any(d.infinite_p for d in self.divergences)

    @property
    def infinite_q(self):
        return _any(d.infinite_q for d in self.divergences)

    @property
    def pooled_terms(self):
        if any(d.pooled_terms is None for d in self.divergences):
            return None
        return tuple(sum(w * d.pooled_terms[i] for w, d in self.parts) for i in (0, 1))

    def compensated(self, temperature):
        factors = [d.compensation(temperature) for d in self.divergences]
        own = [d for d in self.divergences if type(d).compensation is not Divergence.compensation]
        numbers = not any(isinstance(c, Tensor) for c in factors)
        if not own or (numbers and len(set(factors)) == 1):
            return self, factors[0]
        weights = [w * c for w, c in zip(self.weights, factors, strict=True)]
        return Sum(tuple(weights), self.divergences), 1.0

    def reference(self, student, teacher, temperature):
        return sum(w * d.reference(student, teacher, temperature) for w, d in self.parts)

    def formula(self, log_p, log_q):
        return sum(w * d.formula(log_p, log_q) for w, d in self.parts)

    def term(self, log_p, log_q, p, q):
        """Of parts that are neither mixed nor of logits."""
        total, slopes = 0, 0
        for w, d in self.parts:
            value, slope = d.term(log_p.clone(), log_q.clone(), p.clone(), q)
            total, slopes = total + w * value, slopes + w * slope
        return total, slopes


def _any(flags):
    """Of bools, or of 0-d tensors where one is."""
    total = False
    for flag in flags:
        total = total | flag
    return total


def known() -> dict[str, type[Divergence]]:
    """All divergences by name, one's own too."""
    return dict(_REGISTRY)


def examples() -> list[Divergence]:
    """One of every divergence of this file, with its default numbers or typical ones."""
    return [cls(*cls.example) for cls in _REGISTRY.values() if cls.__module__ == __name__]


def get(divergence: str | Divergence) -> Divergence:
    """The divergence of that name with its default numbers, or the object itself."""
    if isinstance(divergence, Divergence):
        for _, part in divergence.parts:
            if _REGISTRY.get(part.name) is not type(part):
                raise TypeError(f"{type(part).__name__} needs a `name` of its own")
            for field in fields(part):
                value = getattr(part, field.name)
                if isinstance(value, Tensor):
                    check_number(f"{type(part).__name__}'s {field.name}", value)
        return divergence
    if not isinstance(divergence, str):
        raise TypeError(
            f"divergence must be a name or a Divergence, got {type(divergence).__name__}"
        )
    if divergence not in _REGISTRY:
        raise ValueError(
            f"unknown divergence {divergence!r}; known: {', '.join(sorted(_REGISTRY))}"
        )
    try:
        return _REGISTRY[divergence]()
    except TypeError as error:
        name = _REGISTRY[divergence].__name__
        raise ValueError(f"{divergence!r} needs numbers: pass an object, {name}(…)") from error
