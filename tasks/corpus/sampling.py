"""A bounded, reproducible choice of documents."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa


class Document(NamedTuple):
    id: str
    text: str


def sample_documents(tables: Iterable[pa.Table], budget: int) -> list[Document]:
    """Documents of at least `budget` characters together, fewer where there are no more.

    tables: with columns id and text. Chosen and ordered by the hash of the id, so the choice
    depends on the set of documents only, not on their order or sharding, and a larger budget
    extends a smaller one's. One pass; no more than the budget, one document and one table is held.
    A document longer than the whole budget is cut to it.
    """
    kept: list[tuple[int, str, str]] = []  # (minus hash, id, text): the largest hash on top
    size = 0
    for table in tables:
        for name, text in zip(*(table.column(c).to_pylist() for c in ("id", "text")), strict=True):
            order = -int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
            if size >= budget and order < kept[0][0]:
                continue
            heapq.heappush(kept, (order, name, text[:budget]))
            size += len(text[:budget])
            while size - len(kept[0][2]) >= budget:
                size -= len(heapq.heappop(kept)[2])
    return [Document(name, text) for _, name, text in sorted(kept, reverse=True)]
