"""Whether two tokenizers are one."""

from __future__ import annotations

from typing import Any

from fastkd.training.places import Place

# What normalisers, pretokenizers and merges treat differently.
PROBES = (
    "Hello World, it's 1234567 o'clock!",
    "  two spaces\n\tand a Tab…  ",
    "def f(x_1): return x_1**2  # Ünïcödé, ﬁne",
    "你好，世界。 Привет, мир! 🙂",
)
PROBE_TOKENS = 2048  # of the vocabulary itself: a small one knows no other words


def check_tokenizer(place: Place, tokenizer: Any) -> None:
    """That a tokenizer is one: transformers makes an empty one where its files are missing.

    Raises:
        InputError: all its tokens are special ones.
    """
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise place.refuse("no tokenizer there: none of its files, or no tokens in them")


def same_tokens(ours: Any, place: Place, theirs: Any, vocab: str) -> bool:
    """Whether a teacher's tokenizer has the student's tokens, and no more or fewer.

    Args:
        ours, theirs: the student's and the teacher's tokenizer.
        place: the teacher.
        vocab: "strict": they must be the same, and cut texts into the same tokens; "shared": one
            may have tokens after the other's last.

    Raises:
        InputError: they differ; says where.
    """
    ids, their_ids = ours.get_vocab(), theirs.get_vocab()
    if ids != their_ids:
        _compare({i: t for t, i in ids.items()}, {i: t for t, i in their_ids.items()}, place, vocab)
    if vocab == "strict":
        _compare_cuts(ours, place, theirs)
    return ids == their_ids


def _compare(ids: dict[int, str], their_ids: dict[int, str], place: Place, vocab: str) -> None:
    every = sorted(ids.keys() | their_ids.keys())
    differ = [i for i in every if ids.get(i) != their_ids.get(i)]
    added = all(i > min(max(ids), max(their_ids)) for i in differ)
    if added and vocab == "shared":
        return
    shown = "; ".join(
        f"id {i} is {_name(ids.get(i))} in the student's and {_name(their_ids.get(i))} in its own"
        for i in differ[:2]
    )
    more = "; --vocab shared allows tokens added at the end" if added else ""
    raise place.refuse(
        f"not the student's tokenizer, {len(differ):,} of {len(every):,} ids differ: {shown}{more}"
    )


def _name(token: str | None) -> str:
    if token is None:
        return "nothing"
    return repr(token if len(token) <= 20 else token[:19] + "…")


def _compare_cuts(ours: Any, place: Place, theirs: Any) -> None:
    ids = sorted(ours.get_vocab().values())
    tokens = ours.convert_ids_to_tokens(ids[:: 1 + len(ids) // PROBE_TOKENS])
    parts = [tokens[i : i + 64] for i in range(0, len(tokens), 64)]
    own = [text for x in parts for text in (" ".join(x), ours.convert_tokens_to_string(x))]
    for text in (*PROBES, *own):
        try:
            cuts = [t(text, add_special_tokens=False)["input_ids"] for t in (ours, theirs)]
        except Exception:  # some have no token for what they do not know
            continue
        if cuts[0] != cuts[1]:
            at = next((i for i, (x, y) in enumerate(zip(*cuts, strict=False)) if x != y), 0)
            words = [ours.convert_ids_to_tokens(cut[at : at + 3]) for cut in cuts]
            raise place.refuse(
                "the student's tokens, but its tokenizer cuts texts into others:"
                f" {words[1]} where the student's has {words[0]}; --vocab shared takes the latter"
            )
