"""Numbers that move during training: functions of the progress, from 0 at its start to 1 at its
end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastkd.divergences import TAID, Divergence

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Constant:
    """The same number all along."""

    value: float

    def __call__(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """A line: start + (end - start) · progress."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return (1 - progress) * self.start + progress * self.end  # exact at both ends


@dataclass(frozen=True)
class Cosine:
    """Half a cosine: flat at both ends, end + (start - end) · (1 + cos(π · progress)) / 2."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        share = (1 + math.cos(math.pi * progress)) / 2
        return share * self.start + (1 - share) * self.end


@dataclass(frozen=True)
class Steps:
    """Constant pieces: {0: 4, 0.5: 2} is 4 in the first half, 2 from the middle on.

    Raises:
        ValueError: the first piece does not begin at 0, or one outside of [0, 1].
    """

    values: Mapping[float, float]

    def __post_init__(self):
        begins = sorted(self.values)
        if not begins or begins[0] != 0 or begins[-1] > 1:
            raise ValueError(f"pieces begin in [0, 1], the first at 0, got {dict(self.values)}")

    def __call__(self, progress: float) -> float:
        return self.values[max(begin for begin in self.values if begin <= progress)]


class Moving:
    """A divergence whose numbers move: `Moving(SkewForwardKL, teacher_weight=Linear(0.5, 0.1))`.

    Args:
        kind: the class of a divergence.
        **numbers: its numbers, or schedules of them.

    Raises:
        TypeError, ValueError: numbers that it would refuse, at the start or at the end.
    """

    def __init__(self, kind: type[Divergence], **numbers: float | Schedule):
        self.kind, self.numbers = kind, numbers
        self(0.0), self(1.0)

    def __call__(self, progress: float) -> Divergence:
        numbers = {name: x(progress) if callable(x) else x for name, x in self.numbers.items()}
        return self.kind(**numbers)

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={x}" for name, x in self.numbers.items())
        return f"Moving({self.kind.__name__}, {numbers})"


def taid(start: float = 0.4, end: float = 1.0) -> Moving:
    """TAID with t on a line: the target moves from near the student to the teacher.

    Shing et al.: TAID (2025), without their adaptive steps: those are a schedule with a state of
    one's own.
    """
    return Moving(TAID, t=Linear(start, end))
