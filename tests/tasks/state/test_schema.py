"""The state database: one schema on SQLite and on Postgres, however many open it at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from tasks.runtime.errors import UserError
from tasks.state import schema
from tasks.state.api_keys import ApiKeys
from tasks.state.leases import lease, try_acquire
from tasks.state.tombstones import Tombstones
from tests.tasks.state.postgres import postgres


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as address:
        yield address


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state.db'}"
    address: str = request.getfixturevalue("server")
    with sa.create_engine(address).connect() as connection:
        connection.exec_driver_sql("drop schema public cascade")
        connection.exec_driver_sql("create schema public")
        connection.commit()
    return address


def test_migrations_lead_to_the_tables_the_code_knows(url: str) -> None:
    with schema.database(url).connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
        assert context.get_current_revision() == schema.REVISION


def test_a_database_of_before_there_were_migrations_keeps_its_rows(url: str) -> None:
    old = sa.create_engine(url)
    schema.metadata.create_all(old, tables=[schema.leases, schema.api_keys])
    with old.begin() as connection:
        connection.execute(schema.leases.insert().values(key="k", holder="h", expires=1.0))
    with schema.database(url).connect() as connection:
        assert connection.execute(sa.select(schema.leases)).all() == [("k", "h", 1.0)]
        assert set(schema.metadata.tables) < set(sa.inspect(connection).get_table_names())


def test_a_database_of_a_later_version_is_refused_and_left_alone(url: str) -> None:
    with schema.database(url).begin() as connection:
        connection.execute(sa.text("update alembic_version set version_num = '9999'"))
    with pytest.raises(UserError, match=r"of schema 9999.*up to 0001"):
        schema.database(url)
    with sa.create_engine(url).connect() as connection:
        assert connection.scalar(sa.text("select version_num from alembic_version")) == "9999"


def test_many_may_open_an_empty_database_at_once(url: str) -> None:
    begin = threading.Barrier(8)

    def open_it(_: int) -> int:
        begin.wait()
        with schema.database(url).connect() as connection:
            return len(sa.inspect(connection).get_table_names())

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(open_it, range(8))) == {len(schema.metadata.tables) + 1}


def test_of_many_who_want_a_lease_one_has_it(url: str) -> None:
    engine = schema.database(url)
    begin = threading.Barrier(8)

    def want(number: int) -> bool:
        begin.wait()
        return try_acquire(engine, "stage", f"elsewhere/{number}/0/x") is None

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(want, range(8))) == 1


def test_a_lease_is_given_back(url: str) -> None:
    wanted_too = pytest.raises(TimeoutError, match="stage is being made by")
    with lease(url, "stage", patience=0), wanted_too, lease(url, "stage", patience=0):
        raise AssertionError("two hold it")
    with lease(url, "stage", patience=0):
        pass


def test_keys_and_tombstones_are_kept(url: str) -> None:
    keys = ApiKeys(url)
    keys.create("one", scopes=("read",), days=1)
    (kept,) = ApiKeys(url).all()
    assert (kept.name, kept.scopes, kept.valid) == ("one", ("read",), True)
    keys.revoke(kept.id)
    assert not ApiKeys(url).all()[0].valid
    Tombstones(url).add("domain", "example.org", "asked")
    assert [t.value for t in Tombstones(url).standing()] == ["example.org"]


def test_a_database_that_does_not_answer_is_named_without_its_password() -> None:
    with pytest.raises(UserError) as told:
        schema.database("postgresql+psycopg://somebody:secret@127.0.0.1:1/state")
    assert "somebody:***@127.0.0.1:1/state does not answer" in str(told.value)
    assert "secret" not in str(told.value)


def test_an_address_of_no_database_is_refused() -> None:
    with pytest.raises(UserError, match=r"GRISTMILL_DATABASE .*postgresql\+psycopg"):
        schema.database("mongo://host/name")
