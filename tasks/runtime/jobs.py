"""Ray jobs: work that outlives the flow that asked for it.

A job's submission id comes from the fingerprint, so a run started again finds the job of the run
that died and follows it instead of starting a second one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from prefect.context import TaskRunContext
from ray.job_submission import JobStatus, JobSubmissionClient

from tasks.runtime.errors import Unavailable
from tasks.runtime.job_board import job_status
from tasks.runtime.rest import Refused
from tasks.runtime.settings import Settings

POLL_SECONDS = 0.5
PATIENCE = 90.0
"""Seconds a stage waits for a cluster that does not answer: it may be starting again."""
RUNNING = (JobStatus.PENDING, JobStatus.RUNNING)


class JobFailed(RuntimeError):
    """A Ray job ended in failure; the message holds the end of its log."""


def client(settings: Settings | None = None, patience: float = 0) -> JobSubmissionClient:
    """A job client that carries the cluster's token.

    Raises Unavailable when nothing answers for `patience` seconds.
    """
    settings = settings or Settings.load()
    settings.apply()
    deadline = time.monotonic() + patience
    while True:
        try:
            return JobSubmissionClient(settings.ray_dashboard)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"no Ray cluster answers at {settings.ray_dashboard}; start it with: "
                    "gristmill up"
                ) from error
        time.sleep(1)


@dataclass(frozen=True)
class Job:
    """One attempt at a fingerprint's work: `<name>-<fingerprint>-<attempt>`."""

    name: str
    fingerprint: str

    @property
    def stem(self) -> str:
        return f"{self.name}-{self.fingerprint[:16]}"

    def attempts(self, jobs: JobSubmissionClient) -> list[Any]:
        found = [j for j in jobs.list_jobs() if (j.submission_id or "").startswith(self.stem)]
        return sorted(found, key=lambda job: job.start_time or 0)

    def attach_or_submit(
        self, jobs: JobSubmissionClient, entrypoint: str, environment: dict[str, str]
    ) -> str:
        """The submission id of the job at work on this fingerprint, started if there is none."""
        attempts = self.attempts(jobs)
        for job in attempts:
            if job.status in RUNNING and job.submission_id:
                return job.submission_id
        submission = f"{self.stem}-{len(attempts)}-{time.time_ns() // 1_000_000}"
        jobs.submit_job(
            entrypoint=entrypoint,
            submission_id=submission,
            runtime_env={"env_vars": environment | {"RAY_JOB_STOP_WAIT_TIME_S": "2"}},
            metadata={"gristmill_flow_run": flow_run_id() or "", "fingerprint": self.fingerprint},
            entrypoint_num_cpus=0,
        )
        return submission


def flow_run_id() -> str | None:
    """The id of the Prefect flow run this code runs in, if any."""
    context = TaskRunContext.get()
    if context is not None and context.task_run.flow_run_id is not None:
        return str(context.task_run.flow_run_id)
    return os.environ.get("PREFECT__FLOW_RUN_ID")


def follow(
    jobs: JobSubmissionClient,
    submission: str,
    settings: Settings,
    on_poll: Callable[[], None] = lambda: None,
) -> None:
    """Wait for a job's end, calling `on_poll` twice a second.

    Stops the job if this process is told to end (a cancelled run). A dashboard that owes an answer
    is asked again. Raises JobFailed with the last lines of the job's log when it fails, or when the
    cluster that ran it is gone, and Unavailable when Ray is silent for too long.
    """
    heard = time.monotonic()
    try:
        while True:
            # Not asked by Ray's client: it builds a pool of connections for each question, and a
            # signal that arrives while the pool's finalizer runs is printed and forgotten.
            try:
                status = job_status(settings, submission)
                heard = time.monotonic()
            except (OSError, HTTPException, Refused) as error:
                if time.monotonic() - heard > PATIENCE:
                    raise Unavailable(
                        f"Ray has not answered for {PATIENCE:.0f} s; mend it with: gristmill up"
                    ) from error
                status = JobStatus.RUNNING
            if status is None:
                raise JobFailed(f"Ray was started anew and lost job {submission}")
            on_poll()
            if status not in RUNNING:
                break
            time.sleep(POLL_SECONDS)
    except BaseException:
        stop(jobs, submission)
        raise
    if status != JobStatus.SUCCEEDED:
        log = jobs.get_job_logs(submission).strip().splitlines()
        raise JobFailed(f"Ray job {submission} {status.lower()}:\n" + "\n".join(log[-30:]))


def stop(jobs: JobSubmissionClient, submission: str) -> None:
    """Ask a job to end; one that is over, or whose cluster is gone, is left alone."""
    with contextlib.suppress(OSError, RuntimeError):
        if jobs.get_job_status(submission) in RUNNING:
            jobs.stop_job(submission)


def stop_of_flow_run(run_id: str, settings: Settings | None = None) -> list[str]:
    """Stop every running job that a flow run started; returns their submission ids."""
    jobs = client(settings)
    stopped = []
    for job in jobs.list_jobs():
        mine = (job.metadata or {}).get("gristmill_flow_run") == run_id
        if mine and job.status in RUNNING and job.submission_id:
            jobs.stop_job(job.submission_id)
            stopped.append(job.submission_id)
    return stopped


def python_entrypoint(module: str, argument: dict[str, Any]) -> str:
    """A shell line that runs `python -m module <json>` with the interpreter of the cluster."""
    return f"{shlex.quote(sys.executable)} -m {module} {shlex.quote(json.dumps(argument))}"
