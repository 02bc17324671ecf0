"""The deduplicate stage: exact and near duplicates, each removal verified against a kept document.

Rounds, each a shard function on Ray: signatures of a shard of documents; candidates of a few bands
over all shards; exact Jaccard similarity of a block of candidate pairs; the selection of a shard.
The driver holds a rank and a digest for each document and the pairs, never the text.

Which copy stays: the longest text, in steps of a tenth; among equals the address that does not look
like a copy's (`/latest/`, `/print/`, a query, …), then the shorter one, then alphabetical order.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from tasks.corpus.arrays import read_array, write_array
from tasks.corpus.clusters import connected, keep_best
from tasks.corpus.documents import (
    Removal,
    Tally,
    counts,
    document_id,
    document_shards,
    require_some,
    selection_reports,
    write_selection,
)
from tasks.corpus.minhash import Bands, candidate_pairs
from tasks.corpus.sharding import run_shards
from tasks.corpus.shingles import Words, jaccard, normalise
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Report, StageConfig, Workspace, stage

BAND_GROUPS = 8  # tasks that look for candidates; each reads the keys of its bands only
PAIRS_PER_BLOCK = 20_000
LARGEST_SHOWN = 10
LENGTH_STEP = 1.1  # a few words more do not make a mirror the better copy
REMEDIES = {"": "crawl more pages"}
_COPY = re.compile(
    r"[/._-](?:latest|old|archive[sd]?|print|printable|amp|mobile|mirrors?|cop(?:y|ies)|backup)"
    r"(?:[/._-]|$)|\?",
    re.IGNORECASE,
)


class DeduplicateConfig(StageConfig):
    """What counts as the same document."""

    threshold: float = Field(0.8, gt=0, le=1)
    """Jaccard similarity of the sets of shingles from which a document is a duplicate."""
    cluster_threshold: float = Field(0.5, gt=0, le=1)
    """Similarity from which documents belong together: the held-out split never divides them."""
    shingle_words: int = Field(5, ge=1, le=20)
    """Words in a shingle."""
    bands: int = Field(32, ge=1, le=256)
    """Bands of a MinHash signature; more find more pairs."""
    rows: int = Field(4, ge=1, le=16)
    """Rows of a band; fewer find less similar pairs, and more that must be looked at in vain."""

    @model_validator(mode="after")
    def finds_what_it_promises(self) -> DeduplicateConfig:
        if self.cluster_threshold > self.threshold:
            raise ValueError(
                f"cluster_threshold {self.cluster_threshold} > threshold {self.threshold}: "
                "documents that are duplicates must belong together; lower it"
            )
        found = Bands(self.bands, self.rows).probability(min(self.threshold + 0.05, 1))
        if found < 0.95:
            raise ValueError(
                f"{self.bands} bands of {self.rows} rows find only {found:.0%} of the pairs just "
                f"above threshold {self.threshold}; raise bands or lower rows"
            )
        return self


@stage("deduplicate", version=1)
def deduplicate(config: DeduplicateConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    """Remove exact and near duplicates and say which documents belong together."""
    names = document_shards(documents)
    signed = run_shards(
        work, "signed", sign_shard, [(config, documents, n) for n in names], label="Signatures"
    )
    sizes = [len(report["urls"]) for report in signed]
    urls = [url for report in signed for url in report["urls"]]
    ids = [item for report in signed for item in report["ids"]]
    rank = _ranks(urls, [size for report in signed for size in report["bytes"]])
    exact = _exact(rank, [digest for report in signed for digest in report["digests"]])
    alive = rank.copy()
    alive[list(exact)] = -1
    write_array(work, "_rank.npy", alive)

    groups = [
        (config, len(names), group.tolist())
        for group in np.array_split(np.arange(config.bands), min(BAND_GROUPS, config.bands))
    ]
    run_shards(work, "candidates", candidates_shard, groups, label="Candidates", unit="bands")
    pairs, similarity = _verified(config, work, len(groups), sizes)

    reached = similarity >= config.threshold
    near = keep_best(len(urls), alive, pairs[reached], similarity[reached])
    together = similarity >= config.cluster_threshold
    roots = connected(len(urls), map(tuple, pairs[together].tolist()))
    removals: list[Removal | None] = [None] * len(urls)
    for row, kept in exact.items():
        removals[row] = Removal("exact-duplicate", f"same text as {urls[kept]}")
    for row, (kept, score) in near.items():
        reason = f"Jaccard similarity {score:.2f} with {urls[kept]}"
        removals[row] = Removal("near-duplicate", reason)
    clusters = [ids[root] for root in roots]

    bounds = [0, *itertools.accumulate(sizes)]
    items = [
        (documents, name, removals[start:stop], clusters[start:stop])
        for name, start, stop in zip(names, bounds, bounds[1:], strict=False)
    ]
    tally = Tally.total(run_shards(work, "selected", select_shard, items, label="Deduplicate"))
    require_some("deduplicate", tally, REMEDIES, "documents")
    largest = Counter(
        cluster for cluster, removal in zip(clusters, removals, strict=True) if removal is None
    ).most_common(LARGEST_SHOWN)
    first = dict(zip(reversed(clusters), reversed(urls), strict=True))
    rows = [
        {"documents": size, "for example": first[cluster]} for cluster, size in largest if size > 1
    ]
    title = f"Largest clusters of kept documents at similarity {config.cluster_threshold:g}"
    return Outcome(
        counts=counts(tally) | {"clusters": len(set(clusters))},
        rules=tally.rules,
        metrics={"candidate_pairs": len(pairs), "pairs_verified": int(reached.sum())},
        reports=(
            *selection_reports("deduplicate", tally),
            Report("clusters", "table", rows or [{"documents": 0, "for example": "none"}], title),
        ),
    )


def sign_shard(
    work: Workspace, number: int, config: DeduplicateConfig, documents: Manifest, name: str
) -> dict[str, Any]:
    """Shingle sets and band keys of one shard, and what the driver needs to rank its documents."""
    table = work.store.of(documents).read_table(name, ["id", "url", "text", "bytes"])
    bands = Bands(config.bands, config.rows)
    digests, sets = [], []
    for text in table["text"].to_pylist():
        normalised = normalise(text)
        digests.append(document_id(normalised))
        sets.append(Words.of(normalised).shingles(config.shingle_words))
    keys = [bands.keys(shingles) for shingles in sets]
    stacked = np.array(keys, np.uint64).reshape(len(sets), config.bands)
    write_array(work, f"_keys-{number:05d}.npy", stacked)
    write_array(work, f"_sets-{number:05d}.npy", np.concatenate([np.zeros(0, np.uint64), *sets]))
    lengths = [len(shingles) for shingles in sets]
    write_array(work, f"_bounds-{number:05d}.npy", np.cumsum([0, *lengths]))
    return {
        "ids": table["id"].to_pylist(),
        "urls": table["url"].to_pylist(),
        "bytes": table["bytes"].to_pylist(),
        "digests": digests,
    }


def candidates_shard(
    work: Workspace, number: int, config: DeduplicateConfig, shards: int, bands: list[int]
) -> int:
    """Pairs of documents that share a key of one of these bands: `_pairs-NNNNN.npy`."""
    rank = read_array(work, "_rank.npy")
    columns = [read_array(work, f"_keys-{shard:05d}.npy")[:, bands] for shard in range(shards)]
    keys = np.concatenate([np.zeros((0, len(bands)), np.uint64), *columns])
    alive = np.flatnonzero(rank >= 0)
    found = [np.zeros((0, 2), np.int64)]
    for column in range(len(bands)):
        found.append(alive[candidate_pairs(keys[alive, column], rank[alive])])
    pairs = np.unique(np.concatenate(found), axis=0)
    write_array(work, f"_pairs-{number:05d}.npy", pairs)
    return len(pairs)


def verify_shard(work: Workspace, number: int, sizes: list[int], start: int, stop: int) -> int:
    """Exact Jaccard similarity of a block of candidate pairs: `_similarity-NNNNN.npy`."""
    starts = np.cumsum([0, *sizes])

    @lru_cache(maxsize=8)
    def shard_sets(shard: int) -> tuple[NDArray[Any], NDArray[Any]]:
        sets = read_array(work, f"_sets-{shard:05d}.npy")
        return sets, read_array(work, f"_bounds-{shard:05d}.npy")

    def shingles(row: int) -> NDArray[Any]:
        shard = int(np.searchsorted(starts, row, side="right")) - 1
        sets, bounds = shard_sets(shard)
        local = row - int(starts[shard])
        return sets[bounds[local] : bounds[local + 1]]

    pairs = read_array(work, "_candidates.npy")[start:stop]
    similarity = np.array([jaccard(shingles(a), shingles(b)) for a, b in pairs.tolist()])
    write_array(work, f"_similarity-{number:05d}.npy", similarity)
    return len(pairs)


def select_shard(
    work: Workspace,
    number: int,
    documents: Manifest,
    name: str,
    removals: list[Removal | None],
    clusters: list[str],
) -> dict[str, Any]:
    table = work.store.of(documents).read_table(name)
    table = table.append_column("cluster", pa.array(clusters, pa.string()))
    return asdict(write_selection(work, number, table, removals))


def _ranks(urls: list[str], sizes: list[int]) -> NDArray[np.int64]:
    """Rank of each row by the rule of the best copy; 0 is best."""
    order = sorted(
        range(len(urls)),
        key=lambda row: (
            -int(math.log(sizes[row] + 1, LENGTH_STEP)),
            bool(_COPY.search(urls[row])),
            len(urls[row]),
            urls[row],
            row,
        ),
    )
    rank = np.empty(len(urls), np.int64)
    rank[order] = np.arange(len(urls))
    return rank


def _exact(rank: NDArray[np.int64], digests: list[str]) -> dict[int, int]:
    """Row → the kept row with the same normalised text."""
    best: dict[str, int] = {}
    for row in np.argsort(rank).tolist():
        best.setdefault(digests[row], row)
    return {row: best[digest] for row, digest in enumerate(digests) if best[digest] != row}


def _verified(
    config: DeduplicateConfig, work: Workspace, groups: int, sizes: list[int]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """All candidate pairs with their similarity."""
    found = [read_array(work, f"_pairs-{group:05d}.npy") for group in range(groups)]
    # Sorted by rows, so that a block touches few shards.
    pairs = np.unique(np.concatenate(found), axis=0)
    write_array(work, "_candidates.npy", pairs)
    starts = range(0, len(pairs), PAIRS_PER_BLOCK)
    blocks = [(sizes, start, start + PAIRS_PER_BLOCK) for start in starts]
    run_shards(work, "verified", verify_shard, blocks, label="Verify", unit="blocks")
    parts = [read_array(work, f"_similarity-{block:05d}.npy") for block in range(len(blocks))]
    return pairs, np.concatenate([np.zeros(0), *parts])
