"""Teachers for trainers: opened, frozen, and brought to where the student is."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.recipes.lm import LM, causal_lm, shifts_labels
from fastkd.recipes.recipe import Batch, Outputs, Teacher
from fastkd.recipes.teachers import Mixture, Prompted
from fastkd.sources import Source


def teacher_of(
    given: Any,
    student: nn.Module,
    accelerator: Any,
    *,
    logits: str = "auto",
    init_kwargs: dict[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    mode: str = "probabilities",
) -> Teacher | None:
    """The `Teacher` that a trainer asks: see `DistillationMixin` for what may be given.

    Raises:
        TypeError, ValueError: what was given is nothing of that, or shares weights with the
            student; or settings for what was not given.
    """
    members = list(given) if isinstance(given, list | tuple) else [given]
    if init_kwargs is not None and not any(isinstance(x, str | os.PathLike) for x in members):
        raise ValueError("teacher_model_init_kwargs are for a teacher_model that is a name or path")
    if weights is not None and len(weights) != len(members):
        raise ValueError(f"{len(members)} teachers, but {len(weights)} teacher_weights")
    if given is None:
        return None
    if not members:
        raise ValueError("teacher_model is an empty list")

    def opened(x):
        if isinstance(x, str | os.PathLike):
            x = open_teacher(x, student, init_kwargs)
        if isinstance(x, LM):
            return Frozen(x.model, student, accelerator, x.logits)
        if isinstance(x, Mixture):
            return Mixture([opened(y) for y in x.teachers], x.weights, x.mode)
        if isinstance(x, Prompted):
            return Prompted(opened(x.teacher), x.shift)
        if isinstance(x, nn.Module) and not _is_teacher(x):
            return Frozen(x, student, accelerator, logits)
        if not callable(x):
            raise TypeError(
                "teacher_model must be a model, a name or path, a list of these, or a function of"
                f" a batch, got {type(x).__name__}"
            )
        return x

    teachers = [opened(x) for x in members]
    return teachers[0] if len(teachers) == 1 else Mixture(teachers, weights, mode)


def _is_teacher(module: nn.Module) -> bool:
    """Whether a module is called as a `Teacher`, with a whole batch, and not as a model."""
    return "batch" in inspect.signature(module.forward).parameters


def open_teacher(
    name: str | os.PathLike, student: nn.Module, init_kwargs: dict[str, Any] | None = None
) -> nn.Module:
    """A model of the student's sort, from the hub or a folder; an adapter merged into its base.

    Raises:
        ValueError: a path where there is no folder; weights that its file does not hold: nobody
            would ever train them.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    path = isinstance(name, os.PathLike) or name.startswith(("/", ".", "~"))
    if path and not os.path.isdir(name):
        raise ValueError(f"there is no folder {os.fspath(name)}, which teacher_model names")
    settings = dict(init_kwargs or {})
    hub = {k: settings[k] for k in ("revision", "token", "cache_dir") if k in settings}
    if find_adapter_config_file(str(name), **hub) is None:
        return _open(str(name), student, settings)
    import peft

    base = peft.PeftConfig.from_pretrained(str(name), **hub).base_model_name_or_path
    if not base:
        raise ValueError(f"{name} is an adapter, and does not say of which model")
    settings.pop("revision", None)
    model = _open(base, student, settings)
    return peft.PeftModel.from_pretrained(model, str(name), **hub).merge_and_unload()


def _open(name: str, student: nn.Module, settings: dict[str, Any]) -> nn.Module:
    import transformers

    kind = "CausalLM"
    if not shifts_labels(student):
        owner = causal_lm(student)
        kind = "Seq2SeqLM" if owner.config.is_encoder_decoder else "MaskedLM"
    auto = getattr(transformers, f"AutoModelFor{kind}")
    with read_by_all():
        model, info = auto.from_pretrained(name, output_loading_info=True, **settings)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{name} lacks {len(missing)} weights of the teacher, as {missing[0]}")
    return model


