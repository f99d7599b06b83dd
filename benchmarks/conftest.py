"""What a saved result says of the machine: the device and the versions, no names."""

import os
import platform
from importlib.metadata import version

import pytest
import torch


def pytest_benchmark_update_machine_info(config, machine_info):
    cpu = machine_info.get("cpu", {})
    machine_info.clear()
    machine_info["device"] = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else cpu.get("brand_raw", platform.machine())
    )
    machine_info["threads"] = torch.get_num_threads()
    machine_info["python"] = platform.python_version()
    for package in ("torch", "triton", "liger-kernel", "trl"):
        try:
            machine_info[package] = version(package)
        except ImportError:
            machine_info[package] = None


def pytest_benchmark_update_commit_info(config, commit_info):
    kept = {k: commit_info[k] for k in ("id", "dirty") if k in commit_info}
    commit_info.clear()
    commit_info.update(kept)


@pytest.fixture(scope="session", autouse=True)
def threads():
    torch.set_num_threads(min(2, os.cpu_count() or 1) if not torch.cuda.is_available() else 8)
