"""The decontaminate stage: documents that hold items of evaluation suites are dropped or cut.

Rounds on Ray: the n-grams each shard shares with the suites and in how many of its documents each
stands; then, without those that many documents have, what each document holds (`contamination`).
The index of the suites' n-grams is what every task holds, 16 bytes for each and 8 for each place;
of the corpus the driver holds nothing.

Beside the documents the artifact has `contamination-NNNNN.parquet`: for every hit the document, the
item, the share of it and the span of text; and `cut-NNNNN.parquet`, the lines that were cut.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from tasks.corpus.arrays import read_array, write_array
from tasks.corpus.contamination import Contamination, Proof, contaminations
from tasks.corpus.cuts import cut_rows, whole_lines, write_cuts
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
from tasks.corpus.leakage import without_lines
from tasks.corpus.sharding import run_shards
from tasks.corpus.suites import Index, Item, SuiteConfig, excerpt, items_of
from tasks.corpus.word_hashes import places_of, words_of
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Directory

SHOWN = 20
RULE = "contaminated"
REMEDIES = {"": "crawl more pages", RULE: "set decontaminate.action=cut"}
HITS = pa.schema(
    [
        ("url", pa.string()),
        ("id", pa.string()),  # of the document as it came
        ("record_id", pa.string()),
        ("suite", pa.string()),
        ("item", pa.string()),  # row and field
        ("words", pa.int64()),  # of the item's that the document has
        ("share", pa.float64()),  # of the item
        ("start", pa.int64()),  # characters of the document's text: its longest span
        ("end", pa.int64()),
        ("span", pa.string()),
        ("spans", pa.int64()),  # how many there are
        ("item_text", pa.string()),
        ("action", pa.string()),
    ]
)


class DecontaminateConfig(StageConfig):
    """Which evaluations no training text may hold."""

    suites: tuple[SuiteConfig, ...] = ()
    """Files with evaluation items. Without any the stage is left out."""
    action: Literal["drop", "cut"] = "drop"
    """drop: a document that holds an item is removed (rule contaminated). cut: it loses the lines
    in which the item stands; one that has nothing but headings left is removed."""
    ngram_words: int = Field(13, ge=5, le=50)
    """Words of a run that is looked for; shorter items are not looked for, and counted."""
    share: float = Field(0.5, gt=0, le=1)
    """Share of an item's words that a document must have."""
    distinct: int = Field(3, ge=1)
    """Different runs of it that a document must have, unless it has the whole item."""
    span_words: int = Field(50, ge=5)
    """Words of one unbroken span of an item that are enough by themselves."""
    common_documents: int = Field(10, ge=1)
    """A run that stands in more documents than this is nobody's own, and is not looked for."""

    @field_validator("suites")
    @classmethod
    def have_names(cls, value: tuple[SuiteConfig, ...]) -> tuple[SuiteConfig, ...]:
        names = [suite.name for suite in value]
        if len(set(names)) < len(names):
            raise ValueError(f"suites are named {names}; each needs its own name")
        return value

    def resolve(self) -> DecontaminateConfig:
        settings = Settings.load()
        digests = tuple(suite.digest(settings) for suite in self.suites)
        return ResolvedConfig(**self.model_dump(), digests=digests)

    def proof(self) -> Proof:
        return Proof(self.ngram_words, self.share, self.distinct, self.span_words)


class ResolvedConfig(DecontaminateConfig):
    """With the digests of the suites' files: a suite is known by its content."""

    digests: tuple[str, ...]

    def resolve(self) -> ResolvedConfig:
        return self


