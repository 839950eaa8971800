"""How much memory is free: this computer's, within what its container and a setting allow, and a GPU's."""

from __future__ import annotations

import importlib
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

CGROUP = Path("/sys/fs/cgroup")


def free_memory(limit: int = 0) -> int:
    """Bytes that a new engine may take. `limit` is the most that one engine is allowed; 0 is no limit."""
    free: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        most = int((CGROUP / "memory.max").read_text())  # “max” is not a number: no limit
        free = min(free, max(0, most - int((CGROUP / "memory.current").read_text())))
    return min(free, limit) if limit else free


def free_gpu_memory() -> int | None:
    """Free bytes of the first GPU; None where there is none, or where nvidia-ml-py is not installed to ask it."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0)).free)
    except nvml.NVMLError:
        return None


@cache
def _nvml() -> Any:
    """NVIDIA's library, ready to be asked; None where it or a driver is missing. Looked for once."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # noqa: BLE001 - the library raises a type of its own for every driver's trouble
        return None
    return nvml
