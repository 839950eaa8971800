"""From an engine's exit code to an error message with a next step."""

from __future__ import annotations

import signal
from pathlib import Path

from ..errors import EngineDied


def explain_exit(code: int | None, log: Path | None) -> EngineDied:
    """Explain why an engine's process ended. `code` is negative for a signal, None if unknown."""
    where = f" Log: {log}" if log else ""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return EngineDied(
            "The engine was killed, most likely because the computer ran out of memory.",
            next_step="It restarts by itself. If it happens again, close other programs or use a smaller model."
            + where,
        )
    if code in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL):
        return EngineDied(
            f"The engine crashed ({signal.Signals(-code).name}).",
            next_step="It restarts by itself. If it happens again, see the log." + where,
        )
    last = _last_line(log)
    return EngineDied(
        f"The engine stopped{'' if code is None else f' with exit code {code}'}{f': {last}' if last else ''}.",
        next_step="It restarts by itself. If it happens again, run `trellis doctor`." + where,
    )


def _last_line(log: Path | None) -> str:
    if log is None or not log.is_file():
        return ""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4096))
        lines = stream.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""