@stage("decontaminate", version=2)
def decontaminate(config: DecontaminateConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    """Drop or cut documents that hold items of evaluation suites, and say which."""
    settings = Settings.load()
    items = [item for suite in config.suites for item in items_of(suite, settings)]
    if not items:
        raise UserError("decontaminate has no suites; name one in decontaminate.suites")
    index, short = Index.of(items, config.ngram_words)
    index.write(work, "_index-")
    work.write_table("_items.parquet", pa.Table.from_pylist([asdict(item) for item in items]))
    names, where = document_shards(documents), work.store.of(documents)
    run_shards(
        work,
        "searched",
        search_shard,
        [(config, where, name) for name in names],
        label="Evaluation n-grams",
    )
    seen = np.zeros(len(index.grams), np.int64)
    for number in range(len(names)):
        grams, several = read_array(work, f"_seen-{number:05d}.npy")
        seen[grams] += several
    common = seen > config.common_documents
    findable = index.items_of(~common)
    write_array(work, "_common.npy", common)
    reports = run_shards(
        work,
        "cleaned",
        clean_shard,
        [(config, where, name) for name in names],
        label="Decontaminate",
    )
    tally = Tally.total(report["tally"] for report in reports)
    require_some("decontaminate", tally, REMEDIES, "documents")
    found = {item for report in reports for item in report["items"]}
    return Outcome(
        counts=counts(tally),
        rules=tally.rules,
        metrics={
            "items": len(items),
            "items_too_short": short,
            "items_too_common": len(items) - short - len(findable),
            "items_found": len(found),
            "documents_contaminated": sum(report["documents"] for report in reports),
            "common_ngrams": int(common.sum()),
        },
        reports=(
            *selection_reports("decontaminate", tally),
            _suites_report(config, items, index, findable, found),
            _hits_report([hit for report in reports for hit in report["largest"]]),
        ),
    )


def search_shard(
    work: Workspace, number: int, config: DecontaminateConfig, where: Directory, name: str
) -> int:
    """`_hits-NNNNN` (3, H): document, word and n-gram of what a shard shares with the suites;
    `_seen-NNNNN` (2, S): n-gram, documents of the shard that have it.
    """
    texts = where.read_table(name, ["text"])["text"].to_pylist()
    runs, bounds = words_of(texts)[0].runs(config.ngram_words)
    places, grams = Index.read(work, "_index-").find(runs)
    owners = np.searchsorted(bounds, places, side="right") - 1
    hits = np.stack([owners, places - bounds[owners], grams])
    once = np.unique(hits[[0, 2]], axis=1)
    write_array(work, f"_hits-{number:05d}.npy", hits)
    seen = np.stack(np.unique(once[1], return_counts=True))
    write_array(work, f"_seen-{number:05d}.npy", seen)
    return len(places)


def clean_shard(
    work: Workspace, number: int, config: DecontaminateConfig, where: Directory, name: str
) -> dict[str, Any]:
    """One shard without what it holds of the suites, and what that was."""
    table = where.read_table(name).replace_schema_metadata()
    owners, places, grams = read_array(work, f"_hits-{number:05d}.npy")
    rare = ~read_array(work, "_common.npy")[grams]
    owners, places, grams = owners[rare], places[rare], grams[rare]
    tally, hits, found = Tally(), list[dict[str, Any]](), set[int]()
    cuts: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    gone: list[dict[str, Any]] = []
    index = Index.read(work, "_index-") if len(owners) else None
    items: list[dict[str, str]] = []
    for row, document in enumerate(table.to_pylist()):
        mine = owners == row
        held: list[Contamination] = []
        if index is not None and mine.any():
            held = contaminations(places[mine], grams[mine], index, config.proof())
        if not held:
            tally.keep(document["bytes"])
            kept.append(document)
            continue
        items = items or work.read_table("_items.parquet").to_pylist()
        words = places_of(document["text"])
        told = [_hit(document, one, Item(**items[one.item]), words, config.action) for one in held]
        hits += told
        found |= {one.item for one in held}
        text, lines = document["text"], set[int]()
        if config.action == "cut":
            spans = [(words[a][0], words[b - 1][1]) for one in held for a, b in one.spans]
            text, lines = without_lines(text, spans)
        if config.action == "cut" and _has_prose(text):
            size = len(text.encode("utf-8", "replace"))
            tally.mend("contaminated-lines", len(lines))
            tally.keep(size)
            left = document | {"id": document_id(text), "text": text, "bytes": size}
            kept.append(left)
            whole = whole_lines(RULE, document["text"].split("\n"), lines)
            cuts += cut_rows(document, left["id"], whole)
            continue
        first = max(told, key=lambda hit: hit["words"])
        removal = Removal(
            RULE,
            f"{first['share']:.0%} of {first['suite']} {first['item']}: “{first['span'][:120]}”",
        )
        tally.remove(removal, document["url"], document["text"])
        gone.append(document | {"rule": removal.rule, "reason": removal.reason})
    if hits:
        table, told_of = pa.Table.from_pylist(kept, table.schema), pa.Table.from_pylist(hits, HITS)
        work.write_table(f"contamination-{number:05d}.parquet", told_of)
    write_cuts(work, number, cuts)
    rejected = pa.Table.from_pylist(gone, pa.schema([*table.schema, *REMOVED]))
    work.write_table(f"documents-{number:05d}.parquet", table)
    work.write_table(f"rejected-{number:05d}.parquet", rejected)
    return {
        "tally": asdict(tally),
        "items": sorted(found),
        "documents": len({hit["url"] for hit in hits}),
        "largest": sorted(hits, key=lambda hit: -int(hit["words"]))[:SHOWN],
    }


def _has_prose(text: str) -> bool:
    return any(line.strip() and not line.startswith("#") for line in text.split("\n"))


def _hit(
    document: dict[str, Any],
    one: Contamination,
    item: Item,
    words: list[tuple[int, int]],
    action: str,
) -> dict[str, Any]:
    first, last = max(one.spans, key=lambda span: span[1] - span[0])
    start, end = words[first][0], words[last - 1][1]
    return {
        "url": document["url"],
        "id": document["id"],
        "record_id": document["record_id"],
        "suite": item.suite,
        "item": item.item,
        "words": one.words,
        "share": round(one.share, 4),
        "start": start,
        "end": end,
        "span": excerpt(document["text"][start:end]),
        "spans": len(one.spans),
        "item_text": excerpt(item.text),
        "action": action,
    }


def _suites_report(
    config: DecontaminateConfig,
    items: list[Item],
    index: Index,
    findable: list[int],
    found: set[int],
) -> Report:
    known = Counter(item.suite for item in items)
    looked_for = Counter(items[number].suite for number in findable)
    short = Counter(
        item.suite
        for item, words in zip(items, index.words.tolist(), strict=True)
        if words < config.ngram_words
    )
    held = Counter(items[number].suite for number in found)
    rows = [
        {
            "suite": suite.name,
            "texts": known[suite.name],
            "too short": short[suite.name],
            "too common": known[suite.name] - short[suite.name] - looked_for[suite.name],
            "found": held[suite.name],
        }
        for suite in config.suites
    ]
    return Report("contamination", "table", rows, "Evaluation items found in documents")


def _hits_report(hits: list[dict[str, Any]]) -> Report:
    rows = [
        {
            "document": hit["url"],
            "item": f"{hit['suite']} {hit['item']}",
            "share": f"{hit['share']:.0%}",
            "span": hit["span"],
        }
        for hit in sorted(hits, key=lambda hit: (-hit["words"], hit["url"]))[:SHOWN]
    ]
    none = {"document": "none", "item": "", "share": "", "span": ""}
    return Report("contaminated-documents", "table", rows or [none], "The longest matches")
