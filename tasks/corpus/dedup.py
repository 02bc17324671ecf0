"""The deduplicate stage: exact and near duplicates, each removal verified against a kept document.

Rounds, each a shard function on Ray that sees its part only:
    pick          a shard of documents     → their digests and band keys        (signatures)
    match         a range of keys          → exact copies, candidate pairs      (matching)
    verify        candidates of a shard    → pairs that resemble, exact Jaccard (matching)
    decide        the driver               → who goes, who belongs together     (decisions)
    select        a shard of documents     → what stays and what went, and why

Digests, keys and sets were made before (the signatures stage); here no text is read but to be
copied. Nothing needs the whole corpus in one process. A match task holds the keys of four to 128
shards, a verify task the shingle sets of two. The driver alone sees all pairs of duplicates, and at
most one pair more for a document in each shard: about 100 bytes for each while it decides, nothing
for a document that resembles no other, and never text or addresses.

Which copy stays: the longest text, in steps of a tenth; among equals the one that is not said to be
a copy, neither by the page, which names another address as its canonical one, nor by its own
address (`/latest/`, `/print/`, a query, …); then the shorter address, then alphabetical order. A
document of an earlier corpus always stays.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from tasks.corpus.arrays import read_array
from tasks.corpus.buckets import ranges, read_part
from tasks.corpus.decisions import BELONGS, GONE, clusters_report, decide, write_clusters
from tasks.corpus.documents import (
    Removal,
    Tally,
    counts,
    document_shards,
    require_some,
    selection_reports,
    write_selection,
)
from tasks.corpus.matching import copies_for, match_partition, verify_shard
from tasks.corpus.minhash import Bands
from tasks.corpus.sharding import run_shards
from tasks.corpus.signatures import SignatureConfig, Signed, Sources, pick_shard, place_of
from tasks.runtime.fingerprint import place
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Directory

SHARDS_PER_PARTITION = 4  # whose keys a match task holds: about 4 KB a document while it works
ENOUGH_PARTITIONS = 4096
MOST_SHARDS = 128  # the same where there are more than enough: 1.8 GB with parts of 16 MB
_KNOWN = "all of it was known; name fewer corpora in deduplicate.against, or none"
REMEDIES = {
    "": "crawl more pages",
    "earlier-exact-duplicate": _KNOWN,
    "earlier-near-duplicate": _KNOWN,
}


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
    against: tuple[str, ...] = place((), max_length=20)
    """Earlier corpora whose documents, and what resembles them, are not taken again: fingerprints
    of deduplicate artifacts, or `previous` for the corpus made before this one with all that it
    was itself compared with."""

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

    def signatures(self) -> SignatureConfig:
        return SignatureConfig(shingle_words=self.shingle_words, bands=self.bands, rows=self.rows)


@stage("deduplicate", version=3)
def deduplicate(
    config: DeduplicateConfig,
    work: Workspace,
    *,
    documents: Manifest,
    signatures: Manifest,
    **earlier: Manifest,
) -> Outcome:
    """Remove exact and near duplicates and say which documents belong together.

    `signatures` are those of all documents of which these are a selection. `earlier` are those of
    other corpora (`earlier.earlier_corpora`), whose documents stay.
    """
    wanted = config.signatures().model_dump(mode="json")
    if signatures.config != wanted:
        raise ValueError(
            f"the signatures were made with {signatures.config} and {wanted} is asked for; "
            "make them with DeduplicateConfig.signatures()"
        )
    names, where = document_shards(documents), work.store.of(documents)
    signed = Signed(work.store.of(signatures), len(names))
    items = [(signed, where, name) for name in names]
    picked = run_shards(work, "picked", pick_shard, items, label="Pick signatures")
    known = tuple(
        Signed(
            work.store.of(manifest),
            manifest.counts["shards"],
            label=manifest.inputs["documents"][:12],
        )
        for _, manifest in sorted(earlier.items())
    )
    sources = Sources(replace(signed, picked=work), known)
    partitions = partitions_of(sources.shards)
    matched = run_shards(
        work,
        "matched",
        match_partition,
        [(partitions, sources)] * partitions,
        label="Candidates",
        unit="ranges",
    )
    looked_at = run_shards(
        work,
        "verified",
        verify_shard,
        [(partitions, sources, config.cluster_threshold, config.threshold)] * len(names),
        label="Verify",
    )
    decisions = decide(work, sources, partitions, config.threshold)

    tally = Tally.total(
        run_shards(
            work,
            "selected",
            select_shard,
            [(where, name, partitions, sources) for name in names],
            label="Deduplicate",
        )
    )
    require_some("deduplicate", tally, REMEDIES, "documents")
    copies = sum(report["copies"] for report in matched)
    write_clusters(work, decisions, sources)
    return Outcome(
        counts=counts(tally) | {"clusters": sum(picked) - copies - decisions.joined},
        rules=tally.rules,
        metrics={"candidate_pairs": sum(looked_at), "pairs_verified": decisions.pairs},
        reports=(
            *selection_reports("deduplicate", tally),
            clusters_report(work, config.cluster_threshold),
        ),
    )


def partitions_of(shards: int) -> int:
    """How many ranges of keys there are for so many shards.

    Small ones as long as there are few: each is a task. Every range is read from every shard, so
    they then grow, to what a task can hold; from there on there are more of them.
    """
    small, large = ranges(shards, SHARDS_PER_PARTITION), ranges(shards, MOST_SHARDS)
    return max(min(small, ENOUGH_PARTITIONS), large)


def select_shard(
    work: Workspace, number: int, where: Directory, name: str, partitions: int, sources: Sources
) -> dict[str, Any]:
    """One shard divided into what stays and what went, by what the rounds before have decided."""
    table = where.read_table(name)
    copies = copies_for(work, partitions, number)
    gone = np.frombuffer(read_part(work, "_gone", number), GONE)
    belongs = np.frombuffer(read_part(work, "_belongs", number), BELONGS)
    told = sources.names(np.concatenate([copies["kept"], gone["kept"], belongs["root"]]))
    places = read_array(work, f"_places-{number:05d}.npy")

    def rows(found: NDArray[np.void]) -> list[int]:
        """Where these stand in the table: what is gone since they were signed is not counted."""
        return np.searchsorted(places, place_of(found["row"])).tolist()

    removals: list[Removal | None] = [None] * table.num_rows
    for row, kept in zip(rows(copies), copies["kept"].tolist(), strict=True):
        removals[row] = _removal("exact-duplicate", "same text as", told, kept, sources)
    for row, kept, score in zip(
        rows(gone), gone["kept"].tolist(), gone["similarity"].tolist(), strict=True
    ):
        seen = f"Jaccard similarity {score:.2f} with"
        removals[row] = _removal("near-duplicate", seen, told, kept, sources)
    clusters = table["id"].to_pylist()
    for row, root in zip(rows(belongs), belongs["root"].tolist(), strict=True):
        clusters[row] = told[root][0]
    table = table.append_column("cluster", pa.array(clusters, pa.string()))
    return asdict(write_selection(work, number, table, removals))


def _removal(
    rule: str, seen: str, told: dict[int, tuple[str, str]], kept: int, sources: Sources
) -> Removal:
    corpus = sources.label(kept)
    if corpus:
        return Removal(f"earlier-{rule}", f"{seen} {told[kept][1]} of corpus {corpus}")
    return Removal(rule, f"{seen} {told[kept][1]}")
