"""Alembic's way in: `store.migrate` passes an open connection; the command line tool opens one from the URL."""

from alembic import context
from sqlalchemy import Connection, create_engine

from trellis.store.tables import metadata


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with create_engine(context.config.get_main_option("sqlalchemy.url") or "").connect() as opened:
        run(opened)
