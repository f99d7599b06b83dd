"""Tiny causal LMs with random weights, a tokenizer, and batches for them."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from fastkd import kd_loss

V = 67


def tiny(seed, family=LlamaConfig, **others):
    sizes = dict(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(family(**(sizes | others)))


def words():
    """A tokenizer: w0 is 0, w1 is 1."""
    table = Tokenizer(WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    table.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=table, unk_token="w0")


def batch(rows=2, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (rows, length), generator=generator)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 1 + 3 * row] = -100  # unequal targets
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss(student, teacher, labels, **others):
    settings = dict(shift=True, temperature=2.0, alpha=0.7) | others
    return kd_loss(student, teacher, labels, **settings)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
