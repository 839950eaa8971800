"""The tables, for every feature. The migrations under migrations/ make them; a test holds the two together."""

from __future__ import annotations

from sqlalchemy import JSON, Column, Float, ForeignKey, Index, Integer, MetaData, String, Table, Text, UniqueConstraint

LATEST_MIGRATION = "0004"
"""The newest migration, so that a start with nothing to migrate need not import Alembic."""

metadata = MetaData()

sessions = Table(
    "sessions",
    metadata,
    Column("id", String, primary_key=True),
    Column("request", String, unique=True),
    Column("name", Text, nullable=False),
    Column("config", JSON, nullable=False),
    Column("head", String),
    Column("offer", String),
    Column("prompts", String),
    Column("created", Float, nullable=False),
    Column("updated", Float, nullable=False),
)

nodes = Table(
    "nodes",
    metadata,
    Column("id", String, primary_key=True),
    Column("session", ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False),
    Column("parent", ForeignKey("nodes.id", ondelete="CASCADE")),
    Column("step", Integer, nullable=False),
    Column("weights", String, nullable=False),
    Column("position", Integer, nullable=False),
    Column("answered", String),
    Column("choice", JSON),
    Column("metrics", JSON),
    Column("control", Text),
    Column("shown", String),
    Column("forward", String),
    Column("name", Text),
    Column("created", Float, nullable=False),
    Index("nodes_by_session", "session", "created"),
)

offers = Table(
    "offers",
    metadata,
    Column("id", String, primary_key=True),
    Column("session", ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False),
    Column("node", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("prompt", Text, nullable=False),
    Column("options", JSON),
    Column("created", Float, nullable=False),
    UniqueConstraint("session", "node", "number", name="one_offer_of_each_number"),
)

intents = Table(
    "intents",
    metadata,
    Column("session", ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    Column("request", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("body", JSON, nullable=False),
    Column("state", String, nullable=False),
    Column("created", Float, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String, primary_key=True),
    Column("request", String, unique=True),
    Column("kind", String, nullable=False),
    Column("body", JSON, nullable=False),
    Column("state", String, nullable=False),
    Column("progress", JSON),
    Column("result", JSON),
    Column("error", JSON),
    Column("created", Float, nullable=False),
)

trials = Table(
    "trials",
    metadata,
    Column("id", String, primary_key=True),
    Column("session", ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False),
    Column("request", String, unique=True),
    Column("left", String, nullable=False),
    Column("right", String, nullable=False),
    Column("planned", Integer, nullable=False),
    Column("position", Integer, nullable=False),
    Column("prompts", JSON, nullable=False),
    Column("state", String, nullable=False),
    Column("created", Float, nullable=False),
    Index("trials_by_session", "session", "created"),
)

rounds = Table(
    "rounds",
    metadata,
    Column("trial", ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("prompt", Text, nullable=False),
    Column("first", String, nullable=False),
    Column("left", Text, nullable=False),
    Column("right", Text, nullable=False),
    Column("verdict", String),
    Column("created", Float, nullable=False),
)

logins = Table(
    "logins", metadata, Column("token_hash", String, primary_key=True), Column("created", Float, nullable=False)
)

rooms = Table(
    "rooms",
    metadata,
    Column("id", String, primary_key=True),
    Column("request", String, unique=True),
    Column("title", Text, nullable=False),
    Column("folded", Text, nullable=False),
    Column("named", Integer, nullable=False),
    Column("system", Text, nullable=False),
    Column("models", JSON, nullable=False),
    Column("sampling", JSON, nullable=False),
    Column("head", String),
    Column("archived", Integer, nullable=False),
    Column("created", Float, nullable=False),
    Column("updated", Float, nullable=False),
)

messages = Table(
    "messages",
    metadata,
    Column("id", String, primary_key=True),
    Column("room", ForeignKey("rooms.id", ondelete="CASCADE"), nullable=False),
    Column("parent", String),
    Column("role", String, nullable=False),
    Column("text", Text, nullable=False),
    Column("folded", Text, nullable=False),
    Column("model", Text),
    Column("group", String),
    Column("state", String, nullable=False),
    Column("finish", String),
    Column("usage", JSON),
    Column("error", JSON),
    Column("files", JSON, nullable=False),
    Column("rating", Integer, nullable=False),
    Column("request", String),
    Column("created", Float, nullable=False),
    Index("messages_by_room", "room", "created"),
    UniqueConstraint("room", "request", name="one_message_of_each_request"),
)

files = Table(
    "files",
    metadata,
    Column("id", String, primary_key=True),
    Column("room", ForeignKey("rooms.id", ondelete="CASCADE"), nullable=False),
    Column("name", Text, nullable=False),
    Column("kind", String, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("text", Text, nullable=False),
    Column("created", Float, nullable=False),
    Index("files_by_room", "room"),
)

prompts = Table(
    "prompts",
    metadata,
    Column("id", String, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("text", Text, nullable=False),
    Column("created", Float, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("hash", String, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("start", String, nullable=False),
    Column("created", Float, nullable=False),
    Column("used", Float),
)

remotes = Table(
    "remotes",
    metadata,
    Column("id", String, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("url", Text, nullable=False),
    Column("secret", Text, nullable=False),
    Column("models", JSON, nullable=False),
    Column("sees", Integer, nullable=False),
    Column("created", Float, nullable=False),
)
