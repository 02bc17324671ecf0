"""`gristmill doctor`: what this machine lacks, one sentence and a remedy each."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from flows import processes
from flows.services import CHECKOUT, services
from tasks.runtime.settings import Settings

PYTHONS = ((3, 11), (3, 12))
DISK_GB = 6
MEMORY_GB = 6
OPEN_FILES = 4096
BUILD_OF_THIS_CODE = 1_767_225_600
"""2026-01-01: a clock before it makes certificates, tokens and schedules wrong."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `remedy` is empty when it is fine; `fatal` says `up` cannot work."""

    what: str
    found: str
    remedy: str = ""
    fatal: bool = True

    @property
    def fine(self) -> bool:
        return not self.remedy


def examine(settings: Settings, *, ports: bool = True) -> list[Finding]:
    """Everything that a first run needs, in the order a person would mend it."""
    findings = [
        _python(),
        *_packages(),
        _disk(settings.home),
        _memory(),
        _shared_memory(settings),
        _open_files(),
        _clock(),
    ]
    if ports:
        findings += _ports(settings)
    return findings


def _python() -> Finding:
    version = sys.version.split()[0]
    known = sys.version_info[:2] in PYTHONS
    remedy = "" if known else "make the environment with Python 3.11 or 3.12: make run PYTHON=…"
    return Finding("python", version, remedy)


def _packages() -> Iterator[Finding]:
    """What pyproject.toml asks for against what is installed."""
    source = CHECKOUT / "pyproject.toml"
    if not source.exists():
        return
    wanted = tomllib.loads(source.read_text())["project"]["dependencies"]
    wrong = []
    for requirement in map(Requirement, wanted):
        try:
            present = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(present, prereleases=True):
            wrong.append(f"{requirement.name} is {present}, not {requirement.specifier}")
    remedy = "install what is pinned: pip install -r requirements.lock" if wrong else ""
    yield Finding("packages", "; ".join(wrong) or f"{len(wanted)} as required", remedy)


def _disk(home: Path) -> Finding:
    place = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(place).free / 2**30
    remedy = ""
    if free < DISK_GB:
        remedy = f"free {DISK_GB - free:.1f} GB there, or use another disk with --home"
    return Finding("disk", f"{free:.1f} GB free at {place}, {DISK_GB} GB needed", remedy)


def _memory() -> Finding:
    free = memory_available() / 2**30
    remedy = "" if free >= MEMORY_GB else "end other programs or use a machine with more memory"
    return Finding("memory", f"{free:.1f} GB available, {MEMORY_GB} GB needed", remedy)


def memory_available() -> int:
    """Bytes that can still be used: the machine's, or less inside a container with a limit."""
    available = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(available, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return available


def _shared_memory(settings: Settings) -> Finding:
    """Ray keeps its objects in /dev/shm and grows slow on a disk when that is small."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("shared memory", "no /dev/shm here; Ray uses files")
    free = shutil.disk_usage(place).free / 2**20
    needed = settings.ray_object_store_mb
    remedy = "" if free >= needed else "enlarge it (docker run --shm-size=1g) or stop other users"
    found = f"{free:.0f} MB free in /dev/shm, {needed} MB needed"
    return Finding("shared memory", found, remedy, fatal=False)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    remedy = ""
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        remedy = f"raise it before starting: ulimit -n {OPEN_FILES}"
    return Finding("open files", f"{soft} allowed, {OPEN_FILES} needed", remedy)


def raise_open_files() -> None:
    """Use the open files that the machine allows; Ray needs more than the usual 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        enough = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(enough, soft), hard))


def _clock() -> Finding:
    now = time.time()
    remedy = "" if now > BUILD_OF_THIS_CODE else "set the clock; schedules and tokens depend on it"
    return Finding("clock", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)), remedy)


def _ports(settings: Settings) -> Iterator[Finding]:
    ours = f"{settings.home}#"
    free = 0
    for service in services(settings):
        for name, port in service.ports.items():
            held = processes.port_holder(settings.host, port)
            if held is None:
                free += 1
                continue
            process, holder = held
            mark = processes.mark_of(process) if process else None
            if mark and mark.startswith(ours):
                free += 1
                continue
            yield Finding(
                f"port {port}", f"{name}: taken by {holder}", f"choose another: --ports {name}=PORT"
            )
    yield Finding("ports", f"{free} free or our own")


def report(findings: list[Finding], *, colour: bool | None = None) -> str:
    """A table of findings, remedies below what they mend."""
    if colour is None:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    lines = []
    for finding in findings:
        word = "ok" if finding.fine else "missing" if finding.fatal else "note"
        shade = {"ok": "32", "missing": "31", "note": "33"}[word]
        shown = f"\033[{shade}m{word:<8}\033[0m" if colour else f"{word:<8}"
        lines.append(f"{shown}{finding.what:<14} {finding.found}")
        if not finding.fine:
            lines.append(f"{'':<22} → {finding.remedy}")
    return "\n".join(lines)
