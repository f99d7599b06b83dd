"""Opening student and teachers, and refusing in one line what cannot work, before the first step.

In this order: `open_tokenizer` and `check_models`, which open no weights; `open_student` and
`open_teachers`; `describe`.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
)
from transformers.utils import logging

from fastkd.integrations.teachers import read_by_all
from fastkd.recipes.lm import looks_ahead
from fastkd.training import adapters, cut
from fastkd.training.errors import InputError
from fastkd.training.places import Place, find
from fastkd.training.settings import LENGTH, DataSettings, ModelSettings
from fastkd.training.vocabularies import check_tokenizer, same_tokens
from fastkd.training.weights import check_numbers, check_report

# Heads that say nothing of tokens: the model was trained to something else.
OTHER_HEADS = re.compile(
    r"For(Sequence|Token|Image|Audio)Classification|ForQuestionAnswering|ForMultipleChoice"
    r"|ForNextSentencePrediction|RewardModel"
)


def open_tokenizer(models: ModelSettings) -> tuple[Any, str, list[int]]:
    """The tokenizer that all models share. Opens tokenizers and configurations, no weights.

    Returns:
        tokenizer: the student's; the first teacher's, where the student is made of it.
        vocab: `kd_loss`'s: "shared" where logits of student and teachers have different sizes, or
            one has tokens added after the other's last; else "strict".
        sizes: how many ids each model has embeddings for: the student's, then the teachers'. A text
            may hold an id that is none of a teacher's, where `--vocab shared` lets the student have
            more tokens: the smallest is the limit.

    Raises:
        InputError: a model that cannot be opened, tokenizers that differ, embeddings too few for
            the tokenizer.
    """
    student, teachers = _places(models)
    tokenizer, size = _tokenizer(student, models)
    sizes, same = [size], True
    for place in teachers:
        if place.base == student.base and place.adapter == student.adapter:
            sizes.append(size)
            continue
        other, size = _tokenizer(place, models)
        same &= same_tokens(tokenizer, place, other, models.vocab)
        sizes.append(size)
    return tokenizer, "strict" if same and len(set(sizes)) == 1 else "shared", sizes


def check_models(models: ModelSettings, data: DataSettings, training: Any = None) -> list[str]:
    """Refuse what configurations alone tell will not work. Opens no weights.

    Args:
        training: transformers' `TrainingArguments`.

    Returns:
        What is no error and should be said: lines for the user.

    Raises:
        InputError: models of another sort than the task; sequences longer than a table of
            positions; quantised or half-precision weights to be trained; fp16 on a CPU; a package
            or a permission that is missing.
    """
    student, teachers = _places(models)
    _check_adapters(models, student, teachers)
    own_text = (data.student_prompt_template, data.teacher_prompt_template) != (None, None)
    students_length = data.max_length or LENGTH
    teachers_length = (data.max_teacher_length if own_text else None) or students_length
    remarks = []
    for place in (student, *teachers):
        config = _config(place, models)
        _check_sort(place, config, models)
        if place.side == "student":
            _check_trainable(place, config, models)
        elif _quantised(config) == "bitsandbytes":
            _need(place, "bitsandbytes")
        length = students_length if place.side == "student" else teachers_length
        flag = "max_teacher_length" if own_text and place.side != "student" else "max_length"
        skeleton = _skeleton(place, config, models)
        remarks += _check_length(place, skeleton, length, flag)
        if models.student_from_teacher is not None and place.side == "student":
            cut.layers_to_keep(models.student_from_teacher, len(cut.blocks(skeleton)[1]))
    if training is not None:
        _check_precision(student, models, training)
    return remarks


def longest(models: ModelSettings, most: int = LENGTH, student_only: bool = False) -> int:
    """For sequences of how many tokens all models were made; `most`, if that is fewer. Opens no
    weights."""
    student, teachers = _places(models)
    found = [most]
    for place in (student,) if student_only else (student, *teachers):
        known, limit = _positions(_skeleton(place, _config(place, models), models))
        found += [x for x in (known, limit) if x is not None and x > 0]
    return min(found)


def open_student(models: ModelSettings) -> nn.Module:
    """The model to train, in train mode: all of it, or the adapters on it.

    An adapter's folder is trained on: the model under it is frozen, what the adapter trained is
    trained. With `student_from_teacher` the student is some of the first teacher's layers.

    Raises:
        InputError: weights that are missing, of other shapes, or not finite; a model of another
            sort than the task; adapters that fit nowhere.
    """
    student, teachers = _places(models)
    _check_adapters(models, student, teachers)
    _check_trainable(student, _config(student, models), models)
    model = _load(student, models, models.student_dtype, models.load_in_4bit)
    if models.student_from_teacher is not None:
        if student.adapter is not None:
            model = adapters.merge(adapters.load(student, model, trained=False))
        return cut.keep_layers(model, models.student_from_teacher).train()
    if getattr(model, "is_quantized", False):
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if student.adapter is not None:
        model = adapters.load(student, model, trained=True)
    elif models.lora_r:
        model = adapters.add(student, model, models)
    if not any(p.requires_grad for p in model.parameters()):
        raise student.refuse("nothing in it is trained")
    return model.train()


def open_teachers(models: ModelSettings, device: torch.device | None = None) -> list[nn.Module]:
    """The teachers, in eval mode and frozen; adapters are merged into the weights under them.

    Args:
        device: where to move them; quantised ones stay where they were opened.

    Raises:
        InputError: as in `open_student`.
    """
    teachers = []
    for place in _places(models)[1]:
        model = _load(place, models, models.dtype)
        if place.adapter is not None:
            model = adapters.merge(adapters.load(place, model, trained=False))
            check_numbers(place, model)
        if device is not None and not getattr(model, "is_quantized", False):
            model.to(device)
        teachers.append(model.eval().requires_grad_(False))
    return teachers


def describe(student: nn.Module, teachers: list[nn.Module]) -> list[str]:
    """Lines that say what was opened: sort, parameters, how many are trained, types."""
    lines = []
    for i, model in enumerate((student, *teachers)):
        side = "student" if not i else "teacher" if len(teachers) == 1 else f"teacher {i}"
        parameters = list(model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        count = model.num_parameters() if hasattr(model, "num_parameters") else 0
        count = count or sum(p.numel() for p in parameters)
        types = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        part = "all" if trained == count else f"{trained:,}" if trained else "none"
        lines += [
            f"{side}: {type(inner).__name__}, {count:,} parameters, {part} trained",
            f"    in {', '.join(types)}",
        ]
    return lines


def _places(models: ModelSettings) -> tuple[Place, list[Place]]:
    """Where student and teachers are."""
    teachers = [find("teacher", name) for name in models.teacher]
    if models.student_from_teacher is None:
        if models.student is None:
            raise InputError("no model to train: name it by --student")
        return find("student", models.student), teachers
    if models.student is not None:
        raise InputError("student_from_teacher makes the student: leave out --student")
    if not teachers:
        raise InputError("student_from_teacher needs a --teacher, to take the student's layers of")
    return teachers[0]._replace(side="student"), teachers


def _config(place: Place, models: ModelSettings) -> Any:
    try:
        with _quiet():
            return AutoConfig.from_pretrained(
                place.base, trust_remote_code=models.trust_remote_code
            )
    except Exception as error:  # whatever transformers and the hub raise
        raise place.refuse(error) from error


def _tokenizer(place: Place, models: ModelSettings) -> tuple[Any, int]:
    """The tokenizer, and the number of ids that the model has embeddings for."""
    source, files = place.base, ("tokenizer.json", "tokenizer_config.json")
    if place.adapter is not None and any((Path(place.adapter) / file).exists() for file in files):
        source = place.adapter
    config = _config(place, models)
    _check_sort(place, config, models)
    size = config.get_text_config().vocab_size
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                source, trust_remote_code=models.trust_remote_code
            )
    except Exception as error:
        raise place.refuse(error, "no tokenizer that can be opened: ") from error
    check_tokenizer(place, tokenizer)
    if models.task == "masked-lm" and tokenizer.mask_token_id is None:
        raise place.refuse("its tokenizer has no mask token, which --task masked-lm needs")
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise place.refuse(f"{size:,} embeddings, but its tokenizer has ids up to {largest:,}")
    return tokenizer, size


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' warnings and reports off: what they tell is an error of ours, or nothing."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _auto(models: ModelSettings) -> Any:
    return AutoModelForMaskedLM if models.task == "masked-lm" else AutoModelForCausalLM


def _check_sort(place: Place, config: Any, models: ModelSettings) -> None:
    """The architecture against the task."""
    sort, masked = config.model_type, models.task == "masked-lm"
    name = (getattr(config, "architectures", None) or [sort])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise place.refuse(
            f"{name} is an encoder-decoder; fastkd.integrations.transformers.DistillationTrainer"
            " trains such a pair, this command does not"
        )
    if OTHER_HEADS.search(name):
        raise place.refuse(f"{name} was trained for other things than to predict tokens")
    own_code = _auto(models).__name__ in (getattr(config, "auto_map", None) or {})
    decoder = getattr(config, "is_decoder", None)
    wrong = sort in MASKED and decoder is False
    if masked and sort in MASKED and decoder:
        raise place.refuse(f"{name} is a decoder (is_decoder): leave out --task masked-lm")
    if own_code or (sort in (MASKED if masked else CAUSAL) and (masked or not wrong)):
        return
    if not masked and sort in MASKED:
        raise place.refuse(
            f"{name} predicts masked tokens, and sees those to come: --task masked-lm"
        )
    if masked and sort in CAUSAL:
        raise place.refuse(f"{name} predicts the next token: leave out --task masked-lm")
    raise place.refuse(f"{name} ({sort}) is no {models.task} that transformers can open")


def _check_adapters(models: ModelSettings, student: Place, teachers: list[Place]) -> None:
    """The settings of adapters against each other, and the packages they need."""
    named = [
        f"--{name}"
        for name in ("lora_alpha", "lora_targets", "lora_dropout")
        if getattr(models, name)
    ]
    if models.lora_r < 0 or not 0 <= models.lora_dropout < 1:
        raise InputError(
            "lora_r must be at least 0 and lora_dropout in [0, 1), got"
            f" {models.lora_r} and {models.lora_dropout}"
        )
    if named and not models.lora_r:
        raise InputError(f"{' and '.join(named)} without --lora_r: there would be no adapters")
    if models.lora_r and student.adapter is not None and not models.student_from_teacher:
        raise student.refuse(
            "an adapter's folder is trained on as it is: leave out --lora_r, or merge it first"
        )
    if models.load_in_4bit and not models.lora_r and student.adapter is None:
        raise student.refuse("weights in 4 bits cannot be trained: add --lora_r 16")
    if models.student_from_teacher and (models.lora_r or models.load_in_4bit):
        raise InputError(
            "student_from_teacher makes a new model, of which nothing is saved under adapters:"
            " leave out --lora_r and --load_in_4bit"
        )
    if models.lora_r:
        _need(student, "peft")
    if models.load_in_4bit:
        _need(student, "bitsandbytes")
    for place in (student, *teachers):
        if place.adapter is not None:
            _need(place, "peft")


def _need(place: Place, package: str) -> None:
    if find_spec(package) is None:
        raise place.refuse(f"this needs {package}: pip install {package}")


def _quantised(config: Any) -> str | None:
    """The method of quantised weights; None: they are plain."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = settings.get("quant_method") or "bitsandbytes"
    return str(getattr(method, "value", method))


