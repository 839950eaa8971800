"""Logging in and out with the owner's password."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ...errors import Refused
from ..access import COOKIE, LOGIN_DAYS, Guard, cookie_token
from ..error_responses import status_of
from ..render import render_of

router = APIRouter(include_in_schema=False)


def guard_of(request: Request) -> Guard:
    guard: Guard = request.app.state.guard
    return guard


@router.get("/login")
async def page(request: Request, next: str = "/") -> Response:
    if not guard_of(request).wanted:
        return RedirectResponse("/", 303)
    return _form(request, next, None, 200)


@router.post("/login")
async def login(
    request: Request, password: Annotated[str, Form(max_length=1024)] = "", next: Annotated[str, Form()] = "/"
) -> Response:
    client = request.client.host if request.client else "unknown"
    try:
        token = await guard_of(request).login(password, client)
    except Refused as error:
        return _form(request, next, error, status_of(error))
    response = RedirectResponse(_own_path(next), 303)
    response.set_cookie(
        COOKIE,
        token,
        max_age=LOGIN_DAYS * 86_400,
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
    return response


@router.post("/logout")
async def logout(request: Request) -> Response:
    await guard_of(request).logout(cookie_token(request.headers))
    response = RedirectResponse("/login", 303)
    response.delete_cookie(COOKIE)
    return response


def _form(request: Request, next: str, error: Refused | None, status: int) -> HTMLResponse:
    return render_of(request).page(
        "login.html", status, place="login", next=_own_path(next), error=error.as_json() if error else None
    )


def _own_path(next: str) -> str:
    """A path on this server, whatever was sent."""
    plain = next.startswith("/") and not next.startswith("//") and "\\" not in next and next.isprintable()
    return next if plain else "/"
