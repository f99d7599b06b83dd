"""TRL's trainers with fastkd's loss: TRL's numbers, and TRL again afterwards."""

import importlib
import logging
import math
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from tiny_lms import V, batch, gradients, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")

from datasets import Dataset  # noqa: E402
from tiny_lms import tokenizer  # noqa: E402
from trl import DistillationConfig, DistillationTrainer  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

import fastkd.integrations.trl as integration  # noqa: E402
from fastkd.integrations.trl import fused  # noqa: E402

BETAS = (0.0, 0.25, 0.5, 1.0)


def functions():
    return (
        vars(GKDTrainer)["generalized_jsd_loss"], vars(GKDTrainer)["compute_loss"],
        distillation_trainer._chunked_divergence_loss,
    )  # fmt: skip


TRLS = functions()
JSD_LOSS, COMPUTE_LOSS, CHUNKED_LOSS = TRLS


@pytest.fixture(autouse=True)
def trl_is_itself_afterwards():
    yield
    assert functions() == TRLS


@pytest.fixture
def calls(monkeypatch):
    """Of `kd_loss`: one for the check of a new setting, one for the loss."""
    made, own = [], integration.kd_loss

    def kd_loss(*args, **kwargs):
        made.append(kwargs)
        return own(*args, **kwargs)

    monkeypatch.setattr(integration, "kd_loss", kd_loss)
    return made


def results(loss, *tensors):
    """The loss, what comes with it, and the gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    made = loss(*leaves)
    value, *others = made if isinstance(made, tuple) else (made,)
    return [value.detach(), *others, *torch.autograd.grad(value, leaves)]


def logits(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    s, t = (3 * torch.randn(2, 9, V, generator=generator) for _ in range(2))
    return s.to(dtype), t.to(dtype), batch()["labels"]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits(beta, dtype, calls):
    """Every argument: no further from TRL's function in float64 than twice what TRL's is in this
    dtype, and what fp32 knows of a log-probability."""
    s, t, labels = logits(dtype)
    named = ("mean", "sum", "batchmean")
    eps = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * (s.abs().max() + math.log(V))
    cases = list(product((None, labels), (1.0, 1.5), named, (None, 12, torch.tensor(30))))
    for labels, temperature, reduction, num_items in cases:
        others = (labels, beta, temperature, reduction, num_items)
        expected = results(lambda s: JSD_LOSS(s, t.double(), *others), s.double())  # noqa: B023
        theirs = results(lambda s: JSD_LOSS(s, t, *others), s)  # noqa: B023
        with fused():
            ours = results(lambda s: GKDTrainer.generalized_jsd_loss(s, t, *others), s)  # noqa: B023
        assert ours[1].dtype == dtype
        for x, y, truth in zip(ours, theirs, expected, strict=True):
            error, allowed = (x - truth).norm(), 2 * (y - truth).norm()
            assert error <= allowed + eps * truth.norm()
    assert len(calls) == 2 * len(cases)


@pytest.mark.parametrize("beta", BETAS)
def test_heads(beta, calls):
    """Widths that differ, biases, scales, softcaps, counts; the entropy and the number of positions
    too."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight, bias = random(2, 9, 16), random(V, 16), random(V)
    teacher = random(2, 9, 24), random(V, 24), random(V)
    mask = (batch()["labels"] != -100).long()
    settings = [
        {},
        {"temperature": 1.5, "num_items_in_batch": torch.tensor(30.0)},
        {"student_final_logit_softcapping": 5.0, "teacher_final_logit_softcapping": 8.0},
        {"student_logit_scale": 0.5, "teacher_logit_scale": 0.25, "num_items_in_batch": 7},
    ]
    for others, biased in product(settings, (False, True)):

        def loss(function, others=others, biased=biased):
            def of(hidden, weight, bias=None):
                return function(
                    hidden, teacher[0], weight, teacher[1], mask, beta, student_lm_head_bias=bias,
                    teacher_lm_head_bias=teacher[2] if biased else None, **others,
                )  # fmt: skip

            return results(of, hidden, weight, *([bias] if biased else []))

        with fused():
            ours = loss(distillation_trainer._chunked_divergence_loss)
        torch.testing.assert_close(ours, loss(CHUNKED_LOSS), rtol=1e-5, atol=1e-5)
    assert len(calls) == 4 * len(settings)


