"""Rooms of chat, their messages and files; the prompt library; keys of the OpenAI API; remote models."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "rooms",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("request", sa.String(), unique=True),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("folded", sa.Text(), nullable=False),
        sa.Column("named", sa.Integer(), nullable=False),
        sa.Column("system", sa.Text(), nullable=False),
        sa.Column("models", sa.JSON(), nullable=False),
        sa.Column("sampling", sa.JSON(), nullable=False),
        sa.Column("head", sa.String()),
        sa.Column("archived", sa.Integer(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("updated", sa.Float(), nullable=False),
    )
    op.create_table(
        "messages",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("room", sa.String(), sa.ForeignKey("rooms.id", ondelete="CASCADE"), nullable=False),
        sa.Column("parent", sa.String()),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("folded", sa.Text(), nullable=False),
        sa.Column("model", sa.Text()),
        sa.Column("group", sa.String()),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("finish", sa.String()),
        sa.Column("usage", sa.JSON()),
        sa.Column("error", sa.JSON()),
        sa.Column("files", sa.JSON(), nullable=False),
        sa.Column("rating", sa.Integer(), nullable=False),
        sa.Column("request", sa.String()),
        sa.Column("created", sa.Float(), nullable=False),
        sa.UniqueConstraint("room", "request", name="one_message_of_each_request"),
    )
    op.create_index("messages_by_room", "messages", ["room", "created"])
    op.create_table(
        "files",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("room", sa.String(), sa.ForeignKey("rooms.id", ondelete="CASCADE"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("bytes", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
    )
    op.create_index("files_by_room", "files", ["room"])
    op.create_table(
        "prompts",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("name", sa.Text(), nullable=False, unique=True),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
    )
    op.create_table(
        "keys",
        sa.Column("hash", sa.String(), primary_key=True),
        sa.Column("id", sa.String(), nullable=False, unique=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("start", sa.String(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("used", sa.Float()),
    )
    op.create_table(
        "remotes",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("name", sa.Text(), nullable=False, unique=True),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("models", sa.JSON(), nullable=False),
        sa.Column("sees", sa.Integer(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
    )
