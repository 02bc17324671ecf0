"""The gather stage: text that is already there becomes documents, beside those of a crawl.

A shard is one file, several small ones, or a piece of a large one (`source_pieces`). Pages and PDF
files are read in the child that can be killed, as the extract stage does. A document names its
source and file in the column `warc` (`source:file`), and the number of its row or the offset of its
record in `offset`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from tasks.corpus.digests import canonical_digest
from tasks.corpus.documents import (
    DOCUMENTS,
    REMOVED,
    Removal,
    Tally,
    counts,
    document_id,
    document_shards,
    require_some,
    selection_reports,
    writable,
)
from tasks.corpus.extract import ExtractConfig, page_child, read_into, removed_by_head
from tasks.corpus.records import Fetched
from tasks.corpus.remote_source import SourceFile, local_copy
from tasks.corpus.sharding import run_shards
from tasks.corpus.source_config import (
    SourceConfig,
    content_digest,
    other_files,
    remote_roots,
    source_files,
)
from tasks.corpus.source_pieces import Piece, count_rows, cut
from tasks.corpus.source_rows import rows_of
from tasks.corpus.warc import payload_digest
from tasks.corpus.weights import WEIGHT
from tasks.runtime.errors import Unavailable, UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig

PART_BYTES = 16_000_000  # of text in one Parquet file
REMEDIES = {
    "": "check corpus.sources",
    "no-text": "name the field that holds the text (text_field)",
    "not-json": "the file is not JSON Lines; choose another format",
    "missing-file": "check the source's path and base",
    "damaged-file": "check that the files are whole",
    "too-large": "raise extract.largest_page_megabytes",
}


class GatherConfig(StageConfig):
    """What to read, and the digests of what lies there: a source is known by its content."""

    sources: tuple[SourceConfig, ...]
    extract: ExtractConfig = ExtractConfig()
    digests: tuple[str, ...] = ()

    def resolve(self) -> GatherConfig:
        settings = Settings.load()
        digests = tuple(content_digest(source, settings) for source in self.sources)
        return self.model_copy(update={"digests": digests})


def is_weighted(config: GatherConfig) -> bool:
    """Whether documents need a column that says how much they count."""
    return any(source.weight != 1 for source in config.sources)


@stage("gather", version=8)
def gather(config: GatherConfig, work: Workspace, *, crawled: Manifest | None = None) -> Outcome:
    """Read the corpus's sources into documents; `crawled` are those of its seeds."""
    items: list[tuple[Any, ...]] = []
    if crawled is not None:
        items += [(config, -1, [(crawled, name)]) for name in document_shards(crawled)]
    largest = int(config.extract.shard_megabytes * 2**20)
    settings = Settings.load()
    pieced: list[tuple[GatherConfig, int, SourceFile, Piece]] = []
    for index, source in enumerate(config.sources):
        group: list[SourceFile] = []
        size = 0
        for file in source_files(source, settings):
            if pieces := cut(source, file):
                pieced += [(config, index, file, piece) for piece in pieces]
                continue
            group.append(file)
            size += file.size
            if size >= largest:
                items.append((config, index, group))
                group, size = [], 0
        if group:
            items.append((config, index, group))
    items += _numbered(work, pieced)
    reports = run_shards(work, "gathered", gather_shard, items, label="Sources")
    tallies: dict[str, Tally] = {}
    for (_, index, *_), report in zip(items, reports, strict=True):
        name = config.sources[index].name if index >= 0 else "seeds"
        tallies.setdefault(name, Tally()).add(Tally(**report))
    tally = Tally.total(reports)
    require_some("gather", tally, REMEDIES, "documents")
    unread = {source.name: other_files(source, settings) for source in config.sources}
    rows = [
        {
            "source": name,
            "documents": part.kept,
            "bytes": part.bytes,
            "removed": part.seen - part.kept,
            "files not read": ", ".join(f"{n:,} {end}" for end, n in unread.get(name, {}).items()),
            "weight": next((s.weight for s in config.sources if s.name == name), 1.0),
            "licence": next((s.licence for s in config.sources if s.name == name), ""),
        }
        for name, part in tallies.items()
    ]
    return Outcome(
        counts=counts(tally)
        | {f"documents_{name}": t.kept for name, t in tallies.items()}
        | {"files_not_read": sum(sum(endings.values()) for endings in unread.values())},
        rules=tally.rules,
        reports=(
            Report("sources", "table", rows, "Documents by source"),
            *selection_reports("gather", tally),
        ),
    )


def _numbered(
    work: Workspace, pieced: list[tuple[GatherConfig, int, SourceFile, Piece]]
) -> list[tuple[Any, ...]]:
    """The shards of pieces of files, each told how many rows stand before it."""
    if not pieced:
        return []
    counted = run_shards(work, "counted", count_shard, pieced, label="Rows", unit="pieces")
    items: list[tuple[Any, ...]] = []
    before, last = 0, ""
    for (config, index, file, piece), rows in zip(pieced, counted, strict=True):
        before = before if file.location == last else 0
        if rows is not None:
            piece = replace(piece, rows=before)
            before += rows
        last = file.location
        items.append((config, index, [file], piece))
    return items


