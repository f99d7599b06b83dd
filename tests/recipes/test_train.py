"""The loop, and every strategy that is a loss of logits, against loops of plain torch in fp64."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_lms import batch, gradients, tiny

from fastkd import TAID, LogitMSE, ReverseKL, SkewForwardKL, reference
from fastkd.recipes import (
    LM,
    Cosine,
    Distil,
    Linear,
    Moving,
    Plus,
    Recipe,
    Steps,
    taid,
    train,
)

STEPS = 3


def pair():
    return tiny(0).double(), tiny(1).double().eval()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def steps(micro_batches=1, rows=4):
    """The same rows of each step in so many micro-batches, of unequal targets."""
    for step in range(STEPS):
        whole = batch(rows=rows, length=14, seed=step)
        whole["labels"][1] = -100  # of one row there is nothing to learn: at 4, of a micro-batch
        pieces = zip(*(x.chunk(micro_batches) for x in whole.values()), strict=True)
        yield [dict(zip(whole, piece, strict=True)) for piece in pieces]


def by_hand(loss_at):
    """(weights, losses) of a loop on whole logits: `loss_at(progress, z_s, z_t, labels)`."""
    student, teacher = pair()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    losses = []
    for step, (whole,) in enumerate(steps()):
        ids, labels = whole["input_ids"], whole["labels"][:, 1:]
        counts = labels != -100
        with torch.no_grad():
            z_t = teacher(input_ids=ids, use_cache=False).logits[:, :-1][counts]
        z_s = student(input_ids=ids, use_cache=False).logits[:, :-1][counts]
        loss = loss_at(step / STEPS, z_s, z_t, labels[counts])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return weights(student), losses


def ours(objective, micro_batches=1, logits="auto", teaches=True):
    student, teacher = pair()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    says = LM(teacher, logits) if teaches else None
    recipe = Recipe(steps(micro_batches), says, objective)
    return weights(student), train(LM(student, logits), recipe, optimizer, STEPS), student


def usual(progress, z_s, z_t, labels, T=2.0, alpha=0.7):
    """Without a line of ours."""
    log_q, log_p = (F.log_softmax(z / T, -1) for z in (z_s, z_t))
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return alpha * T**2 * kl + (1 - alpha) * F.cross_entropy(z_s, labels)


@pytest.mark.parametrize("logits", ["auto", "whole"])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_weights_of_a_loop_by_hand(micro_batches, logits):
    """However the step is cut, and on either way to the logits."""
    expected, losses = by_hand(usual)
    _, history, student = ours(Distil(temperature=2.0, alpha=0.7), micro_batches, logits)
    torch.testing.assert_close(weights(student), expected)
    torch.testing.assert_close([row["loss"] for row in history], losses)
    assert [row["step"] for row in history] == [1, 2, 3]


def of(divergence, T=1.0, alpha=1.0):
    """The reference's loss, with numbers that may move."""

    def loss_at(progress, z_s, z_t, labels):
        now = [x(progress) if callable(x) else x for x in (divergence, T, alpha)]
        d, temperature, weight = now
        return reference.kd_loss(
            z_s, z_t, labels, divergence=d, temperature=temperature, alpha=weight
        )

    return loss_at


STRATEGIES = {
    "logit mse": (Distil(divergence="logit_mse"), of(LogitMSE())),
    "reverse": (Distil(divergence="reverse_kl", temperature=3.0), of(ReverseKL(), 3.0)),
    "skew": (Distil(divergence=SkewForwardKL(0.2)), of(SkewForwardKL(0.2))),
    "taid": (Distil(divergence=taid(0.1, 0.7)), of(lambda x: TAID(0.1 + 0.6 * x))),
    "temperature": (Distil(temperature=Linear(4, 1)), of("forward_kl", lambda x: 4 - 3 * x)),
    "alpha": (
        Distil(alpha=Steps({0: 1, 0.5: 0.2})),
        of("forward_kl", 1.0, lambda x: 1 if x < 0.5 else 0.2),
    ),
    "moving skew": (
        Distil(divergence=Moving(SkewForwardKL, teacher_weight=Linear(0.5, 0.2))),
        of(lambda x: SkewForwardKL(0.5 - 0.3 * x)),
    ),
    "two divergences": (
        Plus(Distil(divergence="reverse_kl"), Distil(alpha=0.5), Cosine(2, 1)),
        lambda x, *z: of("reverse_kl")(x, *z) + Cosine(2, 1)(x) * of("forward_kl", 1.0, 0.5)(x, *z),
    ),
}  # fmt: skip


