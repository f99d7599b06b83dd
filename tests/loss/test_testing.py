"""`fastkd.testing`: what is right passes, and each property is really looked at: what breaks one
fails with the line that says so."""

import math
from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl
from common import DEVICE, DIVERGENCES
from own_divergence import PearsonChi2, chi2_term
from own_source import Int8Head, Int8Reader, Int8Student

from fastkd import (
    JSD,
    TAID,
    TVD,
    AlphaBeta,
    Ensemble,
    ForwardKL,
    Hellinger,
    LMHead,
    LogitMSE,
    Renyi,
    ReverseKL,
    TopK,
    kd_loss,
    testing,
)
from fastkd.sources import Dense
from fastkd.testing import check_divergence, check_source

SUMS = [
    0.5 * ForwardKL() + 0.5 * TVD(),
    0.3 * JSD(0.1) + 2.0 * ReverseKL(),
    0.4 * TAID(0.4) + 0.6 * Hellinger(),
    0.2 * LogitMSE(centered=True) + 0.5 * ForwardKL(),
    1e-3 * ForwardKL() + 100.0 * JSD(),
]
# Their formulas lose digits, in float64 too: no false alarms.
INEXACT = [Renyi(1.0001), AlphaBeta(0.05, 0.05)]


pytestmark = pytest.mark.filterwarnings("error:.*was not checked")  # Triton is here


@pytest.mark.parametrize("divergence", [*DIVERGENCES, *SUMS, *INEXACT], ids=str)
def test_every_divergence(divergence):
    check_divergence(divergence)


def test_the_example_of_the_documentation(backend):
    (note,) = check_divergence("pearson_chi2")
    assert "pooled_terms = (0, 1)" in note
    student, teacher = (torch.zeros(2, 9, device=DEVICE) for _ in range(2))
    student[0, 3] = -math.inf
    assert kd_loss(student, teacher, divergence="pearson_chi2", reduction="none")[0] == math.inf


# --- Broken divergences ----------------------------------------------------


@triton.jit
def off_value(log_p, log_q, p, q, a, b):
    ratio = tl.exp(tl.minimum(log_p - log_q, 80.0))
    return 1.001 * (p - q) * (ratio - 1), -p * ratio


@triton.jit
def off_slope(log_p, log_q, p, q, a, b):
    ratio = tl.exp(tl.minimum(log_p - log_q, 80.0))
    return (p - q) * (ratio - 1), -1.001 * p * ratio


@triton.jit
def unbounded(log_p, log_q, p, q, a, b):
    ratio = tl.exp(log_p - log_q)
    return (p - q) * (ratio - 1), -p * ratio


def term(change):
    """The term of χ² with something done to (value, slope, log_p, log_q, p, q)."""

    def changed(self, log_p, log_q, p, q):
        value, slope = PearsonChi2.term(self, log_p, log_q, p, q)
        return change(value, slope, log_p, log_q, p, q)

    return changed


def no_bound(self, log_p, log_q, p, q):
    ratio = (log_p - log_q).exp()
    return ((p - q) * (ratio - 1)).sum(-1), -p * ratio


def held(self, log_p, log_q):
    return PearsonChi2.formula(self, log_p, log_q.detach()) + 0 * log_q.sum(-1)


BROKEN_CHI2 = {
    "changes q": dict(term=term(lambda v, s, lp, lq, p, q: (v, s, q.mul_(2))[:2])),
    "value is no sum": dict(term=term(lambda v, s, lp, lq, p, q: (v / p.shape[-1], s))),
    "must give values of shape": dict(term=term(lambda v, s, lp, lq, p, q: (v[:, None], s))),
    "slope_sum is declared as -1,": dict(slope_sum=-1.0),
    r"\(autograd\) is": dict(formula=held),
    "torch term's slope": dict(term=term(lambda v, s, lp, lq, p, q: (v, 1.001 * s))),
    "torch term's value": dict(term=term(lambda v, s, lp, lq, p, q: (1.001 * v, s))),
    "formula is negative": dict(
        formula=lambda self, lp, lq: PearsonChi2.formula(self, lp, lq) - 1,
    ),
    "Triton term's value": dict(triton_term=lambda self: off_value),
    "Triton term's slope": dict(triton_term=lambda self: off_slope),
    "infinite_q is False, but the formula grows": dict(infinite_q=False),
    "infinite_p is True, but the formula goes to": dict(infinite_p=True),
    r"gradient is .* \(torch term, float32\): a power": dict(term=no_bound),
    r"gradient is .* \(Triton term, float32\): a power": dict(triton_term=lambda self: unbounded),
    "value is NaN where": dict(
        term=term(lambda v, s, lp, lq, p, q: (v + ((lp - lq).exp() * 0).sum(-1), s))
    ),
    "-inf on both sides": dict(
        term=term(lambda v, s, lp, lq, p, q: (v + ((p == 0) & (q == 0)).sum(-1), s))
    ),
    r"c \+ e must be": dict(pooled_terms=(0.0, 0.0)),
    "kind must be one of": dict(kind="ratios"),
}  # fmt: skip


