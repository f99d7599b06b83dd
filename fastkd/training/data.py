"""From files or hub datasets to token ids with labels on the response only."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from torch.utils.data import DataLoader

from fastkd.training.config import InputError

IGNORED = -100
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
BUILDERS |= {".txt": "text", ".md": "text"}
FORMATS = (
    "text | prompt + completion (or response) | messages |"
    " instruction (+ input) + output (or response) | input_ids (+ labels)"
)


def load_rows(source: str, split: str = "train", name: str | None = None) -> Dataset:
    """Open a file, a folder of files of one kind, a folder of `save_to_disk`, or a hub dataset.

    Args:
        source: path or hub name. Text files become one document each.
        split: which split of a hub or saved dataset.
        name: configuration of a hub dataset.

    Raises:
        InputError: nothing there, or files of several or unknown kinds.
    """
    path = Path(source)
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        saved = load_from_disk(source)
        if isinstance(saved, DatasetDict) and split not in saved:
            raise InputError(f"{source} has no split {split!r}, only {', '.join(saved)}")
        return saved[split] if isinstance(saved, DatasetDict) else saved
    if path.exists():
        candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [str(file) for file in candidates if file.suffix.lower() in BUILDERS]
        builders = {BUILDERS[Path(file).suffix.lower()] for file in files}
        if len(builders) != 1:
            found = (
                f"files of several kinds ({', '.join(sorted(builders))})" if builders else "no file"
            )
            raise InputError(
                f"{source}: expected one kind among {', '.join(BUILDERS)}, found {found}"
            )
        builder = builders.pop()
        options = {"sample_by": "document"} if builder == "text" else {}
        return _open(source, builder, data_files=files, split="train", **options)
    if path.suffix.lower() in BUILDERS or path.is_absolute():
        raise InputError(f"{source}: no such file or folder")
    return _open(source, source, name, split=split)


def _open(source: str, *args: Any, **options: Any) -> Dataset:
    try:
        return load_dataset(*args, **options)
    except Exception as error:  # of many kinds, from parsers to networks
        raise InputError(f"cannot open the data {source}: {error.__cause__ or error}") from error


def encode(rows: Dataset, tokenizer: Any, max_length: int, packing: bool = True) -> Dataset:
    """Tokenise rows to `input_ids` and `labels`, labels being -100 outside of the response.

    Rows without a token to predict are dropped, and their number is printed.

    Args:
        rows: with the columns of one of the known formats.
        tokenizer: the models' tokenizer; a chat template is needed for `messages`.
        max_length: sequences are cut (or, if packed, chunked) to this many tokens.
        packing: join the documents of `text` rows into sequences of `max_length`.

    Raises:
        InputError: no known format among the columns, no chat template, or no row left.
    """
    to_ids = _row_encoder(rows.column_names, tokenizer)
    pack = packing and rows.column_names and _format(rows.column_names) == "text"

    def convert(batch: dict[str, list]) -> dict[str, list]:
        columns = list(batch)
        pairs = [
            to_ids(dict(zip(columns, values, strict=True)))
            for values in zip(*batch.values(), strict=True)
        ]
        if pack:
            stream = [i for ids, _ in pairs for i in ids]
            chunks = [stream[i : i + max_length] for i in range(0, len(stream), max_length)]
            pairs = [(chunk, chunk) for chunk in chunks]
        pairs = [(ids[:max_length], labels[:max_length]) for ids, labels in pairs]
        # Position 0 has no position before it that could predict it.
        pairs = [
            (ids, labels) for ids, labels in pairs if any(label != IGNORED for label in labels[1:])
        ]
        return {"input_ids": [ids for ids, _ in pairs], "labels": [labels for _, labels in pairs]}

    encoded = rows.map(convert, batched=True, remove_columns=rows.column_names, desc="tokenising")
    if not pack and len(encoded) < len(rows):
        print(
            f"dropped {len(rows) - len(encoded):,} of {len(rows):,} rows:"
            f" no response within {max_length} tokens"
        )
    if not len(encoded):
        raise InputError(f"none of the {len(rows):,} rows has a token to learn from")
    return encoded


@dataclass
class Collator:
    """Pads rows to the longest: ids with the pad token, labels with -100, the mask with 0."""

    pad_token_id: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.full((len(rows), length), self.pad_token_id),
            "attention_mask": torch.zeros(len(rows), length, dtype=torch.int64),
            "labels": torch.full((len(rows), length), IGNORED),
        }
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            batch["input_ids"][i, :n] = torch.tensor(row["input_ids"])
            batch["attention_mask"][i, :n] = 1
            batch["labels"][i, :n] = torch.tensor(row["labels"])
        return batch


def batches_per_epoch(rows: int, size: int, processes: int) -> int:
    """Micro-batches of an epoch for each process; a last one too small for all is left out."""
    whole, rest = divmod(rows, size * processes)
    return whole + (rest >= processes)


def train_batches(
    rows: Dataset,
    collate: Collator,
    size: int,
    accumulation: int,
    processes: int,
    rank: int,
    seed: int,
    done: int,
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The micro-batches of each optimizer step, epoch after epoch, from step `done` on.

    The order depends on the seed and the epoch alone, so that a resumed run sees what it would have
    seen.
    """
    n = batches_per_epoch(len(rows), size, processes)
    start, steps_done = divmod(done, math.ceil(n / accumulation))
    for epoch in itertools.count(start):
        order = torch.randperm(
            len(rows), generator=torch.Generator().manual_seed(seed + epoch)
        ).tolist()
        shares = [
            order[i * size * processes : (i + 1) * size * processes][rank::processes]
            for i in range(n)
        ]
        batches = _loader(rows, collate, shares[steps_done * accumulation :])
        while step := list(itertools.islice(batches, accumulation)):
            yield step
        steps_done = 0


