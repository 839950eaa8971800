"""The database seen as two verbs: read and write a plain function in a short transaction, off the event loop.

SQLite in WAL mode by default, with every acknowledged write on the disk; any other by URL.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from ..errors import TrellisError, shorten
from .tables import LATEST_MIGRATION

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


class Store:
    """Functions of `(connection, …)` run here; writes one after another, reads beside them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = open_database_engine(url)
        self._write_executor = ThreadPoolExecutor(1, thread_name_prefix="store-write")
        self._read_executor = ThreadPoolExecutor(4, thread_name_prefix="store-read")

    async def write(self, work: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run in a transaction of its own; on return it is committed and on the disk."""
        return await self._run(self._write_executor, work, *args, **kwargs)

    async def read(self, work: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._run(self._read_executor, work, *args, **kwargs)

    async def _run(
        self,
        executor: ThreadPoolExecutor,
        work: Callable[Concatenate[Connection, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        def run() -> R:
            try:
                with self._engine.begin() as connection:
                    return work(connection, *args, **kwargs)
            except OperationalError as error:
                raise _to_trellis_error(error) from error

        # A write that has begun is let finish even when nobody waits any more: half an action is worse than one.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(executor, run))

    def close(self) -> None:
        self._write_executor.shutdown()
        self._read_executor.shutdown()
        self._engine.dispose()


def _to_trellis_error(error: OperationalError) -> TrellisError:
    """Return the error for a database that cannot be read or written. The transaction was rolled back."""
    detail = str(error.orig)
    if "full" in detail or "No space left" in detail:
        return TrellisError(
            "The disk is full, so this could not be saved.",
            code="disk_full",
            next_step="Free up disk space and try again. Nothing else is lost.",
        )
    log.error("the database answered: %s", detail)
    return TrellisError(
        f"The database can't be used: {shorten(detail, 160)}.",
        code="database",
        next_step="Check the disk of the studio's save folder and try again.",
    )


def open_database_engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed)
    if parsed.get_backend_name() == "sqlite":

        @event.listens_for(engine, "connect")
        def set_pragmas(connection: Any, record: Any) -> None:
            cursor = connection.cursor()
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

    return engine


def migrate(url: str) -> None:
    """Bring the database to the newest shape. Costs nothing when it is there."""
    engine = open_database_engine(url)
    try:
        with engine.connect() as connection:
            if inspect(connection).has_table("alembic_version"):
                version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
                if version == LATEST_MIGRATION:
                    return
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()
