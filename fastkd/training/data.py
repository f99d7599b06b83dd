"""The data of a run, from what the user names to rows of token ids.

Sources are opened (files.py), encoded (encode.py, chat.py, packs.py), divided into a training and a
held-out part, and mixed; collate.py makes batches of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets, interleave_datasets

from fastkd.training.chat import IGNORED, encode_chat, encode_conversation
from fastkd.training.collate import collator
from fastkd.training.encode import Encoder, Prompts, encode
from fastkd.training.errors import InputError
from fastkd.training.files import NoSplit, load_rows
from fastkd.training.packs import keeps_documents_apart
from fastkd.training.settings import LENGTH, DataSettings

__all__ = [
    "Prompts",
    "Read",
    "collator",
    "encode",
    "encode_chat",
    "encode_conversation",
    "keeps_documents_apart",
    "load_rows",
    "open_data",
]

FEW = 1000  # held-out tokens under which an evaluation says little


@dataclass
class Read:
    """What was read.

    Attributes:
        train: rows with `input_ids` and `labels` (and more: see `encode`).
        held_out: rows for evaluation, if any.
        report: lines that say what was read, used, dropped and why, and held out.
    """

    train: Dataset
    held_out: Dataset | None
    report: list[str]


def open_data(
    data: DataSettings,
    tokenizer: Any,
    *,
    seed: int = 0,
    vocab_size: int | None = None,
    pack: bool = True,
    task: str = "causal-lm",
) -> Read:
    """Open, encode, divide and mix the data of a run.

    Held out are usable rows, of each source its part; rows that come of one conversation stay
    together. Several sources are joined, or mixed by `data_weight`: then until each of them was
    read to its end, shorter ones several times.

    Args:
        data: the settings; `packing` and `pack` both decide whether texts are packed.
        seed: decides what is held out, and the order of a mixture.
        vocab_size: ids beyond it are refused.
        pack: False: documents are not packed, for models that cannot keep them apart.
        task: "causal-lm" or "masked-lm".

    Raises:
        InputError: nothing to train on, or data that cannot be read as they are.
    """
    if not data.data:
        raise InputError("no data: give --data")
    if data.data_weight and len(data.data_weight) != len(data.data):
        raise InputError(f"{len(data.data_weight)} weights for {len(data.data)} sources of data")
    if any(not 0 < weight < math.inf for weight in data.data_weight):
        raise InputError(f"data_weight must be above 0, got {data.data_weight}")
    if not 0 <= data.eval_fraction < 1:
        raise InputError(f"eval_fraction must be in [0, 1), got {data.eval_fraction}")
    prompts = Prompts(
        data.student_prompt_template, data.teacher_prompt_template, data.max_teacher_length
    )
    encoder = Encoder(tokenizer, data.max_length or LENGTH, vocab_size, task, prompts)
    packing = data.packing and pack
    report: list[str] = []

    def encoded(source: str, split: str) -> Dataset:
        try:
            made = encoder.encode(load_rows(source, split, data.data_name), packing)
        except NoSplit:
            raise
        except InputError as error:
            known = str(error).startswith(source)
            raise error if known else InputError(f"{source}: {error}") from error
        report.extend(f"{source}: {line}" for line in made.report)
        return made.rows

    sources = [encoded(source, data.data_split) for source in data.data]
    held_out = []
    if data.eval_data is not None:
        held_out = [_held_out_split(encoded, data)]
    elif data.eval_fraction:
        sources, held_out = _divided(sources, data.eval_fraction, seed)
        if not held_out:
            report.append("nothing is held out: there is a single row")
    sources, held_out = ([s.remove_columns("row") for s in some] for some in (sources, held_out))
    train = _mixed(sources, data.data_weight, seed)
    report.append(f"to train on: {_size(train)}")
    held = concatenate_datasets(held_out) if held_out else None
    if held is not None:
        few = _tokens(held)[1] < FEW
        report.append(f"held out: {_size(held)}" + (": few, its losses say little" if few else ""))
    return Read(train, held, report)


def _held_out_split(encoded: Callable[[str, str], Dataset], data: DataSettings) -> Dataset:
    """Of data with several splits, the one that is for evaluation."""
    for split in ("validation", "test"):
        try:
            return encoded(data.eval_data, split)
        except NoSplit:
            continue
    return encoded(data.eval_data, data.data_split)


def _divided(
    sources: list[Dataset], fraction: float, seed: int
) -> tuple[list[Dataset], list[Dataset]]:
    """Each source without what is held out of it, and what is held out. At least one row is, of the
    largest source, and at least one is left in each."""
    numbers = []
    for rows in sources:
        tables = rows.select_columns("row").with_format("arrow").iter(batch_size=100_000)
        column = np.concatenate([table["row"].to_numpy() for table in tables])
        numbers.append(np.arange(len(rows)) if (column < 0).any() else column)
    groups = [np.unique(x) for x in numbers]
    counts = [min(round(fraction * len(g)), len(g) - 1) for g in groups]
    if not any(counts):
        largest = max(range(len(groups)), key=lambda i: len(groups[i]))
        counts[largest] = min(1, len(groups[largest]) - 1)
    train, held_out = [], []
    for i, (rows, x, group) in enumerate(zip(sources, numbers, groups, strict=True)):
        chosen = np.random.default_rng((seed, i)).permutation(group)[: counts[i]]
        held = np.isin(x, chosen)
        train.append(rows.select(np.flatnonzero(~held)) if counts[i] else rows)
        if counts[i]:
            held_out.append(rows.select(np.flatnonzero(held)))
    return train, held_out


def _mixed(sources: list[Dataset], weights: list[float], seed: int) -> Dataset:
    if not weights or len(sources) == 1:
        return concatenate_datasets(sources)
    return interleave_datasets(
        sources,
        probabilities=[weight / sum(weights) for weight in weights],
        seed=seed,
        stopping_strategy="all_exhausted",
    )


def _tokens(rows: Dataset) -> tuple[int, int]:
    """How many there are, and how many count: those that something before them predicts."""
    total = counted = 0
    for table in rows.with_format("arrow").iter(batch_size=10_000):
        total += pc.sum(pc.list_value_length(table["input_ids"])).as_py() or 0
        if "labels" in table.column_names:
            labels = table["labels"].combine_chunks()
            counts = pc.list_flatten(labels).to_numpy() != IGNORED
            counted += int(counts.sum())
            firsts = pc.list_element(labels.filter(pc.greater(pc.list_value_length(labels), 0)), 0)
            counted -= int((firsts.to_numpy() != IGNORED).sum())
    return total, counted if "labels" in rows.column_names else total


def _size(rows: Dataset) -> str:
    total, counted = _tokens(rows)
    packed = " packed" if "position_ids" in rows.column_names else ""
    counting = "" if "labels" not in rows.column_names else f", {counted:,} of them count"
    return f"{len(rows):,}{packed} rows, {total:,} tokens{counting}"
