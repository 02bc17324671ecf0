"""Which Ray jobs run, and for whom, asked over REST so that a small process need not import Ray."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from http import HTTPStatus

from tasks.runtime.rest import Refused, call
from tasks.runtime.settings import Settings

RUNNING = ("PENDING", "RUNNING")
UNKNOWN = "does not exist"
"""What Ray says of a job that an earlier cluster ran; a 404 without it is somebody else's."""


@dataclass(frozen=True)
class RunningJob:
    """A job at work; `flow_run` is the id of the Prefect flow run that submitted it."""

    submission_id: str
    flow_run: str


def running_jobs(settings: Settings) -> list[RunningJob]:
    """Jobs submitted by flow runs that have not ended. Raises OSError when Ray does not answer."""
    jobs = call(f"{settings.ray_dashboard}/api/jobs/", token=_token(settings))
    return [
        RunningJob(job["submission_id"], job["metadata"]["gristmill_flow_run"])
        for job in jobs
        if job["status"] in RUNNING
        and job.get("submission_id")
        and (job.get("metadata") or {}).get("gristmill_flow_run")
    ]


def job_status(settings: Settings, submission_id: str) -> str | None:
    """`PENDING`, `RUNNING`, `STOPPED`, `SUCCEEDED` or `FAILED`; None for a job Ray does not know.

    Raises OSError when Ray does not answer, Refused when it answers with an error of its own.
    """
    url = f"{settings.ray_dashboard}/api/jobs/{submission_id}"
    try:
        return str(call(url, token=_token(settings), timeout=15)["status"])
    except Refused as refusal:
        if refusal.status == HTTPStatus.NOT_FOUND and UNKNOWN in str(refusal):
            return None
        raise
    except (KeyError, TypeError) as error:
        raise OSError(f"{url} answers, but not as Ray does") from error


def stop_job(settings: Settings, submission_id: str) -> None:
    """Ask a job to end; one that ended meanwhile is left alone."""
    with contextlib.suppress(Refused):
        url = f"{settings.ray_dashboard}/api/jobs/{submission_id}/stop"
        call(url, {}, token=_token(settings), timeout=15)


def _token(settings: Settings) -> str | None:
    path = settings.ray_token_path
    return path.read_text().strip() if path.exists() else None
