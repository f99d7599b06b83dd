"""Several documents in one sequence, none of which sees another."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
DOCUMENT = 4  # tokens of each of the two documents that a model is tried with


def pack(documents: list[list[int]], max_length: int) -> list[dict[str, Any]]:
    """Rows of at most `max_length` tokens: longer documents are cut into pieces of that length, and
    each piece, the longest first, goes where it leaves the least room.

    A row has `input_ids`; `labels`, which are -100 at each document's first token, since nothing
    of it stands before; `position_ids`, which start again with each document; and `use_cache`
    False. Without an attention mask and without a cache, transformers' models take from the
    position ids who may see whom.
    """
    pieces = [
        document[start : start + max_length]
        for document in documents
        for start in range(0, len(document), max_length)
    ]
    pieces = sorted((piece for piece in pieces if len(piece) > 1), key=len, reverse=True)
    rows: list[list[list[int]]] = []
    rooms: list[tuple[int, int]] = []  # (tokens free, row), sorted
    for piece in pieces:
        at = bisect_left(rooms, (len(piece), 0))
        if at < len(rooms):
            free, row = rooms.pop(at)
        else:
            free, row = max_length, len(rows)
            rows.append([])
        rows[row].append(piece)
        insort(rooms, (free - len(piece), row))
    return [
        {
            "input_ids": list(chain.from_iterable(row)),
            "labels": list(chain.from_iterable([IGNORED, *piece[1:]] for piece in row)),
            "position_ids": list(chain.from_iterable(range(len(piece)) for piece in row)),
            "use_cache": False,
        }
        for row in rows
    ]


@torch.no_grad()
def keeps_documents_apart(model: nn.Module) -> bool:
    """Whether packed documents do not see each other in a model, for any architecture.

    Found by trial: two forward passes of 8 tokens, in evaluation mode. The second document's logits
    must be the same under another first one. Modes and random states are left as they were.
    """
    device = next(model.parameters()).device
    size = model.config.get_text_config().vocab_size
    ids = torch.arange(3 * DOCUMENT, device=device) % size
    first, other, second = ids.chunk(3)
    modes = {module: module.training for module in model.modules()}
    gpus = [device.index] if device.type == "cuda" else []
    try:
        model.eval()
        with torch.random.fork_rng(gpus):
            seen = [_second(model, start, second) for start in (first, other)]
    except Exception:  # refused, each architecture with words of its own
        return False
    finally:
        for module, training in modes.items():
            module.training = training
    # Of masked positions the weights are 0: equal up to a rounding.
    limit = torch.finfo(seen[0].dtype).eps * seen[0].abs().max()
    return bool((seen[0] - seen[1]).abs().max() <= limit)


def _second(model: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """The logits of the second of two packed documents."""
    positions = torch.arange(DOCUMENT, device=first.device).repeat(2)
    ids = torch.cat([first, second])
    output = model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    return output.logits[0, DOCUMENT:].float()
