"""Checks for who writes a divergence or a source: is it what it says that it is?

    check_divergence(PearsonChi2())
    check_source(Int8Head(hidden, weight, steps))

Both raise an AssertionError of one line, which says what does not hold, where, and both numbers.
The project's own divergences and sources are under them.

Errors are judged by torch's own: in fp32 the error against float64 may be twice that of the plain
formula, plus a few roundings; in float64, where the truth is rounded as well, twice that, as much
smaller as its roundings are. Derivatives are finite differences, which say how exact they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import divergences, reference
from fastkd.divergences import Divergence, Sum
from fastkd.loss import kd_loss
from fastkd.packing import Packed, pack, replace_tensors, tensors_of, unpack
from fastkd.rows import Ask, Sparse
from fastkd.sources import Source, TopK

INF = math.inf
EPS_32, EPS_64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
STEP = 1e-4  # of finite differences
KINDS = ("probabilities", "mixed", "logits")


def check_divergence(d: str | Divergence, *, compiled: bool = False) -> list[str]:
    """Raise where a divergence is not what it declares, or its terms are not its formula.

    Checked are, in this order: that it survives the way through the operator; that its torch term
    leaves q alone, sums over parts of the vocabulary, and has the `slope_sum` that it declares; the
    slope against finite differences of the formula; value and gradient of `kd_loss` against the
    formula on both backends, with and without cross-entropy, at two temperatures, in float64 (torch
    only) and fp32; what happens at p = 0 < q and at q = 0 < p against `infinite_p` and
    `infinite_q`; extreme logits; `pooled_terms`; 0-d tensors as its numbers.

    Args:
        d: one with all its numbers, or a name. Of a sum each part is checked as well.
        compiled: under `torch.compile` too, which takes seconds.

    Returns:
        What could not be checked, which is also warned of, and what might be declared beside.

    Raises:
        AssertionError: naming the property, the place and both numbers.
        TypeError, ValueError: where it is no divergence that `kd_loss` takes.
    """
    d = replace_tensors(divergences.get(d), float)
    for _, part in d.parts:
        _check_fields(part)
    notes: list[str] = []
    backends = ["eager"]
    reason = _no_triton(d)
    if reason:
        notes.append(f"{_name(d)}: the Triton term was not checked: {reason}")
        warnings.warn(notes[-1], stacklevel=2)
    else:
        backends.append("triton")
    for _, part in d.parts:
        _check_term(part, notes)
    _check_slope(d)
    for backend in backends:
        _check_values(d, backend)
    for _, part in d.parts:
        _check_infinities(part)
    for backend in backends:
        _check_hostile(d, backend)
    for _, part in d.parts:
        _check_pooling(part, notes)
    if d.pooled_terms is not None:
        for backend in backends:
            _check_bucket(d, backend)
    for backend in backends:
        _check_tensors_as_numbers(d, backend)
    if compiled:
        _check_compiled(d)
    return notes


def _require(holds: Any, x: Any, message: str) -> None:
    if not bool(holds):
        raise AssertionError(f"{_name(x)}: {message}")


def _name(x: Any) -> str:
    return str(x) if isinstance(x, Divergence) else type(x).__name__


@contextlib.contextmanager
def _environment(backend: str) -> Iterator[None]:
    """With FASTKD_BACKEND as it is said."""
    before = os.environ.get("FASTKD_BACKEND")
    os.environ["FASTKD_BACKEND"] = backend
    try:
        yield
    finally:
        os.environ.pop("FASTKD_BACKEND")
        if before is not None:
            os.environ["FASTKD_BACKEND"] = before


def _no_triton(d: Divergence) -> str:
    """Why the Triton term cannot be run, or ""."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    for _, part in d.parts:
        try:
            part.triton_term(), part.numbers
        except TypeError as error:
            return str(error)
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return "without a GPU it needs TRITON_INTERPRET=1, set before triton is imported"


def _device(backend: str) -> str:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "cuda" if backend == "triton" and not interpreted else "cpu"


# --- Numbers ---------------------------------------------------------------


