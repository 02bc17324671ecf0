"""The measure stage: everything that is judged of a document, as columns beside it.

A measures artifact holds `attributes-NNNNN.parquet`, one for each shard of the documents: a row a
document with `id`, `url`, its language as identified, the share of code, and one column for each
quality rule (null where the rule does not apply). No threshold is known here: the stages after it
apply theirs to these columns, so that another threshold costs a selection, not a reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks.corpus.documents import document_shards, places_among
from tasks.corpus.filters.catalogue import RULES
from tasks.corpus.language_id import identify
from tasks.corpus.reading import Readings
from tasks.corpus.sharding import run_shards
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Directory

IDENTIFIED = pa.schema(
    [
        ("language", pa.string()),  # ISO 639-1, or "und": there is no prose
        ("language_score", pa.float64()),  # probability
        ("language_words", pa.int64()),  # words of prose that were looked at
        ("code_share", pa.float64()),
    ]
)
TOGETHER = 16  # documents that go through one rule after the other: code and tables stay near


class MeasureConfig(StageConfig):
    """What is measured of every document. Thresholds stand with the stages that apply them."""


@stage("measure", version=3)
def measure(config: MeasureConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    """Identify each document's language and measure it by every quality rule."""
    where = work.store.of(documents)
    items = [(where, name) for name in document_shards(documents)]
    ranges = run_shards(work, "measured", measure_shard, items, label="Measure")
    rows = []
    for rule in RULES:
        told = [shard["rules"][rule.name] for shard in ranges if shard["rules"][rule.name]]
        number = sum(part["documents"] for part in told)
        rows.append(
            {
                "attribute": rule.name,
                "documents": number,
                "lowest": f"{min((part['lowest'] for part in told), default=math.nan):.4g}",
                "mean": f"{sum(part['sum'] for part in told) / max(number, 1):.4g}",
                "highest": f"{max((part['highest'] for part in told), default=math.nan):.4g}",
            }
        )
    seen = sum(shard["documents"] for shard in ranges)
    report = Report("attributes", "table", rows, f"What was measured of {seen:,} documents")
    return Outcome(counts={"documents": seen}, reports=(report,))


def measure_shard(work: Workspace, number: int, where: Directory, name: str) -> dict[str, Any]:
    table = where.read_table(name, ["id", "url", "text"])
    columns = attributes(table["text"].to_pylist())
    beside = {"id": table["id"], "url": table["url"]}
    work.write_table(f"attributes-{number:05d}.parquet", pa.table(beside | columns))
    told = {rule.name: _range(columns[rule.name]) for rule in RULES}
    return {"documents": table.num_rows, "rules": told}


def attributes(texts: Sequence[str]) -> dict[str, pa.Array]:
    """The columns of IDENTIFIED and one for each rule; null where the rule does not apply."""
    found: dict[str, list[Any]] = {name: [] for name in IDENTIFIED.names}
    found |= {rule.name: [] for rule in RULES}
    for start in range(0, len(texts), TOGETHER):
        readings = Readings.of(texts[start : start + TOGETHER])
        for reading in readings.each:
            identified = (*identify(reading), reading.code_share)
            for name, value in zip(IDENTIFIED.names, identified, strict=True):
                found[name].append(value)
        codes = found["language"][start:]
        for rule in RULES:
            values = zip(rule.of(readings), codes, strict=True)
            found[rule.name] += [v if rule.judges(code) else None for v, code in values]
    types = {field.name: field.type for field in IDENTIFIED}
    return {name: pa.array(values, types.get(name, pa.float64())) for name, values in found.items()}


def attributes_of(
    measured: Directory, number: int, documents: pa.Table, columns: list[str]
) -> pa.Table:
    """The attributes of the documents of shard `number`, row by row.

    They are found by id and address: stages between may have removed some, and a text may stand
    there twice. Raises ValueError when one was never measured.
    """
    table = measured.read_table(f"attributes-{number:05d}.parquet", ["id", "url", *columns])
    places = places_among(_keys(table), _keys(documents))
    return table.select(columns).take(places)


def _keys(table: pa.Table) -> list[tuple[str, str]]:
    return list(zip(table["id"].to_pylist(), table["url"].to_pylist(), strict=True))


def _range(column: pa.Array) -> dict[str, float] | None:
    """Number, sum, least and greatest of the values that are there; None when there are none."""
    values = column.drop_null()
    if len(values) == 0:
        return None
    ends = pc.min_max(values).as_py()
    total = float(pc.sum(values).as_py())
    return {
        "documents": len(values),
        "sum": total,
        "lowest": float(ends["min"]),
        "highest": float(ends["max"]),
    }
