"""The boilerplate stage: lines and spans of text that many documents share, left in the first one.

Two kinds, both exact in words (case, layout and punctuation make no difference):
 - units: a line of prose, a whole code block, a whole table, as navigation, licences and notices;
 - spans: runs of `span_words` words anywhere in prose, so that any longer text that recurs is found
   however it is embedded (exact substrings as in Lee et al., arXiv:2107.06499, by hashed windows
   instead of a suffix array, which would need the corpus in one place). Code is never torn.

Rounds on Ray: every shard's hashes; a range of hashes of all shards, counted; a shard without what
too many documents have. A counting task holds one range: 16 bytes for each different unit and span
of a document in it, `ENTRIES` of them. The scratch is 16 bytes a line, with spans 16 bytes a word.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from tasks.corpus.buckets import cut_by, ranges, read_part, read_range, write_parts, write_sorted
from tasks.corpus.cuts import Cut, cut_rows, write_cuts
from tasks.corpus.documents import (
    REMOVED,
    Removal,
    Tally,
    counts,
    document_id,
    document_shards,
    require_some,
    selection_reports,
)
from tasks.corpus.sharding import run_shards
from tasks.corpus.shingles import Hashes, mix
from tasks.corpus.signatures import SHARD, place_of, shard_of
from tasks.corpus.text_units import Units, without
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Directory

ENTRIES = 1 << 22  # counted by a task at a time, more or less: 64 MB
TOP = 200  # of each range; spans of one passage are many
SHOWN = 50
EXCERPT = 300
REMEDIES = {"": "crawl more pages", "only-boilerplate": "raise boilerplate.documents"}
SPAN = np.uint64(0xA0761D6478BD642F)  # keeps hashes of spans apart from those of units
ENTRY = np.dtype([("key", "<u8"), ("row", "<u8")])
COMMON = np.dtype([("key", "<u8"), ("row", "<u8"), ("first", "?")])
TEXTS = pa.schema(
    [
        ("documents", pa.int64()),  # that have it
        ("kind", pa.string()),
        ("host", pa.string()),  # empty where the whole corpus was counted
        ("url", pa.string()),  # where it stays
        ("text", pa.string()),
    ]
)


class BoilerplateConfig(StageConfig):
    """Which text is cut because too many documents have it."""

    scope: Literal["off", "host", "corpus"] = "off"
    """host: documents of the same host are counted, corpus: all. off: the stage is left out."""
    documents: int = Field(10, ge=1)
    """What more documents than this have stays in the first of them only."""
    shortest_words: int = Field(5, ge=1)
    """A line, code block or table of fewer words stays: headings and names recur rightly."""
    span_words: int = Field(0, ge=0, le=500)
    """Words of a run of prose that is looked for inside lines, too; 0 looks at whole units only."""

    @model_validator(mode="after")
    def spans_are_long(self) -> BoilerplateConfig:
        if 0 < self.span_words < 20:
            raise ValueError(
                f"span_words {self.span_words} < 20: set phrases would be cut out of sentences; "
                "raise it, or set 0 for whole lines only"
            )
        return self


@stage("boilerplate", version=2)
def boilerplate(config: BoilerplateConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    """Cut lines and spans that too many documents share, except from the first of them."""
    names, where = document_shards(documents), work.store.of(documents)
    items = [(config, where, name) for name in names]
    entries = run_shards(work, "hashed", hash_shard, items, label="Lines and spans")
    partitions = ranges(sum(entries), ENTRIES)
    found = run_shards(
        work,
        "counted",
        count_range,
        [(config, partitions, len(names))] * partitions,
        label="Count",
        unit="ranges",
    )
    reports = run_shards(
        work,
        "cut",
        cut_shard,
        [(config, where, name, partitions) for name in names],
        label="Boilerplate",
    )
    tally = Tally.total(report["tally"] for report in reports)
    require_some("boilerplate", tally, REMEDIES, "documents")
    most = sorted((top for report in found for top in report["top"]), reverse=True)[:TOP]
    texts = _texts(config, where, names, most)
    work.write_table("boilerplate.parquet", pa.Table.from_pylist(texts, TEXTS))
    rows = [{k: row[k] for k in ("documents", "kind", "host", "text", "url")} for row in texts]
    none = {"documents": 0, "kind": "none", "host": "", "text": "", "url": ""}
    return Outcome(
        counts=counts(tally),
        rules=tally.rules,
        metrics={
            "common_texts": sum(report["common"] for report in found),
            "documents_cut": sum(report["documents"] for report in reports),
            "bytes_cut": sum(report["bytes"] for report in reports),
        },
        reports=(
            *selection_reports("boilerplate", tally),
            Report("boilerplate", "table", rows or [none], "What most documents share"),
        ),
    )


def hash_shard(
    work: Workspace, number: int, config: BoilerplateConfig, where: Directory, name: str
) -> int:
    """`_hashes-NNNNN`: an ENTRY for each different unit and span of a document."""
    hashed = _hashed(config, where.read_table(name, ["url", "text"]))
    counted = hashed.keys != 0
    keys, rows = hashed.keys[counted], hashed.rows[counted].astype(np.uint64)
    by = np.lexsort((rows, keys))
    keys, rows = keys[by], rows[by]
    new = np.ones(len(keys), bool)
    new[1:] = (keys[1:] != keys[:-1]) | (rows[1:] != rows[:-1])
    entries = np.zeros(int(new.sum()), ENTRY)
    entries["key"], entries["row"] = keys[new], (np.uint64(number) << SHARD) + rows[new]
    write_sorted(work, f"_hashes-{number:05d}", entries)
    return len(entries)


@dataclass(frozen=True)
class _Hashed:
    """The units of a shard, then its spans: key (0: not counted) and document of each."""

    units: Units
    keys: Hashes
    rows: NDArray[np.int64]
    segment: NDArray[np.int64]  # of each span, in order
    place: NDArray[np.int64]  # word of the segment where it begins


def _hashed(config: BoilerplateConfig, table: pa.Table) -> _Hashed:
    units = Units.of(table["text"].to_pylist())
    keys = np.where(units.words >= config.shortest_words, units.hashes, np.uint64(0))
    rows = np.array([row for row, _ in units.units], np.int64)
    segment = place = np.zeros(0, np.int64)
    if config.span_words:
        spans, segment, place = units.spans(config.span_words)
        of_segment = np.array([row for row, _, _ in units.segments], np.int64)
        keys = np.concatenate([keys, spans ^ SPAN])
        rows = np.concatenate([rows, of_segment[segment]])
    if config.scope == "host":
        hosts = np.array([_host_key(url) for url in table["url"].to_pylist()], np.uint64)
        keys = np.where(keys == 0, keys, mix(keys ^ hosts[rows]))
    return _Hashed(units, keys, rows, segment, place)


def _host_key(url: str) -> int:
    host = urlsplit(url).netloc.encode("utf-8", "replace")
    return int.from_bytes(hashlib.sha256(host).digest()[:8], "little")


def count_range(
    work: Workspace, number: int, config: BoilerplateConfig, count: int, shards: int
) -> dict[str, Any]:
    """`_common-NNNNN`, a part for each shard: what too many documents have, and which is first."""
    parts = [
        read_range(work, f"_hashes-{shard:05d}", number, count, ENTRY) for shard in range(shards)
    ]
    entries = np.concatenate([np.zeros(0, ENTRY), *parts])
    entries = entries[np.argsort(entries["key"], kind="stable")]  # shards came in order
    starts = np.flatnonzero(np.diff(entries["key"], prepend=~entries["key"][:1]))
    sizes = np.diff(np.append(starts, len(entries)))
    several = np.repeat(sizes, sizes) > config.documents
    common = np.zeros(int(several.sum()), COMMON)
    common["key"], common["row"] = entries["key"][several], entries["row"][several]
    first = np.zeros(len(entries), bool)
    first[starts] = True
    common["first"] = first[several]
    write_parts(work, f"_common-{number:05d}", cut_by(common, shard_of(common["row"]), shards))
    top = np.argsort(-sizes, kind="stable")[:TOP]
    top = top[sizes[top] > config.documents]
    return {
        "common": int((sizes > config.documents).sum()),
        "top": [
            [int(sizes[at]), int(entries["row"][starts[at]]), int(entries["key"][starts[at]])]
            for at in top
        ],
    }


def cut_shard(
    work: Workspace,
    number: int,
    config: BoilerplateConfig,
    where: Directory,
    name: str,
    partitions: int,
) -> dict[str, Any]:
    """One shard without what too many documents have, unless this is the first of them."""
    table = where.read_table(name).replace_schema_metadata()
    parts = [read_part(work, f"_common-{part:05d}", number) for part in range(partitions)]
    common = np.frombuffer(b"".join(parts), COMMON)
    common = common[~common["first"]]
    tally, changed, lost = Tally(), 0, 0
    kept: list[dict[str, Any]] = []
    gone: list[dict[str, Any]] = []
    texts = _remaining(config, table, common) if len(common) else {}
    cuts: list[dict[str, Any]] = []
    for row, document in enumerate(table.to_pylist()):
        if row not in texts:
            tally.keep(document["bytes"])
            kept.append(document)
            continue
        text, what, pieces = texts[row]
        size = len(text.encode("utf-8", "replace"))
        changed, lost = changed + 1, lost + document["bytes"] - size
        if all(line.startswith("#") for line in text.split("\n") if line.strip()):
            removal = Removal("only-boilerplate", "all but headings is text that others have, too")
            tally.remove(removal, document["url"], document["text"])
            gone.append(document | {"rule": removal.rule, "reason": removal.reason})
            continue
        for kind, amount in what.items():
            tally.mend(f"boilerplate-{kind}", amount)
        tally.keep(size)
        left = document | {"id": document_id(text), "text": text, "bytes": size}
        kept.append(left)
        cuts += cut_rows(document, left["id"], pieces)
    write_cuts(work, number, cuts)
    if texts:
        table = pa.Table.from_pylist(kept, table.schema)
    work.write_table(f"documents-{number:05d}.parquet", table)
    rejected = pa.Table.from_pylist(gone, pa.schema([*table.schema, *REMOVED]))
    work.write_table(f"rejected-{number:05d}.parquet", rejected)
    return {"tally": asdict(tally), "documents": changed, "bytes": lost}


def _remaining(
    config: BoilerplateConfig, table: pa.Table, common: NDArray[np.void]
) -> dict[int, tuple[str, Counter[str], list[Cut]]]:
    """Row → what is left of its text, how many units and spans went, and which; of changed ones."""
    hashed = _hashed(config, table)
    units = hashed.units
    theirs = _single(common["key"], place_of(common["row"]))
    hit = np.isin(_single(hashed.keys, hashed.rows), theirs)
    lines: dict[int, set[int]] = {}
    spans: dict[int, list[tuple[int, int, int]]] = {}
    what: dict[int, Counter[str]] = {}
    cuts: dict[int, list[Cut]] = {}
    for number in np.flatnonzero(hit[: len(units.units)]).tolist():
        row, unit = units.units[number]
        lines.setdefault(row, set()).update(range(unit.first, unit.last))
        what.setdefault(row, Counter())[unit.kind] += 1
        text = "\n".join(units.lines[row][unit.first : unit.last])
        cuts.setdefault(row, []).append(Cut(f"boilerplate-{unit.kind}", unit.first, text))
    found = np.flatnonzero(hit[len(units.units) :])
    edges = np.flatnonzero(np.diff(hashed.segment[found], prepend=-1))
    for starts in np.split(found, edges[1:]) if len(found) else []:
        number = int(hashed.segment[starts[0]])
        row = units.segments[number][0]
        cut, several = units.places(number, hashed.place[starts], config.span_words)
        spans.setdefault(row, []).extend(cut)
        what.setdefault(row, Counter())["span"] += several
        cuts.setdefault(row, []).extend(
            Cut("boilerplate-span", line, units.lines[row][line][start:end])
            for line, start, end in cut
            if line not in lines.get(row, ())
        )
    return {
        row: (
            without(units.lines[row], lines.get(row, set()), spans.get(row, ())),
            told,
            sorted(cuts[row], key=lambda cut: cut.line),
        )
        for row, told in what.items()
    }


def _single(keys: Hashes, rows: NDArray[np.int64]) -> Hashes:
    """Key and document as one number: equal ones are equal but for one chance in 2^64."""
    return mix(keys ^ mix(rows.astype(np.uint64) + np.uint64(1)))


def _texts(
    config: BoilerplateConfig,
    where: Directory,
    names: list[str],
    most: list[list[int]],
) -> list[dict[str, Any]]:
    """What the commonest keys stand for, read where they stay; of a passage one span."""
    found: dict[tuple[int, int, int], dict[str, Any]] = {}
    for shard in sorted({row >> int(SHARD) for _, row, _ in most}):
        table = where.read_table(names[shard], ["url", "text"])
        for count, row, key in most:
            if row >> int(SHARD) != shard:
                continue
            one = table.slice(row & 0xFFFFFFFF, 1)
            kind, text = _said(config, _hashed(config, one), key)
            url = one["url"][0].as_py()
            host = urlsplit(url).netloc if config.scope == "host" else ""
            told = {"documents": count, "kind": kind, "host": host, "url": url}
            again = (count, row, 0 if kind == "span" else key)
            found.setdefault(again, told | {"text": text[:EXCERPT]})
    return sorted(found.values(), key=lambda row: (-row["documents"], row["text"]))[:SHOWN]


def _said(config: BoilerplateConfig, hashed: _Hashed, key: int) -> tuple[str, str]:
    """Kind and text of the unit or span of one document that has this key."""
    units = hashed.units
    at = int(np.flatnonzero(hashed.keys == np.uint64(key))[0])
    if at < len(units.units):
        unit = units.units[at][1]
        return unit.kind, "\n".join(units.lines[0][unit.first : unit.last])
    at -= len(units.units)
    start = hashed.place[at : at + 1]
    cut, _ = units.places(int(hashed.segment[at]), start, config.span_words)
    return "span", "\n".join(units.lines[0][line][a:b] for line, a, b in cut)