def _normal(*shape: int, seed: int = 0) -> Tensor:
    """In float64, of values that fp32 holds: most inputs are exact in both."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).double()


class _Found(NamedTuple):
    value: Tensor  # in float64, on the CPU
    grad: Tensor


def _run(loss: Callable, student: Tensor, teacher: Any, labels=None, **settings) -> _Found:
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, teacher, labels, reduction="none", **settings)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return _Found(value.detach().double().cpu(), grad.double().cpu())


def _on(backend: str, dtype: torch.dtype, student, teacher, labels=None, **settings) -> _Found:
    device = _device(backend)
    student, teacher = (x.to(device, dtype) for x in (student, teacher))
    labels = None if labels is None else labels.to(device)
    with _environment(backend):
        return _run(kd_loss, student, teacher, labels, **settings)


def _limit(plain: Tensor, truth: Tensor, dtype: torch.dtype, size: float = 1.0) -> float:
    """How far from the truth a result may be, by what plain torch gives in fp32; its terms are
    probabilities, times `size`."""
    error = (plain - truth).abs().max().item() if len(truth) else 0.0
    limit = 2 * error + 8 * EPS_32 * max(_size(truth), size)
    # In float64 the truth is rounded as well.
    return limit if dtype == torch.float32 else 2 * limit * (EPS_64 / EPS_32)


def _difference(f: Callable[[float], Tensor], noise: float | None = None) -> tuple[Tensor, Tensor]:
    """The derivative of f at 0, and how exact it is, by the `noise` that f has."""
    near, far = ((f(h) - f(-h)) / (2 * h) for h in (STEP, 2 * STEP))
    best = (4 * near - far) / 3
    noise = 8 * EPS_64 * _size(f(0.0)) if noise is None else noise
    return best, (best - near).abs() + noise / STEP


def _worst(ours: Tensor, truth: Tensor, limit: float | Tensor) -> tuple[int, ...] | None:
    """Where the two are further apart than the limit, or None; NaN is."""
    excess = ((ours - truth).abs() - limit).nan_to_num(nan=INF)
    excess = torch.where(ours == truth, -1.0, excess)  # infinities
    if not excess.numel() or excess.max() <= 0:
        return None
    return tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))


def _close(x: Any, ours: Tensor, truth: Tensor, limit: float | Tensor, message: str) -> None:
    """`message` may have {ours}, {truth}, {row} and {entry} of where they are furthest apart."""
    at = _worst(ours, truth, limit)
    if at is not None:
        row, entry = (at[0], at[-1]) if at else (0, 0)
        numbers = dict(ours=f"{ours[at]:.8g}", truth=f"{truth[at]:.8g}", row=row, entry=entry)
        _require(False, x, message.format(**numbers))


def _weight(d: Divergence) -> float:
    """Of all its parts together."""
    return sum(weight for weight, _ in d.parts)


def _size(*xs: Tensor) -> float:
    """The largest number, or 1."""
    return max([1.0, *(x[x.isfinite()].abs().max().item() for x in xs if x.isfinite().any())])


# --- Divergences -----------------------------------------------------------


def _check_fields(d: Divergence) -> None:
    _require(d.kind in KINDS, d, f"kind must be one of {', '.join(KINDS)}, got {d.kind!r}")
    _check_packing(d)
    _require(unpack(pack(d)) == d, d, "is not itself after it was packed")


def _check_packing(x: Packed) -> None:
    names = {field.name for field in dataclasses.fields(x)}
    lost = sorted(set(getattr(x, "__dict__", {})) - names)
    line = f"{', '.join(lost)} is no field of the dataclass: it does not reach the operator"
    _require(not lost, x, line)


def _sides(d: Divergence, student: Tensor, teacher: Tensor) -> list[Tensor]:
    """What a term is given."""
    if d.kind == "logits":
        difference = student - teacher
        center = d.numbers[0] * difference.mean(-1, keepdim=True)
        return [difference - center]
    logs = [teacher.log_softmax(-1), student.log_softmax(-1)]
    if d.kind == "mixed":
        of_student, of_teacher = d.mixing
        logs.append((of_student * student + of_teacher * teacher).log_softmax(-1))
    return [*logs, *(x.exp() for x in logs)]


def _term(d: Divergence, sides: list[Tensor], share: float = 1.0) -> tuple[Tensor, Tensor]:
    sides = [x.clone() for x in sides]
    value, slope = d.term(*sides, share) if d.kind == "logits" else d.term(*sides)
    return value, slope.clone()


def _check_term(d: Divergence, notes: list[str]) -> None:
    """The torch term alone."""
    student, change = _normal(6, 40, seed=1) * 2, _normal(6, 40, seed=2)
    sides = _sides(d, student, student + change)
    value, slope = _term(d, sides)
    got = tuple(value.shape), tuple(slope.shape)
    line = f"the torch term must give values of shape (6,) and slopes of (6, 40), got {got}"
    _require(got == ((6,), (6, 40)), d, line)
    if d.kind != "logits":
        given = [x.clone() for x in sides]
        q = given[3 if d.kind == "probabilities" else 4]
        before = q.clone()
        d.term(*given)
        line = "the torch term changes q, which is read after it: {ours}, was {truth}, at row {row}"
        _close(d, q, before, 0.0, line)
    parts = [_term(d, [x[:, part] for x in sides]) for part in (slice(0, 15), slice(15, 40))]
    rounding = 64 * EPS_64 * _size(value, slope)
    line = "the torch term's {} is no sum over the vocabulary: of two parts {{ours}}, of the whole"
    line += " {{truth}}, at row {{row}}"
    _close(d, parts[0][0] + parts[1][0], value, rounding, line.format("value"))
    _close(d, torch.cat([parts[0][1], parts[1][1]], -1), slope, rounding, line.format("slope"))
    total = slope.sum(-1)
    if d.kind == "logits":
        return  # its slopes are the gradient: no sum of them has a part in it
    if d.slope_sum is not None:
        line = "slope_sum is declared as {truth}, but the torch slopes sum to {ours} at row {row}"
        _close(d, total, torch.full_like(total, d.slope_sum), rounding, line)
    elif total.max() - total.min() <= rounding:
        constant = round(total[0].item(), 12) + 0.0
        notes.append(f"{_name(d)}: Σ slope is always {constant:g}: slope_sum could say so")


def _check_slope(d: Divergence) -> None:
    """Gradient of `kd_loss` in float64 against finite differences of the definition."""
    if any(
        part.kind == "mixed" and type(part).reference is not Divergence.reference
        for _, part in d.parts
    ):
        return  # it may hold its target: then autograd's gradient alone says what is meant
    student, change = _normal(3, 7, seed=3) * 2, _normal(3, 7, seed=4)
    teacher = (student + change).float().double()
    for T in (1.0, 2.5):
        settings = dict(divergence=d, temperature=T, compensate=False)
        each = torch.eye(7, dtype=torch.float64)[:, None]  # (V, 1, V): one entry at a time
        truth, plain = (d.reference(s, t, T) for s, t in (
            (student, teacher), (student.float(), teacher.float())
        ))  # fmt: skip
        derivative, limit = _difference(
            lambda h, T=T, each=each: d.reference(student + h * each, teacher, T),
            2 * _limit(plain, truth, torch.float64, _weight(d)),
        )
        derivative, limit = derivative.T, limit.T
        by_autograd = _run(reference.kd_loss, student, teacher, **settings)
        ours = _on("eager", torch.float64, student, teacher, **settings)
        for what, found in (
            ("the formula's own gradient (autograd)", by_autograd),
            ("the torch term's slope: the gradient", ours),
        ):
            line = f"{what} is {{ours}} where finite differences of the formula give {{truth}}, at"
            line += f" T = {T}, row {{row}}, entry {{entry}} (float64)"
            _close(d, found.grad, derivative, limit, line)


def _check_values(d: Divergence, backend: str) -> None:
    """`kd_loss` against the definition in float64."""
    student, change = _normal(8, 40, seed=5) * 2, _normal(8, 40, seed=6)
    change[0] = 0
    change[1] *= 2.0**-7
    teacher = (student + change).float().double()
    labels = torch.arange(8) * 5
    labels[3] = -100
    few = slice(0, 4 if backend == "triton" else 8)  # the interpreter takes its time
    dtypes = [torch.float32] if backend == "triton" else [torch.float64, torch.float32]
    word = {"eager": "torch", "triton": "Triton"}[backend]
    for settings, y in (
        (dict(temperature=1.0, alpha=1.0), None),
        (dict(temperature=2.5, alpha=0.6), labels),
    ):
        settings = dict(divergence=d, **settings)
        truth = _run(reference.kd_loss, student, teacher, y, **settings)
        plain = _run(reference.kd_loss, student.float(), teacher.float(), y, **settings)
        factor = d.compensated(settings["temperature"])
        size = _weight(factor[0]) * factor[1]
        least = truth.value.min().item()
        _require(least >= -64 * EPS_64, d, f"the formula is negative: {least:.6g}")
        for dtype in dtypes:
            sides = student[few], teacher[few], None if y is None else y[few]
            ours = _on(backend, dtype, *sides, **settings)
            for what in ("value", "grad"):
                o, t, p = (getattr(x, what) for x in (ours, truth, plain))
                limit, t = _limit(p, t, dtype, size), t[few]
                name = {"value": "value", "grad": "slope: the gradient"}[what]
                line = f"the {word} term's {name} is {{ours}} where the formula gives {{truth}},"
                line += f" at T = {settings['temperature']}, alpha = {settings['alpha']}, row"
                line += " {row} (0: student = teacher, 1: close), entry {entry}"
                line += f" ({str(dtype)[6:]}, within {limit:.1e})"
                _close(d, o, t, limit, line)


def _check_infinities(d: Divergence) -> None:
    """`infinite_p`, `infinite_q` against what the definition does where a probability goes to 0."""
    if d.kind == "logits":
        return  # what is dead on one side only is infinite
    for name, which in (("infinite_p", "p = 0 < q"), ("infinite_q", "q = 0 < p")):
        value, diverges = _towards_dead(d, name == "infinite_p")
        declared = bool(getattr(d, name))
        does = "grows without bound" if diverges else f"goes to {value:.6g}"
        line = f"{name} is {declared}, but the formula {does} where {which}"
        _require(declared == diverges, d, line)


def _towards_dead(d: Divergence, of_teacher: bool) -> tuple[float, bool]:
    """The definition where one logit of a side goes to -inf, and whether it has no limit."""
    student, teacher = (_normal(9, seed=seed) for seed in (7, 8))
    values = []
    for k in range(21):
        sides = student.clone(), teacher.clone()
        sides[of_teacher][4] = -(2.0 ** (k + 4))
        values.append(d.reference(*sides, 1.0).item())
        if not math.isfinite(values[-1]):
            break
    if values[-1] == INF:
        return INF, True
    values = [x for x in values if math.isfinite(x)]  # a NaN says nothing: what came before does
    if len(values) < 3:
        raise AssertionError(f"{_name(d)}: the formula is NaN where a logit is -64")
    before, last = values[-2] - values[-3], values[-1] - values[-2]
    # What goes to a limit takes ever smaller steps, though every one is twice as long.
    return values[-1], last > before / 2 and last > 64 * EPS_64 * max(abs(values[-1]), 1.0)


def _check_hostile(d: Divergence, backend: str) -> None:
    """-inf and extreme logits through `kd_loss`."""
    student, teacher = _normal(7, 40, seed=9), _normal(7, 40, seed=10)
    student[0, 4] = teacher[1, 4] = -INF
    student[2, 10:30] = teacher[2, 10:30] = -INF
    student[3], teacher[3] = 1e4 * student[3].sign(), 1e4 * teacher[3].sign()
    student[4, 5], teacher[4, 9] = 1e4, 1e4
    student[5], teacher[5] = student[5] * 30, teacher[5] * 30
    student[6, 20:] = teacher[6, :20] = -INF
    rows = (
        "q = 0 < p", "p = 0 < q", "entries are -inf on both sides", "logits are ±1e4",
        "both sides are one-hot, elsewhere", "logits are ±60", "the supports do not meet",
    )  # fmt: skip
    expected = _of_dead(d, student, teacher)
    plain = _of_dead(d, student.float(), teacher.float())
    word = {"eager": "torch", "triton": "Triton"}[backend]
    for dtype in (torch.float32,) if backend == "triton" else (torch.float32, torch.float64):
        of = f"({word} term, {str(dtype)[6:]})"
        value, grad = _on(backend, dtype, student, teacher, divergence=d, compensate=False)
        for row, where in enumerate(rows):
            _require(not value[row].isnan(), d, f"the value is NaN where {where} {of}")
            _require(value[row] >= 0, d, f"the value is {value[row]:.6g} where {where} {of}")
            bad = grad[row][~grad[row].isfinite()].tolist()
            line = f"the gradient is {bad[:1]} where {where} {of}: a power needs a bound"
            _require(not bad, d, line)
        known = expected.isfinite()
        limit = _limit(plain[known], expected[known], dtype, _weight(d))
        for row, truth in enumerate(expected):
            line = f"the value is {{ours}} where {rows[row]}, the definition gives {{truth}} {of}"
            _close(d, value[row], truth, limit, line)
        dead = grad[2, 10:30].abs().max()
        _require(dead == 0, d, f"the gradient is {dead:.6g} where {rows[2]} {of}")


def _of_dead(d: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """What the first three rows of `_check_hostile` should be, by the definition's limit; the third
    not where a sum holds both a mean over all entries and others."""
    expected = []
    for row, of_teacher in ((0, False), (1, True)):
        floored = (x[row].masked_fill(x[row] == -INF, -1e5) for x in (student, teacher))
        _, diverges = _towards_dead(d, of_teacher)
        expected.append(INF if diverges else d.reference(*floored, 1.0).item())
    alive = student[2] > -INF
    kinds = {part.kind == "logits" for _, part in d.parts}
    if len(kinds) == 1:
        share = alive.double().mean().item() if True in kinds else 1.0
        expected.append(share * d.reference(student[2, alive], teacher[2, alive], 1.0).item())
    return torch.tensor(expected, dtype=torch.float64)


def _check_pooling(d: Divergence, notes: list[str]) -> None:
    """`pooled_terms` against the torch term and the formula."""
    declared = d.pooled_terms
    if d.kind != "probabilities":
        line = f"pooled_terms is {declared}, but kind {d.kind!r} is no sum over probabilities"
        _require(declared is None, d, line)
        return
    log_p, log_q = (_normal(4, 12, seed=seed).log_softmax(-1) for seed in (11, 12))

    def entries(log_p, log_q):
        """Value and slope of every entry by itself."""
        flat = [x.flatten()[:, None] for x in (log_p, log_q)]
        value, slope = _term(d, [*flat, *(x.exp() for x in flat)])
        return value.view(log_p.shape), slope.view(log_p.shape)

    value, slope = entries(log_p, log_q)
    half, _ = entries(log_p - math.log(2), log_q - math.log(2))
    rounding = 256 * EPS_64 * _size(value)
    # Where it scales with p and q, outcomes may be added up.
    scales = _worst(2 * half, value, rounding) is None
    p, q = log_p.exp(), log_q.exp()
    derivative, limit = _difference(lambda h: entries(log_p, log_q + h)[0])  # q · ∂/∂q
    together = (derivative - slope) / q  # c + e
    limit = (limit / q).max().item()
    even = together.max() - together.min() <= 2 * limit
    c_and_e = round(together.mean().item(), 6) + 0.0
    c = _textbook(d, (log_p, log_q), value, p - q)
    if declared is None:
        if scales and even:
            c = 0.0 if c is None else c
            line = f"may be pooled: pooled_terms = ({c:g}, {c_and_e - c:g}), for top-k teachers"
            notes.append(f"{_name(d)}: {line}")
        return
    declared = tuple(float(x) for x in declared)
    line = f"pooled_terms is {declared}, but outcomes may not be pooled: at p/2, q/2 the torch term"
    _close(d, 2 * half, value, rounding, line + " is half of {ours}, not of {truth}")
    line = f"pooled_terms is {declared}: c + e must be (q · ∂value/∂q - slope) / q, which is"
    line += f" {together.min().item():.6g} to {together.max().item():.6g}, not {sum(declared):.6g}"
    _require(even and abs(together.mean().item() - sum(declared)) <= 2 * limit, d, line)
    if c is not None:
        line = f"pooled_terms is {declared}, but over a part of the vocabulary the formula is"
        _require(abs(c - declared[0]) <= 1e-6, d, f"{line} Σ (value + {c:.6g} (p - q))")


def _textbook(d: Divergence, logs: tuple[Tensor, Tensor], value: Tensor, excess: Tensor):
    """The c of a formula that is a sum over the entries; None where it is not (1 - Σ √(pq))."""
    try:
        whole = d.formula(*logs)
        parts = [d.formula(*(x[:, part] for x in logs)) for part in (slice(0, 5), slice(5, None))]
    except TypeError:
        return None
    if _worst(sum(parts), whole, 256 * EPS_64 * _size(whole)):
        return None
    ratio = (parts[0] - value[:, :5].sum(-1)) / excess[:, :5].sum(-1)
    return round(ratio.mean().item(), 6) + 0.0


def _check_bucket(d: Divergence, backend: str) -> None:
    """A top-k teacher's divergence is the formula's of the pooled outcomes, and never larger."""
    student, teacher = _normal(2, 12, seed=13), (_normal(2, 12, seed=14) * 2).log_softmax(-1)
    logprobs, ids = teacher.topk(5)
    rest = torch.log1p(-logprobs.exp().sum(-1, keepdim=True))
    log_q = student.log_softmax(-1)
    of_rest = log_q.scatter(-1, ids, -INF).logsumexp(-1, keepdim=True)
    pooled = d.formula(
        torch.cat([logprobs, rest], -1), torch.cat([log_q.gather(-1, ids), of_rest], -1)
    )
    whole = d.formula(teacher, log_q)
    line = "pooled_terms is declared, but pooling makes it larger: {truth} instead of {ours}"
    _close(d, torch.minimum(pooled, whole), pooled, 256 * EPS_64 * _size(whole), line)
    dtype = torch.float32 if backend == "triton" else torch.float64
    device = _device(backend)
    with _environment(backend):
        list_ = TopK(ids.to(device), logprobs.to(device, dtype))
        ours = _run(kd_loss, student.to(device, dtype), list_, divergence=d, compensate=False)
    # The rest is 1 - Σ p, a difference.
    limit = 64 * torch.finfo(dtype).eps / rest.exp().min().item()
    limit *= max(_size(pooled), _weight(d))
    line = "with a top-k teacher the value is {ours}, the formula of its outcomes {truth}"
    _close(d, ours.value, pooled, limit, f"{line} ({backend})")


def _with_tensors(d: Divergence) -> Divergence:
    """The same with 0-d tensors as its numbers."""

    def tensor(x):
        return torch.tensor(float(x), dtype=torch.float64)

    if isinstance(d, Sum):
        return Sum(tuple(tensor(w) for w in d.weights), tuple(map(_with_tensors, d.divergences)))
    numbers = {f.name: getattr(d, f.name) for f in dataclasses.fields(d)}
    numbers = {name: tensor(x) for name, x in numbers.items() if type(x) in (int, float)}
    return dataclasses.replace(d, **numbers)


def _check_tensors_as_numbers(d: Divergence, backend: str) -> None:
    other = replace_tensors(_with_tensors(d), lambda x: x.to(_device(backend)))
    if not tensors_of(other):
        return
    student, teacher = _normal(1, 12, seed=15), _normal(1, 12, seed=16)
    dtype = torch.float32 if backend == "triton" else torch.float64
    plain, ours = (
        _on(backend, dtype, student, teacher, divergence=x, temperature=2.5) for x in (d, other)
    )
    for what, a, b in zip(_Found._fields, plain, ours, strict=True):
        line = f"with 0-d tensors as its numbers the {what} is {{ours}}, with floats {{truth}}"
        _close(d, b, a, 16 * torch.finfo(dtype).eps * _size(a), f"{line} ({backend})")


def _check_compiled(d: Divergence) -> None:
    student, teacher = _normal(4, 12, seed=15), _normal(4, 12, seed=16)
    plain = _on("eager", torch.float64, student, teacher, divergence=d)
    with _environment("eager"):
        compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
        ours = _run(compiled, student, teacher, divergence=d)
    for what, a, b in zip(_Found._fields, plain, ours, strict=True):
        line = f"compiled the {what} is {{ours}}, else {{truth}}"
        _close(d, b, a, 16 * EPS_64 * _size(a), line)


# --- Sources ---------------------------------------------------------------


def check_source(s: Source, *, logits: Tensor | None = None) -> list[str]:
    """Raise where a source does not keep the protocol of fastkd/sources/source.py.

    As a teacher (one with a `reader`): that the logits of any chunk, and of the first n entries,
    are those rows and entries of the whole, of the shape, type and device that it declares; that
    `row_bytes` says what they take; that `kd_loss` gives what it gives for the whole logits, in
    chunks of any size, whatever stands in rows that do not count; that all its tensors have an
    effect, and are refused where they require a gradient.

    As a student (one with a `student`): the same, and its gradients against finite differences of
    the loss, of every tensor that requires one (all that are floating where none does), with a
    factor for each position, cross-entropy, a cut vocabulary and rows that do not count.

    All in float64, which it must therefore take, and the logits in its own type as well: what
    agrees in half of its digits is a rounding. Not checked: vocabulary shards, autocast,
    torch.compile.

    Args:
        s: small, of at least 3 rows and 4 entries, all of which count for something.
        logits: (..., V), what its logits should be.

    Returns:
        What could not be checked.

    Raises:
        AssertionError: naming the property, the place and both numbers.
        TypeError, ValueError: where it is no source, or too small.
    """
    if not isinstance(s, Source):
        raise TypeError(f"check_source needs a fastkd.sources.Source, got {type(s).__name__}")
    reads, learns = (
        getattr(type(s), name) is not getattr(Source, name) for name in ("reader", "student")
    )
    _require(reads or learns, s, "has neither a reader nor a student")
    _check_declared(s)
    if math.prod(s.leading) < 3 or (s.entries is not None and s.entries < 4):
        raise ValueError(f"check_source needs at least 3 rows and 4 entries, got {tuple(s.shape)}")
    double = replace_tensors(
        s, lambda x: x.detach().double() if x.is_floating_point() else x.detach()
    )
    # Memory that nothing was written to is NaN.
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with _environment("eager"):
            return _check_roles(s, double, logits, reads, learns)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _check_declared(s: Source) -> None:
    _check_packing(s)
    _require(isinstance(s.leading, tuple), s, f"leading must be a torch.Size, got {s.leading!r}")
    known = isinstance(s.entries, int) or (s.sparse and s.entries is None)
    _require(known, s, f"entries must be an int, got {s.entries!r}")
    _require(isinstance(s.like, Tensor), s, f"like must be a tensor, got {type(s.like).__name__}")
    _require(s.dtype.is_floating_point, s, f"the logits must be floating, dtype is {s.dtype}")
    names = [field.name for field in dataclasses.fields(s)]
    line = f"parameters names {s.parameters}, the fields are {names}"
    _require(set(names) >= set(s.parameters), s, line)
    again = unpack(pack(s))
    for what in ("leading", "entries", "dtype", "device"):
        was, got = getattr(s, what), getattr(again, what)
        _require(was == got, s, f"{what} is {got} after it was packed, was {was}")


def _check_roles(
    s: Source, double: Source, logits: Tensor | None, reads: bool, learns: bool
) -> list[str]:
    notes = []
    if s.sparse:
        _check_lists(double)
    else:
        whole = _check_logits(double, reads, learns)
        own, exact = _logits(s, s.entries, reads), whole
        _agree(s, f"the logits in {str(s.dtype)[6:]}", own.double(), exact, s.dtype)
        if logits is not None:
            expected = logits.detach().double().reshape(whole.shape)
            _agree(s, "the logits", whole, expected, s.dtype)
        _check_effect(double, whole, reads)
    if reads:
        _check_refused(double)
        if not s.sparse:
            notes += _check_teacher(double, whole)
        _check_ignored(double, None)
    if learns:
        leaves = [x.requires_grad for x in tensors_of(s)]
        if not any(leaves):
            leaves = [x.is_floating_point() for x in tensors_of(s)]
        _check_gradients(double, leaves)
        _check_ignored(double, leaves)
    return notes


def _agree(
    x: Source, what: str, ours: Tensor, truth: Tensor, dtype: torch.dtype = torch.float64
) -> None:
    """In half of the digits."""
    finite = truth[truth.isfinite()].abs()
    size = finite.max().item() if len(finite) else 0.0
    line = f"{what} should be {{truth}}, got {{ours}}, at ({{row}}, {{entry}})"
    _close(x, ours, truth, torch.finfo(dtype).eps ** 0.5 * size, line)


def _ask(n: int | None, temperature: float = 1.0) -> Ask:
    return Ask(divergences.ForwardKL(), temperature, n)


def _worker(s: Source, n: int | None, as_teacher: bool, wants: list[bool] | None = None):
    """A reader; of a student all its entries."""
    if as_teacher:
        return s.reader(_ask(n))
    return s.student(_ask(n), wants or [False] * len(tensors_of(s)), False)


@torch.no_grad()
def _logits(s: Source, n: int | None, as_teacher: bool, size: int | None = None) -> Tensor:
    """(T, at least n), made `size` rows at a time."""
    T = math.prod(s.leading)
    size = size or T
    reader = _worker(s, n, as_teacher)
    reader.prepare(size)
    chunks = []
    for low in range(0, T, size):
        high = min(low + size, T)
        z = reader.logits(low, high)
        given = tuple(z.shape)
        good = len(given) == 3 and given[0] * given[1] == high - low and given[2] >= n
        line = f"logits of rows {low} to {high} must be (outer, length, {n} or more) with outer ·"
        _require(good, s, f"{line} length = {high - low}, got {given}")
        _require(z.stride(-1) == 1, s, f"logits must have unit stride, got {z.stride()}")
        for what in ("dtype", "device"):
            got, said = getattr(z, what), getattr(s, what)
            _require(got == said, s, f"logits have {what} {got}, the source says {said}")
        chunks.append(z.flatten(0, 1)[:, :n].clone())
    return torch.cat(chunks)


def _check_logits(s: Source, reads: bool, learns: bool) -> Tensor:
    """(T, V), after the same rows and entries came out of chunks and cuts."""
    T, V = math.prod(s.leading), s.entries
    whole = _logits(s, V, reads)
    for role in [True] * reads + [False] * learns:
        name = "reader" if role else "student"
        for n in (V, V - 1):
            expected = whole[:, :n]
            if n < V and not s.has_logits:  # what is cut is the members'
                expected = _logits(s, n, role)
            for size in (T, 2, 1):
                what = f"the {name}'s logits in chunks of {size} rows, of the first {n} entries,"
                _agree(s, what, _logits(s, n, role, size), expected)
        _check_row_bytes(s, role, name)
    return whole


@torch.no_grad()
def _check_row_bytes(s: Source, as_teacher: bool, name: str) -> None:
    reader = _worker(s, s.entries, as_teacher)
    takes = reader.row_bytes(s.entries)
    reader.prepare(2)
    z = reader.logits(0, 2)
    owned = {x.untyped_storage().data_ptr() for x in tensors_of(s)}
    least = 0 if z.untyped_storage().data_ptr() in owned else s.entries * z.element_size()
    line = f"the {name}'s row_bytes is {takes}, but a row's logits are {least} bytes of new memory"
    _require(takes >= least, s, f"{line}: chunks would not keep to the workspace")


def _check_effect(s: Source, whole: Tensor, reads: bool) -> None:
    """What has no effect on the logits was forgotten."""
    for i, x in enumerate(tensors_of(s)):
        if not x.is_floating_point():
            continue
        moved = _logits(_moved(s, [i], 1e-2), s.entries, reads)
        same = _worst(moved, whole, 0.0) is None
        _require(not same, s, f"{_field(s, i)} has no effect on the logits")


def _field(s: Source, i: int) -> str:
    """The name of the field with tensor number i."""
    for field in dataclasses.fields(s):
        inside = tensors_of(getattr(s, field.name))
        if i < len(inside):
            return field.name
        i -= len(inside)
    raise IndexError(i)


def _directions(s: Source, which: list[int], seed: int = 0) -> list[Tensor | None]:
    """One for each tensor, None for those that stay; of the size of what they move."""
    found: list[Tensor | None] = []
    for i, x in enumerate(tensors_of(s)):
        if i not in which:
            found.append(None)
            continue
        finite = x[x.isfinite()].abs()
        size = finite.max().item() if len(finite) else 0.0
        found.append(_normal(*x.shape, seed=seed + i).to(x.device) * (size or 1.0))
    return found


def _moved(s: Source, which: list[int], h: float, seed: int = 0) -> Source:
    parcel = pack(s)
    steps = _directions(s, which, seed)
    tensors = [x if v is None else x + h * v for x, v in zip(parcel.tensors, steps, strict=True)]
    return unpack(parcel._replace(tensors=tensors))


def _check_lists(s: Source) -> None:
    """A sparse teacher's chunks."""
    T = math.prod(s.leading)
    V = int(s.reader(_ask(2**20)).chunk(0, T).ids.max()) + 1

    def lists(size: int) -> Sparse:
        reader = s.reader(_ask(V))
        reader.prepare(size)
        chunks = [reader.chunk(low, min(low + size, T)) for low in range(0, T, size)]
        line = f"chunk must give a Sparse, got {type(chunks[0]).__name__}"
        _require(all(isinstance(chunk, Sparse) for chunk in chunks), s, line)
        return Sparse(*(torch.cat([chunk[i] for chunk in chunks]) for i in (0, 1)))

    whole = lists(T)
    for i, what in enumerate(("ids", "logprobs")):
        rows = whole[i].shape[0]
        _require(rows == T, s, f"chunk gave {rows} rows of {what}, not {T}")
        for size in (2, 1):
            got = f"{what} in chunks of {size} rows"
            _agree(s, got, lists(size)[i].double(), whole[i].double())


