"""What a source of logits is, and how the operator works with one.

A *source* is one side of the comparison as its user made it: a frozen dataclass with any leading
shape, checked once. Inside of the operator (compare.py) it gives a *reader*, which works on T rows
for one call. A new source is one file with these two classes; subclassing registers it.

    @dataclass(frozen=True, eq=False)
    class Int8Head(Source):
        hidden: Tensor   # (..., H)
        weight: Tensor   # (V, H) int8
        steps: Tensor    # (V,): row v of the head is steps[v] · weight[v]

        leading = property(lambda self: self.hidden.shape[:-1])
        entries = property(lambda self: self.weight.shape[0])
        like = property(lambda self: self.hidden)

        def reader(self, ask):
            return Int8Reader(self, ask)

Fields are numbers, strings, tensors, None, other sources and tuples of these: they are all that
goes through the operator, so what follows from them is a property.

The operator calls a reader in this order:

    reader = source.reader(ask)                      or source.student(ask, wants, inplace)
    reader.row_bytes(entries)                        how much memory a row of a chunk takes
    reader.prepare(size)                             chunks will have at most so many rows
    for each chunk of rows low … high:
        logits = reader.logits(low, high)            valid until the next chunk
        grad = reader.grad_of(logits, low, high)     a student: where the gradient goes
        reader.take(grad, low, high, counts)         a student: pass it on
        (or reader.skip(low, high) alone, where no row of the chunk counts)
    reader.finish()                                  a student: the gradients of its tensors

A reader is made under the caller's autocast, where `source.dtype` says which type that gives, and
works without it. Over vocabulary shards a source holds this rank's columns, and `ask.shard` says
which they are. See dense.py for the simplest student, topk.py for a sparse teacher, ensemble.py for
one of several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastkd.packing import Packed, tensors_of
from fastkd.rows import Ask, Sparse


class Source(Packed):
    """Base of all sources.

    Attributes:
        leading: the shape without the vocabulary.
        entries: V, or None where any will do (a top-k list).
        like: the tensor whose device and dtype the logits have.
        has_logits: whether there are logits, and not only probabilities.
        sparse: whether the reader's `chunk` is a `Sparse`.
        parameters: fields that may require a gradient elsewhere, and of a teacher are constants
            nevertheless: an LM head's weight may be tied to the student's. All other tensors of a
            teacher must not.
        alone_in_shards: whether nothing but the rows' sums depends on the other ranks of a
            vocabulary in shards: then their sizes need no exchange.
        row_by_row: of a student, whether row i of every gradient is row i's alone, so that it can
            be scaled afterwards. If not, a gradient whose upstream factor differs from row to row
            is computed in the backward pass.
    """

    sparse: ClassVar[bool] = False
    parameters: ClassVar[tuple[str, ...]] = ()
    alone_in_shards: ClassVar[bool] = False
    row_by_row: ClassVar[bool] = False

    @property
    def leading(self) -> torch.Size:
        raise TypeError(f"{type(self).__name__} does not say its leading shape")

    @property
    def entries(self) -> int | None:
        raise TypeError(f"{type(self).__name__} does not say its number of entries")

    @property
    def like(self) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not say what its logits are like")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def has_logits(self) -> bool:
        return True

    @property
    def is_whole(self) -> bool:
        """Whether it says what all entries have, so that it may be a member of an `Ensemble`."""
        return not self.sparse

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of the logits, for messages."""
        return (*self.leading, self.entries)

    @property
    def may_be_overwritten(self) -> bool:
        """Of a student: whether its gradient may go where its one tensor is (`inplace=True`)."""
        return False

    @property
    def members(self) -> tuple[Source, ...]:
        """The sources inside of this one."""
        return ()

    @property
    def differentiated(self) -> list[str]:
        """Names of the tensors that require a gradient; of a teacher there must be none."""
        names = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            of_members = any(value is x for x in (self.members, *self.members))
            if field.name in self.parameters or of_members:
                continue
            if any(x.requires_grad for x in tensors_of(value)):
                names.append(field.name)
        return [*names, *(name for member in self.members for name in member.differentiated)]

    def check(self, divergence: Any, temperature: Any) -> None:
        """Raise where this cannot be the teacher of that divergence."""
        if not self.has_logits and any(part.kind == "logits" for _, part in divergence.parts):
            raise ValueError(
                f"{divergence} compares logits, of which {type(self).__name__} has none"
            )

    def check_rows(self, counts: Tensor, n: int | Tensor, strict: bool) -> None:
        """Raise where a row that counts holds what cannot be: `counts` (...) says which do. The
        divergence sees n entries, of all shards; `strict`: no vocabulary is cut."""
        for member in self.members:
            member.check_rows(counts, n, strict)

    def whole_logits(self, temperature: float = 1.0, n: int | None = None) -> Tensor:
        """(..., V) logits in plain torch, all at once, differentiable: the truth that
        `fastkd.reference` compares. Only tests need it. The loss sees them at that temperature, and
        the first n entries."""
        raise TypeError(f"{type(self).__name__} has no logits")

    def reader(self, ask: Ask) -> Reader:
        """The teacher's worker; it needs only the first ask.n entries."""
        raise TypeError(f"{type(self).__name__} has no reader")

    def student(self, ask: Ask, wants: list[bool], inplace: bool) -> Reader:
        """The student's worker, of all V entries.

        `wants`: which of the tensors (in the order of the fields) get a gradient. `inplace`: dense
        logits may be overwritten by theirs.
        """
        raise TypeError(f"{type(self).__name__} cannot be a student")


