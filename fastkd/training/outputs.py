"""What a run writes: log, checkpoints and model. Nothing appears half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from fastkd.training.config import InputError


class Log:
    """`log.jsonl`, shown above the progress bar too; a resumed run drops what comes after it."""

    def __init__(self, path: Path, done: int, bar: tqdm):
        self.path, self.bar, self.rows = path, bar, []
        if done and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            self.rows = [row for row in map(json.loads, lines) if row["step"] <= done]
        if not bar.disable:
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def write(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        if not self.bar.disable:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            text = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
            self.bar.write(f"step {row['step']:>6}  {text}")


def _checkpoints(output: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    return sorted(
        output.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.partition("-")[2])
    )


def checkpoint_to_resume(name: str | None, output: Path) -> Path | None:
    """The checkpoint that a name means, `last` being the newest one in `output`.

    Raises:
        InputError: there is none.
    """
    if name is None:
        return None
    if name == "last":
        if not (found := _checkpoints(output)):
            raise InputError(f"{output} has no checkpoint to resume from")
        return found[-1]
    if not (Path(name) / "progress.json").exists():
        raise InputError(f"{name} is no checkpoint of fastkd")
    return Path(name)


def resume(accelerator: Accelerator, checkpoint: Path, order: dict[str, int]) -> int:
    """Restore weights, optimizer, schedule and random state; return the steps done.

    Raises:
        InputError: `order`, what decides the rows of each step, is not what it was.
    """
    progress = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
    if progress["order"] != order:
        raise InputError(
            f"{checkpoint} was written with {progress['order']}, and cannot go on with {order}"
        )
    accelerator.load_state(str(checkpoint))
    return progress["step"]


def save_checkpoint(
    accelerator: Accelerator,
    output: Path,
    step: int,
    student: Any,
    tokenizer: Any,
    order: dict[str, int],
    limit: int | None,
) -> None:
    """Write `checkpoint-<step>`, loadable as a model too; drop all but the `limit` newest."""
    partial = output / f".checkpoint-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        student.config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "progress.json").write_text(
            json.dumps({"step": step, "order": order}), encoding="utf-8"
        )
        shutil.rmtree(output / f"checkpoint-{step}", ignore_errors=True)
        partial.rename(output / f"checkpoint-{step}")
        for old in _checkpoints(output)[: -limit if limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def save_model(output: Path, student: Any, tokenizer: Any) -> None:
    """Write the student and its tokenizer for `from_pretrained`."""
    partial = output / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    student.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for stale in output.glob("*.safetensors*"):
        stale.unlink()
    for file in sorted(
        partial.iterdir(), key=lambda file: file.name == "config.json"
    ):  # what marks a model, last
        file.replace(output / file.name)
    partial.rmdir()
