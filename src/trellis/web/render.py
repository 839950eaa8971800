"""Render templates. The only caller of Jinja; everything is escaped."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse

from .. import __version__
from . import numbers

HERE = Path(__file__).parent
STATIC = HERE / "static"
OPTION_LETTERS = "ABCDEFGH"


def _hash_static_files() -> str:
    """Return a hash of all static files, so that browsers may cache them forever."""
    digest = hashlib.sha256()
    for file in sorted(STATIC.rglob("*")):
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


STATIC_VERSION = _hash_static_files()
"""Part of the URL of every static file, so that modules that import each other have the same version."""


class Renderer:
    """Templates, loaded once and kept."""

    def __init__(self, can_log_out: bool) -> None:
        self._environment = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.globals.update(
            version=__version__, static=f"/static/{STATIC_VERSION}", letters=OPTION_LETTERS, can_log_out=can_log_out,
            locale=numbers.reader_locale,
        )  # fmt: skip
        self._environment.filters.update(
            ago=format_age, number=numbers.number, count=numbers.number, percent=numbers.percent,
            compact=numbers.compact,
            factor=numbers.factor, size=numbers.size, duration=numbers.duration,
        )  # fmt: skip

    def html_response(self, template: str, status: int = 200, /, **values: Any) -> HTMLResponse:
        return HTMLResponse(self.render(template, **values), status)

    def render(self, template: str, /, **values: Any) -> str:
        return self._environment.get_template(template).render(values)


def get_renderer(request: Request) -> Renderer:
    render: Renderer = request.app.state.render
    return render


def format_age(timestamp: str) -> str:
    """How long ago, roughly."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(timestamp)).total_seconds()
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            number = int(seconds // length)
            return f"{number} {unit}{'s' if number > 1 else ''} ago"
    return "just now"