def _check_refused(s: Source) -> None:
    """As a teacher, whatever requires grad is named, but for `parameters`."""
    constants = _constants(s)
    for i, x in enumerate(tensors_of(s)):
        if not x.is_floating_point() or any(x is constant for constant in constants):
            continue
        parcel = pack(s)
        parcel.tensors[i] = x.clone().requires_grad_()
        line = f"as a teacher its {_field(s, i)} may require grad, and would get none"
        _require(unpack(parcel).differentiated, s, line)


def _constants(s: Source) -> list[Tensor]:
    own = [x for name in s.parameters for x in tensors_of(getattr(s, name))]
    return own + [x for member in s.members for x in _constants(member)]


def _loss(student: Any, teacher: Any, **settings) -> Tensor:
    return kd_loss(student, teacher, **dict(reduction="none") | settings)


def _workspaces(needed: int, entries: int) -> list[int | None]:
    """Of chunks of one row, of two, and of all."""
    from fastkd.backends.softmax import BUFFERS

    row = needed + 4 * BUFFERS * entries
    return [row, 2 * row, None] if needed else [None]


def _check_teacher(s: Source, whole: Tensor) -> list[str]:
    """`kd_loss` with it is `kd_loss` with its logits."""
    V = s.entries
    student = _normal(*s.leading, V, seed=20).to(s.device)
    teacher = whole.view(*s.leading, V)
    # A softmax of other kinds depends on the temperature.
    temperature = 2.0 if s.has_logits else 1.0
    expected = _loss(student, teacher, temperature=temperature)
    for workspace in _workspaces(s.reader(_ask(V)).row_bytes(V), V):
        ours = _loss(student, s, temperature=temperature, workspace_bytes=workspace)
        what = f"the loss with it as the teacher (workspace_bytes={workspace})"
        _agree(s, what, ours, expected)
    if s.has_logits:
        return []
    return [f"{_name(s)}: without logits it was compared at temperature 1 alone"]


