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

PARTS = ("torch", "transformers", "peft", "safetensors", "datasets", "fastapi", "uvicorn", "sqlalchemy")
EXTRAS = (("bitsandbytes", "8-bit and 4-bit", "quantized"), ("nvidia-ml-py", "free GPU memory", "gpu"))
"""Optional packages: what each is for, and the extra that installs it."""
ENOUGH_DISK = 2_000_000_000
ENOUGH_MEMORY = 2_000_000_000

PROBE = """
import json, torch
cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"threads": torch.get_num_threads(), "cuda": cuda}))
"""


@dataclass(frozen=True)
class Finding:
    what: str
    found: str
    ok: bool = True
    next_step: str = ""
    optional: bool = False


def examine(settings: Settings) -> list[Finding]:
    """Check everything that Trellis needs, without starting it."""
    return [
        _python(),
        *(_part(name) for name in PARTS),
        *(_extra(*row) for row in EXTRAS),
        _devices(),
        _memory(),
        _folder(settings.save_dir),
        _disk(settings.save_dir),
        _demo(),
    ]


def _python() -> Finding:
    return Finding("Python", platform.python_version(), sys.version_info >= (3, 11), "Install Python 3.11 or newer.")


def _part(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", False, f"Install it: pip install {name} (or `make install`).")


def _extra(name: str, purpose: str, extra: str) -> Finding:
    try:
        return Finding(name, f"{importlib.metadata.version(name)} ({purpose})")
    except importlib.metadata.PackageNotFoundError:
        way = f"Optional: pip install 'trellis-studio[{extra}]'."
        return Finding(name, f"not installed ({purpose})", False, way, optional=True)


def _devices() -> Finding:
    """Ask in a separate process: torch is heavy, and a broken driver must not crash this one."""
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and text
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120, check=True
        )  # fmt: skip
        found = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        last = (detail.strip().splitlines() or ["?"])[-1]
        return Finding("Devices", f"torch fails to start: {last}", False, "Reinstall torch.")
    if found["cuda"]:
        return Finding("Devices", ", ".join(found["cuda"]))
    return Finding("Devices", f"CPU, {found['threads']} threads; no GPU (fine for small models)")


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    return Finding(
        "Memory",
        f"{free / 1e9:.1f} GB free",
        free >= ENOUGH_MEMORY,
        "Close other programs: a model needs at least 1 GB.",
    )


def _folder(folder: Path) -> Finding:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("Save folder", f"{folder}: {error.strerror}", False, "Choose another folder with --save-dir.")
    return Finding("Save folder", f"{folder} is writable")


def _disk(folder: Path) -> Finding:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return Finding(
        "Disk", f"{free / 1e9:.1f} GB free", free >= ENOUGH_DISK, f"Free disk space on the disk of {folder}."
    )


def _demo() -> Finding:
    files = Path(__file__).parent / "demo" / "text" / "model"
    there = (files / "model.safetensors").is_file() and os.access(files / "config.json", os.R_OK)
    return Finding(
        "Demo model", "installed" if there else "missing", there, "Run `make demo-model`, or reinstall Trellis."
    )
