"""Models are opened whole, or refused in one line."""

import json
import os
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_lms import gradients
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    BitsAndBytesConfig,
    DistilBertConfig,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MptConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    RobertaConfig,
    SmolLM3Config,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    XLNetConfig,
)
from transformers.trainer_utils import set_seed

from fastkd.recipes.lm import find_head, looks_ahead, run
from fastkd.training import cut
from fastkd.training import models as opening
from fastkd.training.cut import layers_to_keep
from fastkd.training.errors import InputError
from fastkd.training.models import (
    check_models,
    describe,
    open_student,
    open_teachers,
    open_tokenizer,
)
from fastkd.training.settings import DataSettings, ModelSettings

V = 64
SIZE = dict(
    vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
GPT2 = dict(vocab_size=V, n_embd=16, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1)
IDS = torch.arange(12)[None]


def words(extra=(), normalizer=None, swapped=False):
    """A tokenizer of one token a word."""
    ids = {f"w{i}": i for i in range(60)} | {x: i for i, x in enumerate(("[MASK]", *extra), 60)}
    if swapped:
        ids |= {"w5": 7, "w7": 5}
    inner = Tokenizer(WordLevel(ids, unk_token="w0"))
    inner.pre_tokenizer, inner.normalizer = pre_tokenizers.WhitespaceSplit(), normalizer
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", mask_token="[MASK]")


class Shop:
    """Makes folders of tiny models."""

    def __init__(self, root):
        self.root = root

    def save(self, name, model, tokenizer=None):
        model.save_pretrained(self.root / name)
        (tokenizer or words()).save_pretrained(self.root / name)
        return self.root / name

    def model(self, name, config=None, auto=AutoModelForCausalLM, tokenizer=None, **others):
        set_seed(len(name))
        model = auto.from_config(config or LlamaConfig(**SIZE | others))
        for p in model.parameters():  # far from a draw: every layer shows in the logits
            p.data.add_(0.1 * torch.randn_like(p))
        return self.save(name, model, tokenizer)

    def changed(self, name, source, change, file="model.safetensors"):
        folder = shutil.copytree(source, self.root / name)
        save_file(change(load_file(folder / file)), folder / file, metadata={"format": "pt"})
        return folder

    def adapter(self, name, base, settings=None, **others):
        peft = pytest.importorskip("peft")
        settings = settings or peft.LoraConfig(r=4, task_type="CAUSAL_LM", **others)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, on tied embeddings
            model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).eval()
            for p in model.parameters():
                if p.requires_grad:
                    p.data.normal_(0, 0.3)
            return self.save(name, model), model


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    os.environ["HF_HUB_OFFLINE"] = "1"
    shop = Shop(tmp_path_factory.mktemp("models"))
    shop.student, shop.teacher = shop.model("student"), shop.model("the-teacher")
    return shop


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def settings(student=None, *teachers, **others):
    student = None if student is None else str(student)
    return ModelSettings(student=student, teacher=[str(t) for t in teachers], **others)


def opened(models, length=16, training=None):
    """As the command line does it."""
    open_tokenizer(models)
    check_models(models, DataSettings(max_length=length), training)
    return open_student(models), open_teachers(models)


def refused(*parts, models, **others):
    with pytest.raises(InputError) as error:
        opened(models, **others)
    text = str(error.value)
    assert "\n" not in text and len(text) <= 300
    for part in parts:
        assert part in text, text


def test_a_pair_is_opened(shop):
    tokenizer, vocab, sizes = open_tokenizer(settings(shop.student, shop.teacher))
    assert len(tokenizer) == 61 and vocab == "strict" and sizes == [V, V]
    student, (teacher,) = opened(settings(shop.student, shop.teacher))
    assert student.training and not teacher.training
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    lines = describe(student, [teacher])
    assert "7,248 parameters, all trained" in lines[0] and "none trained" in lines[2]
    assert max(map(len, lines)) <= 80


# Weights: each is a fault that training hides.