class Reader:
    """T rows of a source, for one call of the operator.

    Attributes:
        source, ask: what it was made of.
        wants: of a student, which of the source's tensors (in the order of its fields) get a
            gradient.
        dtype: of the logits.
    """

    def __init__(self, source: Source, ask: Ask, wants: Sequence[bool] = ()):
        self.source, self.ask, self.wants, self.dtype = source, ask, wants, source.dtype

    def row_bytes(self, entries: int) -> int:
        """Memory that `logits` needs for each row of a chunk with so many entries."""
        return 0

    def prepare(self, size: int) -> None:
        """Make room for chunks of `size` rows."""

    def logits(self, low: int, high: int) -> Tensor:
        """(outer, length, at least n) logits of rows `low` to `high`, with unit stride along the
        entries; valid until the next call."""
        raise TypeError(f"{type(self.source).__name__} has no logits")

    def chunk(self, low: int, high: int) -> Tensor | Sparse:
        """What the backend is given of these rows."""
        return self.logits(low, high)

    # As a student, it also takes gradients:

    def grad_of(self, logits: Tensor, low: int, high: int) -> Tensor | None:
        """(rows, V) contiguous memory for the gradient wrt a chunk's logits, which may be their
        own; None where no gradient is wanted."""
        return logits[0] if any(self.wants) else None

    def take(self, grad: Tensor, low: int, high: int, counts: Tensor) -> None:
        """Pass a chunk's gradient on; `counts` (rows,) is False where a row counts nowhere, and
        its gradient is 0."""
        raise TypeError(f"{type(self.source).__name__} does not take a gradient")

    def skip(self, low: int, high: int) -> None:
        """No row of the chunk counts."""

    def finish(self) -> list[Tensor | None]:
        """The gradients, of the shape and type of the source's tensors, one for each; None where
        it is not wanted."""
        raise TypeError(f"{type(self.source).__name__} does not give its gradients")


def leaves(source: Source) -> list[Source]:
    """The sources without others inside."""
    if not source.members:
        return [source]
    return [leaf for member in source.members for leaf in leaves(member)]


def flat(x: Tensor) -> Tensor:
    """(T, last), T = 0 too."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def as_rows(x: Tensor) -> Tensor:
    """(outer, length, V) with unit stride along V, as a view where strides allow: `logits[:, :-1]`
    is not copied."""
    x = x.detach()
    if x.dim() == 3 and x.stride(-1) == 1 and not x.is_contiguous():
        return x
    if x.dim() == 2 and x.stride(-1) == 1:
        return x[None]
    return x.contiguous().view(1, x.shape[:-1].numel(), x.shape[-1])


def sum_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Of sums."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
