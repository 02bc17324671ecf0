"""Every flow as a Prefect deployment `FLOW/local`, and the embedded runner that executes them.

`python -m flows.deployments` is the `worker` service of the local stack; a cluster deploys the same
flows from `prefect.yaml` to its work pool.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from prefect import Flow, serve
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from flows.corpus import corpus
from flows.deploy import deploy
from flows.evaluate import evaluate_flow
from flows.finetune import finetune_flow
from flows.pipeline import pipeline
from flows.pretrain import pretrain_flow
from flows.retrain import retrain
from flows.tokenizer import tokenizer
from tasks.runtime.planning import Planned, planning
from tasks.runtime.settings import Settings

DEPLOYMENT = "local"
CONCURRENT_RUNS = 4
EDITABLE = ("schedules", "paused", "parameters", "concurrency_limit", "concurrency_options")
"""What a person may have changed in the dashboard, and a restart of the runner leaves as it is."""


@dataclass(frozen=True)
class FlowEntry:
    """A flow, the model of its parameters, its tags and one sentence about it."""

    flow: Flow[..., Any]
    params_model: type[BaseModel]
    tags: tuple[str, ...]
    description: str


def params_model(flow: Flow[..., Any]) -> type[BaseModel]:
    """A pydantic model of a flow's parameters that refuses unknown names, as Prefect does not."""
    fields: dict[str, Any] = {
        name: (parameter.annotation, parameter.default)
        for name, parameter in inspect.signature(flow.fn, eval_str=True).parameters.items()
    }
    return create_model(f"{flow.name}_parameters", __config__=ConfigDict(extra="forbid"), **fields)


def _entry(flow: Flow[..., Any], *tags: str) -> FlowEntry:
    return FlowEntry(flow, params_model(flow), ("gristmill", *tags), flow.description or "")


FLOWS: dict[str, FlowEntry] = {
    entry.flow.name: entry
    for entry in (
        _entry(corpus, "data"),
        _entry(tokenizer, "data"),
        _entry(pretrain_flow, "training"),
        _entry(finetune_flow, "training"),
        _entry(evaluate_flow, "evaluation"),
        _entry(deploy, "serving"),
        _entry(pipeline, "whole"),
        _entry(retrain, "whole", "scheduled"),
    )
}


def parameters(name: str, values: dict[str, Any]) -> BaseModel:
    """`values` checked against the flow's parameters. Raises pydantic's ValidationError."""
    return FLOWS[name].params_model.model_validate(values)


def plan(name: str, values: dict[str, Any]) -> list[Planned]:
    """What a run with these parameters would do, stage by stage; nothing runs."""
    checked = parameters(name, values)
    arguments = {key: getattr(checked, key) for key in type(checked).model_fields}
    with planning() as planned:
        FLOWS[name].flow.fn(**arguments)
    return planned


def main() -> None:
    settings = Settings.load()
    settings.apply()
    deployments = []
    for entry in FLOWS.values():
        deployment = entry.flow.to_deployment(
            name=DEPLOYMENT,
            tags=list(entry.tags),
            description=entry.description,
            entrypoint_type=EntrypointType.MODULE_PATH,
            enforce_parameter_schema=True,
        )
        assert isinstance(deployment, RunnerDeployment)  # a coroutine only inside an event loop
        # Prefect would send their defaults and so remove schedules.
        deployment.model_fields_set.difference_update(EDITABLE)
        deployments.append(deployment)
    serve(*deployments, limit=CONCURRENT_RUNS, pause_on_shutdown=False)


if __name__ == "__main__":
    main()

__all__ = ["FLOWS", "FlowEntry", "ValidationError", "parameters", "plan"]
