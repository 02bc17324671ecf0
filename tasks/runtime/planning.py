"""Planning: calling the stages of a flow to hear what each would do, without doing it."""

from __future__ import annotations

import contextlib
import contextvars
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

UNKNOWN = "unknown"


@dataclass
class Planned:
    """What `plan` says of one stage."""

    stage: str
    fingerprint: str
    status: Literal["cached", "run", "unknown"]
    why: str


_plan: contextvars.ContextVar[list[Planned] | None] = contextvars.ContextVar("plan", default=None)


@contextlib.contextmanager
def planning() -> Iterator[list[Planned]]:
    """Inside, calling a stage records what it would do instead of doing it."""
    planned: list[Planned] = []
    token = _plan.set(planned)
    try:
        yield planned
    finally:
        _plan.reset(token)


def plan_under_way() -> list[Planned] | None:
    """What was recorded so far; None outside `planning`."""
    return _plan.get()


def is_planning() -> bool:
    return _plan.get() is not None


def plan_unknown(stage: str, why: str) -> None:
    """Record, while planning, a stage of which nothing can be said yet."""
    planned = _plan.get()
    if planned is not None:
        planned.append(Planned(stage, UNKNOWN, "unknown", why))


def differences(old: Any, new: Any, where: str) -> list[str]:
    """`where.key old → new` for every leaf of `new` that differs from `old`."""
    if isinstance(new, dict) and isinstance(old, dict):
        return [
            line
            for key, value in new.items()
            for line in differences(old.get(key), value, f"{where}.{key}")
        ]
    return [] if old == new else [f"{where} {json.dumps(old)} → {json.dumps(new)}"]
