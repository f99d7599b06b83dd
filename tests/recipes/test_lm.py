"""Language models of every kind as sources of logits: a head is found, once, and without a trace;
what the model adds to its own loss is not lost."""

import random

import pytest
import torch
import torch.nn.functional as F
from tiny_lms import batch, gradients, loss, tiny
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BlenderbotSmallConfig,
    BlenderbotSmallForConditionalGeneration,
    DistilBertConfig,
    DistilBertForMaskedLM,
    Gemma2Config,
    Gemma3Config,
    GraniteConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
)
from transformers import T5ForConditionalGeneration as T5

from fastkd import LMHead
from fastkd.recipes import LM, Distil, Plus, Recipe, shifts_labels, train
from fastkd.recipes.lm import Head, causal_lm, chunks, find_head, logits_of


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


def learn(model, inputs, logits="auto", **settings):
    """The loss of labels alone, as an objective makes it."""
    objective = Distil(shifts_labels(model), alpha=0.0, **settings)
    return objective(LM(model, logits)(inputs), None, inputs, objective.counts(inputs)).loss


BART = dict(
    d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=67,
    max_position_embeddings=64,
)  # fmt: skip
T5_SIZES = dict(
    decoder_start_token_id=0, vocab_size=67, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
)
BERT = dict(
    vocab_size=67, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
)
MOE = dict(
    family=MixtralConfig, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True
)


def vision_language():
    text = dict(
        vocab_size=67, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=3
    )
    return AutoModelForCausalLM.from_config(config)


KINDS = {
    "causal": lambda: tiny(0),
    "experts": lambda: tiny(0, router_aux_loss_coef=5.0, **MOE),
    "experts, another": lambda: tiny(
        0, family=Qwen2MoeConfig, num_experts=4, output_router_logits=True,
        router_aux_loss_coef=5.0, moe_intermediate_size=8, shared_expert_intermediate_size=8,
    ),
    "masked": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "masked, without a cache": lambda: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=67, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    ),
    "t5": lambda: T5(T5Config(**T5_SIZES)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "another rule for decoders": lambda: BlenderbotSmallForConditionalGeneration(
        BlenderbotSmallConfig(**BART)
    ),
    "t5 of experts": lambda: SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            **T5_SIZES, num_experts=4, output_router_logits=True, router_z_loss_coef=0.5,
            router_aux_loss_coef=5.0, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        )
    ),
    "vision and language": vision_language,
}  # fmt: skip


