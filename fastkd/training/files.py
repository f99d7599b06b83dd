"""Opening data: a file, a folder of files, a saved data set, or one of the hub.

What is in a file is taken as it is written there. So JSON and CSV are read here: the readers of
`datasets` turn texts like 2020-01-01, 007 or NA into dates, numbers and nulls, fill the objects of
a column up with each other's keys, and do not say where a file is broken.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import hashlib
import json
import logging
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from datasets import Dataset, DatasetDict, Features, Json, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.utils.logging import get_verbosity, set_verbosity
from huggingface_hub import metadata_load
from pyarrow.parquet import read_metadata

from fastkd.training.errors import InputError

KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
KINDS |= {".parquet": "parquet", ".arrow": "arrow", ".txt": "text", ".md": "text"}
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# The words by which `datasets` knows the files of a split, alone or between separators.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
NO_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|contributing|citation|data_?set_?card|datacard"
    r"|requirements)\b.*|config\.json|dataset_infos?\.json|dataset_dict\.json|state\.json",
    re.IGNORECASE,
)
CSV_FIELD_LIMIT = 2**31 - 1
INT64 = range(-(2**63), 2**63)
# In the names of what is cached: files that were read by other code are read again.
CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


class NoSplit(InputError):
    """The data are there, but not this split of them."""


def load_rows(source: str, split: str = "train", name: str | None = None) -> Dataset:
    """Open a file, a folder, a folder of `save_to_disk`, or a hub data set.

    A folder is read as `datasets.load_dataset(folder)` reads it: by the `configs` of its README,
    or by the names of splits in those of files and folders; hidden files, READMEs, licences and
    dataset cards are no data. Without such names all of it is "train". A path is never a pattern.
    Files may be compressed (.gz, .bz2, .xz). Values are those of the file: of CSV all are text, an
    empty field being none; JSON's are of their own type in every row. Text files are one document
    each.

    Args:
        source: path or hub name.
        split: which split of a folder, a saved or a hub data set; of a single file all is read.
        name: configuration of a hub data set, or of a folder whose README has some.

    Raises:
        InputError: nothing there, no rows, files of several or unknown kinds, or a broken file,
            with the line; `NoSplit`, a kind of it: no such split.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_info.json").exists() and (path / "state.json").exists():
            rows = _call(source, load_from_disk, str(path))
        elif (path / "dataset_dict.json").exists():
            saved: DatasetDict = _call(source, load_from_disk, str(path))
            if split not in saved:
                raise NoSplit(f"{source} has no split {split!r}, only {', '.join(saved)}")
            rows = saved[split]
        else:
            rows = _read(source, _files(source, path, split, name))
    elif path.exists():
        if _kind(path) is None:
            raise InputError(f"{source}: not a file of a known kind ({', '.join(KINDS)})")
        rows = _read(source, [path])
    else:
        if _kind(path) or path.is_absolute() or source.startswith((".", "~")):
            raise InputError(f"{source}: no such file or folder")
        rows = _hub(source, split, name)
    if not len(rows):
        raise InputError(f"{source} has no rows")
    return rows


def _hub(source: str, split: str, name: str | None) -> Dataset:
    try:
        return load_dataset(source, name, split=split)
    except Exception as error:  # of many kinds, from names to networks
        reason = _first_line(error)
        if "Unknown split" in reason:
            raise NoSplit(f"{source}: {reason}") from error
        raise InputError(
            f"{source}: no such file or folder, and as a hub data set: {reason}"
        ) from error


def _kind(path: Path) -> str | None:
    """What a file is by its name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes = suffixes[:-1]
    return KINDS.get(suffixes[-1]) if suffixes else None


def _files(source: str, folder: Path, split: str, name: str | None) -> list[Path]:
    """The files of a split in a folder."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith((".", "__")) for part in parts):
            if not NO_DATA.fullmatch(parts[-1]):
                found.append(path)
    if not any(map(_kind, found)):
        raise InputError(f"{source}: no data in this folder; known kinds: {', '.join(KINDS)}")
    splits = _configured(source, folder, name) or _named(folder, found)
    if split not in splits:
        raise NoSplit(f"{source} has no split {split!r}, only {', '.join(splits)}")
    chosen = [path for path in splits[split] if _kind(path)]
    kinds = sorted({_kind(path) for path in chosen})
    if len(kinds) != 1:
        there = f"files of several kinds ({', '.join(kinds)})" if kinds else "none"
        raise InputError(f"{source}: expected files of one kind, found {there}")
    return chosen


