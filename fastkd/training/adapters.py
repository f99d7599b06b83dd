"""Adapters: on a student, new or trained on; of a teacher, merged."""

from __future__ import annotations

import warnings

from torch import nn

from fastkd.training.errors import InputError
from fastkd.training.places import Place
from fastkd.training.settings import ModelSettings
from fastkd.training.weights import check_numbers, some


def add(place: Place, model: nn.Module, models: ModelSettings) -> nn.Module:
    """A model under new adapters, which alone are trained.

    Raises:
        InputError: layers that it does not have, or that take no adapters.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=models.lora_r,
        lora_alpha=2 * models.lora_r if models.lora_alpha is None else models.lora_alpha,
        lora_dropout=models.lora_dropout,
        target_modules=models.lora_targets or "all-linear",
        task_type="CAUSAL_LM" if models.task == "causal-lm" else None,
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        layers = {n.rpartition(".")[2] for n, m in model.named_modules() if _is_linear(m)}
        raise place.refuse(
            f"no adapters on {', '.join(models.lora_targets) or 'its layers'}: its linear layers"
            f" are {', '.join(sorted(layers))}"
        ) from error


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's


def load(place: Place, model: nn.Module, trained: bool) -> nn.Module:
    """A model under the adapter of a folder, after making sure that all of it found its place.

    Args:
        model: the one under it.
        trained: whether what the adapter trained is trained on.

    Raises:
        InputError: an adapter that adds tokens, or whose weights are missing, of other shapes, of
            layers that the model has not, or not finite.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        settings = PeftConfig.from_pretrained(place.adapter)
        if settings.is_prompt_learning:
            raise place.refuse(f"{settings.peft_type.value} adapters add tokens: not supported")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused below
            model = PeftModel.from_pretrained(model, place.adapter, is_trainable=trained)
        in_file = load_peft_weights(place.adapter, device="cpu")
    except InputError:
        raise
    except Exception as error:  # whatever peft and torch raise
        raise place.refuse(error) from error
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    if missing := wanted.keys() - in_file.keys():
        raise place.refuse(f"{some(missing)} missing in the adapter, and would be random")
    # An adapter on the embeddings saves their weights too, and peft reads them.
    base = {_plain(f"base_model.model.{name}") for name in model.get_base_model().state_dict()}
    unknown = {name for name in in_file.keys() - wanted.keys() if _plain(name) not in base}
    if unknown:
        raise place.refuse(f"the adapter's {some(unknown)} fit nowhere in {place.base}")
    check_numbers(place, model)
    return model


def _plain(name: str) -> str:
    """Of a weight, without peft's wrapper."""
    return name.replace(".base_layer.", ".")


def merge(model: nn.Module) -> nn.Module:
    """The model with its adapter in its weights, if they are not quantised; so that a head's
    adapter is part of the head.

    A head that shares the embeddings' weight gets one of its own: what is added to one of the two
    would be added to both.
    """
    base = model.get_base_model()
    if getattr(base, "is_quantized", False) or not hasattr(model, "merge_and_unload"):
        return model
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    inner = [getattr(x, "base_layer", x) for x in (head, embeddings)]
    if inner[0] is not None and inner[0].weight is inner[1].weight and inner != [head, embeddings]:
        inner[0].weight = nn.Parameter(inner[0].weight.detach().clone())
        base.config.get_text_config().tie_word_embeddings = False
        base.config.tie_word_embeddings = False
    return model.merge_and_unload()
