"""The storeys: who may import whom."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastkd"
TRAINERS = ("transformers", "accelerate", "datasets", "peft", "trl", "lightning", "tokenizers")
ABOVE = ("recipes", "integrations", "training", "cli", "demo")  # of the loss, lowest first
# What a storey may import beside the loss's own modules, torch and the standard library.
MAY = {
    "loss": (),
    "recipes": ("fastkd.recipes", "transformers"),
    "integrations": (
        "fastkd.recipes",
        "fastkd.integrations",
        "transformers",
        "trl",
        "lightning",
        "accelerate",
        "peft",
    ),
}


def imports(path):
    """Every module that a file imports, at its top or inside of a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = path.relative_to(ROOT).with_suffix("").parts[: -node.level or None]
            base = ".".join([*parents, node.module or ""]) if node.level else node.module
            yield base
            yield from (f"{base.rstrip('.')}.{alias.name}" for alias in node.names)


def files(storey):
    every = [p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts]
    if storey != "loss":
        return [p for p in every if p.is_relative_to(PACKAGE / storey)]
    # `fastkd.data` is another name of a file of the trainer's; `__main__` is the command line.
    own = {f"{name}.py" for name in (*ABOVE, "data", "__main__")}
    return [
        p
        for p in every
        if p.relative_to(PACKAGE).parts[0] not in ABOVE
        and p.relative_to(PACKAGE).parts[0] not in own
    ]


def within(name, modules):
    return any(name == m or name.startswith(m + ".") for m in modules)


@pytest.mark.parametrize("storey", MAY)
def test_a_storey_knows_only_those_below(storey):
    closed = [f"fastkd.{name}" for name in ABOVE] + list(TRAINERS)
    seen = files(storey)
    assert seen
    for path in seen:
        for name in imports(path):
            allowed = within(name, MAY[storey]) or not within(name, closed)
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_kernels_import_nothing_of_fastkd():
    paths = list((ROOT / "kernels").glob("*.py"))
    assert paths
    for path in paths:
        for name in imports(path):
            inside = name.startswith("kernels")
            assert inside or within(name, ("torch", "triton", *sys.stdlib_module_names)), (
                path,
                name,
            )
            assert path.name != "limits.py" or not within(name, ("torch", "triton")), (path, name)


def test_few_parameters():
    """At most eight; what has more is a contract (`kd_loss`), or a kernel."""
    paths = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name != "kd_loss":
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                kernel = node.name.endswith("_kernel")
                assert kernel or len(arguments) <= 8, f"{path}:{node.lineno} {node.name}"


def test_import_brings_torch_alone():
    """And no CUDA context; and the name `kernels` stays free for its owner."""
    unwanted = ("triton", "kernels", "matplotlib", "yaml", *TRAINERS)
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastkd\n"
        f"bad = [m for m in {unwanted} if m in set(sys.modules) - before]\n"
        "bad += [m for m in sys.modules if m.startswith(('fastkd.training', 'fastkd.recipes'))]\n"
        "assert not bad and not torch.cuda.is_initialized(), bad\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
