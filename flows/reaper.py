"""Ends what lost its owner: flow runs whose process is gone and Ray jobs whose flow run is over.

Prefect's runner closes the runs it started, but not those of a runner that was killed: they would
show Running for ever, and a cancel would be ignored for ever. And after `kill -9` of a flow no hook
runs, so its Ray job would go on for nobody.

A healthy run is never touched. A run is lost only if it came from a deployment that this machine's
runner serves, no process carries its id in its environment, and two looks in a row agree. Runs of
work pools belong to workers elsewhere and are left alone.
"""

from __future__ import annotations

import contextlib
import datetime
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, Literal

import psutil

from flows.processes import Record, flow_processes
from tasks.runtime.job_board import running_jobs, stop_job
from tasks.runtime.rest import Refused, call
from tasks.runtime.settings import Settings

QUIET_SECONDS = 5.0
"""How long a run must have been in its state: a process is being started or is just ending."""
PENDING_SECONDS = 30.0
ORPHAN_GRACE = 8.0
"""Seconds between TERM and KILL for the process of a cancelled run that no runner watches."""
KILL_SECONDS = 0.5
"""How long a look waits for a process that was told to end."""
CANCEL_GRACE = 2.0
"""Seconds a cancelled run has to end by itself; its runner, which told it to, would wait for 30."""
WATCH_SECONDS = 60.0
"""How long the state of a run that we ended is watched: its runner may still call it Crashed."""
REATTACH_SECONDS = 60.0
"""How long the Ray job of a crashed run waits for a new run to follow it."""
LIVE = ("PENDING", "RUNNING", "CANCELLING")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")

Ending = Literal["CRASHED", "CANCELLED"]


