"""From rows to token ids, with labels on what is to be learnt; what counts is what the row says."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from fastkd.training import chat, packs
from fastkd.training.chat import IGNORED, Chat, Example, Unusable
from fastkd.training.errors import InputError
from fastkd.training.settings import FORMATS

CHATS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "instruction", "query", "question")
ANSWERS = ("completion", "response", "output", "answer")
BESIDE = (
    "system",
    "system_prompt",
    "history",
    "tools",
    "documents",
    "chat_template_kwargs",
)  # of a conversation
WEIGHTS = ("weight", "sample_weight", "loss_weight")
MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask", "response_mask")
# What else a column may say of what counts, or is seen: rows that have it are refused.
REFUSED = re.compile(
    r"(\w+_)?masks?|(token|loss|label)_weights|(images?|videos?|audios?|functions|chat_template)"
)
REFUSED_OF_IDS = re.compile(
    r"token_type_ids|(prompt|source|input|completion|response|target)_(len|lens|length|lengths)"
)
OF_TOKENS = ("attention_mask", "position_ids", "special_tokens_mask", "seq_lengths", *MASKS)
INPUT = "{input}"
NO_RESPONSE, NO_TURN = "no response", "no turn of the assistant to learn"
PROMPTS_ONLY = "; `fastkd generate` lets a teacher write answers to prompts"
# In the names of what is cached: rows that were encoded by other code are encoded again.
CODE = hashlib.sha256(
    b"".join(Path(file).read_bytes() for file in (chat.__file__, packs.__file__, __file__))
).hexdigest()[:16]


@dataclass(frozen=True)
class Prompts:
    """What the two models read as the prompt, where that is not the data's.

    `{input}` stands for the data's prompt, or for each of a user's turns; `{system}`, say, for the
    row's column of that name. All other braces stay as they are.

    Args:
        student: None: the data's prompt.
        teacher: None: what the student reads.
        max_teacher_length: tokens per sequence of the teacher's; None: as many as the student's.

    Raises:
        InputError: a template without `{input}`.
    """

    student: str | None = None
    teacher: str | None = None
    max_teacher_length: int | None = None

    def __post_init__(self):
        for role in ("student", "teacher"):
            template = getattr(self, role)
            if template is not None and INPUT not in template:
                raise InputError(f"{role}_prompt_template has no {INPUT}: {template!r:.60}")

    def names(self, columns: list[str]) -> list[str]:
        """The columns that the templates speak of."""
        named = self._named()
        return [column for column in columns if column in named]

    def strays(self, columns: list[str]) -> list[str]:
        """Names in braces that are no columns: meant so, or misspelt."""
        return [f"{{{name}}}" for name in self._named() if name not in columns]

    def _named(self) -> list[str]:
        found = re.findall(r"\{(\w+)\}", (self.student or "") + (self.teacher or ""))
        return [name for name in dict.fromkeys(found) if name != "input"]


def encode(
    rows: Dataset,
    tokenizer: Any,
    max_length: int,
    packing: bool = True,
    *,
    vocab_size: int | None = None,
    task: str = "causal-lm",
    prompts: Prompts | None = None,
) -> Dataset:
    """Tokenise rows to `input_ids` and `labels`, labels being -100 outside of the response.

    Prompt and response are tokenised apart, as at inference. Special tokens that a text holds
    already are not added again. Numbers become their text. Rows without a token to predict are
    dropped, and their number is printed with the reason.

    Args:
        rows: with the columns of one of the known formats.
        tokenizer: the models' tokenizer; a chat template is needed for conversations.
        max_length: sequences are cut (or, if packed, filled) to this many tokens.
        packing: join the documents of `text` rows into sequences of `max_length`, which also hold
            `position_ids` and `use_cache`; see `packs.pack`.
        vocab_size: ids beyond it are refused.
        task: "masked-lm": `input_ids` alone, with the special tokens; the collator masks.
        prompts: other prompts for the models; where the teacher's is its own, rows also hold
            `teacher_input_ids` and `teacher_labels`, which count the same response tokens.

    Raises:
        InputError: no known format among the columns, no chat template, a row that cannot be read
            as it is (with its number, from 0), or no row left.
    """
    encoder = Encoder(tokenizer, max_length, vocab_size, task, prompts or Prompts())
    made = encoder.encode(rows, packing)
    for line in made.report[1:]:
        print(line)
    return made.rows.remove_columns("row")


@dataclass
class Encoded:
    rows: Dataset  # with a column `row`, the number of the row that each is of; -1: packed
    report: list[str]  # how many were read; what was dropped and ignored, if anything


@dataclass
class Plan:
    """What is to become of a row: a prompt and its answer, or a conversation."""

    prompts: tuple[str, ...] = ()  # the student's, the teacher's if it has its own
    answer: str | None = None
    chats: tuple[list, ...] = ()
    first: int = 0
    template: dict[str, Any] = field(default_factory=dict)


class Encoder:
    """How the rows of one run are encoded; see `encode`."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        vocab_size: int | None,
        task: str,
        prompts: Prompts,
    ):
        if max_length < 2:
            raise InputError(f"max_length must be at least 2, got {max_length}")
        self.tokenizer, self.max_length, self.vocab_size = tokenizer, max_length, vocab_size
        self.masked, self.prompts = task == "masked-lm", prompts
        self.chat = Chat(tokenizer) if tokenizer.chat_template else None
        self.before, self.after = _added(tokenizer)
        eos = tokenizer.eos_token_id
        self.end = self.after if eos is None else [eos]

    def encode(self, rows: Dataset, packing: bool) -> Encoded:
        n = len(rows)
        if not n:
            raise InputError("there are no rows")
        kind, used = self._format(rows.column_names)
        used += [c for c in rows.column_names if c not in used and _is_refused(c, kind)]
        packed = packing and kind == "text" and not self.masked
        # Before any row is read: what would be refused in each of them.
        if self.masked and kind not in ("text", "input_ids"):
            raise InputError(f"masked-lm learns from text or input_ids, and the data are {kind}")
        if kind in ("text", "input_ids") and (self.prompts.student or self.prompts.teacher):
            raise InputError(f"prompt templates need a prompt, and the data are {kind}")
        if kind in CHATS and self.chat is None:
            raise InputError(f"`{kind}` data need a tokenizer with a chat template; it has none")
        columns = {"input_ids": List(Value("int32")), "row": Value("int64"), "why": Value("string")}
        if not self.masked:
            columns["labels"] = List(Value("int32"))
        if packed or "position_ids" in used or "seq_lengths" in used:
            columns |= {"position_ids": List(Value("int32")), "use_cache": Value("bool")}
        if self.prompts.teacher is not None:
            columns |= {f"teacher_{k}": List(Value("int32")) for k in ("input_ids", "labels")}
        encoded = rows.select_columns(used).map(
            _convert,
            batched=True,
            with_indices=True,
            remove_columns=used,
            features=Features(columns),
            fn_kwargs={"encoder": self, "kind": kind, "packed": packed, "code": CODE},
            desc="tokenising",
        )
        report = [f"{n:,} rows"]
        why = encoded.data.column("why")
        if why.null_count < len(why):
            reasons = Counter(why.drop_null().to_pylist())
            total = sum(reasons.values())
            told = "; ".join(
                reason if count == total else f"{count:,} {reason}"
                for reason, count in reasons.most_common()
            )
            if not why.null_count:
                raise InputError(
                    f"none of the {n:,} rows has a token to learn from: {told}"
                    + (PROMPTS_ONLY if reasons.keys() & {NO_RESPONSE, NO_TURN} else "")
                )
            report.append(f"dropped {total:,} of {n:,} rows: {told}")
            encoded = encoded.select(np.flatnonzero(pc.is_null(why).to_numpy()))
        if not len(encoded):
            raise InputError(f"none of the {n:,} rows has a token to learn from")
        if ignored := [column for column in rows.column_names if column not in used]:
            report.append(f"columns that are ignored: {', '.join(ignored)}")
        if strays := self.prompts.strays(rows.column_names):
            report.append(f"no such columns, so they stay in the prompts: {', '.join(strays)}")
        return Encoded(encoded.remove_columns("why"), report)

    def _format(self, columns: list[str]) -> tuple[str, list[str]]:
        """The format, by the name of its first column, and the columns that are read."""
        has = set(columns).__contains__
        weights = [column for column in columns if column in WEIGHTS]
        if has("input_ids"):
            beside = ("labels", *OF_TOKENS)
            unused = () if self.masked else ("special_tokens_mask",)
            used = [c for c in columns if c in beside and c not in unused]
            return "input_ids", ["input_ids", *used, *weights]
        answers = [column for column in ANSWERS if has(column)]
        questions = [column for column in QUESTIONS if has(column)]
        kind = next((column for column in CHATS if has(column)), None)
        if kind is None and questions and answers:
            kind = questions[0]
        elif kind is None and has("text"):
            kind = "text"
        elif kind is None and questions:
            raise InputError(
                f"found the columns {', '.join(columns)}: a {questions[0]} without its answer"
                f" ({', '.join(ANSWERS)})" + PROMPTS_ONLY
            )
        elif kind is None:
            raise InputError(
                f"found the columns {', '.join(columns) or '(none)'}; expected {FORMATS}"
            )
        of_tokens = [column for column in columns if column in OF_TOKENS]
        if of_tokens:
            raise InputError(
                f"{', '.join(of_tokens)} would say which tokens count, but there are no input_ids"
            )
        used = [kind, *weights]
        if kind != "text":
            used += [column for column in BESIDE if has(column)]
            used += [c for c in self.prompts.names(columns) if c not in used]
        if kind in QUESTIONS:
            used += [c for c in answers[:1] if c not in used]
            if kind == "instruction" and has("input") and "input" not in used:
                used.append("input")
        return kind, used

    def convert(self, kind: str, rows: list[dict], packed: bool) -> list[list[dict] | str]:
        """For each row what it becomes, or the reason why nothing.

        Raises:
            RowError: a row that cannot be read as it is.
        """
        for i, row in enumerate(rows):
            self._tried(i, _check_columns, row, kind)
        made: list[Any] = [self._tried(i, _weighed, row) for i, row in enumerate(rows)]
        left = [i for i, reason in enumerate(made) if reason is None]
        if kind == "input_ids":
            for i in left:
                made[i] = self._tried(i, self._given, rows[i])
        elif kind == "text":
            texts = self._texts([rows[i] for i in left], left, packed)
            for i, result in zip(left, texts, strict=True):
                made[i] = result
        else:
            plans = {i: self._tried(i, self._plan, kind, rows[i]) for i in left}
            answered = self._answered([plan for plan in plans.values() if _is_plain(plan)])
            for i, plan in plans.items():
                if isinstance(plan, str):
                    made[i] = plan
                elif plan.chats:
                    made[i] = self._tried(i, self._said, plan)
                else:
                    made[i] = self._tried(i, self._finished, next(answered))
        if self.vocab_size is not None:
            for i, result in enumerate(made):
                for row in result if isinstance(result, list) else ():
                    self._tried(i, self._check_ids, row)
        return made

    def _tried(self, i: int, function: Callable, *args: Any) -> Any:
        try:
            return function(*args)
        except Unusable as error:
            return str(error)
        except InputError as error:
            raise RowError(i, str(error)) from error

    def _check_ids(self, row: dict) -> None:
        for name in ("input_ids", "teacher_input_ids"):
            ids = row.get(name)
            if ids and (max(ids) >= self.vocab_size or min(ids) < 0):
                wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
                raise InputError(f"the id {wrong}, and the models know {self.vocab_size:,} tokens")

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Without the special tokens that the tokenizer would add; for tokenizers that always add
        some, with them."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _begun(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self.before)] == self.before else self.before + ids

    def _ended(self, ids: list[int], text: str) -> list[int]:
        eos = self.tokenizer.eos_token
        held = ids[-len(self.end) :] == self.end if self.end else True
        return ids if held or (eos and text.rstrip().endswith(eos)) else ids + self.end

    def _texts(self, rows: list[dict], numbers: list[int], packed: bool) -> list[list[dict] | str]:
        texts = [self._tried(i, _text, row, "text") for i, row in zip(numbers, rows, strict=True)]
        made = []
        for text, ids in zip(texts, self._ids([text or "" for text in texts]), strict=True):
            if not text or not ids:
                made.append("no text")
            elif self.masked:
                ids = ids[len(self.before) :] if ids[: len(self.before)] == self.before else ids
                if self.after and ids[-len(self.after) :] == self.after:
                    ids = ids[: -len(self.after)]
                room = self.max_length - len(self.before) - len(self.after)
                made.append([{"input_ids": self.before + ids[:room] + self.after}])
            else:
                ids = self._ended(self._begun(ids), text)
                # Packing cuts it into pieces.
                made.append([_row((ids, ids), None if packed else self.max_length)])
                if len(ids) < 2:
                    made[-1] = "nothing to predict in a text of one token"
        return made

    def _plan(self, kind: str, row: dict) -> Plan:
        """What a row with a prompt and an answer, or a conversation, says."""
        named = self.prompts.names(list(row))
        beside = {c: row.get(c) for c in BESIDE if c not in named}
        template = {c: chat.tools_of(beside.get(c), c) for c in ("tools", "documents")}
        more = chat.without_nulls(chat.from_json(beside.get("chat_template_kwargs"), BESIDE[-1]))
        if more is not None and not isinstance(more, dict):
            raise InputError(f"{BESIDE[-1]} must be an object, got {more!r:.60}")
        template = {name: x for name, x in (template | (more or {})).items() if x is not None}
        history = _history(beside.get("history"))
        told = {_text(beside, c) or "" for c in ("system", "system_prompt")} - {""}
        if len(told) > 1:
            raise InputError("two system prompts: the columns system and system_prompt")
        system = told.pop() if told else ""

        if kind in CHATS:
            messages, answers = chat.from_json(row[kind], kind), []
            if not messages:
                raise Unusable("no messages")
        else:
            column = next(c for c in ANSWERS if c in row)
            answers = row[column] if _are_messages(row[column]) else _text(row, column)
            if not answers or isinstance(answers, str) and not answers.strip():
                raise Unusable(NO_RESPONSE)
            messages = row[kind]
            if not _are_messages(messages):
                question = self._question(kind, row)
                told = system.strip() or history or template or isinstance(answers, list)
                if not told and (kind == "prompt" or self.chat is None):
                    tail = "" if kind == "prompt" else "\n\n"
                    prompts = [self._filled(t, question, row) + tail for t in self._wanted()]
                    return Plan(tuple(prompts), answers)
                messages = [{"role": "user", "content": question}]
            if isinstance(answers, str):
                answers = [{"role": "assistant", "content": answers}]
        if self.chat is None:
            needs = ", ".join(c for c in beside if beside[c]) or kind
            raise InputError(f"{needs}: needs a tokenizer with a chat template; it has none")

        messages = chat.normalised(messages)
        at = int(messages[0]["role"] == "system")
        head, messages = messages[:at], messages[at:]
        if system.strip():
            if head and head[0].get("content") != system:
                raise InputError("two system prompts: the column's and the conversation's")
            head = [{"role": "system", "content": system}]
        chats = [
            [*head, *history, *self._asked(t, messages, row), *answers] for t in self._wanted()
        ]
        first = len(head) + len(history) + (0 if kind in CHATS else len(messages))
        return Plan(chats=tuple(chats), first=first, template=template)

    def _question(self, kind: str, row: dict) -> str:
        question = _text(row, kind)
        if question is None:
            raise Unusable(f"no {kind}")
        added = _text(row, "input") if kind == "instruction" else None
        return f"{question}\n\n{added}" if added else question

    def _wanted(self) -> list[str | None]:
        """The templates of the prompts that a row needs: the student's, the teacher's."""
        own = [] if self.prompts.teacher is None else [self.prompts.teacher]
        return [self.prompts.student, *own]

    def _filled(self, template: str | None, prompt: str, row: dict) -> str:
        if template is None:
            return prompt
        named = self.prompts.names(list(row))

        def value(match: re.Match) -> str:
            if match[0] == INPUT:
                return prompt
            return (_text(row, match[1]) or "") if match[1] in named else match[0]

        # In one go: braces in what is put in stay as they are.
        return re.sub(r"\{(\w+)\}", value, template)

    def _asked(self, template: str | None, messages: list[dict], row: dict) -> list[dict]:
        if template is None:
            return messages
        return [
            message | {"content": self._filled(template, message["content"], row)}
            if message["role"] == "user"
            else message
            for message in messages
        ]

    def _answered(self, plans: list[Plan]) -> Any:
        """For each plan the examples of student and teacher, a batch of texts at a time."""
        answers = self._ids([plan.answer for plan in plans])
        prompts = zip(*(plan.prompts for plan in plans), strict=True)
        sides = [self._ids(list(side)) for side in prompts]
        for i, (plan, answer) in enumerate(zip(plans, answers, strict=True)):
            if self.before and answer[: len(self.before)] == self.before:
                answer = answer[len(self.before) :]
            answer = self._ended(answer, plan.answer)
            made = []
            for side in sides:
                prompt = self._begun(side[i])
                made.append((prompt + answer, [IGNORED] * len(prompt) + answer))
            yield made

    def _said(self, plan: Plan) -> list[dict]:
        sides = [self.chat.examples(messages, plan.first, plan.template) for messages in plan.chats]
        if not all(sides):
            raise Unusable(NO_TURN)
        if len({len(side) for side in sides}) > 1:
            raise InputError("student and teacher, with their prompts, see different turns")
        made, reasons = [], []
        for examples in zip(*sides, strict=True):
            try:
                made += self._finished(list(examples))
            except Unusable as error:
                reasons.append(error)
        if not made:
            raise reasons[0]
        return made

    def _finished(self, examples: list[Example]) -> list[dict]:
        """The row of a student's example, with the teacher's if it has its own."""
        if len(examples) == 1:
            row = _row(examples[0], self.max_length)
            _check_learnt(row["labels"], examples[0][1], self.max_length)
            return [row]
        limit = self.prompts.max_teacher_length or self.max_length
        student, teacher = _aligned(examples, (self.max_length, limit))
        row = {"input_ids": student[0], "labels": student[1]}
        return [row | {"teacher_input_ids": teacher[0], "teacher_labels": teacher[1]}]

    def _given(self, row: dict) -> list[dict]:
        """A row of token ids, with what its other columns say of them."""
        ids = row["input_ids"]
        if ids is None:
            raise Unusable("no input_ids")
        columns = {
            c: _integers(row[c], c)
            for c in ("input_ids", "labels", *OF_TOKENS)
            if row.get(c) is not None
        }
        for column, x in columns.items():
            if column != "seq_lengths" and len(x) != len(ids):
                raise InputError(f"{len(ids)} input_ids and {len(x)} {column}")
        if not len(ids):
            raise Unusable("no input_ids")
        positions = columns.get("position_ids")
        if positions is None and "seq_lengths" in columns:
            lengths = columns["seq_lengths"]
            if lengths.sum() != len(ids) or (lengths < 0).any():
                raise InputError(f"seq_lengths sum to {lengths.sum()}, of {len(ids)} input_ids")
            positions = np.concatenate([np.arange(n) for n in lengths])
        ids = columns["input_ids"]
        labels = self._labels(columns)
        if (mask := columns.get("attention_mask")) is not None:
            there = np.flatnonzero(mask)
            if not len(there):
                raise Unusable("an attention_mask of zeros alone")
            there = slice(there[0], there[-1] + 1)
            if not mask[there].all():
                raise InputError("attention_mask has zeros between ones, not only at an end")
            ids, labels = ids[there], labels[there]
            positions = None if positions is None else positions[there]
        if (ids < 0).any():
            raise InputError(f"the id {ids.min()} is below 0")
        cut = slice(0, self.max_length)
        if self.masked:
            return [{"input_ids": ids[cut].tolist()}]
        made = {"input_ids": ids[cut].tolist(), "labels": labels[cut].tolist()}
        if positions is not None:
            starts = np.flatnonzero(np.diff(positions) != 1) + 1
            labels = labels.copy()
            labels[starts] = IGNORED
            counted = np.concatenate([np.arange(len(x)) for x in np.split(positions, starts)])
            made["labels"] = labels[cut].tolist()
            made |= {"position_ids": counted[cut].tolist(), "use_cache": False}
        _check_learnt(made["labels"], labels.tolist(), self.max_length)
        return [made]

    def _labels(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """What all columns that say which tokens count agree on."""
        ids, labels = columns["input_ids"], columns.get("labels")
        if labels is not None and self.masked:
            raise InputError("labels: masked-lm masks tokens itself, and labels them")
        there = columns.get("attention_mask", np.ones_like(ids)) != 0
        wanted, said = None, ""
        if labels is not None and not np.array_equal(labels, ids):
            wanted, said = labels != IGNORED, "labels"
            wrong = np.flatnonzero(wanted & (labels != ids) & there)
            if len(wrong):
                k = wrong[0]
                raise InputError(
                    f"the label {labels[k]} at the id {ids[k]}, position {k}: labels are the ids,"
                    " not shifted, or -100"
                )
        for name in MASKS:
            if name in columns:
                mask = columns[name].astype(bool)
                if wanted is not None and not np.array_equal(mask[there], wanted[there]):
                    raise InputError(f"{name} and {said} contradict each other")
                wanted, said = mask, name
        return ids if wanted is None else np.where(wanted, ids, IGNORED)


class RowError(Exception):
    """Row `at` of a batch cannot be read as it is."""

    def __init__(self, at: int, reason: str):
        super().__init__(reason)
        self.at = at


def _convert(
    batch: dict[str, list], indices: list[int], encoder: Encoder, kind: str, packed: bool, code: str
) -> dict[str, list]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    try:
        made = encoder.convert(kind, rows, packed)
    except RowError as error:
        raise InputError(f"row {indices[error.at]} (counted from 0): {error}") from error
    found = []
    documents = []
    for index, result in zip(indices, made, strict=True):
        if isinstance(result, str):
            found.append({"row": index, "why": result, "input_ids": []})
        elif packed:
            documents += [row["input_ids"] for row in result]
        else:
            found += [{"row": index, "why": None} | row for row in result]
    found += [row | {"row": -1, "why": None} for row in packs.pack(documents, encoder.max_length)]
    columns = ["input_ids", "row", "why"] + ([] if encoder.masked else ["labels"])
    columns += sorted({column for row in found for column in row} - set(columns))
    return {column: [row.get(column) for row in found] for column in columns}


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    for probe in ("a", "0"):
        bare = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        full = tokenizer(probe, verbose=False)["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
    return [], []


def _text(row: dict, column: str) -> str | None:
    """A column's text; of a number, the number as it is written; None where there is none."""
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return None if value != value else str(value)
    raise InputError(f"the column {column} holds {value!r:.60}, and not text")


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, dict) for x in value)


