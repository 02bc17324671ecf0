"""Rounds of deduplication between the signatures and the decisions, each cut so that no task sees
more than its part.

    match_partition   a range of digests and band keys of all shards → copies, candidate pairs
    verify_shard      candidates whose worse document stands in one shard → pairs that resemble
    name_shard        ids and addresses of documents of one shard that others have to name
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.buckets import cut_by, read_part, read_range, write_parts
from tasks.corpus.minhash import Folded, candidate_pairs
from tasks.corpus.signatures import ENTRY, SHARD, Sources
from tasks.runtime.stage import Workspace
from tasks.runtime.store import Directory

COPY = np.dtype([("row", "<u8"), ("kept", "<u8")])
PAIR = np.dtype([("better", "<u8"), ("worse", "<u8"), ("order", "<u8")])  # order of the better one
RESEMBLING = np.dtype([*PAIR.descr, ("similarity", "<f8")])
WANTED = np.dtype([("row", "<u8"), ("reader", "<u8")])

Names = dict[int, tuple[str, str]]  # row → id, address


def match_partition(work: Workspace, number: int, count: int, sources: Sources) -> dict[str, int]:
    """Range `number` of `count` ranges of keys: `_copies-`, `_pairs-` and `_wanted-NNNNN`."""
    own = sources.current.shards
    copies = exact_copies(_entries(sources, "digests", number, count))
    copies = copies[shard_of(copies["row"]) < own]  # an earlier corpus stays as it is
    write_parts(work, f"_copies-{number:05d}", cut_by(copies, shard_of(copies["row"]), own))
    wanted = np.zeros(len(copies), WANTED)
    wanted["row"], wanted["reader"] = copies["kept"], shard_of(copies["row"])
    parts = cut_by(wanted, shard_of(copies["kept"]), sources.shards)
    write_parts(work, f"_wanted-{number:05d}", parts)
    pairs = near_candidates(_entries(sources, "keys", number, count))
    pairs = pairs[shard_of(pairs["worse"]) < own]
    write_parts(work, f"_pairs-{number:05d}", cut_by(pairs, shard_of(pairs["worse"]), own))
    return {"copies": len(copies), "pairs": len(pairs)}


def _entries(sources: Sources, kind: str, number: int, count: int) -> NDArray[np.void]:
    """The entries of one range of all shards; those of earlier corpora rank before all others."""
    parts = [np.zeros(0, ENTRY)]
    for signed, start in sources.corpora():
        for shard in range(signed.shards):
            part = read_range(signed.where, signed.name(kind, shard), number, count, ENTRY)
            if signed is not sources.current:
                part = part.copy()
                part["order"] = 0
                part["row"] += np.uint64(start) << SHARD
            parts.append(part)
    return np.concatenate(parts)


def exact_copies(entries: NDArray[np.void]) -> NDArray[np.void]:
    """Documents whose normalised text another, better one has too, with that one: COPY."""
    entries = _shared(entries)
    entries = _sorted(entries, "key", "digest", "order", "row")
    first = _first_of(entries, "key", "digest")
    group = np.cumsum(first) - 1
    copies = np.zeros(int((~first).sum()), COPY)
    copies["row"] = entries["row"][~first]
    copies["kept"] = entries["row"][first][group[~first]]
    return copies


def near_candidates(entries: NDArray[np.void]) -> NDArray[np.void]:
    """Pairs that share a band key, each once, the better first: PAIR. Exact copies count as one."""
    entries = _shared(entries)
    entries = _sorted(entries, "key", "digest", "order", "row")
    entries = _shared(entries[_first_of(entries, "key", "digest")])
    entries = entries[np.argsort(entries["row"], kind="stable")]  # rows break ties of ranks
    found = candidate_pairs(entries["key"], entries["order"])
    rows, dense = np.unique(entries["row"], return_inverse=True)
    codes, place = np.unique(
        dense[found[:, 0]] * max(len(rows), 1) + dense[found[:, 1]], return_index=True
    )
    pairs = np.zeros(len(codes), PAIR)
    pairs["better"] = entries["row"][found[place, 0]]
    pairs["worse"] = entries["row"][found[place, 1]]
    pairs["order"] = entries["order"][found[place, 0]]
    return pairs


def _shared(entries: NDArray[np.void]) -> NDArray[np.void]:
    """Only those whose key another entry has too."""
    keys = np.sort(entries["key"])
    several = np.unique(keys[1:][keys[1:] == keys[:-1]])
    return entries[np.isin(entries["key"], several)]


def _sorted(rows: NDArray[np.void], *fields: str) -> NDArray[np.void]:
    ordered: NDArray[np.void] = rows[np.lexsort([rows[field] for field in reversed(fields)])]
    return ordered


def _distinct(rows: NDArray[np.void], *fields: str) -> NDArray[np.void]:
    """One row for each combination of these fields, in their order."""
    rows = _sorted(rows, *fields)
    return rows[_first_of(rows, *fields)]


def _first_of(entries: NDArray[np.void], *fields: str) -> NDArray[np.bool_]:
    """Where sorted entries differ from the one before in one of these fields."""
    first = np.ones(len(entries), bool)
    same = [entries[field][1:] == entries[field][:-1] for field in fields]
    first[1:] = ~np.logical_and.reduce(same)
    return first


def verify_shard(
    work: Workspace, number: int, partitions: int, sources: Sources, threshold: float
) -> int:
    """True Jaccard similarity of the candidates of one shard: `_resembling-NNNNN`.

    Only pairs that reach the threshold are written; returns how many there were to look at. In
    memory: the sets wanted of this shard, and of one other shard at a time.
    """
    parts = [
        read_part(work, f"_pairs-{part:05d}", number, sources.current.shards)
        for part in range(partitions)
    ]
    pairs = _distinct(np.frombuffer(b"".join(parts), PAIR), "better", "worse")
    similarity = np.zeros(len(pairs))
    if len(pairs):
        mine = _Sets(sources, number, place_of(pairs["worse"]))
        shards = shard_of(pairs["better"])
        edges = np.flatnonzero(np.diff(shards, prepend=-1))
        for start, stop in zip(edges, [*edges[1:], len(pairs)], strict=True):
            block = pairs[start:stop]
            other = _Sets(sources, int(shards[start]), place_of(block["better"]))
            similarity[start:stop] = [
                jaccard_above(other[a], mine[b], threshold)
                for a, b in zip(
                    place_of(block["better"]).tolist(),
                    place_of(block["worse"]).tolist(),
                    strict=True,
                )
            ]
    reached = similarity >= threshold
    resembling = np.zeros(int(reached.sum()), RESEMBLING)
    for field in PAIR.names or ():
        resembling[field] = pairs[field][reached]
    resembling["similarity"] = similarity[reached]
    work.write_bytes(f"_resembling-{number:05d}", resembling.tobytes())
    return len(pairs)


class _Sets:
    """The sets of some documents of one shard, by their places."""

    def __init__(self, sources: Sources, shard: int, places: NDArray[np.int64]) -> None:
        wanted = np.unique(places)
        reader = sources.sets(shard)
        self._sets = dict(zip(wanted.tolist(), reader.read(wanted), strict=True))
        reader.close()

    def __getitem__(self, place: int) -> Folded:
        return self._sets[place]


def jaccard_above(a: Folded, b: Folded, threshold: float) -> float:
    """|a ∩ b| / |a ∪ b| of two sorted sets, or 0 where their sizes alone put it below."""
    smaller, larger = sorted((len(a), len(b)))
    if smaller < threshold * larger:
        return 0.0
    both = np.concatenate([a, b])
    both.sort()
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared) if len(both) else 1.0


def name_shard(
    work: Workspace,
    number: int,
    partitions: int,
    shards: int,
    readers: int,
    documents: Directory,
    name: str,
) -> int:
    """Ids and addresses of documents of one shard, a part for each reader: `_names-NNNNN`."""
    parts = [read_part(work, f"_wanted-{part:05d}", number, shards) for part in range(partitions)]
    parts.append(read_part(work, "_wanted", number, shards))
    wanted = _distinct(np.frombuffer(b"".join(parts), WANTED), "reader", "row")
    told: list[Names] = [{} for _ in range(readers)]
    if len(wanted):
        table = documents.read_table(name, ["id", "url"]).take(place_of(wanted["row"]))
        ids, urls = table["id"].to_pylist(), table["url"].to_pylist()
        for row, reader, one, url in zip(
            wanted["row"].tolist(), wanted["reader"].tolist(), ids, urls, strict=True
        ):
            told[reader][row] = (one, url)
    whole = [json.dumps(list(names.items())).encode() if names else b"" for names in told]
    write_parts(work, f"_names-{number:05d}", whole)
    return len(wanted)


def read_names(work: Workspace, rows: NDArray[np.uint64], reader: int, readers: int) -> Names:
    """What `name_shard` wrote for a reader of these rows."""
    names: Names = {}
    for shard in np.unique(shard_of(rows)).tolist():
        told = read_part(work, f"_names-{shard:05d}", reader, readers)
        names.update({row: (one, url) for row, (one, url) in json.loads(told or b"[]")})
    return names


def read_rows(
    work: Workspace, kind: str, files: int, part: int, parts: int, dtype: np.dtype[np.void]
) -> NDArray[np.void]:
    """One part of every numbered file of a kind."""
    found = [read_part(work, f"_{kind}-{number:05d}", part, parts) for number in range(files)]
    return np.frombuffer(b"".join(found), dtype)


def copies_of(work: Workspace, partitions: int, shards: int) -> Iterator[NDArray[np.void]]:
    """All exact copies, one partition after another."""
    for number in range(partitions):
        parts = [read_part(work, f"_copies-{number:05d}", shard, shards) for shard in range(shards)]
        yield np.frombuffer(b"".join(parts), COPY)


def shard_of(rows: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (rows >> SHARD).astype(np.int64)


def place_of(rows: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (rows & np.uint64(0xFFFFFFFF)).astype(np.int64)
