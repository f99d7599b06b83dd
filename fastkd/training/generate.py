"""`fastkd generate`: a teacher's answers to a file of prompts, as data to distil on."""

from __future__ import annotations

import json
from pathlib import Path

from tqdm.auto import tqdm

from fastkd.recipes import generate as answers
from fastkd.training.chat import prompts_of
from fastkd.training.data import load_rows
from fastkd.training.errors import InputError
from fastkd.training.models import open_teachers, open_tokenizer
from fastkd.training.settings import GenerateSettings, ModelSettings

FREE = ("output", "overwrite", "attn_implementation")  # may change when a file is gone on with


def generate(settings: GenerateSettings) -> int:
    """Write an answer to every prompt: one JSON line each, `prompt` and `response`, or `messages`
    with the answer as the last of them.

    Beside the file, `<file>.settings.json` holds the settings: the same command goes on with a file
    that was interrupted, and ends as it would have ended.

    Returns:
        How many answers the file holds.

    Raises:
        InputError: settings, prompts or a file that cannot be.
    """
    _check(settings)
    output = Path(settings.output)
    rows = [load_rows(x, settings.data_split, settings.data_name) for x in settings.data]
    models = ModelSettings(
        student=settings.teacher,
        teacher=[settings.teacher],
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
    )
    tokenizer, *_ = open_tokenizer(models)
    prompts = [p for part in rows for p in prompts_of(part, tokenizer, settings.prompt_template)]
    prompts = prompts[: settings.limit]
    if not prompts:
        raise InputError(f"{', '.join(settings.data)}: no prompts")
    done = _begin(settings, output, prompts)
    fits = [
        i for i, p in enumerate(prompts) if _length(tokenizer, p.text) <= settings.max_prompt_length
    ]
    if len(fits) < len(prompts):
        print(
            f"left out {len(prompts) - len(fits):,} of {len(prompts):,} prompts: longer than"
            f" {settings.max_prompt_length} tokens"
        )
    left = fits[len(done) :]
    if done:
        print(f"{len(done):,} of {len(fits):,} answers are there: going on")
    (teacher,) = open_teachers(models)
    made = answers(
        teacher,
        tokenizer,
        [prompts[i].text for i in fits],
        batch_size=settings.batch_size,
        start=len(done),
        sampling=dict(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=settings.seed,
        ),
    )
    with output.open("a", encoding="utf-8") as file:
        for i, text in tqdm(made, total=len(fits), initial=len(done), desc=output.name):
            file.write(json.dumps(prompts[fits[i]].answered(text), ensure_ascii=False) + "\n")
            file.flush()
    print(f"{len(fits):,} answers are in {output}. To distil on them:")
    print(f"    fastkd distill --data {output} --teacher {settings.teacher} --student … --output …")
    return len(fits)
