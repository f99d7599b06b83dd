"""Small models with tokenizers, data, and runs of the command line on them."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from fastkd.cli import main

WORDS = 60


def words(extra=()):
    """One token a word: w0 … w59, <end>, and a few more."""
    names = [*(f"w{i}" for i in range(WORDS)), "<end>", *extra]
    inner = Tokenizer(models.WordLevel({x: i for i, x in enumerate(names)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>"
    )
    if "<mask>" in extra:
        tokenizer.mask_token = "<mask>"
    return tokenizer


def write_model(folder, seed, family=LlamaConfig, scale=1.0, tokenizer=None, **others):
    """A model of random weights; a larger scale gives it opinions."""
    size = dict(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    (tokenizer or words()).save_pretrained(folder)
    torch.manual_seed(seed)
    masked = family.model_type == "bert"
    opened = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model = opened.from_config(family(**size | others))
    with torch.no_grad():
        model.get_output_embeddings().weight *= scale
    model.save_pretrained(folder)
    return str(folder)


def rows(count, seed=0):
    """Rows whose responses differ in length, so that micro-batches differ in target tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(WORDS, (2 + 3 * i % 17,), generator=generator).tolist()
        made.append({"prompt": f"w{i % WORDS} w1", "completion": " ".join(f"w{j}" for j in ids)})
    return made


def write_rows(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return str(path)


def flags(settings):
    """`key=value` settings as a command line."""
    made = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        made += [f"--{name}"] if value is True else [f"--{name}={x}" for x in values]
    return made


def run(*more, **settings):
    """The exit status of `fastkd distill`."""
    return main(["distill", *flags(settings), *more])


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def curve(folder):
    """The log without what the clock and the memory say."""
    varies = ("second", "runtime", "memory_mb", "time")
    return [{k: x for k, x in row.items() if not k.endswith(varies)} for row in log(folder)]


def weights(folder, opened=AutoModelForCausalLM):
    return opened.from_pretrained(folder, dtype=torch.float32).state_dict()


def difference(a, b, opened=AutoModelForCausalLM):
    a, b = weights(a, opened), weights(b, opened)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
