"""Shard functions on Ray, resumed at the shard: what a shard reported is kept beside its output."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from tasks.runtime.ray_session import ray_session
from tasks.runtime.stage import Workspace


def run_shards(
    work: Workspace,
    step: str,
    function: Callable[..., Any],
    items: Sequence[tuple[Any, ...]],
    *,
    label: str,
    unit: str = "shards",
) -> list[Any]:
    """`function(work, number, *item)` for every item; what they return (JSON), in order.

    `function` writes its files through `work`. A shard that reported is not run again by a later
    attempt; `step` keeps apart the reports of several rounds in one stage. Items name other
    artifacts by their Directory: a manifest names every file and would go along with every shard.
    """
    names = [f"_{step}-{number:05d}.json" for number in range(len(items))]
    done = set(work.names())
    missing = [number for number, name in enumerate(names) if name not in done]
    found: dict[int, Any] = {
        number: json.loads(work.read_bytes(name))
        for number, name in enumerate(names)
        if name in done
    }
    if missing:
        calls = [(function, work, number, names[number], items[number]) for number in missing]
        with ray_session() as session:
            for index, report in session.map(_reporting, calls, label=label, unit=unit):
                found[missing[index]] = report
    return [found[number] for number in range(len(items))]


def _reporting(
    function: Callable[..., Any], work: Workspace, number: int, name: str, item: tuple[Any, ...]
) -> Any:
    report = function(work, number, *item)
    work.write_json(name, report)
    return report
