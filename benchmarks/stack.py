"""A stack of its own for a benchmark: home, free ports, the command line, memory sampled."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from flows.processes import environment_of
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
        """Everything that runs for this home.

        Ray's workers overwrite their environment when they rename themselves; they are found as
        descendants of what carries the home in its own.
        """
        mark = f"GRISTMILL_HOME={self.settings.home}".encode()
        present = {process.pid: process for process in psutil.process_iter()}
        children: dict[int, list[int]] = {}
        for pid, process in present.items():
            with contextlib.suppress(psutil.Error):
                children.setdefault(process.ppid(), []).append(pid)
        found = {pid for pid in present if mark in environment_of(pid)}
        waiting = list(found)
        while waiting:
            below = [pid for pid in children.get(waiting.pop(), ()) if pid not in found]
            found.update(below)
            waiting += below
        return [present[pid] for pid in sorted(found - {os.getpid()})]

    def memory(self) -> float:
        """GB of all processes together; a page shared by n of them counts as 1/n in each."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total / 1e9


def _end(*_: object) -> None:
    """On SIGTERM, which `timeout` sends: take down what runs, undisturbed by a second one."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def home() -> Iterator[Home]:
    """A fresh home, taken down and removed at the end.

    `GRISTMILL_BENCH_HOME` names one to use instead: it is taken down, too, but kept, so that a
    benchmark that is being written need not crawl and train each time.
    """
    kept = os.environ.get("GRISTMILL_BENCH_HOME")
    directory = Path(kept or tempfile.mkdtemp(prefix="gristmill-bench-"))
    running = Home(directory.resolve())
    signal.signal(signal.SIGTERM, _end)
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
        if not kept:
            shutil.rmtree(directory, ignore_errors=True)


class MemorySampler:
    """Peak proportional set size (shared pages counted once) of a home's processes, in GB.

    `largest` says who held it at the peak, `when` how many seconds after the start that was.
    """

    def __init__(self, watched: Home, seconds: float = 2.0) -> None:
        self.watched, self.seconds, self.peak = watched, seconds, 0.0
        self.begun, self.when = time.monotonic(), 0.0
        self.largest: list[tuple[str, float]] = []
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
            held: list[tuple[str, float]] = []
            for process in self.watched.processes():
                with contextlib.suppress(psutil.Error):
                    name = " ".join(process.cmdline()).strip()[-60:]
                    held.append((name, process.memory_full_info().pss / 1e9))
            total = sum(size for _, size in held)
            if total > self.peak:
                self.peak, self.when = total, time.monotonic() - self.begun
                self.largest = sorted(held, key=lambda entry: -entry[1])
