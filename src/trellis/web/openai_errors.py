"""Errors in the shape that OpenAI's clients read. It knows errors and paths, not routes."""

from __future__ import annotations

from typing import Any

from ..errors import EngineError, TrellisError

OPENAI_CODES = {
    "prompt_too_long": "context_length_exceeded",
    "too_many_requests": "rate_limit_exceeded",
    "login_required": "invalid_api_key",
}
"""Our codes that have another name there."""


def is_openai_path(path: str) -> bool:
    """Whether who asks for this path expects OpenAI's shape."""
    return path == "/v1" or path.startswith("/v1/")


def to_openai_error(error: TrellisError, status: int = 400) -> dict[str, Any]:
    """An error in the shape that these clients know, under the status that it is answered with."""
    code = OPENAI_CODES.get(error.code, error.code)
    kind = "invalid_request_error"
    if status == 429 or code == "rate_limit_exceeded":
        kind = "rate_limit_error"
    elif status >= 500 or (isinstance(error, EngineError) and status not in (400, 404)):
        kind = "server_error"
    param = error.field.removeprefix("body.") if error.field else None
    return {"error": {"message": f"{error.message} {error.next_step}", "type": kind, "param": param, "code": code}}