def _integers(value: Any, column: str) -> np.ndarray:
    """A column's list of integers; of a mask also as booleans, or as floats."""
    try:
        x = np.asarray(value)
    except ValueError:  # lists of unequal length
        x = np.asarray(None)
    mask = column in MASKS or column == "attention_mask"
    kinds = "iubf" if mask else "iu"
    if (
        x.ndim != 1
        or x.size
        and (x.dtype.kind not in kinds or mask and not np.isin(x, (0, 1)).all())
    ):
        wanted = "zeros and ones" if mask else "integers"
        raise InputError(f"the column {column} holds {value!r:.60}, and not a list of {wanted}")
    return x.astype(np.int64)


def _history(value: Any) -> list[dict]:
    """Earlier turns: messages, or pairs of a question and its answer. They are context."""
    messages = []
    for turn in chat.from_json(value, "history") or []:
        if isinstance(turn, dict):
            messages.append(turn)
        elif isinstance(turn, list) and len(turn) == 2 and all(isinstance(x, str) for x in turn):
            question, answer = turn
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        else:
            raise InputError(f"history holds {turn!r:.60}, and not [question, answer] or a message")
    return messages


def _is_refused(column: str, kind: str) -> bool:
    known = column in OF_TOKENS
    of_ids = kind == "input_ids" and REFUSED_OF_IDS.fullmatch(column)
    return bool(not known and (REFUSED.fullmatch(column) or of_ids))