def _check_trainable(place: Place, config: Any, models: ModelSettings) -> None:
    """Whether the student's weights are of a kind that can be trained."""
    method = _quantised(config)
    if method is not None and models.load_in_4bit:
        raise place.refuse(f"its weights are quantised already ({method}): no --load_in_4bit")
    if method is not None and models.student_from_teacher:
        raise place.refuse(f"a student of its layers cannot be trained: {method} weights")
    if method is not None and not models.lora_r and place.adapter is None:
        raise place.refuse(
            f"its weights are quantised ({method}) and cannot be trained: add --lora_r 16, or name"
            " the model they were made of"
        )
    if method == "bitsandbytes":
        _need(place, "bitsandbytes")
    half = getattr(config.get_text_config(), "dtype", None) in (torch.float16, "float16")
    plain = not models.lora_r and place.adapter is None
    if half and plain and method is None and models.student_dtype == "auto":
        raise place.refuse("float16 weights cannot be trained: --student_dtype float32")


def _check_precision(student: Place, models: ModelSettings, training: Any) -> None:
    """What is computed in 16 bits."""
    if training.fp16 and training.device.type == "cpu":
        raise InputError("fp16 on a CPU cannot be trained with: use --bf16")
    whole = models.student_dtype == "float32" and not (training.fp16 or training.bf16)
    if whole and "flash" in (models.attn_implementation or ""):
        raise student.refuse("flash attention computes in 16 bits: add --bf16")