@dataclass
class Reaper:
    """One look at a time, with what the looks before it suspected."""

    settings: Settings
    say: Callable[[str], None] = lambda line: None
    _suspects: dict[tuple[str, str], float] = field(default_factory=dict)
    _told_to_end: dict[int, float] = field(default_factory=dict)
    _cancelled_by_us: dict[str, float] = field(default_factory=dict)
    _looked_after: dict[str, float] = field(default_factory=dict)
    hurried: bool = False
    """Whether a run was being cancelled at the last look: the next one should come soon."""

    def reap(self, *, at_once: bool = False) -> None:
        """Look once; stops looking when Prefect or Ray are busy or do not answer.

        `at_once` is for a stack that is being stopped: what has no process now never will.
        """
        with contextlib.suppress(OSError, HTTPException, Refused):
            runs = self._runs({"state": {"type": {"any_": [*LIVE]}}})
            roots = [run for run in runs if self._is_ours(run)]
            self.hurried = any(run["state_type"] == "CANCELLING" for run in roots)
            if roots:
                processes = flow_processes()
                for run in roots:
                    self._look_at(run, processes.get(run["id"], []), at_once)
            keys = {(run["id"], run["state_type"]) for run in roots}
            self._suspects = {key: seen for key, seen in self._suspects.items() if key in keys}
            self._finish_cancels()
            self._mend_parts(runs)
            self._stop_jobs(runs)

    # Flow runs

    @staticmethod
    def _is_ours(run: dict[str, Any]) -> bool:
        is_root = run["parent_task_run_id"] is None
        return is_root and run["deployment_id"] is not None and run["work_pool_name"] is None

    def _look_at(self, run: dict[str, Any], processes: list[psutil.Process], at_once: bool) -> None:
        state = run["state_type"]
        if processes:
            self._suspects.pop((run["id"], state), None)
            if state == "CANCELLING" and self._have_ended(run, processes):
                self._cancelled_by_us[run["id"]] = time.monotonic()
                self._end(run, "CANCELLED", "The process of this run has ended.")
            return
        patience = PENDING_SECONDS if state == "PENDING" else QUIET_SECONDS
        if not at_once and (_age(run) < patience or not self._seen_before(run)):
            return
        if state == "CANCELLING":
            self._end(run, "CANCELLED", "The process of this run has ended.")
        elif state == "PENDING" and not at_once:
            if self._worker_is_younger_than(run):
                self._schedule_again(run)
        else:
            self._end(
                run,
                "CRASHED",
                "The process of this run was killed or the stack was stopped. Run it again: "
                "finished stages are found, training continues from its last checkpoint.",
            )

    def _seen_before(self, run: dict[str, Any]) -> bool:
        key = (run["id"], run["state_type"])
        return self._suspects.setdefault(key, time.monotonic()) < time.monotonic() - 1

    def _worker_is_younger_than(self, run: dict[str, Any]) -> bool:
        record = Record.read(self.settings.home / "run" / "worker.json")
        return record is not None and record.alive and record.since > _timestamp(run)

    def _have_ended(self, run: dict[str, Any], processes: list[psutil.Process]) -> bool:
        """Whether the processes of a cancelled run are over; those that stay are made to end.

        A process inside Ray's or torch's own code hears no signal; killed, it takes its shard work
        along. Its runner would say Cancelled, but may have died, or hear of cancels only every ten
        seconds because Prefect's server was started again.
        """
        watched = self._children_of_the_runner()
        now = time.monotonic()
        for process in processes:
            with contextlib.suppress(psutil.Error):
                if process.pid in watched:
                    if _age(run) > CANCEL_GRACE:
                        self.say(f"killing process {process.pid} of the cancelled {run['name']}")
                        process.kill()
                    continue
                self._cancelled_by_us[run["id"]] = now
                told = self._told_to_end.setdefault(process.pid, now)
                if told == now:
                    self.say(f"ending process {process.pid} of the cancelled {run['name']}")
                    process.send_signal(signal.SIGTERM)
                elif now - told > ORPHAN_GRACE:
                    process.kill()
        return not psutil.wait_procs(processes, timeout=KILL_SECONDS)[1]

    def _children_of_the_runner(self) -> set[int]:
        record = Record.read(self.settings.home / "run" / "worker.json")
        if record is None or not record.alive:
            return set()
        with contextlib.suppress(psutil.Error):
            return {child.pid for child in psutil.Process(record.pid).children(recursive=True)}
        return set()

    def _finish_cancels(self) -> None:
        """A run that we ended may be called Crashed, by itself or its runner; it was cancelled."""
        for run_id, since in list(self._cancelled_by_us.items()):
            run = self._ask(f"flow_runs/{run_id}")
            if run["state_type"] == "CRASHED":
                self._end(run, "CANCELLED", "The process of this run has ended.")
            if run["state_type"] in OVER and time.monotonic() - since > WATCH_SECONDS:
                del self._cancelled_by_us[run_id]

    def _schedule_again(self, run: dict[str, Any]) -> None:
        self.say(f"run {run['name']} was taken by a runner that died; scheduled again")
        moment = datetime.datetime.now(datetime.UTC).isoformat()
        state = {"type": "SCHEDULED", "name": "Scheduled", "message": "Its runner was killed."}
        self._set("flow_runs", run, state | {"state_details": {"scheduled_time": moment}})

    def _end(self, run: dict[str, Any], ending: Ending, message: str) -> None:
        self.say(f"run {run['name']} is over: {ending.lower()}")
        self._set("flow_runs", run, {"type": ending, "name": ending.title(), "message": message})
        self._mend_tasks(run["id"], ending)

    # Their parts

    def _mend_parts(self, live: list[dict[str, Any]]) -> None:
        """Close the rows of runs that ended lately: tasks and subflows that still show Running.

        Tasks of a cancelled run are often left Crashed, which reads as a fault; they were cancelled
        too.
        """
        since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)
        ended = self._runs(
            {
                "state": {"type": {"any_": ["CANCELLED", "CRASHED"]}},
                "end_time": {"after_": since.isoformat()},
            }
        )
        now = time.monotonic()
        present = {run["id"] for run in ended}
        self._looked_after = {k: v for k, v in self._looked_after.items() if k in present}
        for run in ended:
            first = self._looked_after.setdefault(run["id"], now)
            if now - first < 60:  # rows that arrive late are still mended
                self._mend_tasks(run["id"], run["state_type"])
        for run in live:
            if run["parent_task_run_id"] is not None and _age(run) > QUIET_SECONDS:
                parent = self._parent_of(run)
                if parent is not None and parent["state_type"] in ("CANCELLED", "CRASHED"):
                    self._end(run, parent["state_type"], "The run it is a part of has ended.")

    def _mend_tasks(self, run_id: str, ending: Ending) -> None:
        wrong = ["RUNNING", "PENDING", *(["CRASHED"] if ending == "CANCELLED" else [])]
        query = {
            "flow_runs": {"id": {"any_": [run_id]}},
            "task_runs": {"state": {"type": {"any_": wrong}}},
            "limit": 200,
        }
        for row in self._ask("task_runs/filter", query):
            message = (
                "The run it is a part of was cancelled."
                if ending == "CANCELLED"
                else ("The process of its run is gone.")
            )
            state = {"type": ending, "name": ending.title(), "message": message}
            self._set("task_runs", row, state)

    def _parent_of(self, run: dict[str, Any]) -> dict[str, Any] | None:
        try:
            row = self._ask(f"task_runs/{run['parent_task_run_id']}")
            return self._ask(f"flow_runs/{row['flow_run_id']}") if row["flow_run_id"] else None
        except Refused:
            return None

    # Ray jobs

    def _stop_jobs(self, live: list[dict[str, Any]]) -> None:
        """Stop jobs of runs that are over; those of a crashed run may still find a new follower.

        A run started again follows the job of the one that died, and the job keeps the dead run's
        id: so as long as any run is at work, jobs of crashed runs are left alone.
        """
        for job in running_jobs(self.settings):
            try:
                run = self._ask(f"flow_runs/{job.flow_run}")
            except Refused as error:
                if error.status != 404:
                    raise
                run = {"state_type": "CANCELLED", "name": f"{job.flow_run} (deleted)"}
            if run["state_type"] not in OVER:
                continue
            if run["state_type"] in ("CRASHED", "FAILED", "COMPLETED") and (
                _age(run) < REATTACH_SECONDS or any(self._is_ours(other) for other in live)
            ):
                continue
            self.say(f"stopping Ray job {job.submission_id}: its run {run['name']} is over")
            stop_job(self.settings, job.submission_id)

    # Prefect

    def _runs(self, query: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._ask(
            "flow_runs/filter", {"flow_runs": query, "limit": 200, "sort": "START_TIME_DESC"}
        )
        return found

    def _set(self, kind: str, row: dict[str, Any], state: dict[str, Any]) -> None:
        """Change a state if it is still the one that was judged."""
        present = self._ask(f"{kind}/{row['id']}")
        if present["state_id"] == row["state_id"]:
            self._ask(f"{kind}/{row['id']}/set_state", {"state": state, "force": True})

    def _ask(self, path: str, body: Any = None) -> Any:
        return call(f"{self.settings.prefect_api}/{path}", body, timeout=10)


def _timestamp(run: dict[str, Any]) -> float:
    return datetime.datetime.fromisoformat(run["state"]["timestamp"]).timestamp()


def _age(run: dict[str, Any]) -> float:
    """Seconds that a run has been in its state."""
    return time.time() - _timestamp(run)
