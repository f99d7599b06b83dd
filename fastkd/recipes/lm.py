"""A language model as a source of logits; without a (tokens, vocabulary) tensor, where its head
alone makes them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.recipes.recipe import Batch, Outputs
from fastkd.sources import LMHead

# What configurations call the factor of the head's product, or its inverse, and the softcap.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# What outputs call a model's auxiliary losses, and its configuration their factor.
AUXILIARY = (
    (
        ("aux_loss", "encoder_aux_loss", "decoder_aux_loss"),
        ("router_aux_loss_coef", "aux_loss_coef"),
    ),
    (("encoder_z_loss", "decoder_z_loss"), ("router_z_loss_coef",)),
)
PROBE_TOKENS = 8
# Wrappers of which the head is not seen: compiled, sharded, copied to other devices.
WHOLE = ("OptimizedModule", "FullyShardedDataParallel", "DataParallel")
TEACHERS_PREFIX = "teacher_"  # of a teacher that reads another prompt
LABELS = ("labels", "shift_labels")  # with these a model computes its own loss
# What tokenizers and collators add, and a model gets only where its forward pass names it.
EXTRAS = ("token_type_ids", "special_tokens_mask", "length")

# Of each causal LM: what the answer rests on, objects and numbers; the answer of `_probe`.
_known: WeakKeyDictionary[nn.Module, tuple[tuple, tuple, tuple | None]] = WeakKeyDictionary()
# Of each wrapper: whether it returns the causal LM's logits as they are.
_returns_logits: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Head(NamedTuple):
    """The layer that alone makes a model's logits; softcap and scale are those of `LMHead`."""

    model: nn.Module  # the causal LM itself, without wrappers
    linear: nn.Linear
    softcap: float | None
    scale: float

    def source(self, hidden: Tensor, dtype: torch.dtype | None = None) -> LMHead:
        """The logits of its inputs (..., H); multiplied in `dtype`, if one is given."""
        factors = hidden, self.linear.weight, self.linear.bias
        if dtype is not None:
            factors = [x if x is None else x.to(dtype) for x in factors]
        if not torch.is_grad_enabled():
            factors = [x if x is None else x.detach() for x in factors]
        return LMHead(*factors, softcap=self.softcap, scale=self.scale)


class LM:
    """A language model as a student, or a teacher: a batch in, `Outputs` out.

    Args:
        model: a language model with a head, causal, masked, or an encoder with a decoder; wrapped
            or not (DDP, FSDP, peft, torch.compile). Modes are not changed: call `model.eval()` on a
            teacher.
        logits: "auto": made from the hidden states a chunk at a time, where the head alone makes
            them and that takes less memory; "whole": the model's own, as one tensor. See `chunks`.

    Raises:
        ValueError: `logits` is neither "auto" nor "whole"; in a call: a model that would add an
            auxiliary loss to its own, and does not return it.

    The batch's keys are the model's keyword arguments, with these differences:

    - no labels, with which it would compute a loss of its own; no cache, with which the position
      ids of packed documents would be ignored; no `logits_to_keep`: the labels say what counts;
    - no `teacher_…`, which are of a teacher with its own prompt (`Prompted`);
    - what tokenizers add (`token_type_ids`, …) only where the model's forward pass names it, so
      that one of the two may know it and the other not. All else is given to both: nothing that
      would be missed is dropped;
    - of an encoder with a decoder, `decoder_input_ids` made from the labels, by the model's own
      rule, where there are none.

    Hidden states are those of a decoder alone or an encoder alone; None where there are both.
    """

    def __init__(self, model: nn.Module, logits: str = "auto"):
        if logits not in ("auto", "whole"):
            raise ValueError(f"logits must be 'auto' or 'whole', got {logits!r}")
        self.model, self.logits, self._seen = model, logits, None

    def __call__(self, batch: Batch, hidden_states: bool = False) -> Outputs:
        head = find_head(self.model) if self.logits == "auto" else None
        head = head if head is not None and chunks(head, batch) else None
        owner = self._owner()
        inputs = _inputs(owner, batch)
        if hidden_states:
            inputs["output_hidden_states"] = True
        logits, output = run(self.model, head, inputs)
        states = _field(output, "hidden_states")
        return Outputs(logits, states, _auxiliary(owner, output))

    def _owner(self) -> nn.Module:
        """The language model inside, looked for once."""
        if self._seen is None or self._seen[0] is not self.model:
            self._seen = self.model, causal_lm(self.model) or self.model
        return self._seen[1]


