"""Real text that every machine has: the source code of Python's own standard library.

The files are split by module name, so that the held-out text is the same on every machine (up to
the Python version) and nothing in it was seen by the teacher that fastkd ships.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

# Whole modules and packages, none of which is used for training or for the tokenizer.
HELD_OUT = frozenset(
    "argparse ast calendar concurrent dataclasses doctest fractions heapq imaplib json"
    " logging pathlib pprint queue shutil statistics tarfile textwrap uuid zipfile".split()
)
# Tests are not shipped by every distribution; code tables and generated parsers are not prose or
# code by hand.
SKIPPED = frozenset(
    "test tests idle_test site-packages dist-packages __pycache__ encodings lib2to3".split()
)


def stdlib_files(held_out: bool) -> list[Path]:
    """The standard library's source files in a fixed order: those held out, or all the others.

    Raises:
        FileNotFoundError: this Python was installed without the sources of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED.intersection(parts) and (parts[0] in HELD_OUT) == held_out:
            files.append(path)
    if not files:
        raise FileNotFoundError(f"no Python sources under {root}: name your own text with --data")
    return files


def stdlib_texts(held_out: bool) -> list[str]:
    """The text of `stdlib_files(held_out)`, one string per file."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files(held_out)]
