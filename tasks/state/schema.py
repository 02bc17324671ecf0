"""The SQL schema of everything that changes: SQLite embedded, Postgres in production."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

metadata = sa.MetaData()

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("key", sa.String(200), primary_key=True),
    sa.Column("holder", sa.String(300), nullable=False),
    sa.Column("expires", sa.Float, nullable=False, comment="seconds since the epoch"),
)

gate_decisions = sa.Table(
    "gate_decisions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", sa.Float, nullable=False, comment="seconds since the epoch"),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("challenger", sa.String(50), nullable=False),
    sa.Column("champion", sa.String(50), nullable=True),
    sa.Column("moved", sa.Boolean, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("scores", sa.JSON, nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(20), primary_key=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False, unique=True, comment="SHA-256 of the key"),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("requests_per_minute", sa.Integer, nullable=True),
    sa.Column("tokens_per_minute", sa.Integer, nullable=True),
    sa.Column("created", sa.Float, nullable=False, comment="seconds since the epoch"),
    sa.Column("expires", sa.Float, nullable=True),
    sa.Column("revoked", sa.Float, nullable=True),
)

tombstones = sa.Table(
    "tombstones",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("kind", sa.String(10), nullable=False, comment="url, domain or digest"),
    sa.Column("value", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("created", sa.Float, nullable=False, comment="seconds since the epoch"),
    sa.Column("withdrawn", sa.Float, nullable=True),
)

erasures = sa.Table(
    "erasures",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("stage", sa.String(100), nullable=False),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("action", sa.String(20), nullable=False, comment="rewritten, deleted or marked"),
    sa.Column("tombstones", sa.JSON, nullable=False, comment="ids"),
    sa.Column("documents", sa.Integer, nullable=False),
    sa.Column("begun", sa.Float, nullable=False, comment="seconds since the epoch"),
    sa.Column("finished", sa.Float, nullable=True),
)


def database(url: str) -> sa.Engine:
    """An engine with the schema in place."""
    prefix = "sqlite:///"
    if url.startswith(prefix):
        Path(url[len(prefix) :]).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(url, connect_args={"timeout": 30})
    else:
        engine = sa.create_engine(url)
    metadata.create_all(engine, checkfirst=True)
    return engine
