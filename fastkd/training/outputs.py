"""The output folder of a run: only what fastkd wrote there is ever replaced or deleted, and nothing
appears half-written.

`fastkd.json` in it is the record: which run, which files are its own. A checkpoint is written
beside its place and moved there when it is complete; it has a record too, with the size of every
file, the settings and the data, so that a torn or foreign one is not taken for it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastkd.training.errors import InputError

RECORD = "fastkd.json"
PARTIAL = ".fastkd.partial"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# With these beside it, a model of another run would be taken for an adapter, or one for a model.
CHANGES_MEANING = ("adapter_config.json", "config.json")


class Folder:
    """The output folder of one run; on the process that writes.

    Attributes:
        path: the folder.
        run: the run's own name; a run that goes on keeps it.
    """

    def __init__(self, path: str | Path, overwrite: bool = False, resume: bool = False):
        """Look whether the run may write there; changes nothing.

        Raises:
            InputError: it is a file, not writable, or holds what it may not touch.
        """
        self.path = Path(path)
        self._check_place()
        self.record = read_record(self.path) or (self._recovered() if resume else None)
        self.run = self.record["run"] if self.record and resume else uuid.uuid4().hex
        self.goes_on = bool(self.record) and resume
        own = self._own_files()
        others = [name for name in _files(self.path) if name not in own]
        if self.goes_on:
            return
        if own and not overwrite:
            raise InputError(
                f"{self.path} holds an earlier run: --resume goes on with it, --overwrite replaces"
                " it"
            )
        if others and not overwrite:
            raise InputError(
                f"{self.path} is not empty ({_some(others)}): name another --output, or pass"
                " --overwrite, which leaves what fastkd did not write"
            )
        clashes = [name for name in others if _would_clash(name)]
        if clashes:
            raise InputError(
                f"{self.path} holds {_some(clashes)}, which fastkd did not write and would have to"
                " replace: name another --output"
            )

    def _check_place(self) -> None:
        path = self.path
        try:
            path.exists()
        except OSError as error:  # a name that is too long
            raise InputError(f"--output {str(path)[:60]}…: {error.strerror}") from error
        if path.exists() and not path.is_dir():
            raise InputError(f"--output {path} is a file")
        above = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not above.is_dir():
            raise InputError(f"--output {path}: {above} is a file")
        if not os.access(above, os.W_OK | os.X_OK):
            raise InputError(f"--output {path}: cannot write to {above}")

    def _recovered(self) -> dict[str, Any] | None:
        """The record, where it is torn: its run is that of the newest complete checkpoint."""
        if not (self.path / RECORD).exists():
            return None
        found = [p for p in self.path.glob("checkpoint-*") if is_complete(p)]
        if not found:
            return None
        newest = max(found, key=lambda p: (p / RECORD).stat().st_mtime)
        files = [name for name in _files(self.path) if "/" not in name and _would_clash(name)]
        return {"run": read_checkpoint(newest)["run"], "files": files}

    def _own_files(self) -> set[str]:
        """Of the recorded run, relative to the folder."""
        if not self.record:
            return set()
        own = {RECORD, *self.record["files"]}
        own |= {name for name in _files(self.path) if name.split("/")[0] == PARTIAL}
        for checkpoint in self._checkpoints(self.record["run"]):
            made = _recorded(checkpoint)
            own |= {f"{checkpoint.name}/{name}" for name in made}
        return own

    def begin(self, step: int = 0) -> None:
        """Make the folder this run's: what an earlier one wrote is removed, all else stays.

        Args:
            step: where a run goes on; its checkpoints of later ones are removed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.goes_on:
            for checkpoint in self._checkpoints(self.run):
                if read_checkpoint(checkpoint)["step"] > step:
                    _drop(checkpoint)
            self.record.pop("finished", None)
            self._write_record()
            shutil.rmtree(self.path / PARTIAL, ignore_errors=True)
            return
        for name in sorted(self._own_files() - {RECORD}):
            (self.path / name).unlink(missing_ok=True)
        folders = (p for p in self.path.rglob("*") if p.is_dir() and _is_own_name(p, self.path))
        for folder in sorted(folders, reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()
        self.record = {"run": self.run, "files": []}
        self._write_record()

    def _write_record(self) -> None:
        write(self.path / RECORD, json.dumps(self.record, indent=1))

    def own(self, name: str) -> Path:
        """Where to write a file of this name; it is this run's from now on."""
        if name not in self.record["files"]:
            self.record["files"].append(name)
            self._write_record()
        return self.path / name

    def text(self, name: str, text: str) -> None:
        """Write a file of this run, whole or not at all."""
        write(self.own(name), text)

    def fill(self, make: Callable[[Path], None]) -> None:
        """Move what `make` writes into a folder to the output folder: a model."""
        made = self.path / PARTIAL / "model"
        shutil.rmtree(made, ignore_errors=True)
        make(made)
        # What marks a model comes last: without it there is none.
        names = sorted(_files(made), key=lambda name: (name in CHANGES_MEANING, name))
        for name in names:
            target = self.own(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            (made / name).replace(target)
        shutil.rmtree(self.path / PARTIAL, ignore_errors=True)

    def finish(self) -> None:
        """Say in the record that the model is the run's last."""
        self.record["finished"] = True
        self._write_record()

    @property
    def partial(self) -> Path:
        """Where a checkpoint is written before it is complete."""
        return self.path / PARTIAL

    def keep(self, step: int, about: dict[str, Any], limit: int | None, best: str | None) -> None:
        """Put the checkpoint that was written to `partial` in its place; drop the oldest ones over
        the limit, never the best.

        Args:
            about: what a run that goes on from it must agree with.
        """
        name = f"checkpoint-{step}"
        made, target = self.partial / name, self.path / name
        sizes = {file: (made / file).stat().st_size for file in _files(made)}
        record = {"run": self.run, "step": step, "sizes": sizes} | about
        write(made / RECORD, json.dumps(record, indent=1))
        for file in _files(made):
            _flush(made / file)
        if target in self._checkpoints(self.run):
            _drop(target)
        if target.exists():
            print(f"{target} is not this run's, and stays: checkpoint {step} was not saved")
            return
        made.rename(target)
        with suppress(OSError):  # not empty: what could not be put in its place
            self.partial.rmdir()
        if limit:
            kept = self._checkpoints(self.run)
            spare = [p for p in kept if p.name not in (name, best and Path(best).name)]
            for old in spare[: max(0, len(kept) - limit)]:
                _drop(old)

    def _checkpoints(self, run: str) -> list[Path]:
        """Those of a run, complete or not, the newest last."""
        found = []
        for path in self.path.glob("checkpoint-*"):
            record = read_checkpoint(path) if CHECKPOINT.fullmatch(path.name) else None
            if record and record["run"] == run and path.name == f"checkpoint-{record['step']}":
                found.append((record["step"], path))
        return [path for _, path in sorted(found)]

    def newest(self) -> Path | None:
        """This run's newest complete checkpoint."""
        complete = [path for path in self._checkpoints(self.run) if is_complete(path)]
        return complete[-1] if complete else None


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run's folder; None where there is none."""
    return _read(folder, {"run", "files"})


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The record of a checkpoint; None where there is none."""
    return _read(folder, {"run", "step", "sizes"})


def _read(folder: Path, needed: set[str]) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and needed <= record.keys() else None


def _recorded(checkpoint: Path) -> list[str]:
    """What was written as a checkpoint; the record, without which it is none, first."""
    return [RECORD, *read_checkpoint(checkpoint)["sizes"]]


def _drop(checkpoint: Path) -> None:
    """Remove a checkpoint; what others have put into it stays."""
    for name in _recorded(checkpoint):
        (checkpoint / name).unlink(missing_ok=True)
    for folder in sorted((checkpoint, *checkpoint.rglob("*")), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _flush(file: Path) -> None:
    """To the disk: a machine that dies later must not leave a file of zeros."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is there, in its size, and does not begin with the zeros
    that a machine leaves which dies while it writes."""
    record = read_checkpoint(checkpoint)
    if record is None:
        return False
    files = {name: checkpoint / name for name in record["sizes"]}
    return all(
        f.is_file() and f.stat().st_size == record["sizes"][n] and _is_written(f)
        for n, f in files.items()
    )


def _is_written(file: Path) -> bool:
    with file.open("rb") as opened:
        start = opened.read(64)
    return any(start) or not start


def write(path: Path, text: str) -> None:
    """A file that is there as a whole, or as it was."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    _flush(partial)
    partial.replace(path)


def _files(folder: Path) -> list[str]:
    """Every file in a folder, relative to it. Empty folders are nothing."""
    if not folder.is_dir():
        return []
    return sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink() or p.is_file()
    )


def _would_clash(name: str) -> bool:
    """Whether a run would write a file of this name, or would be misread with it beside."""
    top = name.split("/")[0]
    if "/" in name:
        return bool(CHECKPOINT.fullmatch(top))
    return name.startswith(("model.", "model-", "adapter_", "tokenizer", "log.jsonl")) or name in (
        *CHANGES_MEANING,
        "generation_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "fastkd.yaml",
        "curves.png",
        RECORD,
    )


def _is_own_name(path: Path, folder: Path) -> bool:
    top = path.relative_to(folder).parts[0]
    return top == PARTIAL or bool(CHECKPOINT.fullmatch(top))


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
