"""Progress of long work, with rate and remaining time, wherever a person looks.

A line in the run's log every few seconds, a Prefect progress artifact on the run page; without
Prefect, a line on standard error.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_UPDATES = 1.0


def run_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """The Prefect run's logger inside a run, else an ordinary one."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("gristmill")


def duration(seconds: float) -> str:
    """`75` → `1 min 15 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


class Progress:
    """How far one piece of work has come; `total` may be corrected while it runs.

    `update(done)` takes the amount done so far, in `unit`s. Work found done on resume is passed
    as `start`, so that the rate counts only what this run did.
    """

    def __init__(self, label: str, total: float, unit: str, start: float = 0) -> None:
        self.label, self.total, self.unit = label, max(total, 1), unit
        self.start = self.done = start
        self.begun = time.monotonic()
        self._line_at = self.begun
        self._update_at = self.begun
        self._artifact: UUID | None = None
        words = "".join(c if c.isalnum() else " " for c in label.lower()).split()
        self._key = "-".join(["progress", *words])  # the label may change, as a loss is in it
        self._in_run = TaskRunContext.get() is not None

    @property
    def rate(self) -> float:
        """Units per second of this run."""
        return (self.done - self.start) / max(time.monotonic() - self.begun, 1e-6)

    @property
    def remaining(self) -> float | None:
        """Seconds to go at the present rate."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None

    def line(self) -> str:
        left = f", {duration(self.remaining)} left" if self.remaining is not None else ""
        share = min(100 * self.done / self.total, 100)
        return (
            f"{self.label}: {self.done:,.0f} of {self.total:,.0f} {self.unit} ({share:.0f}%), "
            f"{self.rate:,.1f}/s{left}"
        )

    def update(self, done: float, total: float | None = None) -> None:
        self.done = done
        if total is not None:
            self.total = max(total, 1)
        now = time.monotonic()
        if now - self._update_at >= SECONDS_BETWEEN_UPDATES:
            self._update_at = now
            self._publish()
        if now - self._line_at >= SECONDS_BETWEEN_LINES:
            self._line_at = now
            self._say()

    def finish(self) -> None:
        """Say the last line; a piece of work shorter than a second stays silent."""
        if time.monotonic() - self.begun >= SECONDS_BETWEEN_UPDATES:
            self._publish()
            self._say()

    def _say(self) -> None:
        if self._in_run:
            run_logger().info(self.line())
        else:
            print(self.line(), file=sys.stderr, flush=True)

    def _publish(self) -> None:
        if not self._in_run:
            return
        share = min(100 * self.done / self.total, 100)
        if self._artifact is None:
            with contextlib.suppress(Exception):  # a page that is late must not end the work
                created = create_progress_artifact(share, key=self._key, description=self.line())
                self._artifact = created if isinstance(created, UUID) else None
        else:
            with contextlib.suppress(Exception):
                update_progress_artifact(self._artifact, share, description=self.line())
