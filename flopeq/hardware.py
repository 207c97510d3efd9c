"""The name of the device, and whether torch.compile works on this machine."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from pathlib import Path

import torch


def can_compile(device: torch.device | str) -> bool:
    """Whether torch.compile can run: it needs a C++ compiler and Python's headers, and Triton on a GPU."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if not headers.is_file() or not any(shutil.which(name) for name in compilers if name):
        return False
    if torch.device(device).type == "cpu":
        return True
    from torch.utils._triton import has_triton

    return has_triton()


def device_name(device: torch.device | str) -> str:
    """The name of the GPU, or `cpu`."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def hardware_name(device: torch.device | str) -> str:
    """The name of the GPU; for a CPU, the model name that Linux reports, else the architecture."""
    if torch.device(device).type == "cuda":
        return device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()
