"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from fastkd.training.config import DistillConfig, InputError, parse_pairs


def make_optimizer(config: DistillConfig, student: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the weights that train; norms and biases are not decayed.

    Raises:
        InputError: unknown name, or arguments it does not take.
    """
    options = {"lr": config.learning_rate} | parse_pairs(config.optimizer_args, "optimizer_args")
    kind = getattr(torch.optim, config.optimizer, None)
    if config.optimizer == "Adafactor":
        kind, options = (
            transformers.Adafactor,
            {"relative_step": False, "scale_parameter": False} | options,
        )
    if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
        raise InputError(
            f"unknown optimizer {config.optimizer!r}: name a class of torch.optim, or Adafactor"
        )
    weights = [p for p in student.parameters() if p.requires_grad]
    matrices, vectors = [p for p in weights if p.dim() > 1], [p for p in weights if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    try:
        return kind([group for group in groups if group["params"]], **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer {config.optimizer} with {options}: {error}") from error


def make_scheduler(config: DistillConfig, optimizer: Any, steps: int) -> Any:
    """transformers' learning-rate schedule over `steps` steps.

    Raises:
        InputError: unknown name, or arguments it does not take.
    """
    options = parse_pairs(config.scheduler_args, "scheduler_args")
    try:
        return transformers.get_scheduler(
            config.scheduler,
            optimizer,
            round(config.warmup_ratio * steps),
            steps,
            scheduler_specific_kwargs=options,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"scheduler {config.scheduler} with {options}: {error}") from error
