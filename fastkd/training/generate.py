"""`fastkd generate`: a teacher's answers to prompts, as data to distil on."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features, Json, Value, disable_progress_bars
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from fastkd.recipes import generate as written
from fastkd.training.chat import ROLES, from_json
from fastkd.training.data import load_rows
from fastkd.training.encode import ANSWERS, CHATS, IGNORED, QUESTIONS, Encoder, Prompts
from fastkd.training.errors import InputError, one_line
from fastkd.training.models import check_models, longest, open_teachers, open_tokenizer
from fastkd.training.outputs import write
from fastkd.training.settings import LENGTH, DataSettings, GenerateSettings, ModelSettings

# The column of an answer, by the question's.
ANSWER_TO = {"prompt": "completion", "instruction": "output", "query": "response"}
WORD = "x"  # stands for the answer while the prompt is made
MAY_CHANGE = ("output", "overwrite", "attn_implementation", "limit")


class Prompt(NamedTuple):
    row: dict[str, Any]  # as in the data
    kind: str  # the column of the question
    ids: list[int]  # what the teacher reads

    def answered(self, text: str) -> dict[str, Any]:
        """The row with this answer in the place of any that it had."""
        if self.kind in CHATS:
            messages = _asked(self.row[self.kind])
            ours = {"from": "gpt", "value": text} if "from" in messages[0] else {
                "role": "assistant", "content": text,
            }  # fmt: skip
            return self.row | {self.kind: [*messages, ours]}
        rest = {k: x for k, x in self.row.items() if k not in ANSWERS}
        return rest | {ANSWER_TO.get(self.kind, "answer"): text}


def generate(settings: GenerateSettings) -> int:
    """Write the teacher's answer to every prompt: a JSON line each, the data's row with the answer
    in it, which `fastkd distill --data` reads.

    Beside the file, `<file>.settings.json` holds the settings. The same command goes on with a file
    that was interrupted, and ends with what it would have been.

    Returns:
        How many answers the file holds.

    Raises:
        InputError: settings, prompts or a file that cannot be; before anything is written.
    """
    _check(settings)
    output = Path(settings.output)
    disable_progress_bars()
    disable_progress_bar()
    sources = {x: load_rows(x, settings.data_split, settings.data_name) for x in settings.data}
    models = ModelSettings(
        student=settings.teacher,
        teacher=[settings.teacher],
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
    )
    tokenizer, *_ = open_tokenizer(models)
    length = _prompt_length(settings, models)
    settings = dataclasses.replace(settings, max_prompt_length=length)
    check_models(models, DataSettings(max_length=2))
    prompts: list[Prompt] = []
    for source, rows in sources.items():
        try:
            prompts += prompts_of(rows, tokenizer, settings)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
    if len(kinds := sorted({prompt.kind for prompt in prompts})) > 1:
        raise InputError(f"data of different columns, {' and '.join(kinds)}: one --output for each")
    prompts = prompts[: settings.limit]
    done = _begin(settings, output, prompts)
    print(f"{len(prompts):,} prompts" + (f", {done:,} of them answered: going on" if done else ""))
    (teacher,) = open_teachers(models)
    sampling = {"top_p": settings.top_p} if settings.top_p < 1 else {}
    sampling |= {"top_k": settings.top_k} if settings.top_k else {}
    try:
        answers = written(
            teacher,
            tokenizer,
            [prompt.ids for prompt in prompts],
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            start=done,
            **(sampling if settings.temperature else {}),
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    longest = 0
    with output.open("a", encoding="utf-8") as file:
        for i, text in tqdm(answers, total=len(prompts), initial=done, desc=output.name):
            file.write(json.dumps(prompts[i].answered(text), ensure_ascii=False) + "\n")
            file.flush()
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            longest += len(ids) >= settings.max_new_tokens
    if longest:
        print(
            f"{longest:,} answers have all of the {settings.max_new_tokens} tokens that"
            " max_new_tokens allows: they may end in the middle"
        )
    print(f"The answers are in {output}. To distil on them:")
    print(f"    fastkd distill --data {output} --teacher {settings.teacher} --student … --output …")
    return len(prompts)


def _prompt_length(settings: GenerateSettings, models: ModelSettings) -> int:
    """The longest prompt, in tokens; with the answer it fits the model's positions."""
    positions = longest(models, sys.maxsize)
    room = positions - settings.max_new_tokens
    if room < (settings.max_prompt_length or 1):
        raise InputError(
            f"the teacher {settings.teacher} has {positions:,} positions, too few for"
            f" --max_prompt_length {settings.max_prompt_length or 1} and --max_new_tokens"
            f" {settings.max_new_tokens}"
        )
    return settings.max_prompt_length or min(room, LENGTH)


