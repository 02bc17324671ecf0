"""Mixing: how often a document is seen in one pass over the corpus.

Documents of a weighted source carry the column `weight`; without it everything counts once. The
whole part of a weight is that many copies; whether the rest gives one more is drawn by the hash of
the document's id, so it does not depend on order or sharding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pyarrow as pa

WEIGHT = pa.field("weight", pa.float64())


def copies(ids: Sequence[str], weights: Sequence[float] | None) -> list[int]:
    """How often each document is written; once where there are no weights."""
    if weights is None:
        return [1] * len(ids)
    return [int(weight) + (_draw(id) < weight % 1) for id, weight in zip(ids, weights, strict=True)]


def rounds(counts: Sequence[int]) -> list[int]:
    """The rows in the order in which their copies are written: copies lie far apart, as two in one
    training sequence would teach to repeat.
    """
    most = max(counts, default=0)
    return [row for turn in range(most) for row, count in enumerate(counts) if count > turn]


def copies_of(table: pa.Table) -> list[int]:
    """`copies` for the rows of a table of documents."""
    weighted = WEIGHT.name in table.column_names
    weights = table[WEIGHT.name].to_pylist() if weighted else None
    return copies(table["id"].to_pylist(), weights)


def _draw(id: str) -> float:
    return int.from_bytes(hashlib.sha256(f"weight:{id}".encode()).digest()[:8]) / 2**64