def subclass(base, i, **changes):
    changes |= dict(name=f"broken_{base.name}_{i}", __module__=__name__)
    return dataclass(frozen=True)(type(f"Broken{base.__name__}{i}", (base,), changes))


@pytest.mark.parametrize("line", BROKEN_CHI2)
def test_broken_divergences(line):
    changes = dict(triton_term=lambda self: chi2_term) | BROKEN_CHI2[line]
    broken = subclass(PearsonChi2, list(BROKEN_CHI2).index(line), **changes)
    with pytest.raises(AssertionError, match=line) as error:
        check_divergence(broken())
    assert "\n" not in str(error.value) and str(error.value).startswith("BrokenPearsonChi2")


class Lost(PearsonChi2):
    """Its number is none of the dataclass's."""

    name = "lost"

    def __init__(self):
        object.__setattr__(self, "weight", 0.5)


@pytest.mark.parametrize(
    "line, divergence",
    [
        # Σ -p log(p/q) over a part is the textbook's: c is known, and not only c + e.
        ("over a part of the vocabulary", (ForwardKL, dict(pooled_terms=(0.0, 1.0)))),
        ("may not be pooled", (AlphaBeta, dict(pooled_terms=(0.0, 0.0)), 0.2, 0.7)),
        ("is no sum over probabilities", (TAID, dict(pooled_terms=(0.0, 0.0)), 0.4)),
        (
            "0-d tensors as its numbers",
            (JSD, dict(compensation=lambda self, T: 1 + isinstance(self.teacher_weight, float))),
        ),
        ("weight is no field", Lost),
    ],
)
def test_what_divergences_declare(line, divergence):
    if isinstance(divergence, tuple):
        base, changes, *numbers = divergence
        term = base().triton_term() if not numbers else base(*numbers).triton_term()
        broken = subclass(base, 0, triton_term=lambda self: term, **changes)
        divergence = lambda: broken(*numbers)  # noqa: E731
    with pytest.raises(AssertionError, match=line):
        check_divergence(divergence())


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(testing, "_no_triton", lambda d: "triton is not installed")
    with pytest.warns(UserWarning, match="Triton term was not checked: triton is not") as warned:
        assert check_divergence(ForwardKL()) == [str(warned[0].message)]


def test_compiled():
    check_divergence(PearsonChi2(), compiled=True)


