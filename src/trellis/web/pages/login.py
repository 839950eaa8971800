"""Logging in and out with the owner's password."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ...errors import Refused
from ..error_responses import status_of
from ..login_guard import LOGIN_COOKIE, LOGIN_DAYS, LoginGuard, cookie_token
from ..render import get_renderer

router = APIRouter(include_in_schema=False)


def get_guard(request: Request) -> LoginGuard:
    guard: LoginGuard = request.app.state.guard
    return guard


@router.get("/login")
async def page(request: Request, next: str = "/") -> Response:
    if not get_guard(request).requires_password:
        return RedirectResponse("/", 303)
    return _render_form(request, next, None, 200)


@router.post("/login")
async def login(
    request: Request, password: Annotated[str, Form(max_length=1024)] = "", next: Annotated[str, Form()] = "/"
) -> Response:
    client = request.client.host if request.client else "unknown"
    try:
        token = await get_guard(request).login(password, client)
    except Refused as error:
        return _render_form(request, next, error, status_of(error))
    response = RedirectResponse(_safe_redirect_path(next), 303)
    response.set_cookie(
        LOGIN_COOKIE,
        token,
        max_age=LOGIN_DAYS * 86_400,
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
    return response


@router.post("/logout")
async def logout(request: Request) -> Response:
    await get_guard(request).logout(cookie_token(request.headers))
    response = RedirectResponse("/login", 303)
    response.delete_cookie(LOGIN_COOKIE)
    return response


def _render_form(request: Request, next: str, error: Refused | None, status: int) -> HTMLResponse:
    return get_renderer(request).html_response(
        "login.html", status, place="login", next=_safe_redirect_path(next), error=error.as_json() if error else None
    )


def _safe_redirect_path(next: str) -> str:
    """A path on this server, whatever was sent."""
    plain = next.startswith("/") and not next.startswith("//") and "\\" not in next and next.isprintable()
    return next if plain else "/"
