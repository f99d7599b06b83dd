"""Objects as a string, a list of numbers and a list of tensors: how they go through an operator,
which takes nothing else.

A `Packed` class is a frozen dataclass whose fields are all that there is to it: numbers, strings,
tensors, None, other packed objects, and tuples of these. What follows from the fields is a
property.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

_CLASSES: dict[str, type[Packed]] = {}


class Packed:
    """Subclassing registers; a class defined again, as in a notebook, takes its own place."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        _CLASSES[_key(cls)] = cls


class Parcel(NamedTuple):
    """A packed object. Its numbers and tensors, in the order of the fields, are apart from the
    string, so that torch.compile may trace them."""

    spec: str  # how to put it together
    numbers: list[float]
    tensors: list[Tensor]


def pack(x: Any) -> Parcel:
    numbers: list[float] = []
    tensors: list[Tensor] = []
    return Parcel(repr(_literal(x, numbers, tensors)), numbers, tensors)


def unpack(parcel: Parcel) -> Any:
    """What was packed. Its constructor, and so its checks, do not run again."""
    return _object(_parsed(parcel.spec), iter(parcel.numbers), iter(parcel.tensors))


def tensors_of(x: Any) -> list[Tensor]:
    """All tensors of an object, in packing order."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, Packed):
        x = [getattr(x, field.name) for field in dataclasses.fields(x)]
    return [t for item in x for t in tensors_of(item)] if isinstance(x, (tuple, list)) else []


def replace_tensors(x: Any, change: Callable[[Tensor], Any]) -> Any:
    """The object with every tensor changed."""
    if not tensors_of(x):
        return x
    parcel = pack(x)
    return unpack(parcel._replace(tensors=[change(t) for t in parcel.tensors]))


def _key(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _literal(x: Any, numbers: list[float], tensors: list[Tensor]) -> Any:
    """As Python literals; a tuple begins with what it stands for."""
    if x is None or isinstance(x, (bool, int, str)):
        return x
    if isinstance(x, float):
        numbers.append(x)
        return ("float",)
    if isinstance(x, Tensor):
        tensors.append(x)
        return ("tensor",)
    if isinstance(x, (tuple, list)):
        return ("tuple", *[_literal(item, numbers, tensors) for item in x])
    if isinstance(x, Packed):
        if _CLASSES.get(_key(type(x))) is not type(x):
            raise TypeError(f"{type(x).__name__} was defined again after this object was made")
        values = [getattr(x, field.name) for field in dataclasses.fields(x)]
        return (_key(type(x)), *[_literal(value, numbers, tensors) for value in values])
    raise TypeError(
        f"a field must be a number, a string, a tensor, None or a tuple, got {type(x).__name__}"
    )


@functools.cache
def _names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


@functools.lru_cache(maxsize=256)
def _parsed(spec: str) -> Any:
    return ast.literal_eval(spec)


def _object(literal: Any, numbers: Iterator[float], tensors: Iterator[Tensor]) -> Any:
    if not isinstance(literal, tuple):
        return literal
    kind, *items = literal
    if kind in ("tensor", "float"):
        return next(tensors if kind == "tensor" else numbers)
    values = [_object(item, numbers, tensors) for item in items]
    if kind == "tuple":
        return tuple(values)
    cls = _CLASSES[kind]
    made = cls.__new__(cls)
    for name, value in zip(_names(cls), values, strict=True):
        object.__setattr__(made, name, value)
    return made