def _check_ignored(s: Source, leaves: list[bool] | None) -> None:
    """What stands in the rows of weight 0 changes nothing; `leaves`: as a student."""
    T, leading = math.prod(s.leading), tuple(s.leading)
    counts = (torch.arange(T, device=s.device) % 3 != 1).view(s.leading)
    parcel = pack(s)
    tensors = list(parcel.tensors)
    for i, x in enumerate(tensors):
        if tuple(x.shape[: len(leading)]) == leading:  # it has a row for each row
            tensors[i] = x.clone()
            tensors[i][~counts] = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    hostile = unpack(parcel._replace(tensors=tensors))
    role = "teacher" if leaves is None else "student"
    V = s.entries or int(s.reader(_ask(2**20)).chunk(0, T).ids.max()) + 1
    other = _normal(*s.leading, V, seed=21).to(s.device)
    needed = 0 if s.sparse else _worker(s, s.entries, leaves is None).row_bytes(V)

    def run(x: Source, workspace: int | None) -> list[Tensor]:
        settings = dict(token_weight=counts, workspace_bytes=workspace)
        if leaves is None:
            return [_loss(other, x, **settings)]
        x, wanted = _differentiated(x, leaves)
        loss = _loss(x, other, **settings)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), wanted)]

    names = ["loss"]
    if leaves is not None:
        names += [f"gradient of {_field(s, i)}" for i, wanted in enumerate(leaves) if wanted]
    for workspace in _workspaces(needed, V):
        before, after = run(s, workspace), run(hostile, workspace)
        for name, a, b in zip(names, before, after, strict=True):
            end = f"(workspace_bytes={workspace})"
            lost = int((~a.isfinite()).sum())
            what = f"as a {role} with rows that do not count, the {name}"
            _require(not lost, s, f"{what} is not finite in {lost} entries: never written? {end}")
            _agree(s, f"as a {role}, with NaN in rows that do not count, the {name} {end}", b, a)


