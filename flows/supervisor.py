"""Starts, watches, heals and stops the services of one home.

There is no daemon that everything hangs on: services are plain processes in sessions of their own,
known by their pid files. A light watcher (`flows.watcher`) restarts what dies; if it is killed too,
the services go on and the next `up` mends what is broken. One lock keeps two of them apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flows import processes
from flows.processes import Record
from flows.reaper import Reaper
from flows.services import (
    CHECKOUT,
    Service,
    champion_is_served,
    inherited_environment,
    keep_ray_logs,
    prepare,
    services,
)
from tasks.runtime.errors import UserError
from tasks.runtime.settings import Settings

LOCK_PATIENCE = 900.0
RECOVER_SECONDS = 20.0
"""How long a living service may be too busy to answer before it counts as hung."""
TOLD_EVERY = 15.0
KEPT_LOG_BYTES = 5 * 2**20

State = Literal["healthy", "starting", "not answering", "crashed", "stopped"]


@dataclass(frozen=True)
class ServiceStatus:
    """What `status` says of a service; memory in bytes, uptime in seconds."""

    name: str
    state: State
    pid: int | None = None
    uptime: float = 0
    memory: int = 0
    url: str = ""


class Busy(Exception):
    """Somebody else holds the lock of this home."""


class Supervisor:
    """The services of one home. `say` receives one line per thing that happens."""

    def __init__(self, settings: Settings, say: Callable[[str], None] = lambda line: None) -> None:
        self.settings, self.say = settings, say
        self.run = settings.home / "run"
        self.services = {service.name: service for service in services(settings)}
        self._stopping = threading.Event()

    # What stands

    def record(self, name: str) -> Record | None:
        return Record.read(self.run / f"{name}.json")

    def mark(self, name: str) -> str:
        return f"{self.settings.home}#{name}"

    @property
    def wanted(self) -> bool:
        """Whether the stack is meant to be up; the watcher ends when it is not."""
        return (self.run / "wanted").exists()

    def is_healthy(self, service: Service) -> bool:
        record = self._running(service)
        return record is not None and service.healthy(record)

    def status(self) -> list[ServiceStatus]:
        """The state of every service and of the watcher, asked for at the same time."""
        with ThreadPoolExecutor(len(self.services)) as pool:
            found = list(pool.map(self._status, self.services.values()))
        return [*found, self._watcher_status()]

    # What changes

    def up(self) -> None:
        """Start what does not run, mend what is broken, leave the rest alone.

        Raises UserError for a taken port (before anything is started) and for a service that does
        not become healthy.
        """
        with self.lock():
            self._prepare()
            missing = self._missing()
            for service in reversed(missing):
                if service.stays:
                    self._sweep(service)
            self._check_ports(missing)
            (self.run / "wanted").touch()
            self._start_in_order(missing)
            self._start_watcher()

    def down(self) -> None:
        """Stop everything, each before what it needs; nothing that we started stays.

        Flow runs that were at work are closed as Crashed before Prefect ends: they can be run again
        and go on where they were.
        """
        with self.lock():
            (self.run / "wanted").unlink(missing_ok=True)
            self._end("watcher", 3)
            first = [s for s in self.services.values() if s.stays and s.after]
            for service in reversed(first):
                self._stop(service)
            Reaper(self.settings, self.say).reap(at_once=True)
            rest = [s for s in self.services.values() if s.stays and not s.after]
            with ThreadPoolExecutor(len(rest)) as pool:
                list(pool.map(self._stop, rest))
            for record in self.run.glob("*.json"):
                record.unlink()
            for mark in processes.marks_of_home(str(self.settings.home)):
                processes.terminate(None, mark, 2)
            keep_ray_logs(self.settings)

    def dead(self) -> list[str]:
        """Services whose process is gone, and those that lived inside it."""
        gone = {s.name for s in self.services.values() if s.stays and self._running(s) is None}
        hosted = {s.name for s in self.services.values() if s.inside in gone}
        return [name for name in self.services if name in gone | hosted]

    def restart(self, names: list[str]) -> None:
        """Start services again. Raises Busy when somebody else is at work, UserError if one fails.

        What `up` would have done, for the watcher: nothing happens once `down` was asked for.
        """
        with self.lock(patience=0):
            if not self.wanted:
                return
            self._prepare()
            known = self.services.values()
            hung = {s.name for s in known if not s.stays and not self.is_healthy(s)}
            still = {*names} & {*self.dead(), *hung}  # `up` may have been quicker
            chosen = [service for service in known if service.name in still]
            for service in reversed(chosen):
                if service.stays:
                    self._sweep(service)
            self._check_ports(chosen)
            self._start_in_order(chosen)

    @contextlib.contextmanager
    def lock(self, patience: float = LOCK_PATIENCE) -> Iterator[None]:
        """One at a time in a home. Raises Busy (patience 0) or UserError naming the holder."""
        self.run.mkdir(parents=True, exist_ok=True)
        with (self.run / "lock").open("a+") as file:
            deadline, told = time.monotonic() + patience, False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                    if not patience:
                        raise Busy(holder) from None
                    if time.monotonic() > deadline:
                        raise UserError(
                            f"{holder} has been changing {self.settings.home} for "
                            f"{patience:.0f} s; end it, then try again"
                        ) from None
                    if not told:
                        self.say(f"waiting for {holder}")
                        told = True
                    time.sleep(0.2)
            file.truncate(0)
            file.write(f"gristmill (process {os.getpid()})")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    # Starting

    def _prepare(self) -> None:
        prepare(self.settings)  # makes the token, which the environment of every service names
        self.services = {service.name: service for service in services(self.settings)}

    def _missing(self) -> list[Service]:
        """What `up` has to start: the services that are not well, in the order of starting."""
        own = [service for service in self.services.values() if service.inside is None]
        with ThreadPoolExecutor(len(own)) as pool:
            names = [service.name for service in own]
            well = dict(zip(names, pool.map(self._is_well, own), strict=True))
        for service in self.services.values():
            if service.inside is not None:  # it ended with the service it lived in
                well[service.name] = well[service.inside] and self._is_well(service)
        return [service for name, service in self.services.items() if not well[name]]

    def _start_in_order(self, chosen: list[Service]) -> None:
        """Start services side by side, each when those it comes after are healthy."""
        names = {service.name for service in chosen}
        self._stopping.clear()
        futures: dict[str, Future[None]] = {}

        def start(service: Service) -> None:
            for name in service.after:
                if name in names:
                    futures[name].result()
            self._start(service)

        with ThreadPoolExecutor(max(len(chosen), 1)) as pool:
            for service in self.services.values():
                if service.name in names:
                    futures[service.name] = pool.submit(start, service)
            try:
                for future in futures.values():
                    future.result()
            except BaseException:
                self._stopping.set()
                raise

    def _start(self, service: Service) -> None:
        for attempts_left in reversed(range(service.attempts)):
            record = self._spawn(service)
            try:
                return self._await(service, record)
            except UserError:
                if record.alive or not attempts_left:
                    raise
                self.say(f"{service.name} ended while starting; trying again")
                self._sweep(service)

    def _spawn(self, service: Service) -> Record:
        log = self.settings.home / "logs" / f"{service.name}.log"
        cut_log(log, 0)
        record = processes.spawn(
            service.command,
            service.environment,
            inherited_environment(),
            self.mark(service.name),
            log,
            CHECKOUT,
        )
        record.write(self.run / f"{service.name}.json")
        return record

    def _await(self, service: Service, record: Record) -> None:
        """Return when a started service is healthy. Raises UserError with the end of its log."""
        begun = time.monotonic()
        deadline, told = begun + service.start_seconds, begun
        while not self._stopping.is_set():
            alive = record.alive
            if service.stays and not alive:
                raise UserError(self._why(service, "ended while starting"))
            if not service.stays and not alive:  # it has done what it could
                deadline = min(deadline, time.monotonic() + RECOVER_SECONDS)
            if alive == service.stays and service.healthy(record):
                self.say(f"{service.name} is up ({time.monotonic() - begun:.1f} s)")
                return
            if time.monotonic() - told > TOLD_EVERY:
                told = time.monotonic()
                self.say(f"{service.name} is still starting ({told - begun:.0f} s)")
            if time.monotonic() > deadline:
                spent = time.monotonic() - begun
                raise UserError(self._why(service, f"did not answer within {spent:.0f} s"))
            time.sleep(0.1)

    def _why(self, service: Service, what: str) -> str:
        log = self.settings.home / "logs" / f"{service.name}.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        end = "\n    ".join(lines[-8:]) or "(it wrote nothing)"
        return (
            f"{service.name} {what}; the end of its log (all of it: gristmill logs "
            f"{service.name}):\n    {end}"
        )

    def _check_ports(self, chosen: list[Service]) -> None:
        """Raises UserError naming every taken port, its holder and the remedy."""
        taken = []
        for service in chosen:
            for name, port in service.ports.items():
                held = processes.port_holder(self.settings.host, port)
                if held is None:
                    continue
                process, holder = held
                mark = processes.mark_of(process) if process else None
                if mark:
                    home = mark.rpartition("#")[0]
                    holder += f" of the stack in {home} (stop it: gristmill down --home {home})"
                taken.append(
                    f"port {port} for {name} is taken by {holder}; stop that, or choose another: "
                    f"gristmill up --ports {name}=PORT"
                )
        if taken:
            raise UserError("\n".join(taken))

    def _start_watcher(self) -> None:
        command = (sys.executable, "-m", "flows.watcher", "--home", str(self.settings.home))
        environment = self.services["worker"].environment
        record = self._watcher_record()
        if record is not None and _is_same(record, command, environment):
            return
        self._end("watcher", 3)
        log = self.settings.home / "logs" / "watcher.log"
        started = processes.spawn(
            command, environment, inherited_environment(), self.mark("watcher"), log, CHECKOUT
        )
        started.write(self.run / "watcher.json")

    # Stopping

    def _stop(self, service: Service) -> None:
        if self._end(service.name, service.stop_seconds):
            self.say(f"{service.name} stopped")

    def _sweep(self, service: Service) -> None:
        """End what a crash left of a service, or a service that does not answer.

        Flow runs go on without the runner that started them: a healthy run is never ended.
        """
        self._end(service.name, service.stop_seconds, spare_runs=True)

    def _end(self, name: str, grace: float, spare_runs: bool = False) -> bool:
        record = self.record(name)
        there = bool(processes.members(record, self.mark(name), spare_runs))
        if there:
            processes.terminate(record, self.mark(name), grace, spare_runs)
        (self.run / f"{name}.json").unlink(missing_ok=True)
        return there

    # Asking

    def _running(self, service: Service) -> Record | None:
        """The record of a service whose process lives, or that lives inside another one."""
        record = self.record(service.name)
        if record is None:
            return None
        if not service.stays:
            return record
        return record if record.alive else None

    def _is_well(self, service: Service) -> bool:
        """Whether a service can be left alone; one that lives but is busy gets a little time."""
        record = self._running(service)
        if record is None or not _is_same(record, service.command, service.environment):
            return False
        deadline = time.monotonic() + RECOVER_SECONDS
        while not service.healthy(record):
            if time.monotonic() > deadline or (service.stays and not record.alive):
                return False
            time.sleep(0.2)
        return True

    def _status(self, service: Service) -> ServiceStatus:
        record = self.record(service.name)
        if record is None:
            return ServiceStatus(service.name, "stopped", url=service.url)
        if not service.stays:
            state: State = "healthy" if service.healthy(record) else "not answering"
            served = champion_is_served(self.settings)
            url = service.url if served else f"{service.url} (no model yet)"
            return ServiceStatus(service.name, state, url=url)
        if not record.alive:
            return ServiceStatus(service.name, "crashed", url=service.url)
        uptime = time.time() - record.since
        young = uptime < service.start_seconds
        state = "healthy" if service.healthy(record) else "starting" if young else "not answering"
        used = processes.memory(record, self.mark(service.name))
        return ServiceStatus(service.name, state, record.pid, uptime, used, service.url)

    def _watcher_record(self) -> Record | None:
        record = self.record("watcher")
        return record if record is not None and record.alive else None

    def _watcher_status(self) -> ServiceStatus:
        record = self._watcher_record()
        if record is None:
            return ServiceStatus("watcher", "crashed" if self.wanted else "stopped")
        used = processes.memory(record, self.mark("watcher"))
        return ServiceStatus("watcher", "healthy", record.pid, time.time() - record.since, used)


def _is_same(record: Record, command: tuple[str, ...], environment: dict[str, str]) -> bool:
    """Whether a process was started as it would be started now; settings may have changed."""
    wanted = tuple(sorted(f"{key}={value}" for key, value in environment.items()))
    return (record.command, record.environment) == (command, wanted)


def cut_log(log: Path, limit: int = 2 * KEPT_LOG_BYTES) -> None:
    """Keep a log that a process is writing bounded: its end goes to `NAME.log.1`, the rest is lost.

    The writer has the file open for appending, so it goes on at the new end.
    """
    with contextlib.suppress(FileNotFoundError):
        size = log.stat().st_size
        if size <= limit:
            return
        with log.open("rb") as file:
            file.seek(max(size - KEPT_LOG_BYTES, 0))
            log.with_name(f"{log.name}.1").write_bytes(file.read())
        os.truncate(log, 0)


def tail(settings: Settings, name: str, lines: int, follow: bool) -> int:
    """Print the end of a service's log, as `tail` does; returns its exit code."""
    log = settings.home / "logs" / f"{name}.log"
    if not log.exists():
        raise UserError(f"{name} has not written a log in {log.parent} yet; start it: gristmill up")
    options = ["-n", str(lines), *(["-F"] if follow else [])]
    return subprocess.run(["tail", *options, str(log)], check=False).returncode
