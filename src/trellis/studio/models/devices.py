"""Free memory of this computer (within the limits of its container and settings) and of its GPU; mains power."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil

CGROUP = Path("/sys/fs/cgroup")


def free_memory(limit: int = 0) -> int:
    """Return the bytes that a new engine may take. `limit` is a cap for one engine; 0 is none."""
    free: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        container_limit = int((CGROUP / "memory.max").read_text())  # “max”, which is not a number, means no limit
        free = min(free, max(0, container_limit - int((CGROUP / "memory.current").read_text())))
    return min(free, limit) if limit else free


def free_gpu_memory() -> int | None:
    """Return the free bytes of the first GPU; None without one, or without nvidia-ml-py."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0)).free)
    except nvml.NVMLError:
        return None


def make_foresight_check(setting: Literal["on", "mains", "off"]) -> Callable[[], bool]:
    """Return a function that tells whether foresight may run now."""

    def is_allowed() -> bool:
        return setting == "on" or (setting == "mains" and has_mains_power())

    return is_allowed


def has_mains_power() -> bool:
    """Return whether this computer is plugged in, or has no battery."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return battery is None or battery.power_plugged is not False


@cache
def _nvml() -> Any:
    """Return NVIDIA's library, initialized; None where it or the driver is missing. Tried once."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # noqa: BLE001 - the library raises a type of its own for every driver's trouble
        return None
    return nvml
