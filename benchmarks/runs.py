"""Flow runs of a home as the dashboard starts, sees and cancels them."""

from __future__ import annotations

import datetime
import json
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import psutil

from benchmarks.stack import Home
from flows.parameters import parse, put, read_config
from flows.processes import flow_processes
from flows.runs import FINAL, Runs

TINY = "tiny"
WAIT = 300.0


class FlowRuns:
    """Triggers runs of a home's deployments and asks Prefect about them."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.api = Runs(home.settings)

    def trigger(self, flow: str, *settings: str, config: str | None = TINY) -> str:
        """Start a run with `key=value` settings over what a preset says of the flow's parameters.

        Returns the run's id.
        """
        form = self.api.ask(f"deployments/name/{flow}/local")["parameter_openapi_schema"]
        values = read_config(config, form["properties"]) if config else {}
        for setting in settings:
            key, _, text = setting.partition("=")
            put(values, key, parse(text))
        return str(self.api.trigger(flow, values)["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api.ask(f"flow_runs/{run_id}")
        return found

    def tasks(self, run_id: str) -> list[dict[str, Any]]:
        query = {"flow_runs": {"id": {"any_": [run_id]}}, "limit": 200}
        return list(self.api.ask("task_runs/filter", query))

    def states(self, run_id: str) -> dict[str, str]:
        """Stage → name of the state of its task; what ran twice in a run is named once."""
        rows = sorted(self.tasks(run_id), key=lambda row: row["created"])
        return {row["name"]: row["state_name"] for row in rows}

    def finish(self, run_id: str, seconds: float = 900) -> dict[str, Any]:
        """The run when it has ended; stops the benchmark when it did not complete."""
        wait_for(lambda: self.run(run_id)["state_type"] in FINAL, seconds, "the end of a run")
        run = self.run(run_id)
        if run["state_type"] != "COMPLETED":
            failed = [row["state"]["message"] for row in self.tasks(run_id)]
            raise SystemExit(f"run {run['name']} {run['state_name']}: {failed[-1:]}")
        return run

    def processes(self, run_id: str) -> list[psutil.Process]:
        return flow_processes().get(run_id, [])


def wait_for(condition: Callable[[], Any], seconds: float = WAIT, what: str = "it") -> float:
    """Seconds until the condition held; stops the benchmark after `seconds`."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > seconds:
            raise SystemExit(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.2)
    return time.monotonic() - begun


def moment(text: str) -> float:
    """Seconds of the epoch of a timestamp as Prefect writes it."""
    return datetime.datetime.fromisoformat(text).timestamp()


def chat(home: Home, question: str, tokens: int = 16, timeout: float = 60) -> str:
    """The served model's answer. Raises OSError when the request fails."""
    body = {
        "model": "gristmill",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{home.settings.serve}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout) as response:
        answer = json.loads(response.read())
    return str(answer["choices"][0]["message"]["content"])