def _named(folder: Path, found: list[Path]) -> dict[str, list[Path]]:
    """The splits by the names of files, or of folders."""
    shards: dict[str, list[Path]] = {}
    for path in found:
        relative = path.relative_to(folder).as_posix()
        if match := re.match(r"data/([\w.]+)-\d{5}-of-\d{5}", relative):
            shards.setdefault(match[1], []).append(path)
    if shards:
        return shards
    for in_folders in (True, False):
        splits = {}
        for split, words in SPLITS.items():
            word = re.compile(rf"(?:^|[-._ 0-9])(?:{'|'.join(words)})(?:[-._ 0-9]|$)")
            chosen = []
            for path in found:
                *parents, file = path.relative_to(folder).parts
                if any(map(word.search, parents if in_folders else [file])):
                    chosen.append(path)
            if chosen:
                splits[split] = chosen
        if splits:
            return splits
    return {"train": found}


def _configured(source: str, folder: Path, name: str | None) -> dict[str, list[Path]]:
    """The splits that the README of a cloned data set lists; empty where it lists none."""
    card = folder / "README.md"
    try:
        metadata = metadata_load(card) if card.is_file() else None
    except Exception:  # no YAML: a README like others
        metadata = None
    configs = (metadata or {}).get("configs") if isinstance(metadata, dict) else None
    configs = [c for c in configs or [] if isinstance(c, dict) and c.get("data_files")]
    if not configs:
        return {}
    names = [str(config.get("config_name", "default")) for config in configs]
    if name is None:
        default = [i for i, c in enumerate(configs) if c.get("default") or names[i] == "default"]
        if not default and len(configs) > 1:
            raise InputError(f"{source} has several configurations: {', '.join(names)}; name one")
        config = configs[default[0] if default else 0]
    elif name in names:
        config = configs[names.index(name)]
    else:
        raise InputError(f"{source} has no configuration {name!r}, only {', '.join(names)}")
    entries = config["data_files"]
    entries = [entries] if isinstance(entries, str | dict) else entries
    splits: dict[str, list[Path]] = {}
    for entry in entries:
        entry = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        patterns = entry.get("path", [])
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            paths = sorted(folder / p for p in glob.glob(pattern, root_dir=folder, recursive=True))
            splits.setdefault(str(entry.get("split", "train")), []).extend(
                path for path in paths if path.is_file()
            )
    return splits


def _read(source: str, files: list[Path]) -> Dataset:
    """The rows of files of one kind."""
    kind = _kind(files[0])
    paths = [str(file.absolute()) for file in files]
    if kind in ("parquet", "arrow"):
        for file in files:
            if not file.stat().st_size:
                raise InputError(f"{file} is empty")
        if kind == "parquet":
            counts = [_call(file, read_metadata, file).num_rows for file in files]
            if not any(counts):
                raise InputError(f"{source} has no rows")
        escaped = [glob.escape(path) for path in paths]
        return _call(source, load_dataset, kind, data_files=escaped, split="train")
    columns = _columns(files)
    if not columns:
        empty = ", ".join(map(str, files[:3]))
        raise InputError(f"{empty}: no rows" + (" in all of them" if len(files) > 1 else ""))
    types = {"string": Value("string"), "int": Value("int64"), "float": Value("float64")}
    types |= {"bool": Value("bool"), "ints": List(Value("int64")), "null": Value("string")}
    features = Features({key: types.get(kind, Json()) for key, kind in columns.items()})
    # Part of the name under which the rows are cached.
    stats = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    given = {"paths": tuple(paths), "columns": columns, "stats": stats, "code": CODE}
    return _call(source, Dataset.from_generator, _generate, features=features, gen_kwargs=given)


def _call(source: str, function: Any, *args: Any, **options: Any) -> Any:
    """Of the library, with one line for whatever goes wrong."""
    verbosity = get_verbosity()
    set_verbosity(logging.CRITICAL)  # it logs what it then raises
    try:
        return function(*args, **options)
    except InputError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        if isinstance(cause, InputError):
            raise cause from error
        raise InputError(f"{source} cannot be opened: {_first_line(cause or error)}") from error
    finally:
        set_verbosity(verbosity)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _generate(paths: tuple[str, ...], columns: dict[str, str], stats: Any, code: str) -> Iterator:
    for path in paths:
        for _, row in _rows(Path(path)):
            yield {
                key: _stored(row[key], kind) if row.get(key) is not None else None
                for key, kind in columns.items()
            }


def _stored(value: Any, kind: str) -> Any:
    # As text, since `Json` would take a string that reads like JSON for the value it writes.
    return json.dumps(value, ensure_ascii=False) if kind == "json" else value


