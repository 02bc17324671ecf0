"""A runner with one harmless flow, for tests of the supervisor, the reaper and the command line.

It offers what `flows.deployments` offers, without what takes seconds to import.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from prefect import flow, serve, task
from prefect.deployments.runner import EntrypointType
from pydantic import BaseModel, ConfigDict, Field


class Nap(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    seconds: float = Field(1, ge=0, le=600)


SHORT = Nap()


class SleeperParameters(BaseModel):
    model_config = ConfigDict(extra="forbid")
    nap: Nap = SHORT
    fail: bool = False


@task
def sleep(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.1)


@flow
def sleeper(nap: Nap = SHORT, fail: bool = False) -> None:
    """Sleeps."""
    sleep(nap.seconds)
    if fail:
        raise RuntimeError("the bed broke")


@dataclass(frozen=True)
class Entry:
    params_model: type[BaseModel]


FLOWS = {"sleeper": Entry(SleeperParameters)}


def parameters(name: str, values: dict[str, Any]) -> BaseModel:
    return FLOWS[name].params_model.model_validate(values)


if __name__ == "__main__":
    from tests.flows import sleeper_deployments  # so that the flow is found by its module's name

    deployment = sleeper_deployments.sleeper.to_deployment(
        "local", entrypoint_type=EntrypointType.MODULE_PATH
    )
    serve(deployment, pause_on_shutdown=False)
