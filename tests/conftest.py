"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they
are imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=["eager", "triton"])
def backend(request, monkeypatch):
    monkeypatch.setenv("FASTKD_BACKEND", request.param)
    return request.param
