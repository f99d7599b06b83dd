"""The command line: `fastkd distill` and `fastkd generate`."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
import textwrap
from importlib.util import find_spec
from typing import Any

import fastkd
from fastkd.training import settings
from fastkd.training.errors import InputError, one_line

NEEDED = ("accelerate", "datasets", "jinja2", "matplotlib", "tqdm", "transformers", "yaml")
USAGE = """\
usage: fastkd distill
           a demonstration on this machine's CPU: a small student with and
           without a teacher
       fastkd distill --teacher T --student S --data D --output O
           distil your own models: `fastkd distill --help` lists the settings
       fastkd generate --teacher T --data PROMPTS --output ANSWERS.jsonl
           a teacher's answers, as data: `fastkd generate --help`
       fastkd --version
"""
WIDTH, INDENT = 79, 30


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; default: the process's own.

    Returns:
        The exit status: 0; 2 for input that cannot work; 1 where the training went wrong; 130 after
        Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = {"distill": _distill, "generate": _generate}
    if argv[:1] == ["--version"]:
        print(f"fastkd {fastkd.__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if argv else 2
    command, *flags = argv
    try:
        if command not in commands:
            raise InputError(f"unknown command {command!r}; known: {', '.join(commands)}")
        if any(flag in ("-h", "--help", "help") for flag in flags):
            print(help_of(command), end="")
            return 0
        missing = [name for name in NEEDED if find_spec(name) is None]
        if missing:
            raise InputError(f"{command} needs {', '.join(missing)}: pip install 'fastkd[train]'")
        return commands[command](flags)
    except InputError as error:
        _complain(error)
        return 2
    except FloatingPointError as error:
        _complain(error)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        _complain(one_line(error))  # no space, no permission
        return 1
    except KeyboardInterrupt:
        _complain("stopped by Ctrl-C")
        return 130


def _distill(flags: list[str]) -> int:
    if not flags:
        from fastkd import demo

        demo.run()
        return 0
    from fastkd.training.config import parse

    config = parse(flags)
    from fastkd.training.run import distill

    return 130 if distill(config).interrupted else 0


def _generate(flags: list[str]) -> int:
    from fastkd.training.config import read

    (chosen,), _ = read(flags, [settings.GenerateSettings], {})
    from fastkd.training.generate import generate

    generate(chosen)
    return 0


def _complain(error: Any) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes, one is enough
        print(f"fastkd: error: {error}", file=sys.stderr)


def help_of(command: str) -> str:
    """What `--help` prints; made without transformers, which takes seconds to import."""
    if command == "generate":
        title = "fastkd generate --teacher T --data PROMPTS --output ANSWERS.jsonl"
        groups = [(_title(settings.GenerateSettings), _fields(settings.GenerateSettings))]
        end = ""
    else:
        title = "fastkd distill [--config FILE] [--setting value ...]"
        groups = [(_title(group), _fields(group)) for group in settings.GROUPS]
        ours = settings.DEFAULTS
        training = [(n, str(ours.get(n, "")), text) for n, text in settings.TRAINING.items()]
        groups.append(("The training, by transformers' names", training))
        end = (
            "\nAll other settings of transformers' TrainingArguments are taken by their names:"
            "\nhttps://huggingface.co/docs/transformers/main_classes/trainer\n"
            "--config FILE: a YAML file of settings; flags override it.\n"
        )
    lines = [f"usage: {title}"]
    for name, rows in groups:
        lines += ["", f"{name}:"]
        for flag, default, text in rows:
            lines += _row(flag, f"{text} [{default}]" if default else text)
    return "\n".join(lines) + "\n" + end


def _title(group: type) -> str:
    return (group.__doc__ or "").rstrip(".")


def _fields(group: type) -> list[tuple[str, str, str]]:
    """(name, default, text) of every setting."""
    rows = []
    for field in dataclasses.fields(group):
        default = "" if field.default in (dataclasses.MISSING, None) else str(field.default)
        name = field.name
        if field.default is True:
            name, default = f"no_{name}", ""
        elif field.default is False:
            default = ""
        rows.append((name, default, field.metadata["help"]))
    return rows


def _row(flag: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH - INDENT)
    head = f"  --{flag}"
    if len(head) >= INDENT:
        return [head, *(" " * INDENT + line for line in lines)]
    return [head.ljust(INDENT) + lines[0], *(" " * INDENT + line for line in lines[1:])]


if __name__ == "__main__":
    sys.exit(main())
