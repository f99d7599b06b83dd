"""Text that a model writes: the student's own, to learn on (`OnPolicy`); a teacher's, to learn from
(`generate`)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd.recipes.lm import LM, TEACHERS_PREFIX, causal_lm, evaluating
from fastkd.recipes.objectives import IGNORED
from fastkd.recipes.recipe import Batch

# Of a batch, what is written anew; of the teacher's part too.
REWRITTEN = ("input_ids", "attention_mask", "labels", "token_type_ids")
PACKED = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # several documents in a row
UNSET = object()


class Writing(NamedTuple):
    """How to write: of `model.generate`, whose other `settings` are its keywords."""

    max_new_tokens: int
    temperature: float
    pad: int
    eos: tuple[int, ...]
    settings: Mapping[str, Any]


class OnPolicy:
    """Batches whose responses the student wrote itself, of which the teacher then says what it
    would have written: generalised knowledge distillation's lambda.

        batches = map(OnPolicy(student, 0.5, max_new_tokens=64), batches)

    Given a batch, or the list of a step's micro-batches, *before* they are counted, it returns
    them; with probability `fraction`, drawn for each, the student writes the responses: what
    stands before a row's first label is the prompt (of a row without labels, all of it), and what
    it writes, to the end of the text or to `max_new_tokens`, is learnt. Later turns of a
    conversation go. An encoder's decoder writes anew all labels. Right-padded.

    Rows without a prompt (plain text), or whose prompt fills the model's positions, keep their
    data. A teacher's own prompt (`teacher_input_ids`, see `Prompted`) gets the same response.

    Written with the modules' own `generate`, without DDP's or torch.compile's wrapper around them,
    in evaluation mode, with a cache. Sharded weights (FSDP2) are gathered by their own hooks, for
    each token: slow; every process draws alike, and writes until all are done. FSDP1 is refused.

    Draws and text follow from `seed`, the number of batches so far, the process's rank and the
    weights alone, not from the global random state, which stays as it was. `state_dict()` holds
    that number.

    Args:
        model: the student, wrapped or not, or its `LM`.
        fraction: part of the batches, in [0, 1].
        max_new_tokens: of the longest response; less where the model's positions end before.
        temperature: at which it samples; 0: greedily.
        pad_token_id: default: that of the model's generation settings.
        eos_token_id: an id, or several that end a text; None ends nothing. Default: those of the
            model's generation settings.
        seed: of draws and text.
        **settings: of transformers' `GenerationConfig` (`top_p`, `top_k`); without them the
            distribution is the model's own: what its folder sets is not used.

    Raises:
        ValueError, TypeError: numbers out of range; unknown settings; a model that cannot write; in
            a call: packed rows, and keys of the batch that cannot be written anew, by name.
    """

    def __init__(
        self,
        model: LM | nn.Module,
        fraction: float,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        pad_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None | object = UNSET,
        seed: int = 0,
        **settings: Any,
    ):
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be in [0, 1], got {fraction}")
        self.model = model.model if isinstance(model, LM) else model
        if eos_token_id is not UNSET:
            settings["eos_token_id"] = eos_token_id
        settings["pad_token_id"] = pad_token_id
        self.how = _writing(self.model, max_new_tokens, temperature, settings)
        self.fraction, self.seed, self.calls = fraction, seed, 0

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.calls = state["calls"]

    def __call__(self, batches: Batch | Iterable[Batch]) -> Batch | list[Batch]:
        if not isinstance(batches, Mapping):
            return [self(batch) for batch in batches]
        draw = random.Random(f"{self.seed} {self.calls}")
        self.calls += 1
        if draw.random() >= self.fraction:
            return batches
        # Processes may hold the same prompts: they need not write the same.
        return self.rewrite(batches, draw.getrandbits(62) + _rank())

    def rewrite(self, batch: Batch, seed: int) -> Batch:
        """A batch with the student's own responses."""
        _check_rows(batch)
        owner, how = causal_lm(self.model), self.how
        both = getattr(owner.config, "is_encoder_decoder", False)
        sides = [x for x in ("", TEACHERS_PREFIX) if f"{x}input_ids" in batch]
        rows = {side: _rows(batch, side, both) for side in sides}
        prompts = {
            side: [ids if both else _prompt(ids, y) for ids, y in rows[side]] for side in sides
        }
        longest = _positions(owner) - 1
        chosen = [
            i
            for i, prompt in enumerate(prompts[""])
            if len(prompt) <= longest and all(prompts[side][i] for side in sides)
        ]
        written = []
        # Of sharded weights every process must be at hand: one without a prompt writes of nothing.
        if chosen or _is_sharded(self.model):
            written = _write(self.model, [prompts[""][i] for i in chosen] or [[0]], how, seed)
        if not chosen:
            return batch
        new = {name: x for name, x in batch.items() if not _of_decoder(name)}
        for side in sides:
            for i, response in zip(chosen, written, strict=True):
                prompt = prompts[side][i]
                if both:
                    rows[side][i] = prompt, response
                else:
                    rows[side][i] = prompt + response, [IGNORED] * len(prompt) + response
            if both:
                labels = [y for _, y in rows[side]]
                new[f"{side}labels"] = _stack(labels, IGNORED, batch[f"{side}labels"])
            else:
                new |= _batch_of(rows[side], batch, side, how.pad)
        return new


