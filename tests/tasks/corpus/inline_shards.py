"""Shard functions in this process: the stages' own code without the seconds Ray takes to start."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest


class InlineSession:
    def __enter__(self) -> "InlineSession":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def map(
        self,
        function: Callable[..., Any],
        items: Iterable[tuple[Any, ...]],
        *,
        label: str,
        unit: str = "shards",
    ) -> Iterator[tuple[int, Any]]:
        for index, item in enumerate(items):
            yield index, function(*item)


def run_inline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("tasks.corpus.sharding.ray_session", InlineSession)
