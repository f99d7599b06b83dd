"""The command line: `fastkd distill`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from importlib.util import find_spec
from typing import TYPE_CHECKING

import fastkd

if TYPE_CHECKING:
    from fastkd.training.config import DistillConfig

NEEDED = ("accelerate", "datasets", "tqdm", "transformers", "yaml")
USAGE = """\
fastkd distill
           a demonstration on this machine's CPU: a small student with and without a teacher
       fastkd distill --teacher T --student S --data D --output O [--setting value ...]
           distil your own models; `fastkd distill --help` lists the settings
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; default: the process's own.

    Returns:
        The exit status: 0, or 2 for input that cannot work.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = ArgumentParser("fastkd", usage=USAGE)
    parser.add_argument("--version", action="version", version=f"fastkd {fastkd.__version__}")
    parser.add_argument("command", choices=["distill"], help="what to do")
    parser.parse_args(argv[:1])

    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        needs = f"distill needs {', '.join(missing)}: pip install 'fastkd[train]'"
        print(f"fastkd: error: {needs}", file=sys.stderr)
        return 2

    from fastkd.training.config import InputError

    try:
        if not argv[1:]:
            from fastkd import demo

            demo.run()
        else:
            config = parse(argv[1:])
            config.check()
            from fastkd.training.train import distill

            distill(config)
    except InputError as error:
        print(f"fastkd: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str]) -> DistillConfig:
    """The `DistillConfig` that flags name, over those of a `--config` file.

    Raises:
        InputError: unknown flags, or a file that cannot be read or has unknown keys.
    """
    from transformers import HfArgumentParser

    from fastkd.training.config import DistillConfig, InputError, flags_from_yaml

    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path, flags = first.parse_known_args(argv)
    parser = HfArgumentParser(
        DistillConfig,
        prog="fastkd distill",
        usage="fastkd distill [--config FILE] [--setting value ...]",
        description="Train a student on a teacher. Without any flag: a demonstration.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of these settings; flags override it.")
    from_file = flags_from_yaml(path.config) if path.config else []
    config, _, unknown = parser.parse_args_into_dataclasses(
        from_file + flags, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise InputError(
            f"unknown: {' '.join(unknown)}; `fastkd distill --help` lists the settings"
        )
    return config


if __name__ == "__main__":
    sys.exit(main())