def chunks(head: Head, batch: Batch) -> bool:
    """Whether a batch's logits are better made in chunks.

    Whole, they and their gradient take T V numbers on each side. In chunks, a head that is trained
    needs its gradient, V H numbers, already in the forward pass, beside the activations: more, at
    few tokens. So T > H is the rule. Measured were whole steps of two models only: at H = 640,
    V = 262,144 whole logits took less memory with 512 tokens, chunks with 1024; at H = 576 they
    took less with 256. Without a gradient of the head (frozen, a teacher, evaluation) chunks never
    take more.
    """
    ids = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]
    weight = head.linear.weight
    trained = weight.requires_grad and torch.is_grad_enabled()
    return ids.numel() > head.linear.in_features or not trained


def shifts_labels(model: nn.Module) -> bool:
    """Whether position i of a model's logits predicts label i + 1: of causal language models, and
    not of encoder-decoders and masked ones."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    owner = causal_lm(model)
    if owner is None:
        return True
    masked = any(kind.__name__ in MASKED.values() for kind in type(owner).__mro__)
    return not (masked or getattr(owner.config, "is_encoder_decoder", False))


@torch.no_grad()
def looks_ahead(model: nn.Module) -> bool:
    """Whether a later token changes an earlier position's logits: of a model whose labels are
    shifted, every label would be in view (BERT opened as a causal model, `is_decoder` unset).

    Found by trial: two forward passes of 4 tokens, in evaluation mode; modes and random states are
    left as they were. A model without a configuration, whose inputs nobody knows, is not tried.

    Raises:
        ValueError: a model without logits, or with those of whole texts (a classifier).
    """
    owner = causal_lm(model) or model
    if not hasattr(getattr(owner, "config", None), "get_text_config"):
        return False
    device = next(owner.parameters()).device
    vocabulary = owner.config.get_text_config().vocab_size
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5]], device=device) % vocabulary
    # Of an encoder-decoder it is the decoder that must not look ahead.
    decoder = getattr(owner.config, "is_encoder_decoder", False)
    name, given = "decoder_input_ids" if decoder else "input_ids", {"input_ids": ids[:1]}
    gpus = [device.index] if device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(gpus):
        first, second = (_logits(_call(model, given | {name: x[None]})) for x in ids)
    if first.dim() != 3:
        raise ValueError(
            f"{type(owner).__name__} is no language model: its logits of 4 tokens have the shape"
            f" {tuple(first.shape)}"
        )
    first, second = first[:, :2], second[:, :2]
    # Experts see other tokens beside these, and may round otherwise.
    rounding = 8 * torch.finfo(first.dtype).eps * first.abs().max()
    return bool((first - second).abs().max() > rounding)


def causal_lm(model: nn.Module) -> nn.Module | None:
    """The language model with a head that `model` is, or has inside: of DDP, FSDP, a peft model,
    a compiled model, a module of one's own. None where there is none, or more than one."""
    found = None
    for module in model.modules():
        # On the class: a peft model hands on the names of what it wraps.
        if hasattr(type(module), "get_output_embeddings") and hasattr(module, "config"):
            if module.get_output_embeddings() is not None:
                if found is None:
                    found, inside = module, set(module.modules())
                elif module not in inside:
                    return None
    return found


