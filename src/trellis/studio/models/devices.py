"""How much memory is free, this computer's within what its container and a setting allow, and a GPU's; and whether the
power lasts."""

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


def may_foresee(setting: Literal["on", "mains", "off"]) -> Callable[[], bool]:
    """Whether the studio may work at what nobody asked for yet, as it is asked each time."""

    def may() -> bool:
        return setting == "on" or (setting == "mains" and on_mains())

    return may


def on_mains() -> bool:
    """Whether this computer is plugged in, or has no battery."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return battery is None or battery.power_plugged is not False


@cache
def _nvml() -> Any:
    """NVIDIA's library, ready to be asked; None where it or a driver is missing. Looked for once."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # noqa: BLE001 - the library raises a type of its own for every driver's trouble
        return None
    return nvml
