"""Two causal LMs as two sources: the loss and the gradients are those of whole logits."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_lms import V, batch, gradients, loss, tiny
from torch import nn
from transformers import Gemma2Config

from fastkd import LMHead
from fastkd.integrations.transformers import sources

ROOT = Path(__file__).parents[2]


def step(student, teacher, inputs, logits="auto"):
    """(sources, loss, gradients)"""
    student.zero_grad()
    torch.manual_seed(3)
    pair = sources(student, teacher, inputs, logits=logits)
    value = loss(*pair, inputs["labels"])
    value.backward()
    return pair, value.detach(), gradients(student)


def assert_as_whole(student, teacher, inputs, kinds=(LMHead, LMHead), **tolerance):
    pair, *results = step(student, teacher, inputs)
    assert [isinstance(x, LMHead) for x in pair] == [kind is LMHead for kind in kinds]
    whole, *expected = step(student, teacher, inputs, "whole")
    assert all(isinstance(x, torch.Tensor) for x in whole)
    torch.testing.assert_close(results, expected, **tolerance or dict(rtol=1e-5, atol=1e-7))
    assert len(results[1]) == sum(p.requires_grad for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


class Wrapper(nn.Module):
    def __init__(self, model, change=lambda z: z):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, **inputs):
        return self.change(self.model(**inputs).logits)


def test_dropout_and_a_teacher_that_is_not_frozen():
    """With the same seed whole logits draw the same: the probe draws nothing."""
    softcap = dict(family=Gemma2Config, final_logit_softcapping=2.0)
    student = tiny(0, attention_dropout=0.3, tie_word_embeddings=True).train()
    assert_as_whole(student, tiny(1, **softcap), batch())
    assert student.training


def test_outputs_as_tuples():
    assert_as_whole(tiny(0), tiny(1), batch() | {"return_dict": False})


def test_gradient_checkpointing():
    student = tiny(0).train()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    assert_as_whole(student, tiny(1), batch())


@pytest.mark.parametrize("where", ["model", "forward", "forward and loss"])
def test_low_precision(where):
    """Autocast that ends with the forward pass, as accelerate's, is still the head's."""
    student, teacher = tiny(0), tiny(1)
    wide = batch(2, 30)
    if where == "model":
        student, teacher = student.bfloat16(), teacher.bfloat16()
    if where == "forward":
        for model in (student, teacher):
            model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    # A bf16 head rounds its logits, and their gradients, here as there: up to their order.
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "forward and loss"):
        (student_source, _), *results = step(student, teacher, wide)
        assert isinstance(student_source, LMHead) and student_source.dtype == torch.bfloat16
        _, *expected = step(student, teacher, wide, "whole")
    torch.testing.assert_close(results[0], expected[0], rtol=2e-3, atol=0)
    for name, x in expected[1].items():
        assert (results[1][name] - x).norm() < 0.02 * x.norm(), name


def test_left_padding_and_other_arguments():
    inputs = batch()
    inputs["attention_mask"][0, :4] = 0
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert_as_whole(tiny(0), tiny(1), inputs)
    inputs["logits_to_keep"] = 5
    inputs["labels"] = inputs["labels"][:, -5:]
    assert_as_whole(tiny(0), tiny(1), inputs)


@pytest.mark.parametrize("logits", ["auto", "whole"])
def test_packed_documents_do_not_see_each_other(logits):
    """With a cache the models would ignore where documents begin."""
    student, teacher = tiny(0), tiny(1)
    documents = [batch(1, n, seed=n) for n in (5, 9, 3)]
    packed = {k: torch.cat([x[k] for x in documents], 1) for k in ("input_ids", "labels")}
    packed["position_ids"] = torch.cat([torch.arange(n) for n in (5, 9, 3)])[None]
    packed["labels"][0, [5, 14]] = -100  # a document's first token is not predicted
    _, value, grads = step(student, teacher, packed, logits)
    count = (packed["labels"][:, 1:] != -100).sum()
    student.zero_grad()
    total = 0
    for document in documents:
        pair = sources(student, teacher, document, logits=logits)
        part = loss(*pair, document["labels"], num_items=count)
        part.backward()
        total += part.detach()
    torch.testing.assert_close((value, grads), (total, gradients(student)), rtol=1e-4, atol=1e-6)


def test_wrappers_of_ones_own():
    """Where one changes the logits, they are whole, in the first call already."""
    teacher, inputs = tiny(1), batch()
    assert_as_whole(Wrapper(tiny(0)), Wrapper(teacher), inputs)
    fifth = torch.tensor([5])
    for change in (lambda z: z / 2, lambda z: z.index_fill_(-1, fifth, -9.0)):
        wrapped = Wrapper(tiny(0), change)
        for _ in range(2):
            assert_as_whole(wrapped, teacher, inputs, (torch.Tensor, LMHead))
    trimmed = Wrapper(
        tiny(0, vocab_size=V + 3), lambda z: z[..., :V]
    )  # more than the width is left
    assert_as_whole(trimmed, teacher, inputs, (torch.Tensor, LMHead))
    assert_as_whole(
        torch.compile(tiny(0), backend="eager"), teacher, inputs, (torch.Tensor, LMHead)
    )


def test_hooks_on_the_head_see_logits():
    student, seen = tiny(0), []
    student.lm_head.register_forward_hook(lambda *args: seen.append(args[2].shape[:2]))
    inputs = batch()
    assert_as_whole(student, tiny(1), inputs, (torch.Tensor, LMHead))
    assert set(seen) == {inputs["input_ids"].shape}


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, LMHead),
        ({"target_modules": ["q_proj", "lm_head"]}, torch.Tensor),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, torch.Tensor),
    ],
    ids=["attention", "head", "saved head"],
)
def test_peft_student_and_teacher(settings, kind):
    peft = pytest.importorskip("peft")

    def adapted(seed):
        config = peft.LoraConfig(**settings, init_lora_weights=False, task_type="CAUSAL_LM")
        return peft.get_peft_model(tiny(seed), config)

    assert_as_whole(adapted(0), adapted(1).requires_grad_(False), batch(), (kind, kind))


def test_an_adapter_added_to_the_head_later():
    """The answer of the probe is no longer the answer."""
    peft = pytest.importorskip("peft")
    student, teacher, inputs = tiny(0), tiny(1), batch()
    assert isinstance(sources(student, teacher, inputs)[0], LMHead)
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    assert_as_whole(peft.get_peft_model(student, config), teacher, inputs, (torch.Tensor, LMHead))


def test_the_models_own_loss_is_not_computed(monkeypatch):
    student, teacher, inputs = tiny(0), tiny(1), batch()
    own = partial(pytest.fail, "the model computes a loss")
    for model in (student, teacher):
        monkeypatch.setattr(type(model), "loss_function", property(lambda self: own))
    for logits in ("auto", "whole"):
        before = dict(inputs)
        sources(student, teacher, inputs, logits=logits)
        assert inputs.keys() == before.keys()


def test_other_teachers():
    """None; one that reads something else; the student itself."""
    student, inputs = tiny(0), batch()
    assert sources(student, None, inputs)[1] is None
    other = batch(seed=5)
    pair = sources(student, student, inputs, teacher_batch=other)
    for source, ids in zip(pair, (inputs, other), strict=True):
        z = student(**{k: x for k, x in ids.items() if k != "labels"}).logits
        torch.testing.assert_close(source.hidden @ source.weight.T, z)
    assert not pair[1].hidden.requires_grad and not pair[1].weight.requires_grad
    with pytest.raises(ValueError, match="got 'heads'"):
        sources(student, None, inputs, logits="heads")


def test_models_are_left_as_they_were_after_an_error():
    model, good = tiny(0), batch()
    expected = model(input_ids=good["input_ids"]).logits
    twin = copy.deepcopy(model)
    for _ in range(2):
        with pytest.raises(IndexError):
            sources(model, None, {"input_ids": torch.full((1, 3), V)})
        assert torch.equal(model(input_ids=good["input_ids"]).logits, expected)
    assert vars(model).keys() == vars(twin).keys()


def test_two_processes_have_the_gradients_of_one():
    """Under DistributedDataParallel, whichever way it finds what the backward pass reaches, and
    under fully_shard; of the head too, tied or alone."""
    pytest.importorskip("peft")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("ddp.py"))
    done = subprocess.run(
        [*launch, script], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 17, done.stdout
