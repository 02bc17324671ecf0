"""The real stack, started once for all tests that need it, on its own home and free ports."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tasks.runtime.settings import Ports, Settings

# How long an example takes says more about who else is on the machine than about the code.
hypothesis.settings.register_profile("gristmill", deadline=None)
hypothesis.settings.load_profile("gristmill")

CHECKOUT = Path(__file__).parents[1]


def pytest_configure() -> None:
    """Whoever ends the tests by SIGTERM leaves no stack behind, as with control-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, below the range Ray's workers use."""
    found: list[int] = []
    while len(found) < count:
        port = random.randint(5100, 9900)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return found


class Stack:
    """A running stack, and the command line as a person would use it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def command(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """`gristmill --home … arguments`, with output captured."""
        environment = os.environ | {"GRISTMILL_HOME": str(self.settings.home)}
        return subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments],
            cwd=CHECKOUT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def gristmill(self, *arguments: str, timeout: float = 300) -> str:
        """What the command prints; fails the test with everything it said when it fails."""
        done = self.command(*arguments, timeout=timeout)
        assert done.returncode == 0, f"gristmill {arguments}: {done.stdout}\n{done.stderr}"
        return done.stdout


@contextlib.contextmanager
def running_stack(
    prepare: Callable[[Path], None] = lambda home: None, store: str | None = None
) -> Iterator[Stack]:
    """`gristmill up` in a home of its own; `gristmill down` at the end, whatever happened."""
    home = Path(tempfile.mkdtemp(prefix="gristmill-test-"))
    names = list(Ports.model_fields)
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    settings = Settings(home=home, ports=Ports(**ports), store=store)
    settings.save()
    prepare(home)
    running = Stack(settings)
    try:
        running.gristmill("up", timeout=240)
        yield running
    finally:
        running.command("down", timeout=120)
        if os.environ.get("GRISTMILL_KEEP_TEST_HOME"):
            print(f"kept {home}", file=sys.stderr)
        else:
            shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    with running_stack() as running:
        yield running
