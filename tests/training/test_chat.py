"""The assistant's turns are learnt, whole and alone, under the prompts of inference."""

import json

import pytest
from tiny_tokenizers import CHAT, by_bytes
from transformers import ByT5Tokenizer

from fastkd.training.chat import IGNORED, encode_chat, encode_conversation, normalised
from fastkd.training.errors import InputError

MARKED = CHAT.replace(
    "{{ m['content'] }}<|end|>",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}",
)
# As Qwen3's: what was thought is kept in the last turn only.
FORGETFUL = CHAT.replace(
    "{{ m['content'] }}",
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else"
    " m['content'].split('</think>')[-1] }}",
)
# As Mistral's: the system prompt is in the last question.
MOVING = (
    "{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.index >= messages|length - 1 %}{{ s }} {% endif %}{{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}<|end|>{% endif %}{% endfor %}"
)
CALLS = (
    "{% for t in tools or [] %}{{ t['name'] }};{% endfor %}{% for m in messages %}<|{{ m['role'] }}"
    "|>{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }}ARGUMENTS{% endfor %}"
    "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def says(role):
    return lambda content, **more: {"role": role, "content": content, **more}


user, assistant, system = says("user"), says("assistant"), says("system")
TALK = [user("hello or bye?"), assistant("hello"), user("and?"), assistant("bye")]


def learnt(labels, tokenizer):
    return tokenizer.decode([i for i in labels if i != IGNORED])


def called(arguments):
    return {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
    }


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_answers_with_their_ends(template, trim):
    """Words that stand elsewhere too, and spaces, of which some tokenizers have no offsets."""
    tokenizer = by_bytes(template, trim=trim)
    talk = [*TALK, user("code"), assistant("if x:\n    return   x")]
    ids, labels = encode_chat(talk, tokenizer)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(talk, tokenize=False)
    assert learnt(labels, tokenizer) == "hello<|end|>bye<|end|>if x:\n    return   x<|end|>"
    assert all(label in (i, IGNORED) for i, label in zip(ids, labels, strict=True))
    (same,) = encode_conversation(talk, tokenizer)
    assert same == (ids, labels)
    assert learnt(encode_chat(TALK, tokenizer, first=2)[1], tokenizer) == "bye<|end|>"


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_a_tokenizer_without_offsets(template):
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = template
    end = "<|end|>\n" if template == CHAT else "<|end|>"  # no token of it, that could end a turn
    assert learnt(encode_chat(TALK, tokenizer)[1], tokenizer) == f"hello{end}bye{end}"


def test_marks_that_mark_nothing():
    tokenizer = by_bytes(CHAT + "{% generation %}{% endgeneration %}")
    assert learnt(encode_chat(TALK, tokenizer)[1], tokenizer) == "hello<|end|>bye<|end|>"


@pytest.mark.parametrize("template", [FORGETFUL, MOVING])
def test_templates_that_rewrite_earlier_turns(template):
    """One example a turn: its prompt is that of inference, and it follows on it."""
    tokenizer = by_bytes(template)
    talk = [system("s")] if template == MOVING else []
    talk += [user("a no b"), assistant("<think>x</think>no"), user("c"), assistant("yes")]
    examples = encode_conversation(talk, tokenizer)
    space = " " if template == MOVING else ""
    said = [f"{space}<think>x</think>no<|end|>", f"{space}yes<|end|>"]
    assert [learnt(labels, tokenizer) for _, labels in examples] == said
    for (ids, labels), turn in zip(examples, (len(talk) - 3, len(talk) - 1), strict=True):
        prompt = tokenizer.apply_chat_template(
            talk[:turn], tokenize=False, add_generation_prompt=True
        )
        start = next(k for k, label in enumerate(labels) if label != IGNORED)
        assert tokenizer.decode(ids[:start]) == prompt
    together = encode_chat(talk, tokenizer)
    assert together == tuple(sum(parts, []) for parts in zip(*examples, strict=True))


def test_a_prompt_for_a_thought_that_an_answer_has_not():
    """As DeepSeek-R1's; and the answer begins as the thought does."""
    tokenizer = by_bytes(CHAT.replace("<|assistant|>{% endif", "<|assistant|><think>\n{% endif"))
    talk = [user("q"), assistant("<table>"), user("q"), assistant("b")]
    assert learnt(encode_chat(talk, tokenizer)[1], tokenizer) == "<table><|end|>b<|end|>"


def test_a_question_that_is_written_otherwise_once_it_is_answered():
    tokenizer = by_bytes(
        CHAT.replace("{{ m['content'] }}", "{{ m['content'] }}{{ '!' if loop.last }}")
    )
    examples = encode_conversation(TALK, tokenizer)
    assert [learnt(labels, tokenizer) for _, labels in examples] == ["hello!<|end|>", "bye!<|end|>"]
    prompt = tokenizer.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(examples[1][0]).startswith(prompt) and prompt.count("!") == 1


def test_an_answer_without_a_question():
    tokenizer = by_bytes(CHAT)
    labels = encode_chat([assistant("hi"), user("q"), assistant("b")], tokenizer)[1]
    assert learnt(labels, tokenizer) == "hi<|end|>b<|end|>"


def test_an_end_that_is_there_already():
    talk = [user("q"), assistant("a<|end|>"), user("q"), assistant("b")]
    tokenizer = by_bytes(CHAT)
    assert learnt(encode_chat(talk, tokenizer)[1], tokenizer) == "a<|end|>b<|end|>"


def test_turns_that_are_not_learnt():
    talk = [user("q"), assistant("a", weight=0), user("q"), assistant("b", train=True)]
    talk += [user("q"), assistant("c", train=False), user("q"), assistant("")]
    tokenizer = by_bytes(CHAT)
    ids, labels = encode_chat(talk, tokenizer)
    assert learnt(labels, tokenizer) == "b<|end|>" and tokenizer.decode(ids).count("<|user|>") == 4
    assert encode_conversation([user("q")], tokenizer) == []
    with pytest.raises(InputError, match="message 1: weight must be 0 or 1, got 0.5"):
        encode_chat([user("q"), assistant("a", weight=0.5)], tokenizer)


@pytest.mark.parametrize(
    "form",
    [
        "{{ c['function']['arguments'] | tojson }}",  # wants an object
        "{{ c['function']['arguments'] }}",  # would write an object as Python does
        "{{ '' + c['function']['arguments'] }}",  # fails on an object
    ],
)
def test_tool_calls(form):
    tokenizer = by_bytes(CALLS.replace("ARGUMENTS", form))
    for arguments in ({"a": "é"}, '{"a": "é"}'):
        labels = encode_chat([user("q"), called(arguments)], tokenizer)[1]
        assert learnt(labels, tokenizer) == 'f{"a": "é"}<|end|>'


def test_nulls_of_arrow_are_no_arguments():
    (message,) = normalised([called({"a": None, "b": [{"c": None, "d": [None]}]}) | {"x": None}])
    assert message["tool_calls"][0]["function"]["arguments"] == {"b": [{"d": [None]}]}
    assert "x" not in message


def test_other_ways_to_write_messages():
    function = json.dumps({"name": "f", "arguments": {"a": 1}})
    call = {"type": "function", "function": json.loads(function)}
    assert normalised(
        [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": function},
            {"from": "observation", "value": {"b": 2}},
            {"from": "gpt", "value": "a"},
            {"role": "Model", "content": [{"type": "text", "text": "a"}, {"text": "b"}]},
        ]
    ) == [
        user("q"),
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": '{"b": 2}'},
        assistant("a"),
        assistant("ab"),
    ]
    parts = "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    tokenizer = by_bytes(CHAT.replace("{{ m['content'] }}", parts + "{% endfor %}"))
    assert learnt(encode_chat(TALK, tokenizer)[1], tokenizer) == "hello<|end|>bye<|end|>"


def test_what_the_template_is_given():
    tokenizer = by_bytes("{% if mood %}{{ mood }}{% endif %}" + CALLS)
    ids, _ = encode_chat(TALK, tokenizer, tools=[{"name": "get"}], mood="kind")
    assert tokenizer.decode(ids).startswith("kindget;<|user|>hello or bye?")


NO_SYSTEM = CHAT.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
STRICT = CHAT + "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
TOOLS = "{% if tools and messages[0].role == 'system' %}{{ tools | tojson }}{% endif %}" + CHAT


@pytest.mark.parametrize(
    ("template", "messages", "more", "words"),
    [
        (None, TALK, {}, "needs a tokenizer with a chat template"),
        (STRICT, [system("s"), *TALK], {}, "the chat template refuses the conversation: no system"),
        ("{{ messages[0].x.y.z }}", TALK, {}, "the chat template refuses the conversation: .*'x'"),
        (CHAT, TALK, {"tools": [{"name": "f"}]}, "does not show the tools"),
        (TOOLS, TALK, {"tools": [{"name": "f"}]}, "does not show the tools"),
        (CHAT, TALK, {"enable_thinking": False}, "does not show the enable_thinking"),
        (CHAT, [user("q"), called({})], {}, "does not show the conversation's tool calls"),
        (NO_SYSTEM, [system("s"), *TALK], {}, "does not show the conversation's system prompt"),
        (CHAT, [{"content": "q"}], {}, "message 0 has no role; it has content"),
        (CHAT, "q", {}, "expected a list of messages, got 'q'"),
        (CHAT, [user("q"), "a"], {}, "message 1 is no object with a role and content, but 'a'"),
        (CHAT, [user([{"type": "image"}])], {}, "message 0: only text is learnt from"),
    ],
)
def test_refused(template, messages, more, words):
    with pytest.raises(InputError, match=words):
        encode_chat(messages, by_bytes(template), **more)


def test_a_token_across_a_border():
    """The prompt's tokens are those of inference, and the answer's its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["▁", "q", "a", ":", "▁a"]
    inner = Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, [("▁", "a")]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}: {% else %}"
        "{{ m.content }}{% endif %}{% endfor %}"
    )
    ids, labels = encode_chat([user("q"), assistant("a")], tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "q", ":", "▁", "a"]
    assert labels == [IGNORED] * 4 + [letters.index("a")]