def generate(
    model: LM | nn.Module,
    tokenizer: Any,
    prompts: Iterable[str | Sequence[int]],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    start: int = 0,
    **settings: Any,
) -> Iterator[tuple[int, str]]:
    """What a model writes after each prompt: (the prompt's number, text) in the prompts' order, as
    soon as its batch is done.

    Batches are the prompts in their order, `batch_size` at a time. Sampled text depends on which
    prompts share a batch, and on the batch's number, by which it is seeded: the same call with
    `start` gives the rest of what was begun, to the letter; another `batch_size` gives other text.
    Written greedily (`temperature=0`) it depends on neither, up to roundings.

    Args:
        model: a causal language model, or an encoder with a decoder, wrapped or not, or its `LM`.
            Modes and random states are left as they were.
        tokenizer: its own.
        prompts: texts, to which the tokenizer adds what it adds to any; or ids, taken as they are:
            of chat templates, which hold the special tokens already.
        batch_size: prompts at a time, left-padded.
        max_new_tokens: per prompt; less where the model's positions end before, of the longest
            prompt in a batch.
        temperature: 0: greedily.
        seed: of all sampling.
        start: the number of the first prompt that is not answered yet.
        **settings: of transformers' `GenerationConfig`: `top_p`, `top_k`, `eos_token_id`, …;
            without them the distribution is the model's own: what its folder sets is not used,
            but for the ids that end a text.

    Raises:
        ValueError, TypeError: numbers out of range, unknown settings, a model that cannot write; a
            prompt without tokens, or that fills the model's positions, by number, before anything
            is written.
    """
    model = model.model if isinstance(model, LM) else model
    if batch_size < 1 or start < 0:
        raise ValueError(
            f"batch_size must be positive and start not negative, got {batch_size} and {start}"
        )
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    own = _ids(getattr(causal_lm(model), "generation_config", None), "eos_token_id")
    if ends["eos_token_id"] is not None:
        ends["eos_token_id"] = [*own, *{ends["eos_token_id"]} - set(own)]
    else:
        del ends["eos_token_id"]
    how = _writing(model, max_new_tokens, temperature, ends | settings)
    rows = [
        tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        for prompt in prompts
    ]
    longest = _positions(causal_lm(model)) - 1
    for i, row in enumerate(rows):
        if not 0 < len(row) <= longest:
            raise ValueError(
                f"prompt {i} has {len(row)} tokens: the model needs at least 1, and at most"
                f" {longest} leave room for an answer"
            )

    def answers():
        for batch in range(start // batch_size, -(-len(rows) // batch_size)):
            first = batch * batch_size
            seed_of_batch = random.Random(f"{seed} {batch}").getrandbits(62)
            for i, ids in enumerate(
                _write(model, rows[first : first + batch_size], how, seed_of_batch), first
            ):
                if i >= start:
                    yield i, tokenizer.decode(ids, skip_special_tokens=True)

    return answers()


def _writing(
    model: nn.Module, max_new_tokens: int, temperature: float, settings: Mapping[str, Any]
) -> Writing:
    from transformers import GenerationConfig

    owner = causal_lm(model)
    if owner is None or not getattr(owner, "can_generate", lambda: False)():
        raise ValueError(f"{type(owner or model).__name__} cannot write text")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    settings, own = dict(settings), owner.generation_config
    unknown = sorted(set(settings) - set(vars(GenerationConfig())))
    if unknown:
        raise TypeError(f"transformers' GenerationConfig has no {', '.join(unknown)}")
    eos = settings.pop("eos_token_id", UNSET)
    eos = _ids(own, "eos_token_id") if eos is UNSET else _as_tuple(eos)
    pad = settings.pop("pad_token_id", None)
    pad = own.pad_token_id if pad is None else pad
    # Where there is none any will do: it is masked.
    pad = (eos or (0,))[0] if pad is None else pad
    return Writing(max_new_tokens, temperature, pad, eos, settings)


@torch.no_grad()
def _write(model: nn.Module, prompts: list[list[int]], how: Writing, seed: int) -> list[list[int]]:
    """What follows each prompt, to the end of the text, that id included."""
    from transformers import GenerationConfig

    # Looked for now: trainers wrap a model after it was given to `OnPolicy`.
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError("models under FSDP1 cannot write: use FSDP2 (fully_shard)")
    owner = causal_lm(model)
    writer = next(m for m in model.modules() if hasattr(type(m), "generate"))
    before, both = owner.generation_config, getattr(owner.config, "is_encoder_decoder", False)
    device, width = owner.get_input_embeddings().weight.device, max(map(len, prompts))
    ids = torch.full((len(prompts), width), how.pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):  # a decoder alone goes on at the right end
        place = slice(0, len(prompt)) if both else slice(width - len(prompt), width)
        ids[i, place], mask[i, place] = torch.tensor(prompt), 1
    sampling = {"do_sample": False}
    if how.temperature > 0:
        sampling = {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        **sampling
        | {
            "max_new_tokens": min(how.max_new_tokens, _positions(owner) - (1 if both else width)),
            "pad_token_id": how.pad,
            "eos_token_id": list(how.eos) or None,
            "bos_token_id": before.bos_token_id,
            "decoder_start_token_id": before.decoder_start_token_id,
            "forced_bos_token_id": before.forced_bos_token_id,
            "use_cache": True,
        }
        | how.settings
    )
    together = {"synced_gpus": True} if _is_sharded(model) else {}
    gpus = [device.index] if device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        owner.generation_config = config  # what the old one sets would fill the gaps of the new
        try:
            out = writer.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                **together,
            )
        finally:
            owner.generation_config = before
    return [_ended(row, how.eos) for row in out[:, 1 if both else width :].tolist()]


