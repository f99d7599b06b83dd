"""Opening a teacher and a student, after making sure that they speak of the same tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastkd.training.config import DistillConfig, InputError


def open_tokenizer(config: DistillConfig) -> tuple[Any, str]:
    """The student's tokenizer, and `kd_loss`'s `vocab` for the pair. Opens no weights.

    Raises:
        InputError: a model that cannot be opened, tokenizers that differ, or embeddings too small
            for the tokenizer.
    """
    tokenizer, size = _tokenizer_and_size(config, "student")
    if config.teacher is None:
        return tokenizer, "strict"
    teacher_tokenizer, teacher_size = _tokenizer_and_size(config, "teacher")
    ids, teacher_ids = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ids != teacher_ids:
        differ = sorted(
            token
            for token in ids.keys() | teacher_ids.keys()
            if ids.get(token) != teacher_ids.get(token)
        )
        token = differ[0]
        raise InputError(
            f"student and teacher must share one tokenizer; {len(differ):,} tokens differ between"
            f" {config.student} ({len(ids):,} tokens) and {config.teacher} ({len(teacher_ids):,});"
            f" {token!r}, for one, is"
            f" {ids.get(token)} in the student's and {teacher_ids.get(token)} in the teacher's"
        )
    return tokenizer, "strict" if size == teacher_size else "shared"


def open_student(config: DistillConfig) -> Any:
    """The model to train, with LoRA adapters if asked for.

    Raises:
        InputError: `lora_r` without peft.
    """
    student = _open(config, config.student, config.student_dtype)
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    if config.lora_r:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise InputError("lora_r needs peft: pip install peft") from error
        settings = LoraConfig(
            r=config.lora_r,
            lora_alpha=2 * config.lora_r,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        student.enable_input_require_grads()
        student = get_peft_model(student, settings)
    return student.train()


def open_teacher(config: DistillConfig) -> Any | None:
    """The frozen teacher in eval mode; None without one."""
    if config.teacher is None:
        return None
    return _open(config, config.teacher, config.dtype).eval().requires_grad_(False)


def _open(config: DistillConfig, name: str, dtype: str) -> Any:
    options = (
        {}
        if config.attn_implementation is None
        else {"attn_implementation": config.attn_implementation}
    )
    return AutoModelForCausalLM.from_pretrained(
        name,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=config.trust_remote_code,
        **options,
    )


def _tokenizer_and_size(config: DistillConfig, role: str) -> tuple[Any, int]:
    name = getattr(config, role)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
        model = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot open the {role} {name}: {error}") from error
    size = model.get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise InputError(
            f"the {role} {name} has {size:,} logits, but its tokenizer has ids up to {largest:,}"
        )
    return tokenizer, size