@pytest.mark.parametrize("logits", ["auto", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_learns_as_by_its_own_loss(kind, logits):
    """Shifted or not, with its decoder's input, and with its auxiliary losses. Two tokenizers'
    extras are in the batch, which this model may not know; and a word that would cut its logits."""
    torch.manual_seed(0)
    model, inputs = KINDS[kind]().eval(), batch(rows=2, length=20)
    experts = {"output_router_logits": True} if "experts" in kind else {}  # Switch must be told
    try:
        returned = model(**inputs, **experts)
    except ValueError:
        if kind != "t5 of experts":
            raise
        pytest.skip("the Switch of this transformers cannot make its own loss")
    returned.loss.backward()
    expected = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    extras = {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
    if kind == "causal":
        extras["logits_to_keep"] = 3
    loss = learn(model, inputs | extras, logits)
    loss.backward()
    torch.testing.assert_close(loss.detach(), returned.loss.detach())
    torch.testing.assert_close(gradients(model), expected)
    both = getattr(model.config, "is_encoder_decoder", False)
    with_head = isinstance(LM(model, logits)(inputs).logits, LMHead)
    assert with_head == (logits == "auto" and not both)


@pytest.mark.parametrize("kind", ["t5", "bart", "masked", "masked, without a cache"])
def test_pairs_whose_labels_are_not_shifted(kind):
    """Position i against label i, of both models, in micro-batches of unequal targets."""
    torch.manual_seed(0)
    (student, teacher), T = (KINDS[kind]().double().eval() for _ in range(2)), 2.0
    inputs, counts = batch(), batch()["labels"] != -100
    given = {k: x for k, x in inputs.items() if k != "labels"}
    if student.config.is_encoder_decoder:
        given["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(inputs["labels"])
    with torch.no_grad():
        log_q, log_p = ((m(**given).logits[counts] / T).log_softmax(-1) for m in (student, teacher))
    kl = T**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    rows = zip(*(x.chunk(2) for x in inputs.values()), strict=True)
    step = [dict(zip(inputs, row, strict=True)) for row in rows]
    recipe = Recipe([step], LM(teacher), Distil(shifts_labels(student), temperature=T))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    (row,) = train(LM(student), recipe, optimizer, steps=1)
    assert row["loss"] == pytest.approx(kl.item(), rel=1e-7)


class Tuples(torch.nn.Module):
    """As older code, and traced models."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs).to_tuple()


@pytest.mark.parametrize("logits", ["auto", "whole"])
def test_models_that_return_tuples(logits):
    model, inputs = tiny(0), batch()
    expected = learn(model, inputs, logits).detach()
    torch.testing.assert_close(learn(Tuples(model), inputs, logits).detach(), expected)


def test_a_balancing_loss_is_not_lost_in_a_wrapper(tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    model, inputs = tiny(0, router_aux_loss_coef=5.0, **MOE), batch()
    expected = model(**inputs).loss.detach()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    torch.testing.assert_close(learn(wrapped, inputs).detach(), expected)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(wrapped)
        torch.testing.assert_close(learn(ddp, inputs).detach(), expected)
    finally:
        torch.distributed.destroy_process_group()

    tuples = Tuples(model)
    with pytest.raises(ValueError, match="balancing loss is not among its outputs"):
        learn(tuples, inputs)
    with torch.no_grad():  # as a teacher it has nothing to balance
        assert LM(tuples)(inputs).auxiliary is None


def test_a_balancing_loss_has_its_share_of_the_step():
    """Of equal rows the step is the same in 1, 2 and 4 micro-batches."""
    found = []
    for pieces in (1, 2, 4):
        model = tiny(0, router_aux_loss_coef=5.0, experts_implementation="eager", **MOE).double()
        whole = {k: x.repeat(4, 1) for k, x in batch(rows=1).items()}
        objective, total = Distil(alpha=0.0), 0
        rows = zip(*(x.chunk(pieces) for x in whole.values()), strict=True)
        parts = [dict(zip(whole, row, strict=True)) for row in rows]
        n = sum(objective.counts(part) for part in parts)
        for part in parts:
            learnt = objective(LM(model)(part), None, part, n)
            learnt.loss.backward()
            total += learnt.measures["auxiliary"]
        found.append((total, gradients(model)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_of_two_objectives_one_adds_the_balancing_loss():
    student, inputs = tiny(0, router_aux_loss_coef=5.0, **MOE), batch()
    heard = LM(student)(inputs)
    once = learn(student, inputs).detach()

    def loss(objective):
        return objective(heard, None, inputs, objective.counts(inputs)).loss.detach()

    ce = once - heard.auxiliary.detach()
    torch.testing.assert_close(loss(Plus(Distil(), Distil(), 0.5)), once + 0.5 * ce)


def test_chunks_where_they_take_less():
    """As whole steps were measured: at H = 640 whole logits are leaner with 512 tokens, chunks with
    1024; at H = 576 whole ones with 256. A head without a gradient is never larger in chunks."""

    def at(width, rows, length, trained=True):
        with torch.device("meta"):
            linear = torch.nn.Linear(width, 9).requires_grad_(trained)
            ids = torch.empty(rows, length, dtype=torch.long)
        return chunks(Head(linear, linear, None, 1.0), {"input_ids": ids})

    assert not at(640, 1, 512) and at(640, 1, 1024) and not at(576, 2, 128)
    assert at(640, 1, 512, trained=False)
    with torch.no_grad():
        assert at(640, 1, 512)