def prompts_of(rows: Dataset, tokenizer: Any, settings: GenerateSettings) -> list[Prompt]:
    """What the teacher reads: of each row exactly what would stand before its answer in training.

    Raises:
        InputError: no format with a prompt, no row left.
    """
    columns = rows.column_names
    kind = next((c for c in (*CHATS, *QUESTIONS) if c in columns), None)
    if kind is None and "text" in columns:
        rows, kind = rows.rename_column("text", "prompt"), "prompt"
    if kind is None:
        raise InputError(
            f"found the columns {', '.join(columns)}; expected one of prompts:"
            f" {', '.join((*CHATS, *QUESTIONS, 'text'))}"
        )
    plain = rows.to_list()
    asked = []
    for i, row in enumerate(plain):
        try:
            nothing = kind in CHATS and not row[kind]  # dropped, and counted
            made = row if nothing else Prompt(row, kind, []).answered(WORD)
        except InputError as error:
            raise InputError(f"row {i} (counted from 0): {error}") from error
        if kind in CHATS and not nothing:
            made = made | {kind: _last_counts(made[kind])}
        asked.append(made)
    prompts = Prompts(student=settings.prompt_template)
    limit = settings.max_prompt_length + 64  # with room for the answer's word and its end
    encoder = Encoder(tokenizer, limit, None, "causal-lm", prompts)
    made = encoder.encode(_dataset(asked), packing=False)
    for line in made.report[1:]:
        print(line)
    found = {}
    for row in made.rows:  # of several examples of a conversation, the last
        ids = row["input_ids"]
        first = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
        found[row["row"]] = ids[:first]
    if empty := [i for i, ids in found.items() if not ids]:
        print(f"left out {len(empty):,} of {len(plain):,} prompts: empty")
        found = {i: ids for i, ids in found.items() if ids}
    fits = {i: ids for i, ids in found.items() if len(ids) <= settings.max_prompt_length}
    if len(fits) < len(found):
        print(
            f"left out {len(found) - len(fits):,} of {len(plain):,} prompts: longer than"
            f" {settings.max_prompt_length} tokens"
        )
    if not fits:
        raise InputError(f"none of the {len(plain):,} prompts fits {settings.max_prompt_length}")
    return [Prompt(plain[i], kind, ids) for i, ids in sorted(fits.items())]


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    """Rows whose values may be of several types in a column."""
    names = {key: None for row in rows for key in row}
    columns: dict[str, list[Any]] = {key: [row.get(key) for row in rows] for key in names}
    features = {}
    for key, values in columns.items():
        texts = all(x is None or isinstance(x, str) for x in values)
        features[key] = Value("string") if texts else Json()
        if not texts:  # as text: see files.py
            columns[key] = [None if x is None else json.dumps(x, default=str) for x in values]
    return Dataset.from_dict(columns, features=Features(features))


