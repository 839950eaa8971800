"""The prepared prompts of a session, and names of nodes."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("sessions", sa.Column("prompts", sa.String(), nullable=True))
    op.add_column("nodes", sa.Column("name", sa.Text(), nullable=True))
