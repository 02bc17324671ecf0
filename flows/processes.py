"""Processes we started: who they are, who belongs to them, how they end.

A pid alone says nothing after a crash, because the kernel gives it to somebody else. So a process
is known by its pid together with its start time and the boot it was started in, and everything
started for a service carries a mark in its environment. Ray's workers overwrite their environment
when they rename themselves; they are found through their session and their parents instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import psutil

MARK = "GRISTMILL_SUPERVISED"
RUN_ID = b"PREFECT__FLOW_RUN_ID="


@cache
def boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else str(int(psutil.boot_time()))


def start_time(pid: int) -> str | None:
    """When `pid` was started, in a form that never changes; None if it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        if sys.platform == "linux":
            return None
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                return str(process.create_time())
        return None
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the command may hold spaces and parentheses
    return None if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class Record:
    """A pid file: what was started, when, and by which command."""

    pid: int
    started: str
    boot: str
    since: float
    command: tuple[str, ...]
    environment: tuple[str, ...]

    @property
    def alive(self) -> bool:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)  # ours, if this process started it: no zombie stays
        return self.boot == boot_id() and start_time(self.pid) == self.started

    @property
    def session_is_ours(self) -> bool:
        """A session's number is not given away while one of its processes lives."""
        return self.boot == boot_id() and start_time(self.pid) in (self.started, None)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """The record in a pid file; None if there is none or a crash left half of one."""
        try:
            values = json.loads(path.read_text())
            values["command"] = tuple(values["command"])
            values["environment"] = tuple(values["environment"])
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError):
            return None


def spawn(
    command: Sequence[str],
    environment: Mapping[str, str],
    inherited: Mapping[str, str],
    mark: str,
    log: Path,
    directory: Path,
) -> Record:
    """Start a command in its own session, its output appended to `log`.

    Being a leader of its session it outlives us and our terminal. The file is opened for appending
    so that it can be cut while the process writes.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(command),
            env={**inherited, **environment, MARK: mark},
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Record(
        pid=process.pid,
        started=start_time(process.pid) or "gone",
        boot=boot_id(),
        since=time.time(),
        command=tuple(command),
        environment=tuple(sorted(f"{key}={value}" for key, value in environment.items())),
    )


def mind_signals() -> None:
    """Let children be interrupted although a shell started us with `&` (which ignores SIGINT)."""
    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def members(record: Record | None, mark: str, spare_runs: bool = False) -> list[psutil.Process]:
    """Everything that belongs to a service, except this process and its parents.

    That is what carries its mark or lives in its session, and their descendants as far as no other
    mark begins. `spare_runs` leaves out processes of flow runs, which outlive their runner.
    """
    session = record.pid if record is not None and record.session_is_ours else None
    present = {process.pid: process for process in psutil.process_iter()}
    marks = {pid: _mark(pid) for pid in present}
    found = {
        pid
        for pid in present
        if marks[pid] == mark or (session is not None and _session_of(pid) == session)
    }
    children: dict[int, list[int]] = {}
    for pid, process in present.items():
        with contextlib.suppress(psutil.Error):
            children.setdefault(process.ppid(), []).append(pid)
    waiting = list(found)
    while waiting:
        for pid in children.get(waiting.pop(), ()):
            if pid not in found and marks[pid] in (None, mark):
                found.add(pid)
                waiting.append(pid)
    found -= _own_line()
    if spare_runs:
        found -= {process.pid for run in flow_processes().values() for process in run}
    return [present[pid] for pid in sorted(found)]


def marks_of_home(home: str) -> set[str]:
    """Marks of the services of a home that have living processes."""
    marks = {_mark(process.pid) for process in psutil.process_iter()}
    return {mark for mark in marks if mark is not None and mark.startswith(f"{home}#")}


def flow_processes() -> dict[str, list[psutil.Process]]:
    """Processes by the id of the Prefect flow run they execute."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        for entry in environment_of(process.pid):
            if entry.startswith(RUN_ID):
                found.setdefault(entry.removeprefix(RUN_ID).decode(), []).append(process)
    return found


def terminate(record: Record | None, mark: str, grace: float, spare_runs: bool = False) -> int:
    """End a service: TERM to its first process, a bounded wait, then KILL for all that is left.

    Returns how many processes had to be killed. Without a first process all are asked to end.
    """
    everyone = members(record, mark, spare_runs)
    first = [p for p in everyone if record is not None and record.alive and p.pid == record.pid]
    deadline = time.monotonic() + grace
    for process in first or everyone:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGCONT)  # a stopped process cannot end
            process.terminate()
    while time.monotonic() < deadline:
        everyone = _alive(everyone)
        if not everyone:
            break
        if first and not _alive(first):
            first = []
            deadline = min(deadline, time.monotonic() + 3)
        time.sleep(0.05)
    late = members(record, mark, spare_runs)
    everyone = list({process.pid: process for process in [*_alive(everyone), *late]}.values())
    for process in everyone:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(everyone, timeout=5)
    return len(everyone)


def memory(record: Record, mark: str) -> int:
    """Bytes of memory of a service; a page shared by n processes counts as 1/n in each."""
    total = 0
    for process in members(record, mark):
        with contextlib.suppress(psutil.Error):
            info = process.memory_full_info()
            total += getattr(info, "pss", info.rss)
    return total


def port_holder(host: str, port: int) -> tuple[psutil.Process | None, str] | None:
    """Who listens on a port: the process if we may know it, and a sentence; None if it is free."""
    if _can_bind(host, port):
        return None
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections(kind="tcp"):
            at_port = connection.laddr and connection.laddr.port == port
            if at_port and connection.status == psutil.CONN_LISTEN and connection.pid:
                process = psutil.Process(connection.pid)
                command = " ".join(process.cmdline()).strip()[:120] or process.name()
                return process, f"process {process.pid} ({command})"
    return None, "a process of another user (`sudo ss -ltnp` names it)"


def mark_of(process: psutil.Process) -> str | None:
    """The mark of a process that one of our supervisors started, its own or inherited."""
    line = [process.pid]
    with contextlib.suppress(psutil.Error):
        line += [parent.pid for parent in process.parents()]
    session = _session_of(process.pid)
    if session is not None:
        line += [pid for pid in psutil.pids() if _session_of(pid) == session]
    return next((mark for mark in map(_mark, line) if mark), None)


def _mark(pid: int) -> str | None:
    prefix = f"{MARK}=".encode()
    for entry in environment_of(pid):
        if entry.startswith(prefix):
            return entry.removeprefix(prefix).decode()
    return None


def _can_bind(host: str, port: int) -> bool:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def environment_of(pid: int) -> list[bytes]:
    """The `KEY=value` entries a process was started with; empty if we may not know them."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        if sys.platform == "linux":
            return []
    try:
        return [f"{k}={v}".encode() for k, v in psutil.Process(pid).environ().items()]
    except (psutil.Error, OSError):
        return []


def _session_of(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.getsid(pid)
    return None


def _own_line() -> set[int]:
    own = psutil.Process()
    return {own.pid, *(parent.pid for parent in own.parents())}


def _alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive
