"""Read the tensors of a model folder with progress, check that they are finite, and compute the model's fingerprint.

Only safetensors files are read. It does not know models or tokenizers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import LoadFailed
from ...messages import Progress
from ...model_files import ModelFiles, canonical_config, inspect_folder
from ...options import Precision

INITIALIZING, READING, PARSING, PLACING, WARMING = 0.11, 0.15, 0.78, 0.8, 0.95
"""Where these stages begin as fractions of a load; reading takes the most time."""


PROGRESS_SECONDS = 0.05


MASK_NAMES = ("masked_bias", "attn.bias", "attention.bias")
"""Name suffixes of the masks in older files, in which infinite values are intended."""


def start_digests(path: Path, precision: Precision) -> list[Any]:
    """Begin a folder's fingerprints: over the canonical config.json for new sessions, then over its bytes, as older
    sessions have it. Precisions other than 32 bits have their own."""
    text = (path / "config.json").read_bytes()
    digests = [hashlib.sha256(canonical_config(text)), hashlib.sha256(text)]
    if precision != "32-bit":
        for digest in digests:
            digest.update(precision.encode())
    return digests


def fingerprints(path: Path) -> list[str]:
    """Return a folder's fingerprints in every precision. Raises LoadFailed."""
    precisions: tuple[Precision, ...] = ("32-bit", "16-bit", "8-bit", "4-bit")
    digests = [digest for precision in precisions for digest in start_digests(path, precision)]
    for file in inspect_folder(path).weight_paths:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    sampled = _sample_values(tensors.get_tensor(name))
                    for digest in digests:
                        digest.update(name.encode())
                        digest.update(sampled)
        except SafetensorError as error:
            raise incomplete_file_error(file, error) from None
    return [digest.hexdigest()[:32] for digest in digests]


def incomplete_file_error(file: Path, error: Exception) -> LoadFailed:
    return LoadFailed(
        f"The file “{file.name}” is not a complete safetensors file: {error}",
        code="corrupt_file",
        next_step="Copy or download the file again.",
    )


def not_readable_error(error: PermissionError) -> LoadFailed:
    return LoadFailed(
        f"No permission to read the file “{error.filename}”.",
        code="permission_denied",
        next_step="Give the studio's user read access.",
    )


def read_tensors(
    files: ModelFiles, dtype: torch.dtype | None, digests: list[Any]
) -> Generator[Progress | None, None, dict[str, Tensor]]:
    """Read all tensors in `dtype`, or as stored if it is None, each copied out of its file, and update the digests.

    Raises LoadFailed for an incomplete file or a value that is not finite.
    """
    paths = files.weight_paths
    total = sum(file.stat().st_size for file in paths)
    state: dict[str, Tensor] = {}
    done = 0
    started = last_report = time.monotonic()
    yield Progress(stage="reading", fraction=READING, message="Reading weights", bytes=0, total_bytes=total)
    for file in paths:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    stored = tensors.get_tensor(name)
                    sampled = _sample_values(stored)
                    for digest in digests:
                        digest.update(name.encode())
                        digest.update(sampled)
                    done += stored.nbytes
                    tensor = stored.to(dtype, copy=True) if dtype and stored.is_floating_point() else stored.clone()
                    if dtype and not is_finite_tensor(name, tensor):
                        raise non_finite_tensor_error(name, file.name, stored)
                    state[name] = tensor
                    now = time.monotonic()
                    if now - last_report < PROGRESS_SECONDS and last_report > started:
                        yield None
                        continue
                    last_report, seconds = now, max(now - started, 1e-6)
                    yield Progress(
                        stage="reading",
                        fraction=READING + (PARSING - READING) * min(done / total, 1.0),
                        message=f"Reading {file.name}",
                        bytes=done,
                        total_bytes=total,
                        rate=done / seconds,
                        seconds_left=max(total - done, 0) * seconds / done if done else None,
                    )
        except PermissionError as error:
            raise not_readable_error(error) from None
        except SafetensorError as error:
            raise incomplete_file_error(file, error) from None
    return state


def is_finite_tensor(name: str, tensor: Tensor) -> bool:
    """Whether all values are finite, in one pass: minimum and maximum are NaN or infinite if any value is.

    It takes a fifth of the time of copying the tensor (docs/log.md).
    """
    if not tensor.is_floating_point() or not tensor.numel() or name.endswith(MASK_NAMES):
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def non_finite_tensor_error(name: str, location: str, stored: Tensor) -> LoadFailed:
    count = int((~torch.isfinite(stored.float())).sum())
    if count:
        return LoadFailed(
            f"The tensor “{name}” in “{location}” contains {count} values that are not numbers (NaN or infinite).",
            code="corrupt_file",
            next_step="Copy or download the file again, or choose another model.",
        )
    return LoadFailed(
        f"The tensor “{name}” in “{location}” contains values that are too large for the precision.",
        code="corrupt_file",
        field="precision",
        next_step="Choose 32-bit.",
    )


def _sample_values(tensor: Tensor, pieces: int = 16) -> bytes:
    """Return values from all over a tensor: enough to tell models apart without hashing gigabytes."""
    flat = tensor.flatten()
    return flat[:: max(1, flat.numel() // (pieces * 16))].float().numpy().tobytes()
