"""Flow runs from the command line: trigger, follow, cancel, over the API the dashboard uses."""

from __future__ import annotations

import re
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

from tasks.runtime.errors import UserError
from tasks.runtime.progress import duration
from tasks.runtime.rest import Refused, call
from tasks.runtime.settings import Settings

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
POLL_SECONDS = 1.0
PROGRESS_SECONDS = 10.0
"""Between two progress lines where they cannot be written over each other."""
SERVER_PATIENCE = 180.0
START_PATIENCE = 20.0
BUSY = (408, 429, 502, 503)
BUSY_PATIENCE = 60.0
CANCEL_PATIENCE = 60.0


@dataclass
class Runs:
    """Runs on the Prefect server of a home. Raises UserError when it does not answer."""

    settings: Settings

    def trigger(self, flow: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Start the deployment `flow/local` with these parameters; returns the flow run."""
        try:
            deployment = self.ask(f"deployments/name/{flow}/local")
        except Refused as error:
            if error.status == 404:
                raise UserError(
                    f"Prefect has no deployment {flow}/local yet; the worker makes it: gristmill up"
                ) from error
            raise UserError(f"Prefect refused: {error}") from error
        body = {
            "parameters": parameters,
            "state": {"type": "SCHEDULED", "name": "Scheduled"},
            "tags": deployment["tags"],
        }
        try:
            run: dict[str, Any] = self.ask(f"deployments/{deployment['id']}/create_flow_run", body)
        except Refused as error:
            raise UserError(f"Prefect refused to start {flow}: {error}") from error
        return run

    def find(self, name: str) -> dict[str, Any]:
        """A run by id, name, or the beginning of either; the newest if several fit."""
        try:
            found: dict[str, Any] = self.ask(f"flow_runs/{uuid.UUID(name)}")
            return found
        except (ValueError, Refused):
            pass
        runs = self.ask("flow_runs/filter", {"limit": 200, "sort": "EXPECTED_START_TIME_DESC"})
        for run in runs:
            if run["name"].startswith(name) or run["id"].startswith(name):
                return dict(run)
        recent = ", ".join(run["name"] for run in runs[:5]) or "none yet"
        raise UserError(f"no run is called {name!r}; the latest are: {recent}")

    def cancel(self, run: dict[str, Any]) -> dict[str, Any]:
        """Cancel a run as the dashboard does and wait for its end; returns it as it ended."""
        if run["state_type"] in FINAL:
            raise UserError(f"run {run['name']} is over already: {run['state_name']}")
        started = run["state_type"] in ("RUNNING", "PENDING", "CANCELLING")
        name = "CANCELLING" if started else "CANCELLED"
        self.ask(f"flow_runs/{run['id']}/set_state", {"state": {"type": name}})
        deadline = time.monotonic() + CANCEL_PATIENCE
        while True:
            run = self.ask(f"flow_runs/{run['id']}")
            if run["state_type"] in FINAL:
                return run
            if time.monotonic() > deadline:
                raise UserError(
                    f"run {run['name']} is still {run['state_name']} after {CANCEL_PATIENCE:.0f} s;"
                    " look at the worker: gristmill status, gristmill logs worker"
                )
            time.sleep(0.3)

    def page(self, run: dict[str, Any]) -> str:
        return f"{self.settings.prefect_dashboard}/v2/runs/flow-run/{run['id']}"

    def ask(self, path: str, body: Any = None) -> Any:
        """An answer of Prefect, which says 503 while its database is busy: that is waited for.

        Raises Refused for any other refusal, UserError when Prefect does not answer.
        """
        deadline = time.monotonic() + BUSY_PATIENCE
        while True:
            try:
                return call(f"{self.settings.prefect_api}/{path}", body, timeout=15)
            except Refused as error:
                if error.status not in BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            except (OSError, HTTPException) as error:
                raise UserError(
                    f"Prefect does not answer at {self.settings.prefect_api}; start it: "
                    "gristmill up"
                ) from error


def plain(message: str | None) -> str:
    """A state's message without the words Prefect and Python put before a person's mistake."""
    return _WRAPPED.sub("", (message or "").strip())


_WRAPPED = re.compile(
    r"^(Flow|Task) run encountered an exception:? *([\w.]*\.)?(UserError|Unavailable): "
)


@dataclass
class Watch:
    """Follows one run: a line for every change of a stage, and its progress in between."""

    runs: Runs
    run: dict[str, Any]
    write: Callable[[str], Any] = field(default_factory=lambda: sys.stdout.write)
    in_place: bool = field(default_factory=lambda: sys.stdout.isatty())
    _states: dict[str, str] = field(default_factory=dict)
    _progress: str = ""
    _progress_at: float = 0.0
    _shown: bool = False
    _begun: float = field(default_factory=time.monotonic)

    def follow(self) -> int:
        """Until the run has ended; 0 if it completed, else 1. An absent server is waited for."""
        absent_since: float | None = None
        warned = False
        while True:
            try:
                self.run = self.runs.ask(f"flow_runs/{self.run['id']}")
                self._stages()
                absent_since = None
            except (UserError, Refused) as error:
                now = time.monotonic()
                if absent_since is None:
                    absent_since = now
                    self._line("Prefect does not answer; the run goes on, waiting for it")
                if now - absent_since > SERVER_PATIENCE:
                    raise error
            if self.run["state_type"] in FINAL:
                return self._end()
            waiting = self.run["state_type"] in ("SCHEDULED", "PENDING")
            if waiting and not warned and time.monotonic() - self._begun > START_PATIENCE:
                warned = True
                self._line("no worker has taken the run yet; see: gristmill status")
            time.sleep(POLL_SECONDS)

    def _stages(self) -> None:
        query = {
            "flow_runs": {"id": {"any_": [self.run["id"]]}},
            "sort": "EXPECTED_START_TIME_ASC",
            "limit": 200,
        }
        running = {}
        for task in self.runs.ask("task_runs/filter", query):
            state = task["state_name"] or "Pending"
            if state == "Running":
                running[task["id"]] = task["name"]
            if self._states.get(task["id"]) == state or state in ("Pending", "NotReady"):
                continue
            self._states[task["id"]] = state
            took = task["total_run_time"] or 0
            spent = f"  {duration(took)}" if state != "Running" and took >= 1 else ""
            self._line(f"{task['name']:<24} {state}{spent}")
        self._show_progress(running)

    def _show_progress(self, running: dict[str, str]) -> None:
        """The latest progress artifact of a stage at work: how far, how fast, how long yet."""
        if not running:
            return
        query = {
            "artifacts": {
                "flow_run_id": {"any_": [self.run["id"]]},
                "type": {"any_": ["progress"]},
            },
            "sort": "UPDATED_DESC",
            "limit": 5,
        }
        for artifact in self.runs.ask("artifacts/filter", query):
            if artifact["task_run_id"] not in running or not artifact["description"]:
                continue
            line = artifact["description"]
            now = time.monotonic()
            if line == self._progress:
                return
            if self.in_place:
                self.write(f"\r\033[K{self._clock()} {line[:110]}")
                self._flush()
                self._shown = True
            elif now - self._progress_at >= PROGRESS_SECONDS:
                self._progress_at = now
                self._line(line)
            self._progress = line
            return

    def _end(self) -> int:
        name, message = self.run["state_name"], plain(self.run["state"]["message"])
        took = duration(self.run["total_run_time"] or 0)
        self._line(f"run {self.run['name']} {name.lower()} after {took}")
        if self.run["state_type"] == "COMPLETED":
            return 0
        for reason in self._failures() or [message]:
            self._line(reason)
        self._line(f"its page: {self.runs.page(self.run)}")
        return 1

    def _failures(self) -> list[str]:
        query = {
            "flow_runs": {"id": {"any_": [self.run["id"]]}},
            "task_runs": {"state": {"type": {"any_": ["FAILED", "CRASHED"]}}},
        }
        return [
            f"{task['name']}: {plain(task['state']['message'])}"
            for task in self.runs.ask("task_runs/filter", query)
        ]

    def _line(self, text: str) -> None:
        self.write(("\r\033[K" if self._shown else "") + f"{self._clock()} {text}\n")
        self._shown = False
        self._flush()

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._begun), 60)
        return f"{minutes:3d}:{seconds:02d}"

    def _flush(self) -> None:
        sys.stdout.flush()
