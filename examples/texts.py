"""What the examples share: two models, and batches of a text file's lines."""

from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(student, teacher, path, size):
    """(student, teacher, loader) by names and path; the student is trained, in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def encode(lines):
        # On the left, padding would be asked for each line's first token.
        batch = dict(tokenizer(lines, padding=True, padding_side="right", return_tensors="pt"))
        padding = batch["attention_mask"] == 0
        batch["labels"] = batch["input_ids"].masked_fill(padding, -100)
        return batch

    loader = DataLoader(Path(path).read_text().splitlines(), size, collate_fn=encode)
    student = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).train()
    return student, AutoModelForCausalLM.from_pretrained(teacher).eval(), loader
