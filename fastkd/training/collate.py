"""From rows of token ids to batches."""

from __future__ import annotations

import copy
import zlib
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

from fastkd.training.errors import InputError


def collator(tokenizer: Any, task: str = "causal-lm", mlm_probability: float = 0.15) -> Collate:
    """What makes a batch of rows: padded on the right, labels with -100.

    Packed rows come with `position_ids`, of which the padding's are 0, and `use_cache` False, and
    without an attention mask; all others with one. `teacher_` columns are padded by themselves. Of
    a masked LM the tokens to predict are drawn here, from the batch alone: the same batch has the
    same masks in every evaluation and after resuming, and rows that are shuffled have others.

    Args:
        tokenizer: without a token for padding, the end of text is taken.
        mlm_probability: part of the tokens that are to be predicted (masked-lm).

    Raises:
        InputError: a masked LM's tokenizer without a mask token.
    """
    return Collate(tokenizer, task == "masked-lm", mlm_probability)


class Collate:
    """See `collator`."""

    def __init__(self, tokenizer: Any, masked: bool, mlm_probability: float):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = "right"
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        self.pad = DataCollatorForSeq2Seq(tokenizer)
        self.mask = None
        if masked:
            if tokenizer.mask_token is None:
                raise InputError("masked-lm needs a tokenizer with a mask token; it has none")
            self.mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if self.mask is not None:
            ids = [{"input_ids": list(row["input_ids"])} for row in rows]
            content = np.concatenate([row["input_ids"] for row in ids]).astype(np.int64)
            self.mask.generator = torch.Generator().manual_seed(zlib.crc32(content.tobytes()))
            return dict(self.mask(ids))
        batch = self._padded(rows, "")
        if rows[0].get("teacher_input_ids") is not None:
            batch |= {f"teacher_{k}": x for k, x in self._padded(rows, "teacher_").items()}
        positions = [row.get("position_ids") for row in rows]
        if any(p is not None for p in positions):
            batch["position_ids"] = torch.zeros_like(batch["input_ids"])
            for i, (row, p) in enumerate(zip(rows, positions, strict=True)):
                n = len(row["input_ids"])
                batch["position_ids"][i, :n] = torch.arange(n) if p is None else torch.tensor(p)
            del batch["attention_mask"]
            batch["use_cache"] = False
        return batch

    def _padded(self, rows: list[dict[str, Any]], prefix: str) -> dict[str, Any]:
        columns = ("input_ids", "labels")
        return dict(self.pad([{c: list(row[prefix + c]) for c in columns} for row in rows]))
