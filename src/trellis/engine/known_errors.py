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
        message=f"The engine met an error it does not know: {type(error).__name__}: {shorten(error, 1000)}",
        next_step="Try again. If it comes back, the engine's log has the details.",
    )


def _explain_by_type(error: Exception) -> TrellisError | None:
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module does not import
        return out_of_memory_error("the device's memory")
    if isinstance(error, MemoryError):
        return out_of_memory_error("this computer's memory")
    if isinstance(error, ImportError):
        return TrellisError(
            f"A library that this needs cannot be used: {shorten(error, 300)}.",
            code="not_installed",
            next_step="Install it where Trellis runs, and load the model again.",
        )
    if isinstance(error, NotImplementedError):
        return TrellisError(
            f"The device or the precision does not know a step of this model: {shorten(error, 300) or 'no details'}.",
            code="not_supported",
            next_step="Load it on another device, in another precision, or with the engine “transformers-eager”.",
        )
    return None


def out_of_memory_error(where: str) -> TrellisError:
    return TrellisError(
        f"There was not enough of {where} for this.",
        code="out_of_memory",
        next_step="Use fewer or shorter options, a shorter context, or a smaller model.",
    )


def device_error(error: Exception) -> TrellisError:
    return TrellisError(
        f"The device failed: {shorten((str(error).splitlines() or ['no details'])[0], 300)}.",
        code="device_failed",
        next_step="Unload the model and load it again. If it comes back, load it on the CPU.",
    )


def damaged_file_error(error: Exception) -> TrellisError:
    return TrellisError(
        f"A file of weights is damaged: {shorten(error, 300)}.",
        code="corrupt_file",
        next_step="Copy or download the model again. Weights of a session are worked out again from its log.",
    )


def disk_error(error: OSError) -> TrellisError:
    where = f" at “{error.filename}”" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TrellisError(
            f"The disk is full{where}.",
            code="disk_full",
            next_step="Make room on the disk, then resume: the choice is kept and is learned from then.",
        )
    if isinstance(error, FileNotFoundError) and error.filename:
        return TrellisError(
            f"The file “{error.filename}” is not there any more.",
            code="disk_write",
            next_step="Put it back, then resume: nothing else is lost.",
        )
    if isinstance(error, PermissionError) and error.filename:
        return TrellisError(
            f"The file “{error.filename}” may not be read or written.",
            code="disk_write",
            next_step="Give the studio's user the right to it, then resume.",
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TrellisError(
            "The engine may not open more files.",
            code="disk_write",
            next_step="Raise the limit of open files (`ulimit -n`), and start the studio again.",
        )
    return TrellisError(
        f"The disk could not be read or written{where}: {error.strerror or shorten(error, 300) or 'no details'}.",
        code="disk_write",
        next_step="Check the studio's save folder, then resume: the choice is kept and is learned from then.",
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
        code=error.code,
        message=error.message,
        next_step=error.next_step,
        field=error.field,
        details=error.details,
    )
