"""Check what is installed, the devices, memory, disk and folders, with a next step for each problem."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from .settings import Settings

REQUIRED_PACKAGES = ("torch", "transformers", "peft", "safetensors", "datasets", "fastapi", "uvicorn", "sqlalchemy")
OPTIONAL_PACKAGES = (("bitsandbytes", "8-bit and 4-bit", "quantized"), ("nvidia-ml-py", "free GPU memory", "gpu"))
"""Optional packages: what each is for, and the extra that installs it."""
MIN_FREE_DISK = 2_000_000_000
MIN_FREE_MEMORY = 2_000_000_000

DEVICE_PROBE = """
import json, torch
cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"threads": torch.get_num_threads(), "cuda": cuda}))
"""


@dataclass(frozen=True)
class CheckResult:
    name: str
    result: str
    ok: bool = True
    next_step: str = ""
    optional: bool = False


def run_checks(settings: Settings) -> list[CheckResult]:
    """Check everything that Trellis needs, without starting it."""
    return [
        _check_python(),
        *(_check_package(name) for name in REQUIRED_PACKAGES),
        *(_check_optional_package(*row) for row in OPTIONAL_PACKAGES),
        _check_devices(),
        _check_memory(),
        _check_save_folder(settings.save_dir),
        _check_disk(settings.save_dir),
        _check_demo_model(),
    ]


def _check_python() -> CheckResult:
    return CheckResult(
        "Python", platform.python_version(), sys.version_info >= (3, 11), "Install Python 3.11 or newer."
    )


def _check_package(name: str) -> CheckResult:
    try:
        return CheckResult(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return CheckResult(name, "not installed", False, f"Install it: pip install {name} (or `make install`).")


def _check_optional_package(name: str, purpose: str, extra: str) -> CheckResult:
    try:
        return CheckResult(name, f"{importlib.metadata.version(name)} ({purpose})")
    except importlib.metadata.PackageNotFoundError:
        install_hint = f"Optional: pip install 'trellis-studio[{extra}]'."
        return CheckResult(name, f"not installed ({purpose})", False, install_hint, optional=True)


def _check_devices() -> CheckResult:
    """Ask in a separate process: torch is heavy, and a broken driver must not crash this one."""
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and text
            [sys.executable, "-c", DEVICE_PROBE], capture_output=True, text=True, timeout=120, check=True
        )  # fmt: skip
        found = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        last = (detail.strip().splitlines() or ["?"])[-1]
        return CheckResult("Devices", f"torch fails to start: {last}", False, "Reinstall torch.")
    if found["cuda"]:
        return CheckResult("Devices", ", ".join(found["cuda"]))
    return CheckResult("Devices", f"CPU, {found['threads']} threads; no GPU (fine for small models)")


def _check_memory() -> CheckResult:
    free = psutil.virtual_memory().available
    return CheckResult(
        "Memory",
        f"{free / 1e9:.1f} GB free",
        free >= MIN_FREE_MEMORY,
        "Close other programs: a model needs at least 1 GB.",
    )


def _check_save_folder(folder: Path) -> CheckResult:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return CheckResult(
            "Save folder", f"{folder}: {error.strerror}", False, "Choose another folder with --save-dir."
        )
    return CheckResult("Save folder", f"{folder} is writable")


def _check_disk(folder: Path) -> CheckResult:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return CheckResult(
        "Disk", f"{free / 1e9:.1f} GB free", free >= MIN_FREE_DISK, f"Free disk space on the disk of {folder}."
    )


def _check_demo_model() -> CheckResult:
    files = Path(__file__).parent / "demo" / "text" / "model"
    there = (files / "model.safetensors").is_file() and os.access(files / "config.json", os.R_OK)
    return CheckResult(
        "Demo model", "installed" if there else "missing", there, "Run `make demo-model`, or reinstall Trellis."
    )
