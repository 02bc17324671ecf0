"""The first tables. Databases of before there were migrations may have them, or some of them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

EPOCH = "seconds since the epoch"
HASH = "SHA-256 of the key"
TABLES = {
    "leases": (
        sa.Column("key", sa.String(200), primary_key=True),
        sa.Column("holder", sa.String(300), nullable=False),
        sa.Column("expires", sa.Float, nullable=False, comment=EPOCH),
    ),
    "gate_decisions": (
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.Float, nullable=False, comment=EPOCH),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("challenger", sa.String(50), nullable=False),
        sa.Column("champion", sa.String(50), nullable=True),
        sa.Column("moved", sa.Boolean, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("scores", sa.JSON, nullable=False),
    ),
    "api_keys": (
        sa.Column("id", sa.String(20), primary_key=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column(
            "digest", sa.String(64), nullable=False, unique=True, comment="SHA-256 of the key"
        ),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("requests_per_minute", sa.Integer, nullable=True),
        sa.Column("tokens_per_minute", sa.Integer, nullable=True),
        sa.Column("created", sa.Float, nullable=False, comment=EPOCH),
        sa.Column("expires", sa.Float, nullable=True),
        sa.Column("revoked", sa.Float, nullable=True),
    ),
    "tombstones": (
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("kind", sa.String(10), nullable=False, comment="url, domain or digest"),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False, comment=EPOCH),
        sa.Column("withdrawn", sa.Float, nullable=True),
    ),
    "erasures": (
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("stage", sa.String(100), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("action", sa.String(20), nullable=False, comment="rewritten, deleted or marked"),
        sa.Column("tombstones", sa.JSON, nullable=False, comment="ids"),
        sa.Column("documents", sa.Integer, nullable=False),
        sa.Column("begun", sa.Float, nullable=False, comment=EPOCH),
        sa.Column("finished", sa.Float, nullable=True),
    ),
}


def upgrade() -> None:
    present = sa.inspect(op.get_bind()).get_table_names()
    for name, columns in TABLES.items():
        if name not in present:
            op.create_table(name, *columns)
