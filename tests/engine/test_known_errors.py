"""Known conditions reach a person as known errors, whichever library raised them."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from trellis.engine.known_errors import explain_error
from trellis.errors import Conflict

pytestmark = pytest.mark.engine


def raised(work: Any) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one it is is the question
        work()
    assert isinstance(caught.value, Exception)
    return caught.value


CASES: list[tuple[Exception, str]] = [
    (OSError(errno.ENOSPC, "No space left on device", "/a"), "disk_full"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full"),
    (OSError(errno.EIO, "Input/output error"), "disk_write"),
    (OSError(errno.EMFILE, "Too many open files"), "disk_write"),
    (OSError(), "disk_write"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a"), "disk_write"),
    (PermissionError(errno.EACCES, "Permission denied", "/a"), "disk_write"),
    (MemoryError(), "out_of_memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "out_of_memory"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), "out_of_memory"),
    (RuntimeError("CUDA error: out of memory"), "out_of_memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), "out_of_memory"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "out_of_memory"),
    (RuntimeError("std::bad_alloc"), "out_of_memory"),
    (RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be"), "device_failed"),
    (SafetensorError("Error while serializing: IoError(Os { code: 28 }) os error 28"), "disk_full"),
    (SafetensorError("Error while deserializing header: HeaderTooLarge"), "corrupt_file"),
    (ModuleNotFoundError("No module named 'flash_attn'"), "not_installed"),
    (NotImplementedError("'addmm_impl_cpu_' not implemented for 'Half'"), "not_supported"),
    (NotImplementedError(), "not_supported"),
    (Conflict("It stands.", code="own", next_step="Go."), "own"),
]


@pytest.mark.parametrize(("error", "code"), CASES, ids=lambda value: str(value)[:40])
def test_a_known_condition_has_its_code_and_a_way_out(error: Exception, code: str) -> None:
    failed = explain_error(error)
    assert failed.code == code, failed
    assert failed.message.endswith(".")
    assert failed.next_step.endswith(".")
    assert type(error).__name__ not in failed.message


def test_a_bug_is_told_as_one_and_briefly() -> None:
    failed = explain_error(KeyError("x" * 100_000))
    assert failed.code == "engine_bug"
    assert len(failed.message) < 1200


def test_what_the_libraries_really_raise_is_known(tmp_path: Path) -> None:
    (tmp_path / "torn").write_bytes(b"\xff" * 30)
    for work, code in (
        (lambda: safe_open(tmp_path / "torn", framework="pt"), "corrupt_file"),
        (lambda: torch.empty(2**60, dtype=torch.uint8), "out_of_memory"),
        (lambda: __import__("a_library_that_nobody_has"), "not_installed"),
    ):
        assert explain_error(raised(work)).code == code
