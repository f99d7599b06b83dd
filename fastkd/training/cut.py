"""A student of some of its teacher's layers."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

from fastkd.recipes.lm import run
from fastkd.training.errors import InputError

WAYS = "every=2 keeps layers 0, 2, 4, …; first=6 the first six; layers=0,3,5 these"


def layers_to_keep(spec: str, count: int) -> list[int]:
    """The numbers of the layers that `--student_from_teacher` names.

    Args:
        spec: "every=2", "first=6" or "layers=0,3,5".
        count: how many the teacher has.

    Raises:
        InputError: neither of these, or layers that the teacher does not have.
    """
    match = re.fullmatch(r"(every|first|layers)=(\d+(?:,\d+)*)", spec.replace(" ", ""))
    if match is None or (match[1] != "layers" and "," in match[2]):
        raise InputError(f"student_from_teacher is {spec!r}: {WAYS}")
    numbers = [int(x) for x in match[2].split(",")]
    if match[1] == "layers":
        kept = numbers
    elif numbers[0] == 0:
        kept = []
    else:
        kept = [*range(count)][:: numbers[0]] if match[1] == "every" else [*range(numbers[0])]
    if not kept or max(kept) >= count or sorted(set(kept)) != kept:
        raise InputError(
            f"student_from_teacher is {spec!r}, but the teacher has layers 0 to {count - 1}:"
            " name some of them, each once, in their order"
        )
    return kept


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of a model's layers, and its name: the outermost as long as the configuration says.

    Raises:
        InputError: there is none, or several (one for each part of a layer, or of towers).
    """
    count = model.config.get_text_config().num_hidden_layers
    found = {}
    for name, module in model.named_modules():
        outer = not any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) == count > 0 and outer:
            found[name] = module
    if len(found) > 1:  # of a picture's tower too, perhaps
        inside = set(model.get_decoder().modules())
        found = {name: module for name, module in found.items() if module in inside}
    if len(found) != 1:
        raise InputError(
            f"student_from_teacher: {type(model).__name__} has {len(found)} lists of {count}"
            " layers, and one is needed to know which are meant"
        )
    return found.popitem()


@torch.no_grad()
def keep_layers(teacher: nn.Module, spec: str) -> nn.Module:
    """A model of the teacher's kind with some of its layers, and weights of its own.

    Built anew from a configuration of its own, so that it is what `from_pretrained` makes of it
    when it was saved; and proved: its logits are those of the teacher without the other layers.

    Args:
        teacher: is used up.
        spec: see `layers_to_keep`.

    Raises:
        InputError: `spec`, or layers of such a kind that they cannot stand at other places.
    """
    name, layers = blocks(teacher)
    kept = layers_to_keep(spec, len(layers))
    config = _configuration(teacher.config, len(layers), kept)
    pattern = re.compile(re.escape(name) + r"\.(\d+)\.(.*)", re.DOTALL)
    weights = {}
    for key, x in teacher.state_dict().items():
        match = pattern.fullmatch(key)
        if match is None:
            weights[key] = x
        elif int(match[1]) in kept:
            weights[f"{name}.{kept.index(int(match[1]))}.{match[2]}"] = x
    refused = InputError(
        f"student_from_teacher {spec}: layers of {type(teacher).__name__} depend on their places,"
        " and these cannot be moved"
    )
    try:
        student = type(teacher)._from_config(config, dtype=next(teacher.parameters()).dtype)
        student.load_state_dict(weights)  # copies
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise refused from error
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    layers = nn.ModuleList(layers[i] for i in kept)
    if not _alike(student.get_submodule(name), layers):
        raise refused
    parent, _, last = name.rpartition(".")
    setattr(teacher.get_submodule(parent), last, layers)
    new = {id(teacher.config): config}
    new[id(teacher.config.get_text_config())] = config.get_text_config()
    for module in teacher.modules():
        if hasattr(module, "config"):
            module.config = new.get(id(module.config), module.config)
    ids = torch.arange(8)[None] % config.get_text_config().vocab_size
    logits = [run(model.eval(), None, {"input_ids": ids})[0] for model in (student, teacher)]
    if not torch.equal(*logits):
        raise refused
    return student


def _alike(made: nn.Module, kept: nn.Module) -> bool:
    """Whether layers have the settings of those they come from: a short text does not tell a
    sliding window."""
    for x, y in zip(made.modules(), kept.modules(), strict=True):
        others = vars(y)
        for key, value in vars(x).items():
            place = key in ("layer_idx", "layer_id", "training") or key.startswith("_")
            if not place and isinstance(value, bool | int | float | str | None):
                if others.get(key) != value:
                    return False
    return True


def _configuration(config: Any, count: int, kept: list[int]) -> Any:
    """With as many layers, and of every list with an entry a layer the entries of those kept."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    for key, value in list(vars(text).items()):
        a_layer_each = isinstance(value, list | tuple) and len(value) == count
        if a_layer_each and key not in ("architectures", "eos_token_id"):
            setattr(text, key, type(value)(value[i] for i in kept))
    text.num_hidden_layers = len(kept)
    return made
