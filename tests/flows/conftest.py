"""Stacks that tests may kill, and processes that tests start."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from killable_stack import KillableStack, put_small_site, settings_with_free_ports


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """The command line puts its home into the environment; no other test may see it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def killable() -> Iterator[KillableStack]:
    """One stack for the command line's tests and then the supervisor's, which end it."""
    home = Path(tempfile.mkdtemp(prefix="gristmill-killable-"))
    settings = settings_with_free_ports(home)
    settings.save()
    put_small_site(home / "site")
    stack = KillableStack(settings)
    try:
        stack.supervisor.up()
        yield stack
    finally:
        stack.supervisor.down()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def ended() -> Iterator[Callable[[psutil.Popen], psutil.Popen]]:
    """Ends what a test starts itself."""
    started: list[psutil.Popen] = []

    def remember(process: psutil.Popen) -> psutil.Popen:
        started.append(process)
        return process

    yield remember
    for process in started:
        if process.is_running():
            process.kill()
        process.wait(10)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server
