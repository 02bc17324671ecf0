"""The console of a flow run whose runner may die."""

from __future__ import annotations

import logging

from prefect.logging.handlers import PrefectConsoleHandler


class OrphanConsoleHandler(PrefectConsoleHandler):
    """Prefect's console handler, without ending the process when nobody reads its output.

    A run writes into a pipe that its runner reads. When the runner is killed, the library that
    Prefect prints with answers the broken pipe by SystemExit, which crashes a healthy run at its
    next log line.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except SystemExit:
            self.setLevel(logging.CRITICAL + 1)