@torch.no_grad()
def find_head(model: nn.Module, ids: Tensor | None = None) -> Head | None:
    """The head of a causal LM, wrapped or not, if its logits are what `LMHead` says of it and
    nothing else; None where the model must make them: an adapter on the head, hooks on it or on
    the model, a quantised, offloaded or sharded head, a compiled model, logits that something else
    changes.

    The configuration only names candidates for scale and softcap. What the model makes of a few
    tokens of `ids` (N, length) decides, under the autocast of the caller; default: the first of its
    vocabulary.

    Cost: two forward passes of 8 tokens of the model without its wrappers, in evaluation mode, the
    first time (`run` tries a wrapper with one more); modes and random states are left as they were.
    The answer is kept for as long as the model has this head, with this weight: later calls look at
    the modules, and run nothing.
    """
    owner = causal_lm(model)
    linear = None if owner is None else owner.get_output_embeddings()
    # Nothing that adds to the layer (adapters, quantisation, offloading), and no shard of it.
    if (
        type(linear) is not nn.Linear
        or "forward" in vars(linear)
        or type(linear.weight) is not nn.Parameter
        or linear.weight.shape != (linear.out_features, linear.in_features)
        or getattr(owner.config, "is_encoder_decoder", False)
        or any(_interferes(module) for module in (linear, *_around(model, owner)))
    ):
        return None
    scales, softcaps = (_numbers(owner, names) for names in (SCALES, SOFTCAPS))
    objects = linear, linear.weight, linear.bias
    numbers = id(type(owner).forward), id(vars(owner).get("forward")), *scales, None, *softcaps
    refs, known, found = _known.get(owner, ((), (), None))
    if known != numbers or any(x is not y() for x, y in zip(objects, refs, strict=True)):
        if ids is None:
            ids = torch.arange(PROBE_TOKENS)[None] % linear.out_features
        found = _probe(owner, linear, ids, scales, softcaps)
        refs = tuple((lambda: None) if x is None else ref(x) for x in objects)
        _known[owner] = refs, numbers, found
    return None if found is None else Head(owner, linear, *found)


def _probe(
    model: nn.Module, linear: nn.Linear, ids: Tensor, scales: list[float], softcaps: list[float]
) -> tuple[float | None, float] | None:
    """The softcap and scale that make the model's logits of its head's product."""
    ids = ids[:1, :PROBE_TOKENS].to(linear.weight.device)

    def run(factor: float) -> tuple[list[Tensor], Tensor]:
        seen = []

        def forward(input):
            product = F.linear(input, linear.weight, linear.bias)
            seen.append(factor * product.float())  # fp32: what follows must not hide in roundings
            return seen[-1]

        with _forward_of(linear, forward):
            own = _logits(_call(model, {"input_ids": ids}))
        return seen, own

    gpus = [ids.device.index] if ids.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(gpus):
        probes = [run(1.0)]
        # And larger logits: a cap that small ones do not feel would be missed.
        probes.append(run(100 / max(probes[0][1].abs().max().item(), 1e-3)))
    if any(len(seen) != 1 for seen, _ in probes):
        return None
    for softcap, scale in product([*softcaps, None], [*scales, *(1 / x for x in scales), 1.0]):
        if scale != 1 and linear.bias is not None:
            continue  # it would be scaled too
        if all(_agree(z, own, softcap, scale) for (z,), own in probes):
            return softcap, scale
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module's own is back."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _around(model: nn.Module, owner: nn.Module) -> list[nn.Module]:
    """The causal LM and what it is wrapped in."""
    path = next(name for name, module in model.named_modules() if module is owner).split(".")
    names = [".".join(path[:i]) for i in range(len(path) + 1)]
    return [model.get_submodule(name) for name in names]


def _interferes(module: nn.Module) -> bool:
    """Whether something else reads what the module makes, or runs other code than the module's."""
    return bool(
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or type(module).__name__ in WHOLE
    )


def _numbers(model: Any, names: tuple[str, ...]) -> list[float]:
    config = model.config.get_text_config()
    values = [getattr(config, name, None) for name in names]
    return [x for x in values if isinstance(x, float | int) and x > 0]


