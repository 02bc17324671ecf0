"""Expiring leases: two runs of the same fingerprint never write the same artifact.

Compare-and-set in the state database. A holder renews its lease from a thread; one that was killed
loses it when it expires, or at once when it ran on this host and its process is gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import psutil
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from tasks.state.schema import database, leases

LIFETIME_SECONDS = 30.0


def holder_of_this_process() -> str:
    """`host/pid/start time/nonce`: enough to know later whether the holder still lives."""
    started = psutil.Process().create_time()
    return f"{socket.gethostname()}/{os.getpid()}/{started}/{uuid.uuid4().hex[:8]}"


def is_dead(holder: str) -> bool:
    """True only if the holder ran on this host and its process is surely gone."""
    host, pid, started, _ = holder.rsplit("/", 3)
    if host != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(started)) > 1
    except psutil.NoSuchProcess:
        return True


def try_acquire(engine: sa.Engine, key: str, holder: str) -> str | None:
    """Take the lease; returns None on success, else who holds it."""
    now = time.time()
    with engine.begin() as connection:
        row = connection.execute(sa.select(leases).where(leases.c.key == key)).one_or_none()
        if row is None:
            try:
                connection.execute(
                    leases.insert().values(key=key, holder=holder, expires=now + LIFETIME_SECONDS)
                )
            except IntegrityError:
                return "another run"
            return None
        if row.expires > now and not is_dead(row.holder):
            return str(row.holder)
        taken = connection.execute(
            leases.update()
            .where(leases.c.key == key, leases.c.holder == row.holder)
            .values(holder=holder, expires=now + LIFETIME_SECONDS)
        )
        return None if taken.rowcount == 1 else "another run"


@contextlib.contextmanager
def lease(database_url: str, key: str, patience: float, poll: float = 0.5) -> Iterator[None]:
    """Hold the lease `key`; waits up to `patience` seconds for another holder to finish.

    Raises TimeoutError naming the holder.
    """
    engine = database(database_url)
    holder = holder_of_this_process()
    deadline = time.monotonic() + patience
    while (other := try_acquire(engine, key, holder)) is not None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{key} is being made by {other}; wait for it or cancel that run")
        time.sleep(poll)
    stopped = threading.Event()

    def renew() -> None:
        while not stopped.wait(LIFETIME_SECONDS / 3):
            with contextlib.suppress(sa.exc.OperationalError), engine.begin() as connection:
                connection.execute(
                    leases.update()
                    .where(leases.c.key == key, leases.c.holder == holder)
                    .values(expires=time.time() + LIFETIME_SECONDS)
                )

    thread = threading.Thread(target=renew, name=f"lease {key}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        with contextlib.suppress(sa.exc.OperationalError), engine.begin() as connection:
            connection.execute(
                leases.delete().where(leases.c.key == key, leases.c.holder == holder)
            )
        engine.dispose()


def wait_until_free(
    database_url: str, key: str, say: Callable[[str], object], poll: float = 0.5
) -> None:
    """Return when nobody holds the lease `key`; `say` is told once who it is that is waited for."""
    engine = database(database_url)
    told = False
    while True:
        with engine.connect() as connection:
            row = connection.execute(sa.select(leases).where(leases.c.key == key)).one_or_none()
        if row is None or row.expires <= time.time() or is_dead(row.holder):
            break
        if not told:
            say(str(row.holder))
            told = True
        time.sleep(poll)
    engine.dispose()
