"""Shard functions in this process: the stages' own code without the seconds Ray takes to start."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tasks.corpus.extract import close_children


class InlineSession:
    cpus = 1

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> "InlineSession":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def map(
        self, function: Callable[..., Any], items: Iterable[tuple[Any, ...]], **_: object
    ) -> Iterator[tuple[int, Any]]:
        for index, item in enumerate(items):
            yield index, function(*item)


def run_inline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("tasks.corpus.sharding.ray_session", InlineSession)
    patch.setattr("tasks.corpus.crawl.ray_session", InlineSession)


@contextmanager
def stages_inline(patch: pytest.MonkeyPatch, home: Path) -> Iterator[None]:
    """Inside, corpus stages write below `home` and do all their work in this process."""
    patch.setenv("GRISTMILL_HOME", str(home))
    run_inline(patch)
    try:
        yield
    finally:
        close_children()