def test_sharded_heads(tmp_path):
    """FSDP2's weights: gathered, with a gradient that goes back to the shards."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        generator = torch.Generator().manual_seed(0)
        hidden, teacher = torch.randn(2, 2, 9, 16, generator=generator)
        weight, mask = torch.randn(V, 16, generator=generator), torch.ones(2, 9)

        def loss(function, weight, other):
            made = results(lambda h, w: function(h, teacher, w, other, mask, 0.5), hidden, weight)
            return [x.full_tensor() if isinstance(x, DTensor) else x for x in made]

        shards = [distribute_tensor(x, mesh, [Shard(0)]) for x in (weight, 2 * weight)]
        with fused():
            ours = loss(distillation_trainer._chunked_divergence_loss, *shards)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(ours, loss(CHUNKED_LOSS, weight, 2 * weight), rtol=1e-5, atol=1e-5)


def test_nothing_counts(calls):
    s, t, labels = logits()
    w = torch.randn(V, V)
    with fused():
        ours = results(lambda s: GKDTrainer.generalized_jsd_loss(s, t, labels * 0 - 100), s)
        assert not any(x.any() for x in ours)
        mask = torch.zeros(2, 9)
        chunked = distillation_trainer._chunked_divergence_loss
        ours = results(lambda s, w: chunked(s, t, w, w.detach(), mask, 0.5), s, w)
        assert not any(x.any() for x in ours)
    assert calls


def test_what_is_not_served_is_trls(calls):
    s, t, labels = logits()
    w, mask = torch.randn(V, V), torch.ones(2, 9)
    sharded = w.clone()
    sharded.ds_id = 0  # ZeRO-3's mark
    vector = torch.full((2,), 9)
    with fused():
        jsd, chunked = (
            GKDTrainer.generalized_jsd_loss, distillation_trainer._chunked_divergence_loss,
        )  # fmt: skip
        for function, own, arguments in (
            (jsd, JSD_LOSS, (s, t, labels, 0.5, 1.0, "none")),
            (jsd, JSD_LOSS, (s, t.clone().requires_grad_(), labels)),
            (chunked, CHUNKED_LOSS, (s, t, w, sharded, mask, 0.5)),
        ):
            torch.testing.assert_close(
                function(*arguments), own(*arguments), rtol=0, atol=0, equal_nan=True
            )
        with pytest.raises(RuntimeError, match="size"):
            (jsd(s, t[:, :, :5], labels) / vector).item()  # TRL's own error
    assert not calls


def test_undo():
    """Nested, twice, out of order, after an error, around another's wrapper."""
    outer = fused()
    with pytest.raises(ZeroDivisionError), fused():
        1 / 0  # noqa: B018
    assert all(x is not y for x, y in zip(functions(), TRLS, strict=True))
    inner = fused()
    outer.undo()
    outer.undo()
    assert functions() != TRLS
    inner.undo()
    assert functions() == TRLS

    with fused():
        ours = distillation_trainer._chunked_divergence_loss
        distillation_trainer._chunked_divergence_loss = wrapper = lambda *a: ours(*a)
    assert distillation_trainer._chunked_divergence_loss is wrapper
    distillation_trainer._chunked_divergence_loss = CHUNKED_LOSS


def test_it_says_once_that_it_is_in_use(caplog):
    with caplog.at_level(logging.INFO, "fastkd"), fused(), fused():
        GKDTrainer.generalized_jsd_loss(*logits())
    (line,) = caplog.messages
    assert line.startswith("trl ") and "use fastkd" in line


def wrong(kd_loss, of_value, of_gradient):
    """With another value, or another gradient."""

    def loss(*args, **kwargs):
        parts = kd_loss(*args, **kwargs)
        value = parts.loss if kwargs.get("return_parts") else parts
        value = value * of_gradient + value.detach() * (of_value - of_gradient)
        return parts._replace(loss=value) if kwargs.get("return_parts") else value

    return loss


