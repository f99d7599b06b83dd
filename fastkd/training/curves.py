"""The curves of a run, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TRAINING = {"loss": "loss", "kd": "divergence", "ce": "cross-entropy"}
HELD_OUT = {"eval_perplexity": "perplexity"}


def draw(history: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of the training loss and its parts, and of the held-out perplexity.

    Args:
        history: lines of the log.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, names in ((left, TRAINING), (right, HELD_OUT)):
        for key, label in names.items():
            points = [(row["step"], row[key]) for row in history if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set(xlabel="step")
        if axes.lines:
            axes.legend()
    left.set(title="training, per token", ylabel="nats")
    right.set(title="held out")
    if right.lines:
        right.set(yscale="log")
    figure.savefig(path, dpi=120)
