"""What the driver of deduplication decides from all pairs that resemble, in arrays of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.corpus.buckets import cut_by, write_parts
from tasks.corpus.clusters import connected, keep_best
from tasks.corpus.matching import RESEMBLING, copies_in
from tasks.corpus.signatures import Sources, shard_of
from tasks.runtime.stage import Report, Workspace

GONE = np.dtype([("row", "<u8"), ("kept", "<u8"), ("similarity", "<f8")])
BELONGS = np.dtype([("row", "<u8"), ("root", "<u8")])
CLUSTERS = pa.schema(
    [
        ("cluster", pa.string()),  # as the documents' column of that name
        ("documents", pa.int64()),  # of this corpus in it, those removed too
        ("removed", pa.int64()),
        ("id", pa.string()),  # one of them a row, in the order of the corpus
        ("url", pa.string()),
    ]
)
LARGEST = 100  # clusters in `clusters.parquet`
MEMBERS = 20  # rows of one
LARGEST_SHOWN = 10  # on the run page
ADDRESSES = 3


@dataclass(frozen=True)
class Cluster:
    """One of the largest clusters; `rows` are some of its documents."""

    root: int
    documents: int
    removed: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Decisions:
    pairs: int  # that reached the threshold of a duplicate
    joined: int  # documents that belong to the cluster of one before them
    largest: tuple[Cluster, ...]


def decide(work: Workspace, sources: Sources, partitions: int, threshold: float) -> Decisions:
    """Decide, and write for each shard its part of `_gone` and `_belongs`."""
    own = sources.current.shards
    parts = [work.read_bytes(f"_resembling-{shard:05d}") for shard in range(own)]
    pairs = np.frombuffer(b"".join(parts), RESEMBLING)
    del parts
    rows, dense = np.unique(np.concatenate([pairs["better"], pairs["worse"]]), return_inverse=True)
    ends = dense.reshape(2, -1).T
    alike = pairs["similarity"] >= threshold
    loser, shown = keep_best(
        len(rows), ends[alike], pairs["similarity"][alike], pairs["order"][alike]
    )
    gone = np.zeros(len(loser), GONE)
    gone["row"] = rows[loser]
    gone["kept"] = pairs["better"][alike][shown]
    gone["similarity"] = pairs["similarity"][alike][shown]
    write_parts(work, "_gone", cut_by(gone, shard_of(gone["row"]), own))

    # Shards of earlier corpora come last, so the root of a cluster is a document of this one.
    roots = rows[connected(len(rows), ends)]
    mine = shard_of(rows) < own
    belongs = np.zeros(int(mine.sum()), BELONGS)
    belongs["row"], belongs["root"] = rows[mine], roots[mine]
    write_parts(work, "_belongs", cut_by(belongs, shard_of(belongs["row"]), own))

    largest = _largest(work, partitions, own, belongs, gone["row"])
    joined = int((belongs["row"] != belongs["root"]).sum())
    return Decisions(int(alike.sum()), joined, largest)


def _largest(
    work: Workspace,
    partitions: int,
    shards: int,
    belongs: NDArray[np.void],
    gone: NDArray[np.uint64],
) -> tuple[Cluster, ...]:
    """The largest clusters of more than one document, exact copies with the one they copy."""
    counted = [
        np.unique(copies_in(work, partition)["kept"], return_counts=True)
        for partition in range(partitions)
    ]
    kept = np.concatenate([np.zeros(0, np.uint64), *(rows for rows, _ in counted)])
    copies = np.concatenate([np.zeros(0, np.int64), *(count for _, count in counted)])
    kept, copies = kept[shard_of(kept) < shards], copies[shard_of(kept) < shards]
    alone = np.setdiff1d(kept, belongs["row"])
    members = np.concatenate([belongs["row"], alone])
    of_member = np.concatenate([belongs["root"], alone])
    by = np.argsort(members)
    members, of_member = members[by], of_member[by]
    roots, index = np.unique(of_member, return_inverse=True)
    copied = index[np.searchsorted(members, kept)]
    removed = np.bincount(copied, copies, len(roots))
    documents = np.bincount(index, minlength=len(roots)) + removed
    removed += np.bincount(index[np.searchsorted(members, gone)], minlength=len(roots))
    top = np.lexsort((roots, -documents))[:LARGEST]
    top = top[documents[top] > 1]
    shown: dict[int, list[int]] = {number: [] for number in top.tolist()}
    for number in top.tolist():
        shown[number] += members[index == number][:MEMBERS].tolist()
    wanted = members[np.isin(index, top)]
    for partition in range(partitions):
        block = copies_in(work, partition)
        block = block[np.isin(block["kept"], wanted)]
        owners = index[np.searchsorted(members, block["kept"])]
        for row, number in zip(block["row"].tolist(), owners.tolist(), strict=True):
            shown[number].append(row)
    return tuple(
        Cluster(
            int(roots[number]),
            int(documents[number]),
            int(removed[number]),
            tuple(sorted(shown[number])[:MEMBERS]),
        )
        for number in top.tolist()
    )


def write_clusters(work: Workspace, decisions: Decisions, sources: Sources) -> None:
    """`clusters.parquet`: the largest clusters, largest first, a row for each document."""
    rows = [row for cluster in decisions.largest for row in (cluster.root, *cluster.rows)]
    told = sources.names(np.array(rows, np.uint64))
    members = [
        {
            "cluster": told[cluster.root][0],
            "documents": cluster.documents,
            "removed": cluster.removed,
            "id": told[row][0],
            "url": told[row][1],
        }
        for cluster in decisions.largest
        for row in cluster.rows
    ]
    work.write_table("clusters.parquet", pa.Table.from_pylist(members, CLUSTERS))


def clusters_report(work: Workspace, threshold: float) -> Report:
    """The largest clusters, with addresses, for the run page."""
    largest: dict[str, dict[str, Any]] = {}
    for member in work.read_table("clusters.parquet").to_pylist():
        row = largest.setdefault(member["cluster"], member | {"urls": []})
        row["urls"].append(member["url"])
    rows = [
        {key: row[key] for key in ("documents", "removed")}
        | {"for example": "  ".join(row["urls"][:ADDRESSES])}
        for row in list(largest.values())[:LARGEST_SHOWN]
    ]
    title = f"Largest clusters of documents that resemble each other by {threshold:g} or more"
    none = {"documents": 0, "removed": 0, "for example": "none"}
    return Report("clusters", "table", rows or [none], title)
