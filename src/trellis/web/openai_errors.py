"""Errors in OpenAI's shape. It knows errors and paths, not routes."""

from __future__ import annotations

from typing import Any

from ..errors import EngineError, TrellisError

OPENAI_CODES = {
    "prompt_too_long": "context_length_exceeded",
    "too_many_requests": "rate_limit_exceeded",
    "login_required": "invalid_api_key",
}
"""Our codes that OpenAI names otherwise."""


def is_openai_path(path: str) -> bool:
    """Return whether clients of this path expect OpenAI's shape."""
    return path == "/v1" or path.startswith("/v1/")


def to_openai_error(error: TrellisError, status: int = 400) -> dict[str, Any]:
    """Return an error in OpenAI's shape, for its HTTP status."""
    code = OPENAI_CODES.get(error.code, error.code)
    kind = "invalid_request_error"
    if status == 429 or code == "rate_limit_exceeded":
        kind = "rate_limit_error"
    elif status >= 500 or (isinstance(error, EngineError) and status not in (400, 404)):
        kind = "server_error"
    param = error.field.removeprefix("body.") if error.field else None
    return {"error": {"message": f"{error.message} {error.next_step}", "type": kind, "param": param, "code": code}}
