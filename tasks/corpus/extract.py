"""The extract stage: WARC records to documents.

Each page is parsed in a child process under a time and a memory limit (`tasks.runtime.killable`);
a page that hangs, swallows memory or brings the parser down is counted by rule and the shard goes
on.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from pydantic import Field

from tasks.corpus.binary import binary_kind
from tasks.corpus.digests import canonical_digest
from tasks.corpus.documents import (
    DOCUMENTS,
    REMOVED,
    Removal,
    Tally,
    counts,
    document_id,
    require_some,
    selection_reports,
    writable,
)
from tasks.corpus.links import header_canonical, robots_directives
from tasks.corpus.opt_out import headers_reserve
from tasks.corpus.page_about import AGENT
from tasks.corpus.page_text import PDF_TYPE, PLAIN_TYPES, Extractor
from tasks.corpus.pages import page_rows
from tasks.corpus.records import Ahead, DamagedRecord, Fetched, needed, read_record, scan
from tasks.corpus.sharding import run_shards
from tasks.corpus.warc import payload_digest
from tasks.runtime.killable import ChildDied, ChildTimeout, KillableChild
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Directory

PAGES = "pages.parquet"
HTML_TYPES = ("text/html", "application/xhtml+xml")
READ_AHEAD = 1 << 20  # bytes of neighbouring records that one request to a remote store asks for
EXCERPT = 2000  # characters of a rejected page's HTML that are kept for inspection
FROM_PAGE = ("title", "text", "language", "date", "licence", "canonical")
REMEDIES = {
    "": "check the seeds and the crawl's report of failures",
    "status": "check that the seeds answer with 200",
    "content-type": "only HTML, plain text and PDF are read; seed such pages",
    "noindex": "the site asks not to be indexed; crawl another",
    "opt-out": "the pages are reserved from text mining; take others",
    "no-text": "the pages may need JavaScript, which is not run; seed static pages",
    "time-limit": "raise extract.seconds_per_document",
    "memory-limit": "raise extract.megabytes_per_document",
    "too-large": "raise extract.largest_page_megabytes",
}


class ExtractConfig(StageConfig):
    """How text is taken out of pages."""

    extractor: Extractor = "trafilatura"
    """trafilatura finds the text best (F1 .969 on 91 article pages); resiliparse is several times
    faster (F1 .93) and meant for crawls of millions."""
    seconds_per_document: float = Field(20.0, gt=0)
    """A page that takes longer is given up (rule time-limit)."""
    megabytes_per_document: int = Field(2048, ge=512)
    """Address space of the process that parses; a page that needs more is given up."""
    largest_page_megabytes: float = Field(10.0, gt=0)
    """Larger pages are not parsed (rule too-large)."""
    honour_opt_outs: bool = True
    """Leave out pages that reserve themselves from text mining (rule opt-out)."""
    shard_megabytes: float = Field(1.0, gt=0)
    """HTML in one shard: the grain of parallelism and of resuming."""


@stage("extract", version=7)
def extract(config: ExtractConfig, work: Workspace, *, crawl: Manifest) -> Outcome:
    """Take the text out of every crawled page."""
    damaged = 0
    if PAGES in crawl.names():
        table = page_rows(work.store.of(crawl)).select(
            [
                "url",
                "canonical",
                "fetched_at",
                "warc",
                "offset",
                "length",
                "record_id",
                "digest",
                "bytes",
            ]
        )
    else:
        table, damaged = _scanned(work, crawl)
    ranges = _ranges(table["bytes"].to_pylist(), int(config.shard_megabytes * 2**20))
    # `take` copies the rows; a pickled slice would carry the whole table to every shard.
    where = work.store.of(crawl)
    items = [(config, where, table.take(list(range(start, stop)))) for start, stop in ranges]
    tally = Tally.total(run_shards(work, "extracted", extract_shard, items, label="Extract"))
    tally.seen += damaged
    if damaged:
        tally.rules["damaged-record"] = tally.rules.get("damaged-record", 0) + damaged
        tally.examples.setdefault("damaged-record", []).append(
            {"url": "(unknown)", "reason": "a gzip member of a segment is damaged", "text": ""}
        )
    require_some("extract", tally, REMEDIES, "pages")
    return Outcome(
        counts=counts(tally),
        rules=tally.rules,
        metrics={f"mended_{name}": count for name, count in tally.mended.items()},
        reports=selection_reports("extract", tally, "pages"),
    )


def _ranges(sizes: list[int], largest: int) -> list[tuple[int, int]]:
    """Row ranges of about `largest` bytes each."""
    ranges, start, total = [], 0, 0
    for row, size in enumerate(sizes):
        total += size
        if total >= largest:
            ranges.append((start, row + 1))
            start, total = row + 1, 0
    if start < len(sizes):
        ranges.append((start, len(sizes)))
    return ranges


def _scanned(work: Workspace, crawl: Manifest) -> tuple[pa.Table, int]:
    """A table of records for segments that came without one, and the count of damaged stretches."""
    names = crawl.names(suffix=".warc.gz")
    items = [(crawl, name) for name in names]
    reports = run_shards(work, "scanned", _scan_shard, items, label="Scan", unit="segments")
    tables = [work.read_table(f"_places-{number:05d}.parquet") for number in range(len(names))]
    return pa.concat_tables([PLACES.empty_table(), *tables]), sum(reports)


PLACES = pa.schema(
    [
        ("url", pa.string()),
        ("fetched_at", pa.string()),
        ("warc", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("record_id", pa.string()),
        ("digest", pa.string()),
        ("bytes", pa.int64()),  # compressed here; only the balance of shards depends on it
    ]
)


def _scan_shard(work: Workspace, number: int, crawl: Manifest, name: str) -> int:
    rows, damaged = [], 0
    for found in scan(work.store.local(crawl, name)):
        if isinstance(found, int):
            damaged += 1
            continue
        row = asdict(found)
        rows.append(row | {"fetched_at": row.pop("date"), "warc": name, "bytes": 4 * row["length"]})
    work.write_table(f"_places-{number:05d}.parquet", pa.Table.from_pylist(rows, PLACES))
    return damaged


def extract_shard(
    work: Workspace, number: int, config: ExtractConfig, where: Directory, rows: pa.Table
) -> dict[str, Any]:
    """Documents of some records: `documents-NNNNN.parquet`, `rejected-NNNNN.parquet`, a tally."""
    tally, kept, rejected = Tally(), [], []
    largest = int(config.largest_page_megabytes * 2**20)
    child = page_child(config)
    honour = config.honour_opt_outs
    for row, found in _fetched(where, rows.to_pylist(), largest, honour):
        document: dict[str, Any] = dict.fromkeys(FROM_PAGE, "") | {
            "url": row["url"],
            "language_score": 0.0,
            "fetched_at": row["fetched_at"],
            "warc": row["warc"],
            "offset": row["offset"],
            "record_id": row["record_id"],
            "digest": canonical_digest(row["digest"] or ""),
        }
        if isinstance(found, Removal):
            removal: Removal | None = found
        else:
            document["html_bytes"] = len(found.body)
            document["digest"] = document["digest"] or canonical_digest(payload_digest(found.body))
            removal = read_into(child, document, found, tally, honour)
        if "canonical" in row:  # as the crawl says it, which calls some sites by other names
            document["canonical"] = row["canonical"] or ""
        text = document["text"]
        size = len(text.encode("utf-8", "replace"))
        document |= {"id": document_id(text), "bytes": size}
        if removal is None:
            tally.keep(size)
            kept.append(document)
        else:
            tally.remove(removal, row["url"], text)
            rejected.append(document | {"rule": removal.rule, "reason": removal.reason})
    schema = pa.schema([*DOCUMENTS, *REMOVED])
    work.write_table(f"rejected-{number:05d}.parquet", pa.Table.from_pylist(rejected, schema))
    work.write_table(f"documents-{number:05d}.parquet", pa.Table.from_pylist(kept, DOCUMENTS))
    return asdict(tally)


def _fetched(
    directory: Directory,
    rows: list[dict[str, Any]],
    largest: int,
    honour_opt_outs: bool,
) -> Iterator[tuple[dict[str, Any], Fetched | Removal]]:
    """Each row with its response, or with the reason why there is none to read."""
    ends: dict[str, int] = {}
    for row in rows:
        ends[row["warc"]] = max(ends.get(row["warc"], 0), row["offset"] + row["length"])
    with contextlib.ExitStack() as files:
        opened: dict[str, Ahead] = {}
        for row in rows:
            name = row["warc"]
            if name not in opened:
                file = directory.filesystem.open_input_file(directory.location(name))
                ahead = 0 if directory.is_local else READ_AHEAD
                opened[name] = Ahead(files.enter_context(file), ends[name], ahead)
            try:
                length = needed(row["length"], largest)
                found = read_record(opened[name].read(row["offset"], length), largest)
            except DamagedRecord as damage:
                yield row, Removal("damaged-record", str(damage))
                continue
            except OverflowError:
                yield row, Removal("too-large", f"body larger than {largest:,} bytes")
                continue
            yield row, removed_by_head(found, honour_opt_outs) or found


def removed_by_head(found: Fetched, honour_opt_outs: bool) -> Removal | None:
    if found.status != 200:
        return Removal("status", f"answered with status {found.status}")
    stated = found.headers.get("content-type", "")
    kind = stated.partition(";")[0].strip().lower()
    if kind not in (*HTML_TYPES, *PLAIN_TYPES, PDF_TYPE) and not (
        kind == "" and b"<html" in found.body[:2048].lower()
    ):
        return Removal(
            "content-type", f"is {kind or 'of no stated type'}, neither HTML, text nor PDF"
        )
    if kind != PDF_TYPE and (binary := binary_kind(found.body, stated)):
        return Removal("binary", f"is binary ({binary}), though {kind or 'no type'} was stated")
    noindex, _ = robots_directives(found.directives, AGENT)
    if noindex:
        return Removal("noindex", "X-Robots-Tag asks not to be indexed")
    if honour_opt_outs and (reserved := headers_reserve(found.headers, found.directives)):
        return Removal("opt-out", f"reserved from text mining ({reserved})")
    return None


def read_into(
    child: KillableChild,
    document: dict[str, Any],
    found: Fetched,
    tally: Tally,
    honour_opt_outs: bool,
) -> Removal | None:
    """Fill `document` from the child's answer, or say why the page is removed."""
    head = {
        "content_type": found.headers.get("content-type", ""),
        "url": document["url"],
        "extractor": child.arguments[0],
    }
    excerpt = found.body[: 2 * EXCERPT].decode("utf-8", "replace")[:EXCERPT]
    document["text"] = excerpt.replace("\x00", "")
    try:
        answer = child.call(head, found.body)
    except ChildTimeout:
        return Removal("time-limit", f"took longer than {child.seconds:g} s")
    except ChildDied as death:
        status = death.args[0]
        if status == -signal.SIGKILL:
            return Removal("memory-limit", "was killed for the memory it took")
        name = signal.Signals(-status).name if status and status < 0 else f"status {status}"
        return Removal("crashed", f"brought the parser down ({name})")
    if "failure" in answer:
        return Removal(answer["failure"], answer["reason"])
    for what in answer["mended"]:
        tally.mend(what)
    if answer["noindex"]:
        return Removal("noindex", "a robots meta element asks not to be indexed")
    if answer["reserved"] and honour_opt_outs:
        return Removal("opt-out", f"reserved from text mining ({answer['reserved']})")
    if not answer["text"]:
        return Removal("no-text", "no text found in the page")
    for name in FROM_PAGE:
        document[name] = writable(answer[name])
    if not document["canonical"]:
        links = found.headers.get("link", "")
        document["canonical"] = header_canonical([links], document["url"])
    return None


_children: dict[tuple[float, int, str], KillableChild] = {}


def page_child(config: ExtractConfig) -> KillableChild:
    """This process's child, kept from shard to shard: its imports take half a second."""
    key = (config.seconds_per_document, config.megabytes_per_document, config.extractor)
    if key not in _children:
        _children[key] = KillableChild("tasks.corpus.page_text", *key)
    return _children[key]


def close_children() -> None:
    """End the children of this process, which otherwise end with it."""
    while _children:
        _children.popitem()[1].close()
