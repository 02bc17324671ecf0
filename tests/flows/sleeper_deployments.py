"""A runner with one harmless flow, for tests of the supervisor, the reaper and the command line."""

from __future__ import annotations

import time

from prefect import flow, serve, task
from prefect.deployments.runner import EntrypointType


@task
def nap(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.1)


@flow
def sleeper(seconds: float = 1) -> None:
    """Sleeps."""
    nap(seconds)


if __name__ == "__main__":
    from tests.flows import sleeper_deployments  # so that the flow is found by its module's name

    deployment = sleeper_deployments.sleeper.to_deployment("local", entrypoint_type=EntrypointType.MODULE_PATH)
    serve(deployment, pause_on_shutdown=False)
