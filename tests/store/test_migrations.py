"""The migrations make the tables, and a database is only touched when it is behind."""

from __future__ import annotations

from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import insert, select, text

from trellis.store import steering as rows
from trellis.store import store
from trellis.store.store import migrate, open_database_engine
from trellis.store.tables import LATEST_MIGRATION, metadata, nodes, sessions


def test_the_migrations_make_the_tables(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'deep' / 'er' / 'trellis.db'}"
    migrate(url)
    engine = open_database_engine(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
    engine.dispose()


def test_the_newest_migration_is_the_one_that_the_tables_name() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(store.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_current_head() == LATEST_MIGRATION


def test_migrating_twice_keeps_what_is_there(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'trellis.db'}"
    migrate(url)
    engine = open_database_engine(url)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO logins VALUES ('x', 1.0)"))
    migrate(url)
    with engine.begin() as connection:
        assert connection.execute(text("SELECT count(*) FROM logins")).scalar() == 1
    engine.dispose()


def test_a_session_of_thousands_of_steps_can_be_deleted(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'trellis.db'}"
    migrate(url)
    engine = open_database_engine(url)
    chain = [
        {"id": f"n{i}", "session": "s", "parent": f"n{i - 1}" if i else None, "step": i, "weights": "w", "position": i,
         "created": i} for i in range(3000)
    ]  # fmt: skip
    with engine.begin() as connection:
        connection.execute(insert(sessions).values(id="s", name="long", config={}, created=1, updated=1))
        connection.execute(insert(nodes), chain)
    with engine.begin() as connection:
        rows.delete_session(connection, "s")
        assert connection.execute(select(nodes.c.id)).first() is None
    engine.dispose()