@contextmanager
def read_by_all() -> Iterator[None]:
    """Models are opened with their weights on every process. Under FSDP's settings transformers
    may leave them to one, which FSDP is to send them from: not so for what it does not shard."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    if before is None:
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ[name] = before


class Frozen:
    """A model as a teacher that nobody trains, on whatever device it is.

    Raises:
        ValueError: it shares weights with the student, which would be frozen too; in a call: ids
            beyond its vocabulary, looked for only where that is smaller than the student's.
    """

    def __init__(self, model: nn.Module, student: nn.Module, accelerator: Any, logits: str):
        if {id(p) for p in model.parameters()} & {id(p) for p in student.parameters()}:
            raise ValueError(
                "teacher_model shares weights with the student, and would be trained: give a copy"
            )
        known, students = (_vocabulary(x) for x in (model, student))
        self.known = known if known < students else None
        self.model = _prepared(model.requires_grad_(False).eval(), accelerator)
        self.lm = LM(self.model, logits)

    def __call__(self, batch: Batch, hidden_states: bool = False) -> Outputs:
        if self.model.training:
            self.model.eval()
        here = next(x.device for x in batch.values() if isinstance(x, Tensor))
        there = next(self.model.parameters()).device
        if self.known is not None and "input_ids" in batch:
            largest = int(batch["input_ids"].max())
            if largest >= self.known:
                raise ValueError(
                    f"the batch has token {largest}, and the teacher knows only {self.known}: the"
                    " two models need one tokenizer"
                )
        if there.type != "meta":  # offloaded: its hooks bring the batch where it is read
            batch = moved(batch, there)
        says = self.lm(batch, hidden_states)
        return Outputs(*(moved(x, here) for x in says))


def _vocabulary(model: nn.Module) -> float:
    """How many tokens a model can read, as far as can be seen."""
    owner = causal_lm(model)
    embeddings = None if owner is None else owner.get_input_embeddings()
    return getattr(embeddings, "num_embeddings", float("inf"))


def moved(x: Any, device: torch.device) -> Any:
    """Tensors, and what is made of them, on a device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Mapping):
        return {k: moved(v, device) for k, v in x.items()}
    if isinstance(x, tuple):
        return tuple(moved(v, device) for v in x)
    if isinstance(x, Source) and x.device != device:
        values = {f.name: moved(getattr(x, f.name), device) for f in fields(x) if f.init}
        return replace(x, **values)
    return x


def _prepared(model: nn.Module, accelerator: Any) -> nn.Module:
    """On the device; sharded, where the student's parameters are."""
    state = accelerator.state
    plugin = getattr(state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        return _zero3(model, plugin.deepspeed_config)
    if getattr(accelerator, "is_fsdp2", False):
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        # The student's layers, by name, are written into the settings: the teacher has its own.
        of_student = state.fsdp_plugin
        state.fsdp_plugin = copy.copy(of_student)
        names = [type(module).__name__ for module in model.modules()]
        known = [x for x in getattr(model, "_no_split_modules", None) or () if x in names]
        state.fsdp_plugin.transformer_cls_names_to_wrap = known
        try:
            return fsdp2_prepare_model(accelerator, model)
        finally:
            state.fsdp_plugin = of_student
    devices = {p.device.type for p in model.parameters()}
    own = devices != {"cpu"} or getattr(model, "hf_device_map", None) is not None
    # Nor where nothing moves: quantised models refuse to be asked.
    stays = own or devices == {accelerator.device.type}
    return model if stays else model.to(accelerator.device)


def _zero3(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Under DeepSpeed, with the student's settings but for those of training; what they leave to
    be filled in has DeepSpeed's default."""
    import deepspeed

    def known(x):
        return {k: known(v) for k, v in x.items() if v != "auto"} if isinstance(x, dict) else x

    own = known({k: x for k, x in config.items() if k not in ("optimizer", "scheduler")})
    own["zero_optimization"].pop("offload_optimizer", None)
    own.setdefault("train_micro_batch_size_per_gpu", 1)
    engine, *_ = deepspeed.initialize(model=model, config=own)
    return engine.eval()
