"""What a model's name stands for: a folder, an adapter's folder and the model under it, or a name
on the hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from fastkd.training.errors import InputError

WEIGHTS = ("*.safetensors", "*.bin", "*.distcp", "*/*.distcp")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
INDEX = "model.safetensors.index.json"
LONG, LONGEST = 200, 300  # characters of another's error, and of ours


class Place(NamedTuple):
    """Where a model is.

    Attributes:
        side: "student" or "teacher": who it is, in messages.
        name: as it was given.
        base: the folder or hub name of configuration and weights.
        adapter: the folder or hub name of the adapter on them; None: there is none.
    """

    side: str
    name: str
    base: str
    adapter: str | None = None

    def refuse(self, what: str | Exception, before: str = "") -> InputError:
        """The error to raise, in one line.

        Args:
            what: the fault, or an exception of transformers', peft's or torch's.
            before: stands before it.
        """
        text = what if isinstance(what, str) else self._in_words(what)
        text = f"the {self.side} {self.name}: {before}{' '.join(text.split())}"
        return InputError(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")

    def _in_words(self, error: Exception) -> str:
        """In a user's words, where the libraries' are those of their functions."""
        text = " ".join(str(error).split())
        first = text or type(error).__name__
        if len(first) > LONG:  # after the first sentence comes all that would have been possible
            first = re.split(r"(?<=\w{3}\.) (?=[A-Z])", first)[0]
        if "trust_remote_code" in text:
            return "comes with code of its own; --trust_remote_code runs it, if you trust it"
        if "Weights only load failed" in text:
            return "its weights are a pickle that holds more than weights: ask for safetensors"
        if isinstance(error, OSError) and not Path(self.base).exists():
            return f"no such folder, and not to be had from the hub: {first}"
        if type(error).__name__ == "SafetensorError":
            return f"a file of its weights is broken: {first}"
        if isinstance(error, KeyError):
            return f"unknown {first}"
        return first


def find(side: str, name: str) -> Place:
    """What a name stands for. Opens no model.

    Raises:
        InputError: no such folder, a file, a folder without a model, an adapter without weights or
            without the model under it.
    """
    if not name.strip():
        raise InputError(f"the {side} has an empty name: name a folder or a model on the hub")
    place = Place(side, name, _expanded(name))
    settings = _adapter_settings(place)
    if settings is None:
        _check_model(place)
        return place
    under = settings.get("base_model_name_or_path")
    if not under:
        raise place.refuse("an adapter that does not name the model under it")
    folder = Path(place.base)
    if folder.is_dir() and not any((folder / file).exists() for file in ADAPTER_WEIGHTS):
        raise place.refuse("adapter_config.json, but no adapter_model.safetensors")
    if folder.is_dir() and any((folder / f).exists() for f in ("model.safetensors", INDEX)):
        raise place.refuse("holds a whole model and an adapter: move one of them away")
    made = Place(side, name, _expanded(under), place.base)
    under_it = Place(f"{side} {name} is an adapter of", under, made.base)
    if _adapter_settings(under_it) is not None:
        raise made.refuse(f"an adapter on another adapter, {under}: merge that one first")
    _check_model(under_it)
    return made


def _expanded(name: str) -> str:
    """Folders by their whole path: an adapter remembers the name of the model under it."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _is_path(name: str) -> bool:
    """Whether a name that does not exist here cannot be on the hub, as `owner/model` may."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name


def _adapter_settings(place: Place) -> dict | None:
    """The adapter's configuration, if the place is an adapter's."""
    path = Path(place.base)
    if path.is_dir():
        path = path / "adapter_config.json"
        if not path.exists():
            return None
    elif path.exists():
        raise place.refuse(_of_file(path))
    elif _is_path(place.name):
        raise place.refuse("no such folder")
    else:
        from transformers.utils.peft_utils import find_adapter_config_file

        try:
            found = find_adapter_config_file(place.base)
        except Exception:  # the configuration's opening says what is wrong
            found = None
        if found is None:
            return None
        path = Path(found)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise place.refuse(f"{path.name} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise place.refuse(f"{path.name} is not an adapter's")
    return settings


def _of_file(path: Path) -> str:
    if path.suffix.lower() == ".gguf":
        return (
            "a GGUF file must be converted: AutoModelForCausalLM.from_pretrained(folder,"
            " gguf_file=…).save_pretrained(new_folder), and the same for AutoTokenizer"
        )
    return "a file: name the folder with config.json and the weights"


def _check_model(place: Place) -> None:
    """A local folder has what a model needs; hub names are looked up when they are opened."""
    folder = Path(place.base)
    if not folder.is_dir():
        return
    if not (folder / "config.json").exists():
        runs = [p for p in folder.glob("checkpoint-*") if p.is_dir()]
        hint = f"; {max(runs, key=os.path.getmtime).name} in it may be one" if runs else ""
        if any(folder.glob("*.gguf")):
            hint = f"; {_of_file(next(folder.glob('*.gguf')))}"
        raise place.refuse(f"no config.json in this folder: it is not a model's{hint}")
    if not any(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise place.refuse("a config.json, but no weights (model.safetensors)")