def count_shard(
    work: Workspace, number: int, config: GatherConfig, index: int, file: SourceFile, piece: Piece
) -> int | None:
    """Rows in a piece of a file; None where the file itself says how many stand before it."""
    if config.sources[index].format == "parquet":
        return None
    return count_rows(Path(file.location), _largest(config), piece)


def _largest(config: GatherConfig) -> int:
    """Bytes of the largest row that is read."""
    return int(config.extract.largest_page_megabytes * 2**20)


def gather_shard(
    work: Workspace,
    number: int,
    config: GatherConfig,
    index: int,
    files: list[Any],
    piece: Piece | None = None,
) -> dict[str, Any]:
    """`documents-NNNNN-PPP.parquet`, `rejected-NNNNN.parquet` and a tally of some files, or of a
    piece of one.
    """
    schema = DOCUMENTS.append(WEIGHT) if is_weighted(config) else DOCUMENTS
    if index < 0:
        crawled, name = files[0]
        return _taken_over(work, number, crawled, name, schema)
    tally, parts = Tally(), itertools.count()
    kept: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    filled = 0

    def write() -> None:
        name = f"documents-{number:05d}-{next(parts):03d}.parquet"
        work.write_table(name, pa.Table.from_pylist(kept, schema))
        kept.clear()

    for document, removal in _documents(work, config, index, files, piece, tally):
        if removal is None:
            tally.keep(document["bytes"])
            kept.append(document)
            filled += document["bytes"]
        else:
            tally.remove(removal, document["url"], document["text"])
            rejected.append(document | {"rule": removal.rule, "reason": removal.reason})
        if filled >= PART_BYTES:
            write()
            filled = 0
    write()
    whole = pa.Table.from_pylist(rejected, pa.schema([*schema, *REMOVED]))
    work.write_table(f"rejected-{number:05d}.parquet", whole)
    return asdict(tally)


def _documents(
    work: Workspace,
    config: GatherConfig,
    index: int,
    files: list[SourceFile],
    piece: Piece | None,
    tally: Tally,
) -> Iterator[tuple[dict[str, Any], Removal | None]]:
    """Every row of some files as a document, with the reason why it is none."""
    source = config.sources[index]
    largest = _largest(config)
    roots = remote_roots(Settings.load())
    scratch = work.scratch("sources")
    for file in files:
        with contextlib.ExitStack() as held:
            try:
                path = held.enter_context(local_copy(file, scratch, roots))
            except Unavailable:  # may pass: the shard fails, to be tried again
                raise
            except UserError as refusal:
                about = {"url": f"file://{source.name}/{file.name}", "bytes": 0, "weight": None}
                yield _document(about), Removal("missing-file", str(refusal))
                continue
            for about, content in rows_of(source, path, file.name, largest, piece):
                stated = {"licence": source.licence, "weight": source.weight}
                document = _document(stated | _usable(about, tally))
                removal = _fill(config.extract, document, content, tally)
                size = len(document["text"].encode("utf-8", "replace"))
                yield document | {"id": document_id(document["text"]), "bytes": size}, removal


def _taken_over(
    work: Workspace, number: int, crawled: Manifest, name: str, schema: pa.Schema
) -> dict[str, Any]:
    """One shard of the crawl's documents, as it is."""
    table = work.store.of(crawled).read_table(name)
    if WEIGHT.name in schema.names:
        table = table.append_column(WEIGHT, pa.array([1.0] * table.num_rows, WEIGHT.type))
    work.write_table(f"documents-{number:05d}-000.parquet", table)
    size = sum(table["bytes"].to_pylist())
    return asdict(Tally(seen=table.num_rows, kept=table.num_rows, bytes=size))


def _usable(about: dict[str, Any], tally: Tally) -> dict[str, Any]:
    """What is said of a row, fit to be written; an address that is none gives way to its place."""
    about = {k: writable(v) if isinstance(v, str) else v for k, v in about.items()}
    try:
        urlsplit(about["url"])
    except ValueError:
        tally.mend("unreadable-address")
        about["url"] = f"file://{about['warc'].replace(':', '/', 1)}#{about['offset']}"
    return about


def _document(about: dict[str, Any]) -> dict[str, Any]:
    document = dict.fromkeys(DOCUMENTS.names, "") | {"language_score": 0.0, "html_bytes": 0}
    return document | {"offset": 0} | about


def _fill(
    config: ExtractConfig, document: dict[str, Any], content: str | Fetched | Removal, tally: Tally
) -> Removal | None:
    if isinstance(content, Removal):
        return content
    if isinstance(content, str):
        text = content.replace("\x00", "").replace("\r\n", "\n").strip()
        if "\x00" in content:
            tally.mend("nul-bytes")
        document["text"] = writable(text)
        return None if text else Removal("no-text", "nothing but blanks")
    if removal := removed_by_head(content, config.honour_opt_outs):
        return removal
    document["html_bytes"] = len(content.body)
    document["digest"] = document["digest"] or canonical_digest(payload_digest(content.body))
    stated = {name: document[name] for name in ("title", "date", "licence")}
    removal = read_into(page_child(config), document, content, tally, config.honour_opt_outs)
    document |= {name: value for name, value in stated.items() if value}
    return removal
