"""Weights: all there, and numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastkd.training.places import Place

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHOWN = 2  # names of weights in a message


def check_report(place: Place, model: nn.Module, report: dict[str, Any]) -> None:
    """What transformers would draw at random is refused: nobody trained it.

    Args:
        report: `from_pretrained`'s, of `output_loading_info=True`.

    Raises:
        InputError: weights that are missing in the file, or have other shapes there, or belong to
            layers that the configuration does not tell of.
    """
    if report["mismatched_keys"]:
        name, in_file, wanted = min(report["mismatched_keys"])
        others = len(report["mismatched_keys"]) - 1
        more = f"; {others} more differ" if others else ""
        raise place.refuse(
            f"{name} is {tuple(in_file)} in its file, and {tuple(wanted)} by its config.json{more}"
        )
    unexpected = report["unexpected_keys"]
    if report["missing_keys"]:
        hint = f"; the file has {some(unexpected)}, for which there is no place" * bool(unexpected)
        raise place.refuse(
            f"{some(report['missing_keys'])} missing in its file, and would be random{hint}"
        )
    if report["error_msgs"]:
        raise place.refuse(report["error_msgs"][0])
    lists = {n: len(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    for key in unexpected:
        match = re.match(r"(.+?)\.(\d+)\.", key)
        for name, count in lists.items() if match else ():
            if name.endswith(match[1]) and int(match[2]) >= count:
                raise place.refuse(f"its file has {key}, but its config.json {count} layers")


def some(names: Iterable[str]) -> str:
    """The first of the names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_numbers(place: Place, model: nn.Module) -> None:
    """No weight is NaN or infinite, and none was left without numbers.

    Raises:
        InputError: one is; names it.
    """
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if x.is_meta:
            raise place.refuse(f"{name} was not loaded: it has no numbers")
    for name, x in model.named_parameters():
        # A sum takes no memory; what overflows in it is looked at twice.
        if x.dtype in FLOATS and not x.detach().sum(dtype=torch.float32).isfinite():
            if not x.isfinite().all():
                kind = "NaN" if x.isnan().any() else "infinite numbers"
                raise place.refuse(f"{name} holds {kind}: these weights are broken")
