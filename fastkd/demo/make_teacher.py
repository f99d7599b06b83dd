"""How the teacher in `fastkd/demo/teacher` was made: `python -m fastkd.demo.make_teacher --output
FOLDER`.

A byte-level BPE of 8,192 entries and a Llama of 4.2 million parameters, both trained on the
standard library's sources without the held-out modules (`corpus.py`), by cross-entropy alone; bf16
safetensors, 8 MB.
"""

from __future__ import annotations

import argparse
import math

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from fastkd.demo.corpus import stdlib_texts

VOCAB_SIZE = 8192
END = "<|endoftext|>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, bos_token=END
    )


def tokens(tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of ids, each text closed by the end token."""
    encoded = tokenizer([text + END for text in texts], add_special_tokens=False)["input_ids"]
    return torch.tensor([i for ids in encoded for i in ids])


def batch(stream: torch.Tensor, size: int, length: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(stream) - length, (size,), generator=generator)
    return torch.stack([stream[i : i + length] for i in starts.tolist()])


@torch.no_grad()
def perplexity(model, stream: torch.Tensor, length: int) -> float:
    rows = stream[: len(stream) // length * length].view(-1, length)[:128]
    losses = [model(input_ids=part, labels=part).loss for part in rows.split(8)]
    return math.exp(torch.stack(losses).mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    texts = stdlib_texts(held_out=False)
    tokenizer = train_tokenizer(texts)
    stream, held_out = tokens(tokenizer, texts), tokens(tokenizer, stdlib_texts(held_out=True))
    print(f"{len(stream):,} tokens to train on, {len(held_out):,} held out", flush=True)

    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=224, intermediate_size=640, num_hidden_layers=4,
        num_attention_heads=7, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=end, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, args.steps)
    generator = torch.Generator().manual_seed(0)
    bar = trange(args.steps, mininterval=10)
    for step in bar:
        ids = batch(stream, args.batch, args.length, generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % 500 == 0:
            value = perplexity(model, held_out, args.length)
            print(f"\nstep {step + 1}: held-out perplexity {value:.1f}", flush=True)
            model.save_pretrained(args.output)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
