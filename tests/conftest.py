"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they
are imported."""

import getpass
import os
import tempfile
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no folder is refused at once
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Code that torch.compile made for other vector instructions is wrong here, and its cache does not
# tell them apart.
capability = torch.backends.cpu.get_cpu_capability().replace(" ", "")
cache = Path(tempfile.gettempdir()) / f"torchinductor-{getpass.getuser()}-{capability}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


@pytest.fixture(params=["eager", "triton"])
def backend(request, monkeypatch):
    monkeypatch.setenv("FASTKD_BACKEND", request.param)
    return request.param