def test_weights_that_would_be_random_or_are_broken_are_named(shop):
    def layers(weights, old="layers.1", new=None):
        """Without some, or under other names."""
        return {
            k.replace(old, new or ""): x for k, x in weights.items() if new or old not in k
        }  # fmt: skip

    norm = "model.norm.weight"
    body = AutoModelForCausalLM.from_pretrained(shop.teacher).model
    faults = {
        "lm_head.weight missing": shop.save("body", body),
        "model.layers.1.input_layernorm.weight": shop.changed("no-1", shop.teacher, layers),
        "the file has model.blocks.0": shop.changed(
            "renamed", shop.teacher, lambda w: layers(w, "model.layers", "model.blocks")
        ),
        "model.layers.2.x": shop.changed(
            "third", shop.teacher, lambda w: w | {"model.layers.2.x": torch.ones(2)}
        ),
        "lm_head.weight is (60, 16)": shop.changed(
            "small", shop.teacher, lambda w: w | {"lm_head.weight": torch.ones(60, 16)}
        ),
        f"{norm} holds NaN": shop.changed(
            "nan", shop.teacher, lambda w: w | {norm: w[norm] * torch.nan}
        ),
        f"{norm} holds infinite": shop.changed(
            "inf", shop.teacher, lambda w: w | {norm: w[norm] / 0}
        ),
    }
    for fault, folder in faults.items():
        refused("the teacher", fault, models=settings(shop.student, folder))
    refused("the student", "lm_head.weight", models=settings(shop.root / "body", shop.teacher))


def test_tied_weights_and_heads_of_others_are_no_fault(shop):
    """A file without the head, whose weight is the embeddings'; and one with a head too many."""
    tied = shop.model("tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    more = shop.changed("more", tied, lambda w: w | {"score.weight": torch.ones(2, 16)})
    opened(settings(tied, more))


def test_folders_that_are_no_models(shop, tmp_path):
    def copy(name, remove=(), **files):
        folder = shutil.copytree(shop.teacher, tmp_path / name)
        for file in remove:
            (folder / file).unlink()
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)
        return folder

    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    torn = copy("torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:99])
    pickled = copy("pickled", ["model.safetensors"])
    torch.save({"lm_head.weight": os.getcwd}, pickled / "pytorch_model.bin")
    (tmp_path / "run").mkdir()
    copy("run/checkpoint-7")
    code = json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})
    for folder, parts in {
        tmp_path / "none": ["no such folder"],
        tmp_path / "a.gguf": ["a GGUF file", "gguf_file"],
        tmp_path / "run": ["no config.json", "checkpoint-7"],
        copy("bare", ["model.safetensors"]): ["no weights"],
        copy("silent", ["tokenizer.json", "tokenizer_config.json"]): ["tokenizer"],
        torn: ["is broken"],
        pickled: ["pickle"],
        copy("odd", config__json="{}"): ["model_type"],
        copy("new", config__json='{"model_type": "llamma"}'): ["`llamma`"],
        copy("half", config__json='{"model_type":'): ["not a valid JSON"],
        copy("code", config__json=code): ["--trust_remote_code"],
        "nobody/nothing": ["no such folder"],
    }.items():
        refused(*parts, models=settings(shop.student, folder))
    refused("no model to train", models=settings(None, shop.teacher))
    refused("empty name", models=settings("", shop.teacher))


def test_pickles_of_weights_alone_are_opened(shop, tmp_path):
    folder = shutil.copytree(shop.teacher, tmp_path / "old")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    opened(settings(shop.student, folder))


# Sorts.


def test_models_of_another_sort_than_the_task(shop):
    size = SIZE | {"num_hidden_layers": 1}
    t5 = T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    bert = shop.model("bert", BertConfig(**size), AutoModelForMaskedLM)
    roberta = shop.model("roberta", RobertaConfig(**size), AutoModelForMaskedLM)
    xlnet = XLNetConfig(vocab_size=V, d_model=16, n_layer=1, n_head=2, d_inner=16)
    distil = DistilBertConfig(vocab_size=V, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    vit = ViTConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, image_size=16)
    tied = LlamaConfig(**size, tie_word_embeddings=True, pad_token_id=0)
    for folder, part in {
        shop.save("t5", T5ForConditionalGeneration(t5)): "is an encoder-decoder",
        shop.save("t5-encoder", T5EncoderModel(t5)): "T5EncoderModel",
        bert: "--task masked-lm",
        roberta: "--task masked-lm",
        shop.model("distil", distil, AutoModelForMaskedLM): "--task masked-lm",
        shop.model("xlnet", xlnet): "sees the tokens that it is to predict",
        shop.save("pictures", ViTForImageClassification(vit)): "ForImageClassification",
        shop.save("judge", LlamaForSequenceClassification(tied)): "ForSequenceClassification",
    }.items():
        refused(part, models=settings(folder, shop.teacher))
        refused(part, models=settings(shop.student, folder))
    opened(settings(bert, roberta, task="masked-lm"))
    refused("the teacher", "next token", models=settings(bert, shop.teacher, task="masked-lm"))
    decoder = BertLMHeadModel(BertConfig(**size, is_decoder=True))
    opened(settings(shop.save("decoder", decoder), shop.teacher))
    refused("is a decoder", models=settings(shop.root / "decoder", bert, task="masked-lm"))


