"""How good a student is: perplexity, KL to the teacher, and how often both would say the same."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from fastkd.loss import kd_loss
from fastkd.recipes.lm import Head, find_head, logits_of
from fastkd.training.data import IGNORED


@torch.no_grad()
def evaluate(
    student: Any,
    batches: Iterable[dict[str, torch.Tensor]],
    accelerator: Accelerator,
    teacher: Any | None = None,
    heads: tuple[Head | None, Head | None] | None = None,
) -> dict[str, float]:
    """Score a model on held-out batches; under several processes each brings its own.

    Args:
        student: a causal LM, not wrapped for data parallelism.
        batches: `input_ids`, `attention_mask` and `labels`; tokens labelled -100 do not count.
        accelerator: names the device and the autocast, and joins the processes.
        teacher: scored against, if given, over the vocabulary that both have.
        heads: of student and teacher, as `find_head` gives them; default: found with the first
            batch. Unused without a teacher.

    Returns:
        `perplexity`, and with a teacher `kl` (KL(teacher‖student) in nats per token) and
        `top1_agreement`.
    """
    was_training = student.training
    student.eval()
    sums = torch.zeros(4)  # tokens, cross-entropy, KL, agreements
    for batch in batches:
        batch = {name: x.to(accelerator.device) for name, x in batch.items()}
        labels = batch.pop("labels")
        counts = F.pad(labels[:, 1:] != IGNORED, (0, 1))
        sums[0] += counts.sum().cpu()
        if teacher is None:
            with accelerator.autocast():
                s = student(**batch, use_cache=False).logits
            entropies = F.cross_entropy(
                s[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
            )
            sums[1] += entropies.cpu()
            continue
        with accelerator.autocast():
            if heads is None:
                heads = tuple(find_head(model, batch["input_ids"]) for model in (student, teacher))
            s, t = (logits_of(*side, batch) for side in zip((student, teacher), heads, strict=True))
            parts = kd_loss(
                s, t, labels, shift=True, reduction="sum", vocab="shared", return_parts=True
            )
        scores = [parts.cross_entropy, parts.divergence, parts.top1_agreement]
        sums[1:] += torch.stack(scores).float().cpu()
    student.train(was_training)
    tokens, entropy, kl, agreements = accelerator.reduce(
        sums.to(accelerator.device), "sum"
    ).tolist()
    scores = {"perplexity": math.exp(min(entropy / tokens, 700.0))}
    return (
        scores
        if teacher is None
        else scores | {"kl": kl / tokens, "top1_agreement": agreements / tokens}
    )