def _skeleton(place: Place, config: Any, models: ModelSettings) -> nn.Module:
    """The model without numbers, on the meta device."""
    options = _options(models)
    try:
        with _quiet(), torch.device("meta"):
            return _auto(models).from_config(copy.deepcopy(config), **options)
    except Exception as error:
        raise place.refuse(error) from error


def _options(models: ModelSettings) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": models.trust_remote_code}
    if models.attn_implementation is not None:
        options["attn_implementation"] = models.attn_implementation
    return options


def _check_length(place: Place, model: nn.Module, length: int, flag: str) -> list[str]:
    """Sequences against positions; a table of them is the limit, rotations are not."""
    known, limit = _positions(model)
    if limit is not None and length > limit:
        raise place.refuse(
            f"it has {limit:,} positions, so sequences of {length:,} tokens do not fit: --{flag}"
            f" {limit}"
        )
    if limit is None and known is not None and length > known:
        return [
            f"the {place.side} {place.name} was made for {known:,} positions,"
            f" and --{flag} is {length:,}"
        ]
    return []


def _positions(model: nn.Module) -> tuple[int | None, int | None]:
    """For how many positions a model was made, and how many it can have at most."""
    config = model.config.get_text_config()
    if config.model_type == "mpt":
        return config.max_seq_len, config.max_seq_len  # its biases are made for as many
    known = getattr(config, "max_position_embeddings", None)
    return known, None if known is None else _table(model, known)