def test_looks_ahead_is_found_by_trial_without_a_trace(shop):
    size = SIZE | {"num_hidden_layers": 1}
    t5 = T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    for model, answer in (
        (AutoModelForCausalLM.from_config(LlamaConfig(**size)), False),
        (BertLMHeadModel(BertConfig(**size, is_decoder=True)), False),
        (BertLMHeadModel(BertConfig(**size)), True),
        (AutoModelForMaskedLM.from_config(BertConfig(**size)), True),
        (T5ForConditionalGeneration(t5), False),
    ):
        model.train().get_input_embeddings().eval()
        modes, state = [m.training for m in model.modules()], torch.get_rng_state()
        assert looks_ahead(model) is answer
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)


# Positions.


@pytest.mark.parametrize(
    "config, limit",
    [
        (GPT2Config(**GPT2, n_layer=1), 16),
        (OPTConfig(**SIZE | {"max_position_embeddings": 16}, ffn_dim=16), 16),
        (BartConfig(vocab_size=V, d_model=16, decoder_layers=1, decoder_ffn_dim=16,
                    decoder_attention_heads=2, max_position_embeddings=16), 16),
        (BertConfig(**SIZE | {"max_position_embeddings": 16}), 16),
        (RobertaConfig(**SIZE | {"max_position_embeddings": 16}), 14),
        (GPTJConfig(**GPT2, n_layer=1, rotary_dim=4), 16),
        (MptConfig(vocab_size=V, d_model=16, n_heads=2, n_layers=1, max_seq_len=16), 16),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)  # fmt: skip
def test_the_longest_sequence_is_the_longest_that_runs(shop, config, limit):
    masked = config.model_type in ("bert", "roberta")
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    folder = shop.model(f"positions-{config.model_type}", config, auto)
    models = settings(folder, folder, task="masked-lm" if masked else "causal-lm")
    student, _ = opened(models, length=limit)
    run(student, None, {"input_ids": torch.full((1, limit), 5)})
    with pytest.raises((IndexError, RuntimeError)):
        run(student, None, {"input_ids": torch.full((1, limit + 1), 5)})
    refused(f"--max_length {limit}", models=models, length=limit + 1)


def test_positions_of_the_other_model_and_of_the_teachers_own_prompt(shop):
    short = shop.model("short", GPT2Config(**GPT2, n_layer=1))
    models = settings(shop.student, short)
    refused("the teacher", "16 positions", models=models, length=17)
    data = DataSettings(max_length=17, max_teacher_length=16, teacher_prompt_template="{input}")
    check_models(models, data)
    data.max_teacher_length = 18
    with pytest.raises(InputError, match="--max_teacher_length 16"):
        check_models(models, data)
    # Rotations have no table: said, and not refused.
    (line,) = check_models(settings(shop.student), DataSettings(max_length=65))
    assert "made for 64 positions" in line


# Vocabularies.


def test_vocabularies(shop):
    added = words(["<a>", "<b>"])
    more = shop.model("more-tokens", tokenizer=added)
    refused("2 of 63 ids", "id 61 is nothing in the student's and '<a>'",
            "--vocab shared", models=settings(shop.student, more))  # fmt: skip
    for pair in ((shop.student, more), (more, shop.student)):
        assert open_tokenizer(settings(*pair, vocab="shared"))[1] == "shared"
    swapped = shop.model("swapped", tokenizer=words(swapped=True))
    for vocab in ("strict", "shared"):
        refused("2 of 61 ids", "id 5 is 'w5' in the student's and 'w7'",
                models=settings(shop.student, swapped, vocab=vocab))  # fmt: skip
    wide = shop.model("wide", vocab_size=70)
    _, vocab, sizes = open_tokenizer(settings(shop.student, shop.teacher, wide))
    assert vocab == "shared" and sizes == [64, 64, 70]
    narrow = shop.model("narrow", vocab_size=50)
    refused("50 embeddings", "60", models=settings(shop.student, narrow))


def test_the_same_tokens_cut_otherwise(shop):
    upper = words(normalizer=normalizers.Replace("w1", "w2"))
    folder = shop.model("normalised", tokenizer=upper)
    refused("cuts texts into others", models=settings(shop.student, folder))
    opened(settings(shop.student, folder, vocab="shared"))


def test_a_masked_lm_needs_a_mask(shop):
    tokenizer = words()
    tokenizer.mask_token = None
    folder = shop.model("maskless", BertConfig(**SIZE), AutoModelForMaskedLM, tokenizer)
    refused("no mask token", models=settings(folder, folder, task="masked-lm"))


# Numbers and packages.


def test_weights_that_cannot_be_trained(shop, tmp_path):
    pytest.importorskip("bitsandbytes")
    source = shop.model("64-wide", hidden_size=64, intermediate_size=64)
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    folder = shop.save("8-bit", model)
    refused("quantised (bitsandbytes)", "--lora_r", models=settings(folder, shop.teacher))
    student, (teacher,) = opened(settings(folder, folder, lora_r=2))
    assert torch.equal(student.eval()(IDS).logits, teacher(IDS).logits)
    refused("bitsandbytes weights", models=settings(None, folder, student_from_teacher="first=1"))
    half = shop.save("half", AutoModelForCausalLM.from_pretrained(source).half())
    refused("float16", models=settings(half, student_dtype="auto"))
    student, (teacher,) = opened(settings(half, half))
    assert (student.dtype, teacher.dtype) == (torch.float32, torch.float16)


def test_what_the_machine_lacks(shop, monkeypatch):
    plain = settings(shop.student, shop.teacher)
    on_cpu = SimpleNamespace(fp16=True, device=torch.device("cpu"))
    refused("fp16 on a CPU", "--bf16", models=plain, training=on_cpu)
    refused('"nonsense"', models=settings(shop.student, attn_implementation="nonsense"))
    with monkeypatch.context() as patch:  # as if the package were there
        patch.setattr(opening, "_skeleton", lambda place, *_: opening._load(place, plain, "auto"))
        flash = settings(shop.student, attn_implementation="flash_attention_2")
        refused("--bf16", models=flash, training=SimpleNamespace(fp16=False, bf16=False))
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    refused("pip install peft", models=settings(shop.student, lora_r=2))
    monkeypatch.setattr(opening, "find_spec", lambda name: name != "bitsandbytes" or None)
    models = settings(shop.student, lora_r=2, load_in_4bit=True)
    refused("pip install bitsandbytes", models=models)


# Adapters.


def test_new_adapters(shop):
    pytest.importorskip("peft")
    student, _ = opened(settings(shop.student, lora_r=2, lora_dropout=0.1))
    config = student.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 4, 0.1)
    trained = {n.split(".")[-4] for n, p in student.named_parameters() if p.requires_grad}
    assert trained == {x + "_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    refused("no adapters on qproj", "q_proj",
            models=settings(shop.student, lora_r=2, lora_targets=["qproj"]))  # fmt: skip
    refused("without --lora_r", models=settings(shop.student, lora_targets=["q_proj"]))
    refused("lora_r must be", models=settings(shop.student, lora_r=-1))
    refused("4 bits", "--lora_r", models=settings(shop.student, load_in_4bit=True))