def _differentiated(s: Source, leaves: list[bool]) -> tuple[Source, list[Tensor]]:
    parcel = pack(s)
    tensors = [
        x.detach().clone().requires_grad_() if wanted else x
        for x, wanted in zip(parcel.tensors, leaves, strict=True)
    ]
    wanted = [x for x, wants in zip(tensors, leaves, strict=True) if wants]
    return unpack(parcel._replace(tensors=tensors)), wanted


@torch.no_grad()
def _check_memory(s: Source, leaves: list[bool]) -> None:
    """Where the gradient of a chunk's logits goes."""
    reader = _worker(s, s.entries, False, leaves)
    reader.prepare(2)
    grad = reader.grad_of(reader.logits(1, 3), 1, 3)
    expected = 2, s.entries
    good = isinstance(grad, Tensor) and grad.shape == expected and grad.is_contiguous()
    got = f"strides {grad.stride()} of {tuple(grad.shape)}" if isinstance(grad, Tensor) else grad
    _require(good, s, f"grad_of must give contiguous {expected} memory for two rows, got {got}")


def _check_gradients(s: Source, leaves: list[bool]) -> None:
    """Against finite differences of the loss, each tensor along two directions."""
    V, T = s.entries, math.prod(s.leading)
    other = _normal(*s.leading, V, seed=22).to(s.device)
    upstream = _normal(*s.leading, seed=23).to(s.device)
    labels = torch.arange(T, device=s.device).view(s.leading) % V
    labels.view(-1)[1] = -100
    needed = _worker(s, V, False).row_bytes(V)
    which = [i for i, wanted in enumerate(leaves) if wanted]
    for i in which if s.row_by_row else ():
        shape = tuple(tensors_of(s)[i].shape)
        line = f"row_by_row is True, but {_field(s, i)} has no row for each position: its shape is"
        _require(shape[:-1] == tuple(s.leading), s, f"{line} {shape}, leading {tuple(s.leading)}")
    if which:
        _check_memory(s, leaves)
    weights = torch.ones_like(upstream)
    cases = [
        (weights, {}, "T = 1, upstream gradient 1"),
        (upstream, dict(labels=labels, alpha=0.6, temperature=2.0, vocab=V - 1),
         "T = 2, alpha = 0.6, vocab = V - 1, an upstream gradient for each position"),
        (weights.sum(), dict(reduction="sum"), "reduction='sum', times a number"),
    ]  # fmt: skip
    for factors, settings, case in cases:

        def total(x: Source, factors=factors, settings=settings, **more) -> Tensor:
            return (_loss(x, other, **settings, **more) * factors).sum()

        for workspace in _workspaces(needed, V):
            student, wanted = _differentiated(s, leaves)
            grads = torch.autograd.grad(total(student, workspace_bytes=workspace), wanted)
            for i, x, grad in zip(which, wanted, grads, strict=True):
                where = f"the gradient of {_field(s, i)} ({case}; workspace_bytes={workspace})"
                got = grad.dtype, tuple(grad.shape)
                line = f"{where} must be as the tensor, {x.dtype}, {tuple(x.shape)}, got {got}"
                _require(got == (x.dtype, tuple(x.shape)), s, line)
                bad = int((~grad.isfinite()).sum())
                _require(not bad, s, f"{where} is not finite in {bad} entries: never written?")
                for seed in (30, 60):
                    derivative, limit = _difference(
                        lambda h, i=i, seed=seed: total(_moved(s, [i], h, seed))
                    )
                    ours = (grad * _directions(s, [i], seed)[i]).sum()
                    line = f"{where} gives {{ours}} along a direction, finite differences {{truth}}"
                    _close(s, ours, derivative, limit, line)
