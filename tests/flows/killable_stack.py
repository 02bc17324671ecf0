"""A real stack on free ports whose runner serves one harmless flow, and what a test does to it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from flows import processes
from flows.processes import Record
from flows.supervisor import Supervisor
from tasks.corpus import site
from tasks.runtime.settings import Ports, Settings


def settings_with_free_ports(home: Path) -> Settings:
    """A home with consecutive free ports below those that Ray's workers use."""
    names = list(Ports.model_fields)
    while True:
        base = random.randint(5100, 9900)
        if all(processes.port_holder("127.0.0.1", base + n) is None for n in range(len(names))):
            ports = Ports(**{name: base + n for n, name in enumerate(names)})
            return Settings(home=home, ports=ports, runner="tests.flows.sleeper_deployments")


def put_small_site(root: Path) -> None:
    """One page where the site server would render two thousand, which takes it seconds."""
    (root / "pages").mkdir(parents=True)
    (root / "pages" / "robots.txt").write_text("User-agent: *\n")
    (root / "site.json").write_text(json.dumps(site._identity() | {"redirects": {}}))
    assert site.is_current(root)


def is_over(process: psutil.Process) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has ended, too."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class KillableStack:
    """A real stack, and what a test does to it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.said: list[str] = []
        self.supervisor = Supervisor(settings, self.said.append)

    def record(self, name: str) -> Record:
        record = self.supervisor.record(name)
        assert record is not None, f"{name} has no pid file"
        return record

    def kill(self, name: str) -> None:
        """`kill -9` of the first process of a service."""
        process = psutil.Process(self.record(name).pid)
        process.kill()
        process.wait(10)

    def states(self) -> dict[str, str]:
        return {status.name: status.state for status in self.supervisor.status()}


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.5)