def _check_columns(row: dict, kind: str) -> None:
    for column, value in row.items():
        if not value or not _is_refused(column, kind):
            continue
        if column == "token_type_ids" and not any(value):
            continue  # a single segment, as of every text
        raise InputError(
            f"the column {column} holds {value!r:.40}, which cannot be obeyed: leave it out, or say"
            f" by {', '.join(MASKS[:2])} or labels which ids count"
            if kind == "input_ids"
            else f"the column {column} holds {value!r:.40}, which cannot be obeyed: leave it out"
        )


def _weighed(row: dict) -> str | None:
    for column in WEIGHTS:
        value = row.get(column)
        if value is not None and str(value) in ("0", "0.0", "False"):
            return f"{column} 0"
        if value is not None and str(value) not in ("1", "1.0", "True"):
            raise InputError(
                f"the column {column} holds {value!r:.40}: rows have no weights, but 0 or 1"
            )
    return None


def _is_plain(plan: Any) -> bool:
    return isinstance(plan, Plan) and not plan.chats


def _row(example: Example, limit: int | None) -> dict:
    return {"input_ids": example[0][:limit], "labels": example[1][:limit]}


def _check_learnt(labels: list[int], whole: list[int], limit: int) -> None:
    # Position 0 has no position before it that could predict it.
    if all(label == IGNORED for label in labels[1:]):
        if any(label != IGNORED for label in whole[1:]):
            raise Unusable(f"no response within {limit:,} tokens")
        raise Unusable(NO_RESPONSE)


def _aligned(examples: list[Example], limits: tuple[int, int]) -> list[Example]:
    """Student's and teacher's, cut so that the same response tokens are left."""
    places = [[k for k, y in enumerate(labels) if y != IGNORED] for _, labels in examples]
    said = [[ids[k] for k in where] for (ids, _), where in zip(examples, places, strict=True)]
    if said[0] != said[1]:
        raise InputError("the response has other tokens after the teacher's prompt")
    n = min(sum(k < limit for k in where) for where, limit in zip(places, limits, strict=True))
    nothing_before = n and 0 in (places[0][0], places[1][0])
    if n <= bool(nothing_before):
        raise Unusable(f"no response within {limits[0]:,} tokens, or the teacher's {limits[1]:,}")
    cut = []
    for (ids, labels), where in zip(examples, places, strict=True):
        stop = where[n - 1] + 1
        labels = labels[:stop]
        if nothing_before:
            labels = [*labels[: where[0]], IGNORED, *labels[where[0] + 1 :]]
        cut.append((ids[:stop], labels))
    return cut