def _table(model: nn.Module, known: int) -> int | None:
    """How many positions a model's table of them serves; None: it has none.

    Args:
        known: what the configuration says; tables of other things (patches of a picture) are of
            other sizes.
    """
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in last or last == "wpe"):
            # OPT and BART have rows before the first position; RoBERTa counts on from the
            # padding's id.
            before = getattr(module, "offset", 0)
            if module.num_embeddings - before == known:
                return known if module.padding_idx is None else known - 1 - module.padding_idx
    tables = (x for name, x in model.named_buffers() if "pos" in name.rpartition(".")[2])
    return known if any(x.dim() > 1 and len(x) == known for x in tables) else None


def _load(place: Place, models: ModelSettings, dtype: str, in_4bit: bool = False) -> nn.Module:
    """A model without its adapter, after making sure that all of it came from its files."""
    config = _config(place, models)
    _check_sort(place, config, models)
    options = _options(models)
    if in_4bit or _quantised(config) is not None:
        # Each process its own; by itself transformers would take the first device for all.
        rank = int(os.environ.get("LOCAL_RANK", 0))
        options["device_map"] = {"": rank if torch.cuda.is_available() else "cpu"}
    if in_4bit:
        half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if half else torch.float32,
        )
    try:
        with _quiet(), read_by_all():
            model, report = _auto(models).from_pretrained(
                place.base,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report
                **options,
            )
    except Exception as error:
        raise place.refuse(error) from error
    if place.side == "student":
        for module in model.modules():
            # On some CPUs bitsandbytes repacks 4-bit weights at the first evaluation, and makes
            # products with them that no gradient passes.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    check_report(place, model, report)
    check_numbers(place, model)
    _check_direction(place, model, models)
    return model


def _check_direction(place: Place, model: nn.Module, models: ModelSettings) -> None:
    """By trial: a causal model does not see what it is to predict."""
    try:
        ahead = models.task == "causal-lm" and looks_ahead(model)
    except Exception:  # kernels that do not run where the weights are now: nothing is proved
        return
    if ahead:
        raise place.refuse(
            f"{type(model).__name__} sees the tokens that it is to predict: it is no causal LM"
        )