def logits_of(model: nn.Module, head: Head | None, batch: Mapping[str, Any]) -> Tensor | LMHead:
    """A causal LM's logits for `kd_loss`: as `LMHead`, where `head` is what `find_head` found; see
    `run`."""
    return run(model, head, batch)[0]


def run(
    model: nn.Module, head: Head | None, batch: Mapping[str, Any]
) -> tuple[Tensor | LMHead, Any]:
    """The logits for `kd_loss`, as `LMHead` where `head` is what `find_head` found; and all that
    the model returned, where the hidden state may stand for the logits.

    The forward pass is the model's own, or that of its wrapper, but for its last product: the
    hidden state that the head is given is returned instead of logits. So it takes the wrapper's
    way out, where DistributedDataParallel looks for what the backward pass will reach.

    Args:
        model: the causal LM, wrapped or not; called without a cache (with one, models ignore the
            position ids of packed documents), and without labels.
        batch: the model's keyword arguments.
    """
    inputs = {name: x for name, x in batch.items() if name not in LABELS}
    if head is not None and model is not head.model and model not in _returns_logits:
        if not _hands_on(model, head):
            _returns_logits[model] = False
    if head is None or not _returns_logits.get(model, True):
        output = _call(model, inputs)
        return _logits(output), output
    linear, seen, types = head.linear, [], []
    own_forward = head.model.forward

    def head_forward(input):
        kind, dtype = input.device.type, linear.weight.dtype
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        types.append(dtype)
        # A frozen body needs no gradient, but a wrapper may wait for one.
        wrapped = model is not head.model
        seen.append(_Tied.apply(input, linear.weight, linear.bias) if wrapped else input)
        # As in generation, for one position; nobody reads it.
        return input.new_zeros(*input.shape[:-2], 1, linear.out_features)

    def forward(*args, **kwargs):
        output = own_forward(*args, **kwargs)
        if isinstance(output, tuple):
            return (*seen, *output[1:])
        (output.logits,) = seen
        return output

    with _forward_of(linear, head_forward), _forward_of(head.model, forward):
        output = _call(model, inputs)
    hidden = _logits(output)
    if model is not head.model and model not in _returns_logits:
        _returns_logits[model] = _equal(hidden, *seen)
        if not _returns_logits[model]:
            output = _call(model, inputs)
            return _logits(output), output
    (dtype,) = types
    # Where autocast ended with the forward pass, the product is still in its type.
    under_autocast = torch.is_autocast_enabled(hidden.device.type)
    return head.source(hidden.to(seen[0].dtype), None if under_autocast else dtype), output


@torch.no_grad()
def _hands_on(wrapper: nn.Module, head: Head) -> bool:
    """Whether a wrapper returns the causal LM's logits as they are, and not a part of them, or
    changed in place: of a few tokens, before it is given hidden states in their place."""
    owner, seen, device = head.model, [], head.linear.weight.device
    own_forward = owner.forward

    def forward(*args, **kwargs):
        output = own_forward(*args, **kwargs)
        seen.append(_logits(output).clone())
        return output

    ids = torch.arange(PROBE_TOKENS, device=device)[None] % head.linear.out_features
    gpus = [device.index] if device.type == "cuda" else []
    with evaluating(wrapper), torch.random.fork_rng(gpus), _forward_of(owner, forward):
        try:
            logits = _logits(_call(wrapper, {"input_ids": ids}))
        except Exception:  # it reads something else: its own logits, then
            return False
    return len(seen) == 1 and _equal(logits, *seen)