@pytest.mark.parametrize("factors", [(1.001, 1.0), (1.0, 1.01)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_loss_is_seen(factors, dtype, monkeypatch):
    """On its first batch, with both numbers; also in evaluation, where no gradient is asked for."""
    if dtype == torch.bfloat16:
        factors = (factors[0], 1.1 if factors[1] != 1 else 1.0)  # rounded to 8 bits
    monkeypatch.setattr(integration, "kd_loss", wrong(integration.kd_loss, *factors))
    s, t, labels = logits(dtype)
    w = (torch.randn(V, V) / V).to(dtype)
    with fused(), torch.no_grad():
        with pytest.raises(RuntimeError, match=r"disagree in GKD.* \S+ against \S+, apart by"):
            GKDTrainer.generalized_jsd_loss(s, t, labels)
        with pytest.raises(RuntimeError, match=r"disagree in _chunked.* \S+ against \S+, apart by"):
            distillation_trainer._chunked_divergence_loss(s, t, w, w, labels != -100, 0.5)


def test_minus_infinity_is_not_compared(caplog):
    """TRL's loss is NaN there; the padded vocabulary of both sides counts for nothing here."""
    s, t, labels = logits()
    expected = JSD_LOSS(s, t, labels)
    padding = torch.full((2, 9, 3), -torch.inf)
    with fused():
        loss = GKDTrainer.generalized_jsd_loss(
            *(torch.cat((x, padding), -1) for x in (s, t)), labels
        )
    torch.testing.assert_close(loss, expected)
    assert "not compared" in caplog.text


def test_an_unknown_trl_is_named(monkeypatch):
    def other(student_logits, teacher_logits, weight): ...

    monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(other))
    with pytest.raises(RuntimeError, match=r"trl \d+\..*GKDTrainer.generalized_jsd_loss\(student"):
        fused()
    monkeypatch.undo()
    monkeypatch.delattr(distillation_trainer, "_chunked_divergence_loss")
    with pytest.raises(RuntimeError, match=r"trl \d+\..* has no .*_chunked_divergence_loss"):
        fused()
    assert vars(GKDTrainer)["generalized_jsd_loss"] is JSD_LOSS
    monkeypatch.undo()


def test_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.experimental.gkd", None)
    monkeypatch.delitem(sys.modules, "fastkd.integrations.trl")
    with pytest.raises(ImportError, match=r"^fastkd.integrations.trl needs trl >= 1.16: .*$"):
        importlib.import_module("fastkd.integrations.trl")


def test_gradients_of_data_parallelism():
    """Each process's loss is over the tokens of all, and gradients are averaged: the gradient of
    the whole batch in one process. TRL's own is divided by the number of processes once more."""
    whole, teacher = batch(rows=4), tiny(1)
    n = (whole["labels"][:, 1:] != -100).sum()

    def gradient(inputs, processes):
        student = tiny(0)
        trainer = SimpleNamespace(
            teacher_model=teacher, beta=0.5, get_tp_size=lambda: 1,
            generalized_jsd_loss=GKDTrainer.generalized_jsd_loss,
            args=SimpleNamespace(average_tokens_across_devices=True),
            accelerator=SimpleNamespace(num_processes=processes),
        )  # fmt: skip
        GKDTrainer.compute_loss(trainer, student, inputs, num_items_in_batch=n).backward()
        return torch.cat([g.flatten() for g in gradients(student).values()])

    def averaged():
        halves = ({k: x[rows] for k, x in whole.items()} for rows in (slice(2), slice(2, 4)))
        return sum(gradient(half, 2) for half in halves) / 2

    with fused():
        expected = gradient(whole, 1)
        torch.testing.assert_close(averaged(), expected)
    torch.testing.assert_close(averaged(), expected / 2)


def pair():
    """Whose distributions differ: those of `tiny` as it is are nearly uniform."""
    return [tiny(seed, initializer_range=0.3) for seed in (0, 1)]


def trained(make, tmp_path, **settings):
    """(logged losses, weights) of three steps of two micro-batches."""
    common = dict(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=0.5,
        gradient_accumulation_steps=2, optim="sgd", lr_scheduler_type="constant", logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=0,
    )  # fmt: skip
    trainer = make(common | settings)
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    losses.append(trainer.evaluate()["eval_loss"])
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    start = torch.cat([p.detach().flatten() for p in pair()[0].parameters()])
    assert (weights - start).norm() > 0.1
    return torch.tensor(losses).double(), weights


def conversations():
    def words(start, count):
        return " ".join(f"w{(7 * start + i) % 60}" for i in range(count))

    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": words(i, 3)},
                          {"role": "assistant", "content": words(i + 1, 2 + i % 5)}]}
            for i in range(8)
        ]
    )  # fmt: skip


def gkd(settings):
    data, (student, teacher) = conversations(), pair()
    args = GKDConfig(**settings, beta=0.25, lmbda=0.0, max_length=32, bf16=False)
    return GKDTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=data, eval_dataset=data,
        processing_class=tokenizer(),
    )  # fmt: skip


def test_gkd_trainer(tmp_path, monkeypatch, calls):
    """Losses and weights are no further from TRL's loss in float64 than twice what TRL's are."""
    theirs = trained(gkd, tmp_path)
    assert not calls
    with fused():
        ours = trained(gkd, tmp_path)
    assert len(calls) > 6

    def double(student_logits, teacher_logits, **others):
        return JSD_LOSS(student_logits.double(), teacher_logits.double(), **others)

    monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(double))
    truth = trained(gkd, tmp_path)
    monkeypatch.undo()
    for x, y, z in zip(ours, theirs, truth, strict=True):
        assert (x - z).norm() <= 2 * (y - z).norm() + torch.finfo(torch.float32).eps * z.norm()


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_distillation_trainer(beta, tmp_path, calls):
    """On what the student writes itself, its likeliest words: losses, entropies and weights."""
    prompts = Dataset.from_list([{"prompt": f"w{i} w{3 * i} w5"} for i in range(8)])

    def make(settings):
        student, teacher = pair()
        args = DistillationConfig(
            **settings, beta=beta, max_completion_length=6, bf16=False,
            generation_kwargs={"do_sample": False},
        )  # fmt: skip
        return DistillationTrainer(
            model=student, teacher_model=teacher, args=args, train_dataset=prompts,
            eval_dataset=prompts, processing_class=tokenizer(),
        )  # fmt: skip

    theirs = trained(make, tmp_path)
    assert not calls
    with fused():
        ours = trained(make, tmp_path)
    assert len(calls) > 6
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