def _columns(files: list[Path]) -> dict[str, str]:
    """Each column's type over all rows: a simple one if all values have it, else "json"."""
    columns: dict[str, str] = {}
    for file in files:
        for place, row in _rows(file):
            for key, value in row.items():
                kind, known = _type(value), columns.get(key, "null")
                if kind == "json" and "\\ud" in json.dumps(value):
                    _check_text(json.dumps(value, ensure_ascii=False), file, place)
                elif kind == "string":
                    _check_text(value, file, place)
                if known == "null" or {known, kind} == {"ints", "list"}:
                    columns[key] = "ints" if "ints" in (known, kind) else kind
                elif kind not in (known, "null"):
                    columns[key] = "json"
    return columns


def _type(value: Any) -> str:
    if isinstance(value, list):
        if not value:
            return "list"
        return "ints" if all(type(x) is int and x in INT64 for x in value) else "json"
    kinds = {str: "string", int: "int", float: "float", bool: "bool", type(None): "null"}
    kind = kinds.get(type(value), "json")
    return "json" if kind == "int" and value not in INT64 else kind


def _check_text(text: str, file: Path, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise InputError(f"{file}, {place}: {half} is half of a character") from error


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with the place where it stands."""
    opened = COMPRESSED.get(file.suffix.lower(), open)
    read = {"json": _json, "csv": _csv, "text": _text}[_kind(file)]
    try:
        with opened(file, "rb") as stream:
            yield from read(file, stream)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"{file} cannot be read: {_first_line(error)}") from error


def _lines(file: Path, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Numbered from 1, decoded, without a byte order mark."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise InputError(f"{file} is UTF-16 text; save it as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise InputError(f"{file}, line {number}: byte 0x{byte:02x} is no UTF-8") from error


def _json(file: Path, stream: BinaryIO) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = _lines(file, stream)
    number, first = next(((n, line) for n, line in lines if line.strip()), (0, ""))
    if not number:
        return
    row = None
    if not first.lstrip().startswith("["):
        try:
            row = _parsed(first)
        except json.JSONDecodeError as error:
            if ".json" not in (suffix.lower() for suffix in file.suffixes):
                raise _broken(file, number, error) from error
    if row is None:  # an array, or an object of several lines
        yield from _json_whole(file, number, first + "".join(line for _, line in lines))
        return
    yield f"line {number}", _object(file, f"line {number}", row)
    for number, line in lines:
        if line.strip():
            try:
                row = _parsed(line)
            except json.JSONDecodeError as error:
                raise _broken(file, number, error) from error
            yield f"line {number}", _object(file, f"line {number}", row)


def _json_whole(file: Path, first: int, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """An array of rows, or a single one."""
    try:
        rows = _parsed(text)
    except json.JSONDecodeError as error:
        raise _broken(file, first + error.lineno - 1, error) from error
    for i, row in enumerate(rows if isinstance(rows, list) else [rows]):
        yield f"row {i}", _object(file, f"row {i}", row)


def _parsed(text: str) -> Any:
    # NaN and the infinities are no JSON, but Python and pandas write them: no value.
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deep", text, 0) from error


def _broken(file: Path, number: int, error: json.JSONDecodeError) -> InputError:
    return InputError(f"{file}, line {number}: not JSON: {error.msg} at column {error.colno}")


def _object(file: Path, place: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{file}, {place}: expected an object with columns, got {row!r:.60}")
    return row


def _csv(file: Path, stream: BinaryIO) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    tabs = ".tsv" in (suffix.lower() for suffix in file.suffixes)
    text = (line for _, line in _lines(file, stream))
    lines = csv.reader(text, delimiter="\t" if tabs else ",", strict=True)
    header: list[str] | None = None
    while True:
        begin = lines.line_num + 1
        try:
            fields = next(lines, None)
        except csv.Error as error:
            reason = "a quote that is not closed" if "end of data" in str(error) else error
            raise InputError(f"{file}, line {begin}: {reason}") from error
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = fields
            twice = sorted({key for key in header if key and header.count(key) > 1})
            if twice:
                raise InputError(f"{file} has the column {', '.join(twice)} twice")
            continue
        if len(fields) != len(header):
            raise InputError(
                f"{file}, line {begin}: {len(fields)} fields under {len(header)} columns"
            )
        place = f"line {begin}"
        # A column without a name is the index that pandas writes.
        yield place, {key: x or None for key, x in zip(header, fields, strict=True) if key}


def _text(file: Path, stream: BinaryIO) -> Iterator[tuple[str, dict[str, Any]]]:
    text = "".join(line for _, line in _lines(file, stream))
    if text.strip():
        yield "line 1", {"text": text}
