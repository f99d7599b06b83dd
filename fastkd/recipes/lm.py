"""A causal LM as a source of logits; without a (tokens, vocabulary) tensor, where its head alone
makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.sources import LMHead

# What configurations call the factor of the head's product, or its inverse, and the softcap.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
PROBE_TOKENS = 8


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
