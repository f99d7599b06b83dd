"""Installed as a newcomer does it, and packed."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INSTALLED = {d.metadata["Name"] for d in distributions()}  # looking for pip's spec has effects
pytestmark = pytest.mark.skipif(
    not ({"pip", "setuptools"} <= INSTALLED and shutil.which("git")),
    reason="needs pip, setuptools and git",
)
PIP = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index")
# `kernels` is another package's name: a folder of that name on the path must not pass for it.
SCRIPT = """
from importlib.util import find_spec
from pathlib import Path
import fastkd.kernels.limits
from fastkd import kd_loss
found = find_spec("kernels")
assert found is None or not str(found.origin).startswith(str(Path.cwd())), found
assert Path(fastkd.__file__).parents[1] == Path.cwd() / "fastkd", fastkd.__file__
if find_spec("transformers"):
    from transformers import AutoModelForCausalLM
"""


@pytest.fixture
def clone(tmp_path):
    """The working tree as git would have it, uncommitted files too, in a folder named fastkd."""
    listed = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    names = [name for name in names if name and os.path.lexists(ROOT / name)]
    if not names:
        pytest.skip("not in a git repository")
    for name in names:
        target = tmp_path / "fastkd" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return tmp_path / "fastkd"


def python(cwd, *arguments, executable=sys.executable):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(executable), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_editable_install_is_found_beside_the_clone(clone):
    """There the clone's own folder, without an __init__.py, is a namespace package of our name."""
    parent = clone.parent
    venv.create(parent / "venv", symlinks=True)
    (packages,) = (parent / "venv").glob("lib/python*/site-packages")
    present = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "zz_present.pth").write_text("\n".join(present))  # after all else
    executable = parent / "venv" / "bin" / "python"
    python(parent, *PIP, "-e", clone, executable=executable)
    (parent / "script.py").write_text(SCRIPT)
    python(parent, "script.py", executable=executable)
    python(parent, "-c", "from fastkd import kd_loss", executable=executable)


def test_a_wheel_made_of_the_source_distribution_holds_every_file(clone, tmp_path):
    """The link to kernels/ becomes a folder."""
    build = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    python(clone, "-c", build)
    (archive,) = tmp_path.glob("*.tar.gz")
    wheel = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index")
    python(tmp_path, *wheel, "-w", tmp_path, archive)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as packed:
        held = {name for name in packed.namelist() if name.startswith("fastkd/")}
    files = [p for p in (clone / "fastkd").rglob("*") if p.is_file()]
    expected = {str(p.relative_to(clone)) for p in files}
    expected |= {f"fastkd/kernels/{p.name}" for p in (clone / "kernels").glob("*.py")}
    assert {"fastkd/py.typed", "fastkd/kernels/limits.py"} < expected
    assert held == expected