# --- Sources ---------------------------------------------------------------


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ROWS, V, H = (2, 3), 11, 5
IDS = torch.stack([torch.arange(4) + i for i in range(6)]).view(*ROWS, 4)
LISTS = IDS, tensor(*ROWS, 6).log_softmax(-1)[..., :4]
HEAD = LMHead(tensor(*ROWS, H), tensor(V, H, seed=1), tensor(V, seed=2), softcap=3.0, scale=0.7)
SOURCES = {
    "dense": Dense(tensor(*ROWS, V)),
    "strided": Dense(tensor(*ROWS, V + 2)[..., :V]),
    "head": HEAD,
    "head in bf16": LMHead(HEAD.hidden.bfloat16(), HEAD.weight.bfloat16()),
    "frozen head": LMHead(HEAD.hidden.clone().requires_grad_(), HEAD.weight),
    "geometric": Ensemble([tensor(*ROWS, V), HEAD], mode="logits"),
    "mixture": Ensemble(
        [tensor(*ROWS, V), HEAD, TopK(*LISTS, tail="renormalize")],
        weights=[0.2, tensor(*ROWS, seed=3).abs(), 0.5],
    ),
    "bucket": TopK(*LISTS),
    "renormalize": TopK(*LISTS, tail="renormalize"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source(kind):
    check_source(SOURCES[kind])


class Reads(Int8Reader):
    """Int8Head's reader, with methods of the source that made it."""

    def __getattribute__(self, name):
        broken = object.__getattribute__(self, "__dict__").get("source")
        change = getattr(broken, "changes", {}).get(name)
        return super().__getattribute__(name) if change is None else change.__get__(self)


class Learns(Reads, Int8Student):
    pass


class Broken(Int8Head):
    """Int8Head with some methods of its readers changed."""

    changes = {}

    def reader(self, ask):
        return Reads(self, ask, n=ask.n)

    def student(self, ask, wants, inplace):
        return Learns(self, ask, wants)


def always_from_the_start(self, low, high):
    return (self.product(0, high - low) * self.steps)[None]


def last_entries(self, low, high):
    n = self.ask.n
    return (self.hidden[low:high] @ self.source.weight[-n:].T.to(self.dtype) * self.steps)[None]


def without_steps(self, low, high):
    self.products = self.product(low, high)
    return self.products[None]


def other_type(self, low, high):
    return (self.product(low, high) * self.steps)[None].float()


def taken(self, grad, low, high, counts, scale=1.0, masked=True):
    self.d_hidden[low:high] = scale * ((grad * self.steps) @ self.weight.to(self.dtype))
    products = self.products.masked_fill(~counts[:, None], 0) if masked else self.products
    self.d_steps += (grad * products).sum(0)


def only_last_chunk(self, grad, low, high, counts):
    taken(self, grad, low, high, counts)
    self.d_steps = (grad * self.products.masked_fill(~counts[:, None], 0)).sum(0)


BROKEN_SOURCES = {
    "logits in chunks of 2 rows": (dict(logits=always_from_the_start), {}),
    "of the first 10 entries": (dict(logits=last_entries), {}),
    "steps has no effect": (dict(logits=without_steps), {}),
    "logits have dtype torch.float32": (dict(logits=other_type), {}),
    "row_bytes is 0": (dict(row_bytes=lambda self, entries: 0), {}),
    "never written": (dict(skip=lambda self, low, high: None), {}),
    "gradient of hidden .*finite differences": (
        dict(take=lambda self, *args: taken(self, *args, scale=0.999)), {},
    ),
    "gradient of steps .*finite differences": (dict(take=only_last_chunk), {}),
    "with NaN in rows that do not count": (
        dict(take=lambda self, *args: taken(self, *args, masked=False)), {},
    ),
    "must give contiguous": (dict(grad_of=lambda self, logits, low, high: logits[0].T), {}),
    "steps has no row for each position": ({}, dict(row_by_row=True)),
    "its hidden may require grad": ({}, dict(differentiated=[])),
    "parameters names": ({}, dict(parameters=("wieght",))),
}  # fmt: skip


def int8_head(cls):
    weight = (40 * tensor(V, H, seed=1)).to(torch.int8)
    return cls(tensor(*ROWS, H), weight, tensor(V, seed=2).abs() / 40)


@pytest.mark.parametrize("line", BROKEN_SOURCES)
def test_broken_sources(line):
    of_readers, of_source = BROKEN_SOURCES[line]
    changes = dict(changes=of_readers, __module__=__name__) | of_source
    broken = type(f"Broken{list(BROKEN_SOURCES).index(line)}", (Broken,), changes)
    with pytest.raises(AssertionError, match=line) as error:
        check_source(int8_head(broken))
    assert "\n" not in str(error.value)


def test_what_a_source_is_said_to_be():
    head = int8_head(Int8Head)
    logits = head.hidden @ (head.steps[:, None] * head.weight).T
    check_source(head, logits=logits)
    with pytest.raises(AssertionError, match="the logits should be"):
        check_source(head, logits=logits + 0.1)
    with pytest.raises(ValueError, match="at least 3 rows"):
        check_source(Dense(logits[0, 0]))
    with pytest.raises(TypeError, match="Tensor"):
        check_source(logits)
    object.__setattr__(head, "bias", tensor(V))
    with pytest.raises(AssertionError, match="bias is no field"):
        check_source(head)