def _ended(ids: list[int], eos: tuple[int, ...]) -> list[int]:
    ends = [i for i, x in enumerate(ids) if x in eos]
    return ids[: ends[0] + 1] if ends else ids


def _check_rows(batch: Batch) -> None:
    """One document a row, and nothing that would stand beside the wrong tokens afterwards."""
    for name, x in batch.items():
        plain = name.removeprefix(TEACHERS_PREFIX)
        rows_alone = isinstance(x, Tensor) and x.dim() == 2
        packed = plain in PACKED or (plain == "attention_mask" and not rows_alone)
        if packed:
            raise ValueError(
                f"on-policy batches need one document a row: {name} says that rows are packed"
            )
        known = plain in REWRITTEN or _of_decoder(name)
        if not known or (plain == "token_type_ids" and x.any()):
            raise ValueError(f"on-policy batches are written anew, and {name} cannot be")


def _of_decoder(name: str) -> bool:
    """Whether a key follows from the labels."""
    return name.removeprefix(TEACHERS_PREFIX).startswith("decoder_")


def _rows(batch: Batch, side: str, both: bool) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each row without its padding; the labels of an encoder's decoder (`both`)
    are beside, as they are."""
    ids, labels = batch[f"{side}input_ids"], batch[f"{side}labels"]
    mask = batch.get(f"{side}attention_mask")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    pieces = zip(ids, labels, mask, strict=True)
    return [(x[m].tolist(), (y if both else y[m]).tolist()) for x, y, m in pieces]


def _prompt(ids: list[int], labels: list[int]) -> list[int]:
    """What stands before the first label."""
    first = next((i for i, y in enumerate(labels) if y != IGNORED), len(ids))
    return ids[:first]


def _batch_of(
    rows: list[tuple[list[int], list[int]]], batch: Batch, side: str, pad: int
) -> dict[str, Tensor]:
    like = batch[f"{side}input_ids"]
    ids = _stack([x for x, _ in rows], pad, like)
    new = {
        "input_ids": ids,
        "attention_mask": _stack([[1] * len(x) for x, _ in rows], 0, like),
        "labels": _stack([y for _, y in rows], IGNORED, like),
    }
    if f"{side}token_type_ids" in batch:
        new["token_type_ids"] = torch.zeros_like(ids)
    return {f"{side}{name}": x for name, x in new.items()}


def _stack(rows: list[list[int]], fill: int, like: Tensor) -> Tensor:
    """(N, longest), right-padded."""
    out = torch.full((len(rows), max(map(len, rows))), fill)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return out.to(like.device)


def _positions(owner: nn.Module) -> float:
    """How many the model has."""
    n = getattr(owner.config.get_text_config(), "max_position_embeddings", None)
    return n if isinstance(n, int) and n > 0 else float("inf")


def _ids(config: Any, name: str) -> tuple[int, ...]:
    return _as_tuple(getattr(config, name, None))


def _as_tuple(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _is_sharded(model: nn.Module) -> bool:
    return any(type(p).__name__ == "DTensor" for p in model.parameters()) and _world() > 1


def _world() -> int:
    distributed = torch.distributed
    return (
        distributed.get_world_size()
        if distributed.is_available() and distributed.is_initialized()
        else 1
    )


def _rank() -> int:
    return torch.distributed.get_rank() if _world() > 1 else 0
