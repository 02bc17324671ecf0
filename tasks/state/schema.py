"""The SQL schema of everything that changes: SQLite embedded, Postgres in production.

What is changed here needs a migration: a file in `migrations/versions/` and its number as
`REVISION`. A test holds the migrated schema against these tables, on both kinds of database.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from tasks.runtime.errors import UserError

REVISION = "0001"
LOCK = 0x6772697374  # whoever migrates a Postgres database holds this advisory lock

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
    """An engine on a database whose tables are those above.

    Raises UserError when the database does not answer, or was made by a later Gristmill.
    """
    prefix = "sqlite:///"
    if url.startswith(prefix):
        Path(url[len(prefix) :]).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(url, connect_args={"timeout": 30})
    else:
        engine = _engine(url)
    try:
        if _revision(engine) != REVISION:
            _migrate(engine)
    except sa.exc.OperationalError as error:
        shown = engine.url.render_as_string(hide_password=True)
        raise UserError(
            f"the state database {shown} does not answer ({error.orig}); "
            "start it, or set GRISTMILL_DATABASE to one that does"
        ) from error
    return engine


def _engine(url: str) -> sa.Engine:
    try:
        return sa.create_engine(url, pool_pre_ping=True)
    except (sa.exc.ArgumentError, ModuleNotFoundError) as error:
        raise UserError(
            f"GRISTMILL_DATABASE is no address of a database that can be opened here ({error}); "
            "write postgresql+psycopg://USER:PASSWORD@HOST/NAME or sqlite:///FILE"
        ) from error


def _revision(engine: sa.Engine) -> str | None:
    """Of the schema as it is; None in a database that has none or one of before there were any."""
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        found: str | None = connection.scalar(sa.text("select version_num from alembic_version"))
        return found


def _migrate(engine: sa.Engine) -> None:
    """Bring the schema up to `REVISION`, one process at a time."""
    from alembic import command  # its import costs more than the check that found nothing to do
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("begin immediate")
        else:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise UserError(
                f"the state database is of schema {_revision(engine)}, this Gristmill knows up to "
                f"{REVISION}; install the later version it was used with"
            ) from error
        connection.commit()
