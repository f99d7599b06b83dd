"""Opening a teacher and a student, after making sure that they speak of the same tokens; and their
logits without a (tokens, vocabulary) tensor, where a model's head alone makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastkd.config import DistillConfig, InputError
from fastkd.sources import LMHead

# What configurations call the factor of the head's product, or its inverse, and the softcap.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
PROBE_TOKENS = 8


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


class Head(NamedTuple):
    """The layer that alone makes a model's logits; softcap and scale are those of `LMHead`."""

    linear: nn.Linear
    softcap: float | None
    scale: float

    def source(self, hidden: Tensor) -> LMHead:
        weight, bias = self.linear.weight, self.linear.bias
        return LMHead(hidden, weight, bias, softcap=self.softcap, scale=self.scale)


@torch.no_grad()
def find_head(model: Any, ids: Tensor) -> Head | None:
    """The head of a causal LM, if its logits are what `LMHead` says of it and nothing else; None
    where the model must make them.

    The configuration only names candidates for scale and softcap. What the model makes of a few
    tokens of `ids` (N, length) decides, under the autocast of the caller.
    """
    linear = getattr(model, "get_output_embeddings", lambda: None)()
    # Nothing that adds to the layer (adapters, quantisation, offloading), and no shard of it.
    if (
        type(linear) is not nn.Linear
        or "forward" in vars(linear)
        or type(linear.weight) is not nn.Parameter
        or linear.weight.shape != (linear.out_features, linear.in_features)
    ):
        return None

    def probe(factor: float) -> tuple[list[Tensor], Tensor]:
        seen = []

        def forward(input):
            product = F.linear(input, linear.weight, linear.bias)
            seen.append(factor * product.float())  # fp32: what follows must not hide in roundings
            return seen[-1]

        with _forward_of(linear, forward):
            own = model(input_ids=ids[:1, :PROBE_TOKENS], use_cache=False).logits
        return seen, own

    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        probes = [probe(1.0)]
        # And larger logits: a cap that small ones do not feel would be missed.
        probes.append(probe(100 / max(probes[0][1].abs().max().item(), 1e-3)))
    finally:
        for module, training in modes.items():
            module.training = training
    if any(len(seen) != 1 for seen, _ in probes):
        return None
    scales, softcaps = (_numbers(model, names) for names in (SCALES, SOFTCAPS))
    for softcap, scale in product([*softcaps, None], [*scales, *(1 / x for x in scales), 1.0]):
        if scale != 1 and linear.bias is not None:
            continue  # it would be scaled too
        if all(_agree(z, own, softcap, scale) for (z,), own in probes):
            return Head(linear, softcap, scale)
    return None


def _numbers(model: Any, names: tuple[str, ...]) -> list[float]:
    config = model.config.get_text_config()
    values = [getattr(config, name, None) for name in names]
    return [x for x in values if isinstance(x, float | int) and x > 0]


def logits_of(model: Any, head: Head | None, batch: dict[str, Tensor]) -> Tensor | LMHead:
    """A causal LM's logits for `kd_loss`: as `LMHead`, where `head` is what `find_head` found.

    The forward pass is the model's own, or that of its wrapper for data parallelism, but for its
    last product: the head keeps the hidden state that it is given.
    """
    if head is None:
        return model(**batch, use_cache=False).logits
    seen = []

    def forward(input):
        seen.append(input)
        # As in generation, for one position; nobody reads it.
        return input.new_zeros(*input.shape[:-2], 1, head.linear.out_features)

    with _forward_of(head.linear, forward):
        model(**batch, use_cache=False)
    (hidden,) = seen
    return head.source(hidden)


@contextmanager
def _forward_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _agree(product: Tensor, own: Tensor, softcap: float | None, scale: float) -> bool:
    """Up to a few roundings. Logits of 0 tell nothing."""
    logits = scale * product
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if logits.shape != own.shape:
        return False
    error, largest = (logits - own.float()).abs().max(), own.abs().max()
    return bool(error < 8 * torch.finfo(own.dtype).eps * largest)


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