def _asked(messages: Any) -> list[dict[str, Any]]:
    """A conversation up to the last question."""
    messages = from_json(messages, "messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"expected a list of messages, got {messages!r:.60}")
    messages = list(messages)
    while messages and _role(messages[-1]) == "assistant":
        messages.pop()
    if not messages:
        raise InputError("a conversation without a question")
    return messages


def _role(message: dict[str, Any]) -> str:
    role = str(message.get("role") or message.get("from"))
    return ROLES.get(role.lower(), role)


def _last_counts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Only the last turn is learnt: what stands before it is the prompt."""
    clean = [{k: x for k, x in m.items() if x is not None} for m in messages]
    return [m | {"weight": 0} for m in clean[:-1]] + clean[-1:]


def _check(settings: GenerateSettings) -> None:
    for name in ("teacher", "data", "output"):
        if not getattr(settings, name):
            raise InputError(f"--{name} is missing")
    for name in ("batch_size", "max_prompt_length", "max_new_tokens"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise InputError(f"{name} must be positive, got {getattr(settings, name)}")
    if settings.limit is not None and settings.limit < 1:
        raise InputError(f"limit must be positive, got {settings.limit}")
    if not (settings.temperature >= 0 and math.isfinite(settings.temperature)):
        raise InputError(f"temperature must not be negative, got {settings.temperature}")
    if not 0 < settings.top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], got {settings.top_p}")
    if settings.top_k < 0:
        raise InputError(f"top_k must not be negative, got {settings.top_k}")
    output = Path(settings.output)
    if output.is_dir():
        raise InputError(f"--output {output} is a folder; a file is needed, answers.jsonl")
    if output.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        raise InputError(f"--output {output}: JSON lines are written, so name it answers.jsonl")
    if any(output.resolve() == Path(x).expanduser().resolve() for x in settings.data):
        raise InputError(f"--output {output} holds the prompts: name another file")


def _begin(settings: GenerateSettings, output: Path, prompts: list[Prompt]) -> int:
    """How many answers the file holds already; it is begun, or cut after its last whole line.

    Raises:
        InputError: it holds something else.
    """
    aside = output.with_name(output.name + ".settings.json")
    now = {k: x for k, x in dataclasses.asdict(settings).items() if k not in MAY_CHANGE}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        exists = output.exists() and output.stat().st_size > 0
        was = json.loads(aside.read_text(encoding="utf-8")) if aside.exists() else None
    except ValueError:
        was = None
    except OSError as error:
        raise InputError(f"--output {output}: {one_line(error)}") from error
    if exists and not aside.exists():
        raise InputError(f"{output} exists, and is not of `fastkd generate`: name another --output")
    if exists and not settings.overwrite:
        if was is None:
            raise InputError(f"{aside} cannot be read: --overwrite writes all answers anew")
        changed = [f"{k} was {was.get(k)}, is {now[k]}" for k in now if was.get(k) != now[k]]
        if changed:
            raise InputError(f"{output} was written with other settings: {'; '.join(changed)}")
        return _whole_batches(output, prompts, settings.batch_size)
    try:
        output.write_text("", encoding="utf-8")
        write(aside, json.dumps(now, indent=1))
    except OSError as error:
        raise InputError(f"--output {output}: {one_line(error)}") from error
    return 0


def _whole_batches(output: Path, prompts: list[Prompt], size: int) -> int:
    """Cut the file after its last batch that is whole, unless it is done; count the answers. A part
    of a batch may have been written without the prompts that are beside it now (--limit)."""
    lines = output.read_bytes().splitlines(keepends=True)
    lines = [line for line in lines if line.endswith(b"\n")]
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{output}, line {i + 1}: not JSON: {one_line(error)}") from error
        ours = prompts[i] if i < len(prompts) else None
        if (
            ours is not None
            and ours.answered("").keys() != row.keys()
            or (ours is not None and _question(ours.row, ours.kind) != _question(row, ours.kind))
        ):
            raise InputError(
                f"{output}, line {i + 1}: the answer to another prompt than the data's"
            )
    if len(lines) < len(prompts):
        lines = lines[: len(lines) // size * size]
    with output.open("r+b") as file:
        file.truncate(sum(map(len, lines)))
    return min(len(lines), len(prompts))


def _question(row: dict[str, Any], kind: str) -> Any:
    return _asked(row[kind]) if kind in CHATS else row[kind]
