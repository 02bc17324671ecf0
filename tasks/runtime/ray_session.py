"""The one door to Ray for work that is cut into shards.

`ray.init` replaces SIGTERM's handler and a blocking `ray.get` swallows Prefect's termination for
30 s, so the session restores the handler, polls, and cancels every reference on its way out: a run
cancelled from the dashboard loses its workers at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray

from tasks.runtime.errors import Unavailable, UserError
from tasks.runtime.progress import Progress
from tasks.runtime.settings import Settings

POLL_SECONDS = 0.1
PATIENCE = 90.0
"""Seconds to wait for a cluster that does not answer: it may be starting again."""

_connected_to: str | None = None


@contextlib.contextmanager
def ray_session(settings: Settings | None = None) -> Iterator[RaySession]:
    """A session on the cluster of `settings`; what it left in flight is cancelled at its end.

    The connection stays for the life of the process, so that a flow's later stages reuse the
    workers of its earlier ones: starting those cost more than many stages' own work. After a
    failure the next session connects anew, since the cluster itself may be another one.

    Raises Unavailable when no cluster answers for `PATIENCE` seconds.
    """
    settings = settings or Settings.load()
    settings.apply()
    if _connected_to != settings.ray or not ray.is_initialized():
        _connect(settings)
    session = RaySession(settings)
    try:
        yield session
    except UserError:
        raise
    except SystemError as error:
        # What a signal's handler raised inside Ray's compiled code is its cause. Left as it is, it
        # would count as a failure, and the task of a cancelled run be tried again.
        raise error.__cause__ or error from None
    except Exception:
        session.cancel()
        leave_ray()
        raise
    finally:
        session.cancel()


def _connect(settings: Settings) -> None:
    global _connected_to
    ray.shutdown()
    handler = signal.getsignal(signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while not ray.is_initialized():
        try:
            ray.init(
                address=settings.ray,
                namespace="gristmill",
                log_to_driver=False,
                logging_level=logging.WARNING,
                configure_logging=False,
            )
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"no Ray cluster answers at {settings.ray}; start it with: gristmill up"
                ) from error
            time.sleep(1)
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
    _connected_to = settings.ray


def leave_ray() -> None:
    """Give the connection and its idle workers back before a long wait; the next session rejoins.

    Harmless when there is no connection.
    """
    if ray.is_initialized() and _connected_to is not None:
        ray.shutdown()


class RaySession:
    """References in flight, so that all of them can be cancelled."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._pending: list[Any] = []

    @property
    def cpus(self) -> int:
        """CPUs by Ray's count; the embedded node claims more than it has, for its controllers."""
        return max(int(ray.cluster_resources().get("CPU", 1)), 1)

    @property
    def gpus(self) -> int:
        """GPUs by Ray's count."""
        return int(ray.cluster_resources().get("GPU", 0))

    def _in_flight(self, num_cpus: float) -> int:
        """On a cluster each CPU has a task waiting for it. The embedded node has fewer cores than
        CPUs, and a third and fourth worker on two cores would only hold memory.
        """
        if self.settings.ray_address is None:
            units = min(self.cpus, len(os.sched_getaffinity(0)))
        else:
            units = 2 * self.cpus
        return max(int(units / num_cpus), 1)

    def map(
        self,
        function: Callable[..., Any],
        items: Iterable[tuple[Any, ...]],
        *,
        label: str,
        unit: str = "shards",
        num_cpus: float = 1,
        in_flight: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Run `function(*item)` for every item; yields `(index, result)` as results come.

        A bounded number is in flight, so memory does not grow with the number of items; `in_flight`
        sets it for functions that wait more than they compute. The first failure is raised and
        cancels the rest. Ray itself never retries (Prefect does).
        """
        remote = ray.remote(num_cpus=num_cpus, max_retries=0)(function)
        work = list(items)
        progress = progress or Progress(label, len(work), unit)
        in_flight = in_flight or self._in_flight(num_cpus)
        index_of: dict[Any, int] = {}
        waiting = iter(enumerate(work))
        done = 0
        while True:
            while len(self._pending) < in_flight:
                following = next(waiting, None)
                if following is None:
                    break
                reference = remote.remote(*following[1])
                index_of[reference] = following[0]
                self._pending.append(reference)
            if not self._pending:
                break
            ready, _ = ray.wait(self._pending, num_returns=1, timeout=POLL_SECONDS)
            for reference in ready:
                self._pending.remove(reference)
                done += 1
                progress.update(progress.start + done)
                yield index_of.pop(reference), _result(reference)
        progress.finish()

    def cancel(self) -> None:
        for reference in self._pending:
            with contextlib.suppress(Exception):
                ray.cancel(reference, force=True)
        self._pending.clear()


def _result(reference: Any) -> Any:
    """What a shard function returned; its own UserError or OSError, as it was raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | OSError):
            raise error.cause from None
        raise
