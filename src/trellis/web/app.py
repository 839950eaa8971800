"""The web application: routes, lifespan and error pages, built from parts that are handed in."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Scope

from .. import __version__
from ..settings import Settings
from ..studio.studio import Studio
from . import chat_socket, error_responses
from .access import MAX_BODY, AccessMiddleware
from .api import blind_test as blind_api
from .api import connections as connections_api
from .api import exports as exports_api
from .api import health
from .api import jobs as jobs_api
from .api import models as models_api
from .api import openai as openai_api
from .api import retraining as fits_api
from .api import rooms as rooms_api
from .api import steering as steering_api
from .api import uploads as uploads_api
from .broadcast import FrameCache
from .login_guard import LoginGuard
from .pages import login, models
from .pages.chat import connections, rooms
from .pages.review import blind_test, retraining, review
from .pages.steering import setup, workbench
from .rate_limits import RateLimiter
from .render import STATIC, STATIC_VERSION, Renderer


class VersionedStaticFiles(StaticFiles):
    """Static files at a versioned URL, which may be cached forever."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        if response.status_code == 200:
            response.headers["cache-control"] = "public, max-age=31536000, immutable"
        return response


def create_app(studio: Studio, settings: Settings) -> ASGIApp:
    """Return the application over a studio, which it opens and closes."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await studio.open()
        try:
            yield
        finally:
            await studio.close()

    app = FastAPI(
        title="Trellis", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, max_body_size=MAX_BODY
    )
    guard = LoginGuard(settings, studio.store)
    app.state.studio = studio
    app.state.guard = guard
    app.state.answering = Counter()
    app.state.frames = FrameCache()
    app.state.expense = RateLimiter(settings.rate_limit)
    app.state.render = Renderer(guard.requires_password)
    error_responses.install_error_handlers(app, app.state.render)
    route_modules = (
        steering_api,
        models_api,
        jobs_api,
        uploads_api,
        rooms_api,
        openai_api,
        connections_api,
        chat_socket,
        exports_api,
        blind_api,
        fits_api,
        health,
        setup,
        workbench,
        review,
        blind_test,
        retraining,
        models,
        rooms,
        connections,
        login,
    )
    for route_module in route_modules:
        app.include_router(route_module.router)
    app.mount(f"/static/{STATIC_VERSION}", VersionedStaticFiles(directory=STATIC), name="static")
    return AccessMiddleware(app, settings, guard, studio.api_keys)
