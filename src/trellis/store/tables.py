"""The tables, for every feature. The migrations under migrations/ make them; a test holds the two together."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

HEAD = "0003"
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
    "logins",
    metadata,
    Column("token_hash", String, primary_key=True),
    Column("created", Float, nullable=False),
)
