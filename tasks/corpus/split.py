"""The split stage: held-out documents that no training ever sees, and nothing like them either.

Documents are divided by groups: clusters of similar documents (`cluster`, from deduplicate), and
pages of one subject (`group_urls`: a module's page and its source). A group is held out when the
hash of its smallest address falls below `fraction`, so the choice does not depend on how many
documents there are, and holds in the next epoch. Then lines of training that also stand in
held-out documents are cut out (`leakage`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, field_validator

from tasks.corpus.arrays import distinct, read_array, write_array
from tasks.corpus.clusters import connected
from tasks.corpus.documents import (
    REMOVED,
    Removal,
    Tally,
    document_id,
    document_shards,
    selection_reports,
)
from tasks.corpus.leakage import Marks, line_marks, own_marks, shared_marks, without_leaks
from tasks.corpus.sharding import run_shards
from tasks.corpus.shingles import Hashes
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Report, StageConfig, Workspace, stage

EXAMPLES = 5


class SplitConfig(StageConfig):
    """Which documents are held out of all training."""

    fraction: float = Field(0.1, gt=0, le=0.5)
    """Share of the groups of similar documents that is held out."""
    seed: int = 12
    """Another seed holds other documents out."""
    group_urls: tuple[str, ...] = (r"/(?:library|source|latest)/([^/]+)\.html$",)
    """Regular expressions with one group; addresses that give the same text stay together."""
    largest_group: float = Field(0.05, gt=0, le=1)
    """A group with a larger share of all text is never held out: it would be the whole measure."""
    common_groups: int = Field(20, ge=2)
    """A passage that stands in so many groups is boilerplate, and no leak of held-out text."""

    @field_validator("group_urls")
    @classmethod
    def captures(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
            if groups != 1:
                raise ValueError(
                    f"{pattern!r} has {groups} groups; give exactly one, in parentheses, "
                    "that names what belongs together"
                )
        return value


@dataclass(frozen=True)
class Choice:
    """For each document its group (the row of its first document) and whether it is held out."""

    groups: list[int]
    held: list[bool]


@stage("split", version=1)
def split(config: SplitConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    """Hold whole groups of similar documents out and cut their text out of the rest."""
    names = document_shards(documents)
    directory = work.store.of(documents)
    tables = [directory.read_table(name, ["url", "cluster", "bytes"]) for name in names]
    whole = pa.concat_tables(tables)
    choice = choose(
        config,
        whole["url"].to_pylist(),
        whole["cluster"].to_pylist(),
        whole["bytes"].to_pylist(),
    )
    bounds = np.cumsum([0, *(table.num_rows for table in tables)]).tolist()
    slices = list(zip(names, bounds, bounds[1:], strict=False))

    items: list[tuple[Any, ...]]
    items = [(documents, name, choice.held[a:b]) for name, a, b in slices]
    run_shards(work, "marked", mark_shard, items, label="Held-out marks")
    for kind in ("windows", "names"):
        parts = [read_array(work, f"_{kind}-{number:05d}.npy") for number in range(len(names))]
        write_array(work, f"_{kind}.npy", distinct(np.concatenate(parts)))
    items = [(documents, name, choice.groups[a:b]) for name, a, b in slices]
    run_shards(work, "shared", shared_shard, items, label="Shared passages")
    common = {kind: _drop_common(work, kind, len(names), config) for kind in ("windows", "names")}
    items = [(documents, name, choice.held[a:b]) for name, a, b in slices]
    reports = run_shards(work, "divided", divide_shard, items, label="Split")
    return _outcome(choice, reports, common)


def choose(
    config: SplitConfig, urls: Sequence[str], clusters: Sequence[str], sizes: Sequence[int]
) -> Choice:
    """Group the documents and choose the groups to hold out. Raises UserError below two groups."""
    patterns = [re.compile(pattern) for pattern in config.group_urls]
    first: dict[tuple[str, str], int] = {}
    pairs = []
    for row, (url, cluster) in enumerate(zip(urls, clusters, strict=True)):
        keys = [("cluster", cluster)]
        keys += [(p.pattern, m.group(1) or "") for p in patterns if (m := p.search(url))]
        pairs += [(first.setdefault(key, row), row) for key in keys]
    groups = connected(len(urls), np.array(pairs, np.int64).reshape(-1, 2)).tolist()
    key_of: dict[int, str] = {}
    size_of: dict[int, int] = {}
    for url, group, size in zip(urls, groups, sizes, strict=True):
        key_of[group] = min(key_of.get(group, stable_key(url)), stable_key(url))
        size_of[group] = size_of.get(group, 0) + size
    if len(key_of) < 2:
        raise UserError(
            f"{len(urls)} documents form {len(key_of)} group of similar ones, and a held-out split "
            "needs two; crawl more pages, or raise deduplicate.cluster_threshold"
        )
    draws = {group: _draw(config.seed, key) for group, key in key_of.items()}
    small = [g for g in draws if size_of[g] <= config.largest_group * sum(sizes)]
    held = {group for group in small if draws[group] < config.fraction}
    if not held:
        # A small corpus: one group, the one a larger fraction would have taken first.
        held = {min(small or draws, key=lambda group: draws[group])}
    if len(held) == len(key_of):
        held.remove(max(held, key=lambda group: draws[group]))
    return Choice(groups, [group in held for group in groups])


def stable_key(url: str) -> str:
    """The address without scheme and port: the same site on another port divides the same way."""
    parts = urlsplit(url)
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.hostname or ''}{parts.path}{query}"


def _draw(seed: int, key: str) -> float:
    digest = hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64


def mark_shard(
    work: Workspace, number: int, documents: Manifest, name: str, held: list[bool]
) -> int:
    """Marks of the held-out documents of one shard: `_windows-NNNNN.npy`, `_names-NNNNN.npy`."""
    texts = work.store.of(documents).read_table(name, ["text"])["text"].to_pylist()
    marks = [own_marks(text) for text, is_held in zip(texts, held, strict=True) if is_held]
    none = np.zeros(0, np.uint64)
    for kind in ("windows", "names"):
        parts = [none, *(getattr(mark, kind) for mark in marks)]
        write_array(work, f"_{kind}-{number:05d}.npy", distinct(np.concatenate(parts)))
    return len(marks)


def shared_shard(
    work: Workspace, number: int, documents: Manifest, name: str, groups: list[int]
) -> int:
    """(mark, group) for the held-out marks that documents of one shard have: `_shared-…npy`."""
    held = Marks(read_array(work, "_windows.npy"), read_array(work, "_names.npy"))
    texts = work.store.of(documents).read_table(name, ["text"])["text"].to_pylist()
    found: dict[str, list[NDArray[np.uint64]]] = {"windows": [], "names": []}
    for text, group in zip(texts, groups, strict=True):
        shared = shared_marks(line_marks(text), held)
        for kind, rows in found.items():
            marks: Hashes = getattr(shared, kind)
            rows.append(np.column_stack([marks, np.full(len(marks), group, np.uint64)]))
    none = np.zeros((0, 2), np.uint64)
    for kind, rows in found.items():
        pairs = np.unique(np.concatenate([none, *rows]), axis=0)
        write_array(work, f"_shared-{kind}-{number:05d}.npy", pairs)
    return len(texts)


def _drop_common(work: Workspace, kind: str, shards: int, config: SplitConfig) -> int:
    """Leave only those held-out marks that few groups have; returns how many were common."""
    held = read_array(work, f"_{kind}.npy")
    parts = [read_array(work, f"_shared-{kind}-{number:05d}.npy") for number in range(shards)]
    pairs = np.unique(np.concatenate(parts), axis=0)
    marks, groups = np.unique(pairs[:, 0], return_counts=True)
    common = marks[groups >= config.common_groups]
    write_array(work, f"_own-{kind}.npy", np.setdiff1d(held, common))
    return len(common)


def divide_shard(
    work: Workspace, number: int, documents: Manifest, name: str, held: list[bool]
) -> dict[str, Any]:
    """One shard divided: `train-`, `heldout-` and `rejected-NNNNN.parquet` where not empty."""
    marks = Marks(read_array(work, "_own-windows.npy"), read_array(work, "_own-names.npy"))
    table = work.store.of(documents).read_table(name)
    tally, trimmed = Tally(), []
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": [], "rejected": []}
    for document, is_held in zip(table.to_pylist(), held, strict=True):
        if is_held:
            tally.keep(document["bytes"])
            parts["heldout"].append(document)
            continue
        text, lines = without_leaks(line_marks(document["text"]), marks)
        if lines == 0:
            tally.keep(document["bytes"])
            parts["train"].append(document)
            continue
        if all(line.startswith("#") for line in text.split("\n") if line.strip()):
            removal = Removal("heldout-leak", f"all but headings stands in held-out text ({lines})")
            tally.remove(removal, document["url"], document["text"])
            parts["rejected"].append(document | {"rule": removal.rule, "reason": removal.reason})
            continue
        size = len(text.encode("utf-8", "replace"))
        tally.mend("lines-shared-with-heldout", lines)
        trimmed.append(
            {"document": document["url"], "lines": lines, "bytes": document["bytes"] - size}
        )
        tally.keep(size)
        parts["train"].append(document | {"id": document_id(text), "text": text, "bytes": size})
    schema = table.schema.remove_metadata()
    for part, rows in parts.items():
        if rows:
            fields = pa.schema([*schema, *REMOVED]) if part == "rejected" else schema
            whole = pa.Table.from_pylist(rows, fields)
            work.write_table(f"{part}-{number:05d}.parquet", whole)
    sizes = {part: sum(row["bytes"] for row in rows) for part, rows in parts.items()}
    return {
        "tally": asdict(tally),
        "trimmed": trimmed,
        "documents": {part: len(rows) for part, rows in parts.items()},
        "bytes": sizes,
    }


def _outcome(choice: Choice, reports: list[dict[str, Any]], common: dict[str, int]) -> Outcome:
    tally = Tally.total(report["tally"] for report in reports)
    totals = {
        f"{part}_{unit}": sum(report[unit][part] for report in reports)
        for part in ("train", "heldout")
        for unit in ("documents", "bytes")
    }
    if not totals["train_documents"]:
        raise UserError(
            f"all {tally.seen - totals['heldout_documents']} training documents consist of "
            "held-out text (rule heldout-leak); crawl more pages or lower split.common_groups"
        )
    trimmed = sorted(
        (row for report in reports for row in report["trimmed"]), key=lambda row: -row["bytes"]
    )
    held_groups = {g for g, held in zip(choice.groups, choice.held, strict=True) if held}
    rows = [
        {
            "part": part,
            "groups": len(held_groups)
            if part == "heldout"
            else len(set(choice.groups) - held_groups),
            "documents": totals[f"{part}_documents"],
            "bytes": totals[f"{part}_bytes"],
        }
        for part in ("train", "heldout")
    ]
    return Outcome(
        counts={
            "documents": totals["train_documents"] + totals["heldout_documents"],
            "bytes": totals["train_bytes"] + totals["heldout_bytes"],
            "groups": len(set(choice.groups)),
            **totals,
        },
        rules=tally.rules,
        metrics={
            "leaked_lines_cut": tally.mended.get("lines-shared-with-heldout", 0),
            "leaked_bytes_cut": sum(row["bytes"] for row in trimmed),
            "documents_trimmed": len(trimmed),
            "common_passages": common["windows"],
            "common_names": common["names"],
        },
        reports=(
            Report("split", "table", rows, "Groups of similar documents, divided"),
            *selection_reports("split", tally),
            Report(
                "held-out-lines",
                "table",
                trimmed[:EXAMPLES] or [{"document": "none", "lines": 0, "bytes": 0}],
                "Training documents that lost most lines because they stand in held-out ones",
            ),
        ),
    )
