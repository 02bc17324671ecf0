"""A Postgres server of a test's own, on loopback, in a directory that goes with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import free_ports

NOBODY = "postgres"
"""Whom root lets run the server, which refuses to be root's."""


def programs() -> Path | None:
    """Where the server's programs are; Debian keeps them off the path, by version."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return debian[-1].parent if debian else None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The address of an empty database."""
    folder = programs()
    assert folder is not None, "no Postgres here; on Debian: apt-get install postgresql"
    directory = Path(tempfile.mkdtemp(prefix="gristmill-postgres-"))
    user = NOBODY if os.geteuid() == 0 else None
    if user:
        shutil.chown(directory, user, user)
    (port,) = free_ports(1)

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [str(folder / program), "-D", str(directory / "data"), *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=60,
            cwd="/",
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )

    try:
        run("initdb", "--auth=trust", "--username=gristmill", "--no-sync")
        options = f"-p {port} -k {directory} -h 127.0.0.1 -F"
        run("pg_ctl", "start", "--wait", "-o", options, "-l", str(directory / "log"))
        yield f"postgresql+psycopg://gristmill@127.0.0.1:{port}/postgres"
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            run("pg_ctl", "stop", "--mode=immediate")
        shutil.rmtree(directory, ignore_errors=True)
