"""What the processor offers that numeric libraries choose their kernels by."""

from __future__ import annotations

import platform
from pathlib import Path

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "bf16", "sve")


def listed_features(cpuinfo: str) -> list[str]:
    """Those of FEATURES that the text of /proc/cpuinfo names (“flags” on x86, “Features” on ARM)."""
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    named = {word for key, _, words in lines if key.strip().lower() in ("flags", "features") for word in words.split()}
    return [feature for feature in FEATURES if feature in named]


def describe_processor() -> str:
    """The machine and its features; their names alone where the system does not list them."""
    listed = Path("/proc/cpuinfo")
    found = listed_features(listed.read_text()) if listed.is_file() else []
    return f"{platform.machine()} {' '.join(found) or platform.processor()}".strip()
