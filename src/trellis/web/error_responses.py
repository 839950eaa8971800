"""Errors as HTTP responses: one shape on pages, in fragments and in JSON."""

from __future__ import annotations

import logging
import secrets
from typing import cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ..errors import Conflict, EngineError, Invalid, NotFound, Refused, TrellisError
from ..errors import internal_error as unknown_error
from ..options import invalid_from_details
from .openai_errors import is_openai_path, to_openai_error
from .render import Renderer

log = logging.getLogger(__name__)

STATUS_BY_TYPE: tuple[tuple[type[TrellisError], int], ...] = (
    (Invalid, 422),
    (NotFound, 404),
    (Conflict, 409),
    (Refused, 403),
    (EngineError, 503),
)
STATUS_BY_CODE = {
    "too_many_tries": 429, "too_many_requests": 429, "wrong_password": 401, "too_large": 413,
    "out_of_memory": 409, "disk_full": 507, "not_found": 404, "permission_denied": 403, "timeout": 504, "network": 502,
    "corrupt_file": 422, "unsupported_architecture": 422, "unsupported_quantization": 422,
    "unsupported_tokenizer": 422, "unsupported_format": 422, "remote_code_refused": 422, "not_installed": 422,
}  # fmt: skip


def status_of(error: TrellisError) -> int:
    if error.code in STATUS_BY_CODE:
        return STATUS_BY_CODE[error.code]
    return next((status for kind, status in STATUS_BY_TYPE if isinstance(error, kind)), 500)


def install_error_handlers(app: FastAPI, render: Renderer) -> None:
    """Answer every kind of failure in the one shape."""

    def error_response(request: Request, error: TrellisError, status: int) -> Response:
        wants_page = "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/api/")
        if is_openai_path(request.url.path):
            status = 400 if status == 422 else status
            return JSONResponse(to_openai_error(error, status), status)
        if wants_page and "hx-request" not in request.headers:
            return render.html_response("error.html", status, error=error.as_json(), status=status)
        return JSONResponse({"error": error.as_json(), **error.details}, status)

    async def on_trellis_error(request: Request, raised: Exception) -> Response:
        error = cast(TrellisError, raised)
        return error_response(request, error, status_of(error))

    async def on_validation_error(request: Request, raised: Exception) -> Response:
        details = [
            finding | {"loc": [part for part in finding["loc"] if part not in ("body", "query", "path", "header")]}
            for finding in cast(RequestValidationError, raised).errors()
        ]
        if any(finding["type"] == "json_invalid" for finding in details):
            error = Invalid(
                "The request body isn't valid JSON.", code="bad_json", next_step="Send valid JSON.", fields=[]
            )
            return error_response(request, error, 422)
        return error_response(request, invalid_from_details(details), 422)

    async def on_http_exception(request: Request, raised: Exception) -> Response:
        http_error = cast(HTTPException, raised)
        status = http_error.status_code
        code, message, next_step = {
            404: ("not_found", f"Page not found: “{request.url.path[:80]}”.", "Check the address."),
            405: (
                "method_not_allowed",
                f"This address doesn't support {request.method}.",
                "See /openapi.json for what it supports.",
            ),
            413: ("too_large", "The request is too large.", "Send less at a time."),
        }.get(status, ("bad_request", str(http_error.detail)[:200], "Check the request and try again."))
        if status == 404 and is_openai_path(request.url.path):
            next_step = "Use /v1/models, /v1/chat/completions or /v1/completions."
        error = TrellisError(message, code=code, next_step=next_step)
        response = error_response(request, error, status)
        response.headers.update(http_error.headers or {})
        return response

    async def on_unexpected_error(request: Request, raised: Exception) -> Response:
        reference = secrets.token_hex(4)
        log.error("reference %s: %s %s", reference, request.method, request.url.path, exc_info=raised)
        return error_response(request, unknown_error(reference), 500)

    app.add_exception_handler(TrellisError, on_trellis_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, on_unexpected_error)