def _call(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The forward pass without a cache; some models that have none refuse the word, and a wrapper
    may not pass it on."""
    owner = causal_lm(model) or model
    inputs = {name: x for name, x in inputs.items() if name != "use_cache"}  # packed rows say it
    if not _takes(owner, "use_cache"):
        return model(**inputs)
    if _takes(model, "use_cache"):
        return model(**inputs, use_cache=False)
    with _forward_of(owner, partial(owner.forward, use_cache=False)):
        return model(**inputs)


def _takes(model: nn.Module, word: str) -> bool:
    known = _parameters(model)
    return word in known or any(p.kind is p.VAR_KEYWORD for p in known.values())


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(model).forward).parameters


class _Tied(torch.autograd.Function):
    """The hidden state, as if the head had been used: `kd_loss` uses it after the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias):
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def _logits(output: Any) -> Tensor:
    """Of a model's output, without labels."""
    if isinstance(output, Tensor):
        return output
    logits = output[0] if isinstance(output, tuple) else _field(output, "logits")
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"a model returned no logits, but {type(output).__name__}: it needs a language model's"
            " head, as AutoModelForCausalLM opens it"
        )
    return logits


def _field(output: Any, name: str) -> Any:
    """Of an output as an object, or as a plain dictionary; None where there is none."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


@torch.no_grad()
def _equal(x: Tensor, y: Tensor) -> bool:
    """But for a cast; NaN is equal to itself."""
    return x.shape == y.shape and torch.equal(x.nan_to_num(), y.to(x.dtype).nan_to_num())


@contextmanager
def _forward_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _agree(product: Tensor, own: Tensor, softcap: float | None, scale: float) -> bool:
    """Up to a few roundings. Logits of 0 tell nothing."""
    logits = scale * product
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if logits.shape != own.shape:
        return False
    error, largest = (logits - own.float()).abs().max(), own.abs().max()
    return bool(error < 8 * torch.finfo(own.dtype).eps * largest)


def _inputs(owner: nn.Module, batch: Batch) -> dict[str, Any]:
    """A language model's own keyword arguments of a batch; see `LM`."""
    known, config = _parameters(owner), getattr(owner, "config", None)
    inputs = {
        name: x
        for name, x in batch.items()
        if name not in (*LABELS, "logits_to_keep")
        and not name.startswith(TEACHERS_PREFIX)
        and (name not in EXTRAS or name in known)
    }
    decoder = {"decoder_input_ids", "decoder_inputs_embeds"}
    if getattr(config, "is_encoder_decoder", False) and not decoder & set(inputs):
        inputs["decoder_input_ids"] = _shifted(owner, batch["labels"])
    if "output_router_logits" in known and getattr(config, "output_router_logits", False):
        inputs.setdefault("output_router_logits", True)  # some read only this
    return inputs


def _shifted(owner: nn.Module, labels: Tensor) -> Tensor:
    """What the decoder reads where it learns `labels`, by the model's own rule."""
    own = getattr(owner, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own(labels=labels)
    shift = getattr(sys.modules[type(owner).__module__], "shift_tokens_right", None)
    if shift is None:
        raise ValueError(
            f"{type(owner).__name__} does not say how its decoder reads labels: put"
            " decoder_input_ids into the batch"
        )
    return shift(labels, owner.config.pad_token_id, owner.config.decoder_start_token_id)


def _auxiliary(owner: nn.Module, output: Any) -> Tensor | None:
    """What the model would add to its own loss, with its own factors."""
    if not hasattr(getattr(owner, "config", None), "get_text_config"):
        return None
    places = owner, owner.config, owner.config.get_text_config()

    def first(names):
        found = (getattr(place, name, None) for place in places for name in names)
        return next((x for x in found if x is not None), None)

    total = None
    for names, factors in AUXILIARY:
        for name in names:
            loss, factor = _field(output, name), first(factors)
            if isinstance(loss, Tensor):
                if factor is None:
                    raise ValueError(
                        f"{type(owner).__name__} returns {name}, and its configuration has no"
                        f" {' or '.join(factors)}"
                    )
                total = factor * loss + (0 if total is None else total)
    if total is None and first(("output_router_logits",)) and torch.is_grad_enabled():
        raise ValueError(
            f"{type(owner).__name__} is set to balance its experts (output_router_logits), but its"
            " balancing loss is not among its outputs: set output_router_logits=False to train"
            " without"
        )
    return total
