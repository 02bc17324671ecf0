"""Stages in this process and on one core: the work itself, without Ray's processes around it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

CHECKOUT = Path(__file__).resolve().parents[1]


class InlineSession:
    """Stands where `ray_session()` stands in shard stages: the same calls, one after another."""

    cpus = 1

    def __enter__(self) -> InlineSession:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def map(
        self, function: Callable[..., Any], items: Iterable[tuple[Any, ...]], **_: Any
    ) -> Iterator[tuple[int, Any]]:
        for index, item in enumerate(items):
            yield index, function(*item)


class OneWorkerSession(InlineSession):
    """The same with shard functions in a process of their own, as on Ray, so that the memory of
    driver and worker can be told apart.
    """

    _pool: ClassVar[ProcessPoolExecutor | None] = None

    @classmethod
    def pool(cls) -> ProcessPoolExecutor:
        if cls._pool is None:
            cls._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        return cls._pool

    def map(
        self, function: Callable[..., Any], items: Iterable[tuple[Any, ...]], **_: Any
    ) -> Iterator[tuple[int, Any]]:
        for index, item in enumerate(items):
            yield index, self.pool().submit(function, *item).result()

    @classmethod
    def peak_mb(cls) -> float:
        """The most memory the worker has held."""
        return cls.pool().submit(peak_mb).result()


@contextlib.contextmanager
def one_core(home: Path, session: type[InlineSession] = InlineSession) -> Iterator[None]:
    """Inside, stages write below `home` and their shard functions run in this process, or where
    `session` says.
    """
    with (
        mock.patch.dict(os.environ, {"GRISTMILL_HOME": str(home)}),
        mock.patch("tasks.corpus.sharding.ray_session", session),
    ):
        yield


def peak_mb() -> float:
    """The most memory this process has held. `ru_maxrss` would begin at the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Stopwatch:
    """CPU seconds of this process and its ended children, and seconds on the clock."""

    def __enter__(self) -> Stopwatch:
        self._begun, self._cpu = time.monotonic(), self._spent()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._begun
        self.cpu = self._spent() - self._cpu

    @staticmethod
    def _spent() -> float:
        used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)


def worker(script: str, *arguments: str, timeout: float = 900) -> dict[str, Any]:
    """Run `script --worker arguments…` in a fresh process; the JSON of its last line."""
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, "--worker", *arguments],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
