"""A causal LM's head is found, once, and without a trace."""

import random

import pytest
import torch
from tiny_lms import batch, gradients, loss, tiny
from transformers import BertConfig, BertLMHeadModel, Gemma2Config, GraniteConfig, T5Config
from transformers import T5ForConditionalGeneration as T5

from fastkd import LMHead
from fastkd.recipes.lm import causal_lm, find_head, logits_of


def count_calls(monkeypatch, model):
    calls, forward = [], type(model).forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    return calls


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"tie_word_embeddings": True},
        {"family": Gemma2Config, "final_logit_softcapping": 2.0},
        {"family": GraniteConfig, "logits_scaling": 8.0},
    ],
    ids=["plain", "tied", "softcap", "scale"],
)
def test_a_head_gives_the_loss_and_gradients_of_whole_logits(others):
    student, teacher, inputs = tiny(0, **others), tiny(1), batch()
    head, results = find_head(student), []
    assert head.softcap == others.get("final_logit_softcapping")
    for way in (head, None):
        student.zero_grad()
        source = logits_of(student, way, inputs)
        assert isinstance(source, LMHead) == (way is not None)
        value = loss(source, logits_of(teacher, None, inputs).detach(), inputs["labels"])
        value.backward()
        results.append((value.detach(), gradients(student)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_a_model_is_probed_once_and_again_when_its_head_changes(monkeypatch):
    model = tiny(0, family=Gemma2Config, final_logit_softcapping=2.0)
    calls = count_calls(monkeypatch, model)
    for _ in range(3):
        assert find_head(model).softcap == 2.0
    assert len(calls) == 2
    model.set_output_embeddings(torch.nn.Linear(16, 67))
    assert find_head(model).linear.bias is not None and len(calls) == 4
    model.config.final_logit_softcapping = 3.0
    assert find_head(model).softcap == 3.0 and len(calls) == 6
    model.config.final_logit_softcapping = None
    assert find_head(model).softcap is None and len(calls) == 8


def test_a_model_that_is_gone_is_forgotten():
    from fastkd.recipes import lm

    before = len(lm._known)
    assert find_head(tiny(0)) is not None
    assert len(lm._known) == before


def test_the_probe_leaves_modes_and_random_states(monkeypatch):
    """Even of a model that draws numbers where it should not."""
    model = tiny(0, attention_dropout=0.5).train()
    model.model.layers[0].eval()
    forward = type(model).forward

    def noisy(self, *args, **kwargs):
        torch.rand(3)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", noisy)
    state, other = torch.get_rng_state(), random.getstate()
    assert find_head(model) is not None
    assert torch.equal(state, torch.get_rng_state()) and other == random.getstate()
    assert model.training and not model.model.layers[0].training
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("place", ["lm_head", ""])
@pytest.mark.parametrize(
    "hook", ["register_forward_hook", "register_full_backward_hook"], ids=["forward", "backward"]
)
def test_hooks_see_whole_logits(place, hook):
    """Also those that come after the probe."""
    model, seen = tiny(0), []
    assert find_head(model) is not None
    getattr(model.get_submodule(place), hook)(lambda *args: seen.append(args))
    assert find_head(model) is None


def test_a_hook_before_the_head_is_part_of_the_model():
    model, inputs = tiny(0), batch()
    model.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    head = logits_of(model, find_head(model), inputs)
    torch.testing.assert_close(head.hidden @ head.weight.T, model(**inputs).logits)


def test_models_of_other_kinds():
    """Encoders with a decoder are left alone; two models in one are not chosen from."""
    t5 = T5(T5Config(vocab_size=67, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    assert causal_lm(t5) is t5 and find_head(t5) is None
    assert causal_lm(torch.nn.ModuleList([tiny(0), tiny(1)])) is None
    assert causal_lm(tiny(0).model) is None and find_head(torch.nn.Linear(2, 2)) is None
    bert = BertLMHeadModel(
        BertConfig(
            vocab_size=67, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, is_decoder=True,
        )
    )  # fmt: skip
    with torch.no_grad():
        bert.cls.predictions.bias.normal_()
    inputs = batch()
    head = logits_of(bert.eval(), find_head(bert), inputs)  # a bias, and a layer before the head
    expected = bert(**inputs).logits
    torch.testing.assert_close(head.hidden @ head.weight.T + head.bias, expected)