def test_an_adapter_on_the_students_head_is_trained(shop):
    """Its logits are made whole, and the gradient reaches it; the embeddings that are tied to the
    head stay as they were."""
    pytest.importorskip("peft")
    tied = shop.model("tied-head", tie_word_embeddings=True)
    student, _ = opened(settings(tied, lora_r=2, lora_targets=["lm_head"]))
    assert find_head(student) is None
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data.normal_(0, 0.1)
    logits, _ = run(student, None, {"input_ids": IDS})
    logits.logsumexp(-1).sum().backward()
    assert {n.split(".")[-3] for n in trained} == {"lora_A", "lora_B"}
    assert all(p.grad.abs().sum() > 0 for p in trained.values())


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["linear", "head", "embeddings", "saved"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_an_adapters_folder_is_student_and_teacher(shop, targets, tied):
    name = f"{tied}-{sorted(targets.values(), key=str)}"
    base = shop.model(f"base-{name}", tie_word_embeddings=tied)
    folder, model = shop.adapter(f"adapter-{name}", base, **targets)
    student, (teacher,) = opened(settings(folder, folder))
    logits = model(IDS).logits
    assert torch.equal(student.eval()(IDS).logits, logits)
    torch.testing.assert_close(teacher(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert find_head(teacher) is not None  # merged: the head has all of it
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in student.named_parameters() if p.requires_grad} == trained


def test_our_own_adapter_is_read_again_from_another_folder(shop, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(shop.root)
    student, _ = opened(settings("student", lora_r=2))
    shop.save("ours", student)
    monkeypatch.chdir(tmp_path)
    again, _ = opened(settings(shop.root / "ours", shop.root / "ours"))
    assert torch.equal(again.eval()(IDS).logits, student.eval()(IDS).logits)
    refused("leave out --lora_r", models=settings(shop.root / "ours", lora_r=2))


def test_adapters_that_fit_nowhere(shop, tmp_path):
    folder, _ = shop.adapter("good", shop.student, target_modules="all-linear")
    file = "adapter_model.safetensors"

    def configured(name, **others):
        copy = shutil.copytree(folder, tmp_path / name)
        config = json.loads((copy / "adapter_config.json").read_text()) | others
        (copy / "adapter_config.json").write_text(json.dumps(config))
        return copy

    def second(weights, missing):
        theirs = {k: x for k, x in weights.items() if "layers.1" in k}
        if missing:
            return {k: x for k, x in weights.items() if k not in theirs}
        return weights | {k.replace("layers.1", "layers.5"): x.clone() for k, x in theirs.items()}

    bare = configured("bare")
    (bare / file).unlink()
    both = configured("both")
    shutil.copy(shop.student / "model.safetensors", both)
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for name, parts in {
        shop.changed("fewer", folder, lambda w: second(w, True), file): ["layers.1", "missing"],
        shop.changed("others", folder, lambda w: second(w, False), file): ["layers.5", "nowhere"],
        shop.changed("zero", folder, lambda w: {k: x / 0 for k, x in w.items()}, file): ["holds"],
        configured("rank", r=3): ["size mismatch"],
        bare: ["no adapter_model.safetensors"],
        both: ["a whole model and an adapter"],
        configured("lost", base_model_name_or_path=str(tmp_path / "gone")): ["gone", "no such"],
        configured("null", base_model_name_or_path=None): ["does not name"],
        configured("stack", base_model_name_or_path=str(folder)): ["on another adapter"],
        shop.adapter("prompt", shop.student, prompt)[0]: ["PROMPT_TUNING"],
    }.items():
        refused(*parts, models=settings(shop.student, name))
        refused(*parts, models=settings(name, shop.teacher))


def test_adapters_on_4_bits(shop):
    bnb = pytest.importorskip("bitsandbytes")
    source = shop.model("64-wide-4", hidden_size=64, intermediate_size=64)
    student, _ = opened(settings(source, load_in_4bit=True, lora_r=2))
    assert "uint8" in describe(student, [])[1]
    for p in student.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.1)
    # As under the same weights in 32 bits.
    plain, _ = opened(settings(source, lora_r=2))
    numbers = {n: p.data for n, p in student.named_parameters() if p.dtype != torch.uint8}
    for name, module in student.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            packed = module.weight.data, module.weight.quant_state
            numbers[f"{name}.weight"] = bnb.functional.dequantize_4bit(*packed)
    plain.load_state_dict(numbers)
    plain.eval()(IDS).logits.logsumexp(-1).sum().backward()
    student.eval()(IDS)  # from here on bitsandbytes by itself loses gradients on some CPUs
    student(IDS).logits.logsumexp(-1).sum().backward()
    theirs = gradients(plain)
    for name, grad in gradients(student).items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-5)
    folder = shop.save("4-bit-adapter", student)
    again, (teacher,) = opened(settings(folder, folder, load_in_4bit=True))
    assert torch.equal(again.eval()(IDS).logits, student.eval()(IDS).logits)
    assert teacher.dtype == torch.float32  # merged into the weights as they were


# A student of the teacher's layers.


def test_which_layers_are_kept():
    assert layers_to_keep("every=2", 5) == [0, 2, 4]
    assert layers_to_keep("first=3", 5) == [0, 1, 2]
    assert layers_to_keep("layers=0,3, 4", 5) == [0, 3, 4]
    for spec in (
        "every=0",
        "first=6",
        "layers=0,5",
        "layers=2,1",
        "layers=1,1",
        "half",
        "every=1,2",
    ):
        with pytest.raises(InputError, match="student_from_teacher is"):
            layers_to_keep(spec, 5)


DEEP = SIZE | {"num_hidden_layers": 4}


@pytest.mark.parametrize(
    "config, spec",
    [
        (LlamaConfig(**DEEP), "layers=0,3"),
        (GPT2Config(**GPT2, n_layer=4), "every=2"),
        (BertConfig(**DEEP), "every=2"),
        (DistilBertConfig(vocab_size=V, dim=16, n_layers=4, n_heads=2, hidden_dim=16), "every=2"),
        # The kinds of its layers are a list in the configuration: as long as the window of 4
        # tokens is, no two kinds give the same logits.
        (Gemma2Config(**DEEP, head_dim=8, sliding_window=4), "layers=1,3"),
        (SmolLM3Config(**DEEP, pad_token_id=0), "layers=2,3"),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_a_student_of_the_teachers_layers(shop, config, spec):
    masked = "bert" in config.model_type
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    folder = shop.model(f"deep-{config.model_type}", config, auto)
    models = settings(None, folder, student_from_teacher=spec)
    models.task = "masked-lm" if masked else "causal-lm"
    student, (teacher,) = opened(models)
    assert student.training and student.config.num_hidden_layers == 2
    assert all(p.requires_grad for p in student.parameters())
    kept = layers_to_keep(spec, 4)
    theirs = {n: p for n, p in teacher.named_parameters() if ".3." in n or ".2." in n}
    last = kept[-1]
    for name, p in student.named_parameters():
        if ".1." in name:
            assert torch.equal(p, theirs[name.replace(".1.", f".{last}.", 1)])
    logits = run(student.eval(), None, {"input_ids": IDS})[0]
    again = auto.from_pretrained(shop.save(f"cut-{config.model_type}", student))
    assert torch.equal(run(again, None, {"input_ids": IDS})[0], logits)
    if not masked:
        student.generate(IDS[:, :3], max_new_tokens=2, do_sample=False)  # its cache has 2 layers


def test_a_pictures_tower_keeps_its_layers(shop):
    vision = dict(DEEP, image_size=16, patch_size=4)
    text = dict(DEEP, head_dim=8)
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5
    )
    folder = shop.model("seeing", config)
    student, (teacher,) = opened(settings(None, folder, student_from_teacher="every=2"))
    assert len(student.get_decoder().layers) == 2
    towers = [m.state_dict() for m in (student.model.vision_tower, teacher.model.vision_tower)]
    assert towers[0].keys() == towers[1].keys()


def test_settings_and_logits_each_tell_layers_at_wrong_places(shop, monkeypatch):
    """A window longer than the text of the trial; a scale by the layer's number."""
    config = Gemma2Config(**DEEP, head_dim=8, sliding_window=32)
    folder = shop.model("windows", config)
    made = cut._configuration

    def first_two(config, count, kept):
        return made(config, count, [0, 1])

    monkeypatch.setattr(cut, "_configuration", first_two)
    refused(
        "depend on their places",
        models=settings(None, folder, student_from_teacher="layers=0,2"),
    )
    monkeypatch.undo()
    monkeypatch.setattr(cut, "_alike", lambda *layers: True)
    scaled = GPT2Config(**GPT2, n_layer=4, scale_attn_by_inverse_layer_idx=True)
    folder = shop.model("scaled-by-number", scaled)
    refused(
        "depend on their places",
        models=settings(None, folder, student_from_teacher="layers=0,2"),
    )


def test_layers_that_cannot_be_moved(shop):
    """GPT-2's scale by the layer's number; a mixture of experts at some places only."""
    scaled = GPT2Config(**GPT2, n_layer=4, scale_attn_by_inverse_layer_idx=True)
    moe = Qwen2MoeConfig(
        **DEEP, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, mlp_only_layers=[1],
    )  # fmt: skip
    for name, config in (("scaled", scaled), ("moe", moe)):
        folder = shop.model(name, config)
        refused("depend on their places",
                models=settings(None, folder, student_from_teacher="layers=0,2"))  # fmt: skip
        opened(settings(None, folder, student_from_teacher="first=2"))
    models = settings(shop.student, shop.teacher, student_from_teacher="first=1")
    refused("leave out --student", models=models)
    refused("needs a --teacher", models=settings(student_from_teacher="first=1"))
    refused("first=3", models=settings(None, shop.teacher, student_from_teacher="first=3"))


def test_a_student_of_a_teacher_with_an_adapter(shop):
    folder, model = shop.adapter("cut-adapter", shop.teacher, target_modules="all-linear")
    student, _ = opened(settings(None, folder, student_from_teacher="first=2"))
    torch.testing.assert_close(student.eval()(IDS).logits, model(IDS).logits)
