"""What every flow does when it ends badly: Ray jobs it started must not outlive it."""

from __future__ import annotations

from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import FlowRun, State

from tasks.runtime import jobs
from tasks.runtime.errors import UserError
from tasks.runtime.settings import Settings


def stop_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Stop the Ray jobs of a run that was cancelled or crashed (Prefect calls it by keyword)."""
    try:
        jobs.stop_of_flow_run(str(flow_run.id))
    except UserError:
        return  # no cluster answers, so nothing runs on it


def stop_jobs_of_a_crash(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Stop them unless a watcher does: it first gives another run a minute to go on with them."""
    if Settings.load().prefect_api_url is not None:
        stop_jobs(flow=flow, flow_run=flow_run, state=state)


HOOKS: dict[str, Any] = {"on_cancellation": [stop_jobs], "on_crashed": [stop_jobs_of_a_crash]}