@pytest.mark.parametrize("logits", ["auto", "whole"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_trains_as_its_definition(name, logits):
    objective, loss_at = STRATEGIES[name]
    expected, losses = by_hand(loss_at)
    _, history, student = ours(objective, 2, logits)
    torch.testing.assert_close([row["loss"] for row in history], losses)
    torch.testing.assert_close(weights(student), expected)


def test_labels_alone_need_no_teacher():
    """The second of two stages, and training on what a teacher wrote."""
    expected, losses = by_hand(lambda progress, z_s, z_t, labels: F.cross_entropy(z_s, labels))
    _, history, student = ours(Distil(alpha=0.7), 2, teaches=False)
    torch.testing.assert_close(weights(student), expected)
    torch.testing.assert_close([row["ce"] for row in history], losses)
    assert "kd" not in history[0]


def test_a_step_without_a_target_learns_nothing():
    student, teacher = pair()
    before = weights(student)
    empty = batch(rows=1) | {"labels": torch.full((1, 9), -100)}
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    recipe = Recipe([[empty, empty]], LM(teacher), Distil(alpha=0.5))
    (row,) = train(LM(student), recipe, optimizer, steps=1)
    assert row["loss"] == 0
    torch.testing.assert_close(weights(student), before, rtol=0, atol=0)


def test_measures_are_averages_over_the_step():
    """And those of the distributions themselves."""
    histories = [ours(Distil(temperature=2.0, alpha=0.7), n)[1] for n in (1, 4)]
    torch.testing.assert_close(*histories)
    student, teacher = pair()
    ((whole,), *_) = steps()
    counts = whole["labels"][:, 1:] != -100
    with torch.no_grad():
        z_s, z_t = (
            m(input_ids=whole["input_ids"]).logits[:, :-1][counts] for m in (student, teacher)
        )
    p = (z_t / 2).softmax(-1)
    row = histories[0][0]
    entropy = -(p * p.log()).sum(-1).mean().item()
    assert row["teacher_entropy"] == pytest.approx(entropy, rel=1e-7)
    same = (z_s.argmax(-1) == z_t.argmax(-1)).double().mean().item()
    assert row["top1_agreement"] == pytest.approx(same, rel=1e-7)
    parts = 0.7 * 4 * row["kd"] + 0.3 * row["ce"]
    assert row["loss"] == pytest.approx(parts, rel=1e-7)


def test_a_teacher_of_another_type():
    """Its logits are what they are in bfloat16; the student's arithmetic stays its own."""
    student, teacher = tiny(0), tiny(1).bfloat16().eval()
    inputs = batch()
    found = []
    for logits in ("auto", "whole"):
        student.zero_grad()
        objective = Distil(temperature=2.0)
        with torch.no_grad():
            says = LM(teacher, logits)(inputs)
        n = objective.counts(inputs)
        objective(LM(student, logits)(inputs), says, inputs, n).loss.backward()
        found.append({k: g.clone() for k, g in gradients(student).items()})
    # The two teachers differ by the rounding of whole logits to bfloat16, and no more.
    for name, one in found[0].items():
        assert (one - found[1][name]).norm() < torch.finfo(torch.bfloat16).eps * one.norm(), name


def test_the_loop_is_read_in_one_sitting():
    assert len(inspect.getsource(train).splitlines()) <= 60


def test_settings_that_kd_loss_refuses_are_refused_at_once():
    ends = dict(alpha=Linear(1, 2)), dict(temperature=Cosine(1, 0))
    for wrong in (dict(temperature=0), dict(alpha=Linear(2, 1)), dict(divergence="klx"), *ends):
        with pytest.raises(ValueError):
            Distil(**wrong)
    with pytest.raises(TypeError, match="reduction cannot be set"):
        Distil(reduction="sum")
    with pytest.raises(ValueError, match="not negative, got -1"):
        Plus(Distil(), Distil(), Linear(1, -1))
    with pytest.raises(ValueError, match="the first at 0"):
        Steps({0.5: 1})


def bare(source):
    """The statements of a function, without its docstring and types."""

    class Untyped(ast.NodeTransformer):
        def visit_AnnAssign(self, node):
            return ast.Assign([node.target], node.value)

    (function,) = ast.parse(source).body
    body = [Untyped().visit(x) for x in function.body if not isinstance(x, ast.Expr)]
    return [ast.unparse(ast.fix_missing_locations(x)) for x in body]


def test_the_page_shows_the_loop_as_it_is():
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (shown,) = (x for x in blocks if x.startswith("def train("))
    assert bare(shown) == bare(inspect.getsource(train))
