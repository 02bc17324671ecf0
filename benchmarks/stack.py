"""A stack of its own for a benchmark: home, free ports, the command line, memory sampled."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tasks.runtime.settings import Ports, Settings

CHECKOUT = Path(__file__).resolve().parents[1]
FIRST_PORT, LAST_PORT = 5100, 9900


def free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in range(FIRST_PORT, LAST_PORT):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise SystemExit(f"fewer than {count} free ports between {FIRST_PORT} and {LAST_PORT}")


class Home:
    """One home directory and the `gristmill` command line on it."""

    def __init__(self, directory: Path) -> None:
        names = list(Ports.model_fields)
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.settings = Settings(home=directory, ports=Ports(**ports))
        self.settings.save()

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"GRISTMILL_HOME": str(self.settings.home), "PYTHONPATH": str(CHECKOUT)}

    def start(self, *arguments: str, quiet: bool = False) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments],
            cwd=CHECKOUT,
            env=self.environment,
            stdout=subprocess.PIPE if quiet else None,
            stderr=subprocess.STDOUT if quiet else None,
            text=True,
        )

    def run(self, *arguments: str, quiet: bool = False) -> tuple[float, str]:
        """Seconds and output; stops the benchmark when the command fails."""
        begun = time.monotonic()
        process = self.start(*arguments, quiet=quiet)
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"gristmill {' '.join(arguments)} failed:\n{output or ''}")
        return time.monotonic() - begun, output or ""

    def processes(self) -> list[psutil.Process]:
        """Everything that runs for this home."""
        mark = str(self.settings.home)
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("GRISTMILL_HOME") == mark:
                    found.append(process)
        return found


@contextlib.contextmanager
def home() -> Iterator[Home]:
    """A fresh home, taken down and removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix="gristmill-bench-"))
    running = Home(directory)
    try:
        yield running
    finally:
        subprocess.run(
            [sys.executable, "-m", "flows.cli", "down"],
            cwd=CHECKOUT,
            env=running.environment,
            timeout=120,
            check=False,
        )
        shutil.rmtree(directory, ignore_errors=True)


class MemorySampler:
    """Peak proportional set size (shared pages counted once) of a home's processes, in GB."""

    def __init__(self, watched: Home, seconds: float = 2.0) -> None:
        self.watched, self.seconds, self.peak = watched, seconds, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self.seconds):
            total = 0
            for process in self.watched.processes():
                with contextlib.suppress(psutil.Error):
                    total += process.memory_full_info().pss
            self.peak = max(self.peak, total / 1e9)
