"""Errors of an engine explained to a person: each known condition once, whichever library raised it.

It does not import torch: library errors are recognized by class name and message.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable

from ..errors import TrellisError, shorten
from ..messages import Failed

log = logging.getLogger(__name__)


def explain_error(error: Exception) -> Failed:
    """Explain an error to a person. Known conditions are recognized by type or message; anything else is a bug, and
    logged."""
    if isinstance(error, TrellisError):
        return failed_event(error)
    if isinstance(error, OSError):
        return failed_event(disk_error(error))
    explanation = next(
        (known for known in (_explain_by_type(error), _explain_by_message(error)) if known is not None), None
    )
    if explanation is not None:
        log.warning("a request failed: %s", explanation.message, exc_info=error)
        return failed_event(explanation)
    log.error("a request failed", exc_info=error)
    return Failed(
        code="engine_bug",
        message=f"Something went wrong in the engine: {type(error).__name__}: {shorten(error, 1000)}",
        next_step="Try again. If it happens again, see the engine's log.",
    )


def _explain_by_type(error: Exception) -> TrellisError | None:
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module does not import
        return out_of_memory_error("the device's memory")
    if isinstance(error, MemoryError):
        return out_of_memory_error("this computer's memory")
    if isinstance(error, ImportError):
        return TrellisError(
            f"A required library can't be used: {shorten(error, 300)}.",
            code="not_installed",
            next_step="Install it where Trellis runs, then load the model again.",
        )
    if isinstance(error, NotImplementedError):
        return TrellisError(
            f"The device or precision lacks an operation of this model: {shorten(error, 300) or 'no details'}.",
            code="not_supported",
            next_step="Try another device, another precision, or the engine “transformers-eager”.",
        )
    return None


def out_of_memory_error(where: str) -> TrellisError:
    return TrellisError(
        f"Out of memory: not enough of {where}.",
        code="out_of_memory",
        next_step="Use fewer or shorter answers, a shorter context, or a smaller model.",
    )


def device_error(error: Exception) -> TrellisError:
    return TrellisError(
        f"The device failed: {shorten((str(error).splitlines() or ['no details'])[0], 300)}.",
        code="device_failed",
        next_step="Unload the model and load it again. If it happens again, load it on the CPU.",
    )


def damaged_file_error(error: Exception) -> TrellisError:
    return TrellisError(
        f"A weights file is damaged: {shorten(error, 300)}.",
        code="corrupt_file",
        next_step="Copy or download the model again. A session's weights are recomputed from its choices.",
    )


def disk_error(error: OSError) -> TrellisError:
    where = f" at “{error.filename}”" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TrellisError(
            f"The disk is full{where}.",
            code="disk_full",
            next_step="Free up disk space, then resume. Your choice is saved and is learned then.",
        )
    if isinstance(error, FileNotFoundError) and error.filename:
        return TrellisError(
            f"The file “{error.filename}” no longer exists.",
            code="disk_write",
            next_step="Put it back, then resume. Nothing else is lost.",
        )
    if isinstance(error, PermissionError) and error.filename:
        return TrellisError(
            f"No permission to read or write “{error.filename}”.",
            code="disk_write",
            next_step="Give the studio's user access to it, then resume.",
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TrellisError(
            "The engine has reached the limit of open files.",
            code="disk_write",
            next_step="Raise the limit (`ulimit -n`) and restart the studio.",
        )
    return TrellisError(
        f"The disk could not be read or written{where}: {error.strerror or shorten(error, 300) or 'no details'}.",
        code="disk_write",
        next_step="Check the studio's save folder, then resume. Your choice is saved and is learned then.",
    )


MESSAGE_PATTERNS: tuple[tuple[re.Pattern[str], Callable[[Exception], TrellisError]], ...] = (
    (re.compile(r"not enough memory|can't allocate memory|cannot allocate memory|bad_alloc", re.I),
     lambda error: out_of_memory_error("this computer's memory")),
    (re.compile(r"out of memory|ALLOC_FAILED", re.I), lambda error: out_of_memory_error("the device's memory")),
    # safetensors gives the kind of error only in the message
    (re.compile(r"os error 28\b"), lambda error: disk_error(OSError(errno.ENOSPC, "No space left on device"))),
    (re.compile(r"os error 122\b"), lambda error: disk_error(OSError(errno.EDQUOT, "Disk quota exceeded"))),
    (re.compile(r"os error (\d+)\b"), lambda error: disk_error(OSError(errno.EIO, shorten(error, 200)))),
    (re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|HIP error|MPS backend", re.I), device_error),
    (re.compile(r"HeaderTooLarge|HeaderTooSmall|InvalidHeader|MetadataIncompleteBuffer|deserializing header", re.I),
     damaged_file_error),
)  # fmt: skip
"""Conditions that libraries report only in their messages."""


def _explain_by_message(error: Exception) -> TrellisError | None:
    text = str(error)
    return next((explain(error) for pattern, explain in MESSAGE_PATTERNS if pattern.search(text)), None)


def failed_event(error: TrellisError) -> Failed:
    return Failed(
        code=error.code, message=error.message, next_step=error.next_step, field=error.field, details=error.details
    )
