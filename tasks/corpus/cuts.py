"""What was cut out of documents that stay: beside the documents, as rejected ones are.

A stage that cuts writes `cut-NNNNN.parquet` for each shard that lost anything: a row for every
line, span or block, with the document it was cut out of. A document that goes whole is rejected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tasks.corpus.documents import writable
from tasks.runtime.stage import Workspace

CUTS = pa.schema(
    [
        ("id", pa.string()),  # of the document as it is now
        ("before", pa.string()),  # and as it came to the stage
        ("url", pa.string()),
        ("record_id", pa.string()),
        ("rule", pa.string()),
        ("line", pa.int64()),  # of the text as it came, from 1: where the cut begins
        ("text", pa.string()),
    ]
)


@dataclass(frozen=True)
class Cut:
    """A piece of a text that a rule took out; `line` is the line it begins in, from 0."""

    rule: str
    line: int
    text: str


def whole_lines(rule: str, lines: Sequence[str], numbers: Iterable[int]) -> list[Cut]:
    return [Cut(rule, number, lines[number]) for number in sorted(numbers)]


def cut_rows(document: Mapping[str, Any], id: str, cuts: Iterable[Cut]) -> list[dict[str, Any]]:
    """Rows of CUTS: `document` is as it came, `id` that of what is left of it."""
    known = {"before": document["id"], "url": document["url"], "record_id": document["record_id"]}
    return [
        known | {"id": id, "rule": cut.rule, "line": cut.line + 1, "text": writable(cut.text)}
        for cut in cuts
    ]


def write_cuts(work: Workspace, number: int, rows: list[dict[str, Any]]) -> None:
    """`cut-NNNNN.parquet`, if there is anything to write."""
    if rows:
        work.write_table(f"cut-{number:05d}.parquet", pa.Table.from_pylist(rows, CUTS))