def eval_batches(
    rows: Dataset, collate: Collator, size: int, processes: int, rank: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Every row once, over all processes."""
    mine = list(range(rank, len(rows), processes))
    return _loader(rows, collate, [mine[i : i + size] for i in range(0, len(mine), size)])


def _loader(
    rows: Dataset, collate: Collator, shares: list[list[int]]
) -> Iterator[dict[str, torch.Tensor]]:
    # A loader draws a seed when it starts: not from torch's state, which a resumed run restores.
    return iter(
        DataLoader(rows, batch_sampler=shares, collate_fn=collate, generator=torch.Generator())
    )


def _format(columns: list[str]) -> str:
    has = set(columns).__contains__
    if has("input_ids"):
        return "input_ids"
    if has("messages"):
        return "messages"
    if has("prompt") and (has("completion") or has("response")):
        return "prompt"
    if has("instruction") and (has("output") or has("response")):
        return "instruction"
    if has("text"):
        return "text"
    raise InputError(f"found the columns {', '.join(columns) or '(none)'}; expected {FORMATS}")


def _row_encoder(
    columns: list[str], tokenizer: Any
) -> Callable[[dict], tuple[list[int], list[int]]]:
    kind = _format(columns)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if kind == "messages" and not tokenizer.chat_template:
        raise InputError(
            "`messages` data needs a tokenizer with a chat template, and this one has none"
        )

    def ids_of(text: str, special: bool) -> list[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def pre_tokenised(row):
        labels = row.get("labels")
        ids = list(row["input_ids"])
        labels = ids if labels is None else list(labels)
        if len(labels) != len(ids):
            raise InputError(f"a row has {len(ids)} input_ids and {len(labels)} labels")
        return ids, labels

    def text(row):
        ids = ids_of(row["text"] or "", True)
        ids = ids if ids[-1:] == end else ids + end
        return ids, ids

    def answer(prompt: str, response: str):
        # Tokenised apart, as at inference time, so that no token straddles the boundary.
        prompt_ids = ids_of(prompt, True)
        if end and prompt_ids[-1:] == end and not prompt.endswith(tokenizer.eos_token):
            prompt_ids = prompt_ids[
                :-1
            ]  # the response follows: the end that the tokenizer adds is not there yet
        response_ids = ids_of(response, False)
        response_ids = (
            response_ids + end if response_ids and response_ids[-1:] != end else response_ids
        )
        return prompt_ids + response_ids, [IGNORED] * len(prompt_ids) + response_ids

    def prompted(row):
        prompt = row["prompt"] or ""
        response = (row["completion"] if "completion" in row else row["response"]) or ""
        if isinstance(prompt, list):
            response = (
                response
                if isinstance(response, list)
                else [{"role": "assistant", "content": response}]
            )
            return encode_chat(prompt + response, tokenizer, first=len(prompt))
        return answer(prompt, response)

    def instructed(row):
        question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        response = (row["output"] if "output" in row else row["response"]) or ""
        if tokenizer.chat_template:
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": response},
            ]
            return encode_chat(turns, tokenizer)
        return answer(question + "\n\n", response)

    def chat(row):
        return encode_chat(row["messages"], tokenizer)

    return {
        "input_ids": pre_tokenised,
        "messages": chat,
        "prompt": prompted,
        "instruction": instructed,
        "text": text,
    }[kind]


def encode_chat(
    messages: list[dict], tokenizer: Any, first: int = 0
) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and labels on the assistant's turns from message `first` on.

    The template's own `{% generation %}` marks are used where it has them; else each turn's text is
    what its rendering adds to the rendering of the turns before it.

    Raises:
        InputError: no chat template, or a turn that cannot be found in the rendered conversation.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "a conversation needs a tokenizer with a chat template, and this one has none"
        )
    marked = re.search(r"\{%-?\s*generation\b", tokenizer.get_chat_template())
    if marked and first == 0:
        encoded = tokenizer.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True
        )
        learnt = encoded["assistant_masks"]
    else:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
        spans = [_turn(messages, i, text, tokenizer) for i in turns]
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        learnt = [
            any(start <= left < right <= stop for start, stop in spans)
            for left, right in encoded["offset_mapping"]
        ]
    ids = list(encoded["input_ids"])
    return ids, [i if keep else IGNORED for i, keep in zip(ids, learnt, strict=True)]


def _turn(messages: list[dict], i: int, text: str, tokenizer: Any) -> tuple[int, int]:
    """Where message i, with the mark that ends it, stands in the rendered conversation."""
    before = ""
    if i:
        before = tokenizer.apply_chat_template(
            messages[:i], tokenize=False, add_generation_prompt=True
        )
    upto = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
    if text.startswith(before) and text.startswith(upto):
        return len(before), len(upto.rstrip())
    # Some templates rewrite earlier turns (dropping past reasoning): look for the words.
    words = (messages[i].get("content") or "").split("</think>")[-1].strip()
    start = text.find(words, len(os.path.commonprefix([before, text])))
    if not words or start < 0:
        raise InputError(
            f"cannot tell where message {i} stands in what the chat template renders;"
            " use a template with {% generation %} marks"
        )
    stop, end = start + len(words), tokenizer.eos_token or ""
    return start, stop + (len(end) if text.startswith(end, stop) else 0)
