"""Conversations: from messages to token ids, with labels on what the assistant says.

Where a turn stands is known from the template, never looked for: by its `{% generation %}` marks,
or as what a turn adds to the prompt that the model would be given at inference.
"""

from __future__ import annotations

import json
import os
import re
from itertools import chain
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from fastkd.training.errors import InputError, one_line

IGNORED = -100
Example = tuple[list[int], list[int]]  # ids and labels
Message = dict[str, Any]

# Other names of roles: ShareGPT's, Gemma's, LLaMA-Factory's.
ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system"}
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model", "ai"), "assistant")
ROLES |= {"tool": "tool", "observation": "tool", "function_response": "tool"}
# 0 or false in a message: it is read, and not learnt.
NOT_LEARNT = ("weight", "train", "training", "loss")
# What else a message may say of which of its tokens count.
REFUSED = ("mask", "loss_mask", "loss_scale", "train_detail", "training_detail")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# What marks a place in a rendering: characters of no meaning, that nobody writes.
HERE, THERE = "\ue000", "\ue001"


class Unusable(InputError):
    """A row that lacks something; it is dropped and counted, not the end of the run."""


def encode_chat(
    messages: list[Message], tokenizer: Any, first: int = 0, **template: Any
) -> Example:
    """Ids of a conversation, and labels on the assistant's turns from message `first` on.

    A turn is learnt with the mark that ends it. Where the template writes earlier turns otherwise
    than it did when they were the last (drops their reasoning, moves the system prompt), no single
    rendering shows every answer under its prompt: the ids are then those of
    `encode_conversation`'s examples, one after the other.

    Args:
        messages: with `role` and `content` (or ShareGPT's `from` and `value`), `tool_calls`, …
        tokenizer: with a chat template.
        first: turns before this message are context.
        **template: what else the template is given: `tools`, `documents`, `enable_thinking`, ….

    Raises:
        InputError: no chat template; one that refuses the conversation, does not use what it is
            given, or does not let a turn's place be known.
    """
    chat = Chat(tokenizer)
    examples = chat.examples(messages, first, template)
    if not examples:
        ids = chat.ids_of(chat.text(chat.prepared(messages), template))
        return ids, [IGNORED] * len(ids)
    return [i for ids, _ in examples for i in ids], [i for _, labels in examples for i in labels]


def encode_conversation(
    messages: list[Message], tokenizer: Any, first: int = 0, **template: Any
) -> list[Example]:
    """The examples that a conversation makes: one with all its answers, or, where the template
    writes earlier turns otherwise, one for each answer, under its prompt as at inference.

    Arguments and errors are those of `encode_chat`. Empty without an answer to learn.
    """
    return Chat(tokenizer).examples(messages, first, template)


