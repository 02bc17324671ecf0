"""What every flow does when it ends badly: Ray jobs it started must not outlive it."""

from __future__ import annotations

from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import FlowRun, State

from tasks.runtime import jobs
from tasks.runtime.errors import UserError


def stop_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Stop the Ray jobs of a run that was cancelled or crashed (Prefect calls it by keyword)."""
    try:
        jobs.stop_of_flow_run(str(flow_run.id))
    except UserError:
        return  # no cluster answers, so nothing runs on it


HOOKS: dict[str, Any] = {"on_cancellation": [stop_jobs], "on_crashed": [stop_jobs]}
