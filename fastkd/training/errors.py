"""What the command line says when something cannot work."""

from __future__ import annotations


class InputError(ValueError):
    """What the user asked for cannot work; raised before any training, and says what would. One
    line."""


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """A library's error as a part of one line."""
    text = " ".join(str(error).split())
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