class Chat:
    """A tokenizer's chat template, and what was found out about it.

    Args:
        tokenizer: of any sort; offsets are not needed.

    Raises:
        InputError: it has no chat template.
    """

    def __init__(self, tokenizer: Any):
        if not tokenizer.chat_template:
            raise InputError("a conversation needs a tokenizer with a chat template; it has none")
        self.tokenizer = tokenizer
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        # Tokens that may end a turn; what a template writes after one is not generated.
        self.ends = tuple({*added, *tokenizer.all_special_tokens} - {""})
        self.ends = tuple(end for end in self.ends if end.strip() and end == end.rstrip())
        self._shows_system: dict[tuple[str, ...], bool] = {}
        self.as_parts = False
        self.as_parts = not self._shows(HERE) and self._shows([{"type": "text", "text": HERE}])
        self.end = tokenizer.eos_token if self._adds(tokenizer.eos_token) else None

    def __getstate__(self) -> dict[str, Any]:
        # The name under which rows are cached must not depend on what was rendered before.
        return self.__dict__ | {"_shows_system": {}}

    def _shows(self, content: Any) -> bool:
        """Whether the template writes a content of this form."""
        try:
            return HERE in self._run([{"role": "user", "content": content}], {}, False)[0]
        except InputError:
            return False

    def _adds(self, end: str | None) -> bool:
        """Whether the template ends an answer with this token."""
        talk = [{"role": r, "content": self._form(HERE)} for r in ("user", "assistant")]
        try:
            return bool(end) and self._run(talk, {}, False)[0].rstrip().endswith(HERE + end)
        except InputError:
            return False

    def prepared(self, messages: Any) -> list[Message]:
        """Messages as templates expect them."""
        prepared = []
        for message in normalised(messages):
            message = {k: x for k, x in message.items() if k not in NOT_LEARNT}
            if isinstance(message.get("content"), str):
                content = message["content"]
                said = content.rstrip()
                if self.end and message["role"] == "assistant" and said.endswith(self.end):
                    content = said.removesuffix(self.end)  # the template adds it
                message["content"] = self._form(content)
            prepared.append(message)
        return prepared

    def examples(
        self, messages: Any, first: int = 0, template: dict[str, Any] | None = None
    ) -> list[Example]:
        """See `encode_conversation`."""
        template = template or {}
        prepared = self.prepared(messages)
        learnt = [_is_learnt(message, i) for i, message in enumerate(messages)]
        messages = prepared
        turns = [i for i in range(first, len(messages)) if learnt[i] and _answers(messages[i])]
        self._check_used(messages, template)
        if not turns:
            return []
        whole, marks = self._render(messages, template)
        found = []
        for i in turns:
            shown, text, spans = messages, whole, marks
            if i < len(messages) - 1:
                try:
                    text, spans = self._render(messages[: i + 1], template)
                    shown = messages[: i + 1]
                except InputError:  # it may not end here; then marks must tell, one for each answer
                    if len(marks) != len(_said(messages)):
                        raise
            found.append(self._placed(shown, i, template, text, spans))
        # An earlier turn is as it was when it was the last, up to where it ends.
        if all(whole.startswith(text[: spans[-1][1]]) for text, spans in found):
            return [self._example(whole, [span for _, spans in found for span in spans])]
        return [self._example(text, spans) for text, spans in found]

    def _placed(
        self, messages: list[Message], i: int, template: dict, text: str, marks: list
    ) -> tuple[str, list[tuple[int, int]]]:
        """A rendering, and where message i is learnt in it: that of `messages`, of which i is the
        last, or whose marks are one for each answer."""
        if marks:
            if len(marks) == len(_said(messages)):
                return text, [marks[_said(messages).index(i)]]
            before = self.text(messages[:i], template) if i else ""
            start = len(os.path.commonprefix([before, text]))
            if inside := [(a, b) for a, b in marks if a >= start]:
                return text, inside
        prompt = self.text(messages[:i], template, True) if i else ""
        start = len(prompt)
        if not i or not text.startswith(prompt):
            # Templates that prompt for a thought, which this answer has not: up to the answer.
            def said(words: str) -> str:
                answer = {"role": "assistant", "content": self._form(words)}
                return self.text([*messages[:i], answer], template)

            trial = said(HERE)
            start = len(os.path.commonprefix([trial, prompt if i else said(THERE)]))
            if i and trial[start : start + 1] != HERE and HERE in trial:
                # The question is written otherwise once it is answered: the answer follows on it
                # as at inference.
                said_at = trial.index(HERE)
                if text[:said_at] == trial[:said_at]:
                    text, start = prompt + text[said_at:], len(prompt)
                    trial = prompt + HERE
            if trial[start : start + 1] != HERE or text[:start] != trial[:start]:
                raise InputError(
                    f"cannot tell where message {i} begins in what the chat template renders;"
                    " use a template with {% generation %} marks"
                )
        stop = len(text)
        if (stripped := text.rstrip()).endswith(self.ends) and len(stripped) > start:
            stop = len(stripped)
        return text, [(start, stop)]

    def _example(self, text: str, spans: list[tuple[int, int]]) -> Example:
        parts, done = [], 0
        for start, stop in sorted(spans):
            parts += [(text[done:start], False), (text[start:stop], True)]
            done = stop
        parts.append((text[done:], False))
        parts = [(part, learnt) for part, learnt in parts if part]
        ids: list[int] = []
        labels: list[int] = []
        for part, (_, learnt) in zip(self.ids_of_parts([p for p, _ in parts]), parts, strict=True):
            ids += part
            labels += part if learnt else [IGNORED] * len(part)
        return ids, labels

    def ids_of(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def ids_of_parts(self, parts: list[str]) -> list[list[int]]:
        """Ids of the parts of a text, each ending where its part ends.

        Together they are the ids of the text; but for a token that would straddle a border: what
        comes before is then tokenised alone, as a prompt is at inference.
        """
        texts = [*parts, "".join(parts)]
        *apart, whole = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        if list(chain.from_iterable(apart)) == whole:
            return apart
        found: list[list[int]] = []
        context, inside = "", []  # a text that begins at some border, and its ids
        for part in parts:
            context += part
            ids = self.ids_of(context)
            if ids[: len(inside)] == inside:
                found.append(ids[len(inside) :])
                inside = ids
            else:
                context, inside = part, self.ids_of(part)
                found.append(self._continued(part))
        return found

    def _continued(self, text: str) -> list[int]:
        """Ids of a text that is no beginning: without the space that some tokenizers put there."""
        for before in "\n.:0":
            start, both = self.ids_of(before), self.ids_of(before + text)
            if both[: len(start)] == start:
                return both[len(start) :]
        return self.ids_of(text)

    def text(self, messages: list[Message], template: dict, generate: bool = False) -> str:
        """What the template renders; with `generate`, a prompt for an answer."""
        return self._render(messages, template, generate)[0]

    def _render(
        self, messages: list[Message], template: dict, generate: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Also what `{% generation %}` marks in it."""
        arguments = [
            call["function"]["arguments"]
            for message in messages
            for call in message.get("tool_calls", ())
            if isinstance(call.get("function", {}).get("arguments"), dict)
        ]
        try:
            text, marks = self._run(messages, template, generate)
            if not any(x and str(x) in text for x in arguments):
                return text, marks
        except InputError:
            if not arguments:
                raise
        # Some templates want them as a string of JSON, and others as an object.
        return self._run([_with_strings(message) for message in messages], template, generate)

    def _run(
        self, messages: list[Message], template: dict, generate: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate, **template
            )
            marks = [] if generate else self._marks(messages, template, text)
        except TemplateError as error:
            raise InputError(
                f"the chat template refuses the conversation: {one_line(error)}"
            ) from error
        except Exception as error:  # whatever a template's Python may raise
            kind = type(error).__name__
            raise InputError(f"the chat template fails: {kind}: {one_line(error)}") from error
        return text, marks

    def _source(self, template: dict) -> str:
        chosen, tools = template.get("chat_template"), template.get("tools")
        return self.tokenizer.get_chat_template(chosen, tools)

    def _marks(self, messages: list[Message], template: dict, text: str) -> list[tuple[int, int]]:
        source = self._source(template)
        if not re.search(r"\{%-?\s*generation\s*-?%\}", source):
            return []
        given = {**self.tokenizer.special_tokens_map, **template, "chat_template": source}
        (again,), (marks,) = render_jinja_template(
            conversations=[messages], return_assistant_tokens_mask=True, **given
        )
        return [(a, b) for a, b in marks if again == text and a < b]

    def _check_used(self, messages: list[Message], template: dict) -> None:
        """Whatever a row says is in the rendering, or refused: templates leave out what they have
        no place for, some of it always, some in some conversations."""
        for name, value in template.items():
            if name == "chat_template" or value is None:
                continue
            shown = re.search(rf"\b{re.escape(name)}\b", self._source(template))
            if shown and name in ("tools", "documents"):
                without = {k: x for k, x in template.items() if k != name}
                shown = self._differ((messages, template), (messages, without))
            if not shown:
                raise InputError(f"the chat template does not show the {name} of the conversation")
        for name in THOUGHTS:
            if any(message.get(name) for message in messages):
                if not re.search(rf"\b{name}\b", self._source(template)):
                    raise InputError(f"the chat template does not show a message's {name}")
        if any("tool_calls" in message for message in messages):
            without = [{k: x for k, x in m.items() if k != "tool_calls"} for m in messages]
            if not self._differ((messages, template), (without, template)):
                raise InputError("the chat template does not show the conversation's tool calls")
        if messages and messages[0]["role"] == "system":
            roles = tuple(message["role"] for message in messages)
            if roles not in self._shows_system:
                # Not compared with none, for which templates have a prompt of their own.
                trial = [{"role": "system", "content": self._form(HERE)}, *messages[1:]]
                self._shows_system[roles] = HERE in self.text(trial, template)
            if not self._shows_system[roles]:
                raise InputError("the chat template does not show the conversation's system prompt")

    def _differ(self, *conversations: tuple[list[Message], dict]) -> bool:
        with_it, without = conversations
        shown = self.text(*with_it)
        try:
            return shown != self.text(*without)
        except InputError:
            return True

    def _form(self, text: str) -> Any:
        """A content as the template takes it."""
        return [{"type": "text", "text": text}] if self.as_parts else text


def normalised(messages: Any) -> list[Message]:
    """Messages with `role` and `content`, tool calls with objects as arguments, without nulls.

    Arrow gives every object the keys of all, as nulls, which cannot be told from a null that
    somebody wrote: both are left out.

    Raises:
        InputError: something that is no message, or holds more than text; `Unusable`, a kind of
            it: a message without content.
    """
    if not isinstance(messages, list):
        raise InputError(f"expected a list of messages, got {messages!r:.60}")
    return [_message(message, i) for i, message in enumerate(messages)]


def _message(message: Any, i: int) -> Message:
    if not isinstance(message, dict):
        raise InputError(f"message {i} is no object with a role and content, but {message!r:.60}")
    message = without_nulls(message)
    role = message.pop("from", None) if "role" not in message else message["role"]
    if not isinstance(role, str):
        raise InputError(f"message {i} has no role; it has {', '.join(message) or 'nothing'}")
    content = message.pop("value", None) if "content" not in message else message.pop("content")
    calls = message.pop("tool_calls", None)
    if role == "function_call":
        role, calls, content = "assistant", content, None
    role = ROLES.get(role.lower(), role)
    made: Message = {"role": role}
    if content is not None:
        made["content"] = _content(content, role, i)
    if calls:
        calls = from_json(calls, f"message {i}: tool_calls")
        calls = calls if isinstance(calls, list) else [calls]
        made["tool_calls"] = [_call(call, i) for call in calls]
    elif content is None:
        if not any(message.get(key) for key in THOUGHTS):
            raise Unusable("a message without content")
    return made | {k: x for k, x in message.items() if k != "role"}


def _content(content: Any, role: str, i: int) -> Any:
    if isinstance(content, str):
        return content
    if isinstance(content, int | float) and not isinstance(content, bool):
        return str(content)
    if role == "tool" and not (isinstance(content, list) and _are_parts(content)):
        return json.dumps(content, ensure_ascii=False)
    if not isinstance(content, list):
        raise InputError(f"message {i}: expected text as content, got {content!r:.60}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if not isinstance(text, str) or kind not in ("text", "input_text", "output_text"):
            raise InputError(f"message {i}: only text is learnt from, and there is {part!r:.60}")
        texts.append(text)
    return "".join(texts)


def _are_parts(content: list) -> bool:
    return all(isinstance(part, dict) and "type" in part for part in content)


def _call(call: Any, i: int) -> dict[str, Any]:
    call = from_json(call, f"message {i}: tool_calls")
    if not isinstance(call, dict):
        raise InputError(f"message {i}: a tool call is an object, got {call!r:.60}")
    if "function" not in call and "name" in call:
        call = {"type": "function", "function": call}
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except json.JSONDecodeError:
            return call
        if isinstance(arguments, dict):
            call = {**call, "function": {**function, "arguments": arguments}}
    return call


def _with_strings(message: Message) -> Message:
    """Tool calls with a string of JSON as arguments."""
    calls = []
    for call in message.get("tool_calls", ()):
        function = call.get("function", {})
        if isinstance(function.get("arguments"), dict):
            text = json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": text}}
        calls.append(call)
    return {**message, "tool_calls": calls} if calls else message


def tools_of(value: Any, name: str = "tools") -> list[dict] | None:
    """A row's tools or documents: a list of objects, or its JSON; None where there are none."""
    value = without_nulls(from_json(value, name))
    if not value:
        return None
    value = value if isinstance(value, list) else [value]
    value = [from_json(x, name) for x in value]
    if not all(isinstance(x, dict) for x in value):
        raise InputError(f"{name}: expected a list of objects, got {value!r:.60}")
    return value


def without_nulls(x: Any) -> Any:
    """Objects, at any depth, without their keys that are null."""
    if isinstance(x, dict):
        return {key: without_nulls(value) for key, value in x.items() if value is not None}
    return [without_nulls(value) for value in x] if isinstance(x, list) else x


def from_json(value: Any, name: str) -> Any:
    """What a text of JSON says; anything else as it is; None where there is nothing."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise InputError(f"{name}: not JSON: {value!r:.60}") from error


def _is_learnt(message: Any, i: int) -> bool:
    for key in REFUSED if isinstance(message, dict) else ():
        if message.get(key) is not None:
            raise InputError(
                f"message {i}: {key} cannot be obeyed; {', '.join(NOT_LEARNT)} 0 leaves out a turn"
            )
    for key in NOT_LEARNT:
        value = message.get(key) if isinstance(message, dict) else None
        if value is not None and value not in (0, 1):
            raise InputError(f"message {i}: {key} must be 0 or 1, got {value!r:.60}")
        if value is not None and not value:
            return False
    return True


def _said(messages: list[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _answers(message: Message) -> bool:
    """Whether it says something, and the assistant says it."""
    if message["role"] != "assistant":
        return False
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return bool(text.strip() or message.get("tool_calls") or message.get("reasoning_content"))
