"""Rounds of deduplication between the signatures and the decisions, each cut so that no task sees
more than its part.

    match_partition   a range of digests and band keys of all shards → copies, candidate pairs
    verify_shard      candidates whose worse document stands in one shard → pairs that resemble

Of documents of equal rank the one whose address comes first is the better one. Addresses are looked
up only where that decides something, so they need no room in any key.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.arrays import distinct, is_among
from tasks.corpus.buckets import cut_by, read_all, read_part, write_parts
from tasks.corpus.clusters import connected
from tasks.corpus.minhash import Folded, candidate_pairs
from tasks.corpus.signatures import ENTRY, SHARD, Sources, place_of, shard_of
from tasks.runtime.stage import Workspace

SEVERAL = 4  # partners of a document, from which they are compared with it together
COPY = np.dtype([("row", "<u8"), ("kept", "<u8")])
PAIR = np.dtype([("better", "<u8"), ("worse", "<u8"), ("order", "<u4"), ("tied", "?")])
# `order` is that of the better one; `tied`: the other has the same.
RESEMBLING = np.dtype([*PAIR.descr, ("similarity", "<f8")])


def match_partition(work: Workspace, number: int, count: int, sources: Sources) -> dict[str, int]:
    """Range `number` of `count` ranges of keys: `_copies-NNNNN` and `_pairs-NNNNN`."""
    own = sources.current.shards
    copies = exact_copies(_entries(sources, "digests", number, count), sources)
    copies = copies[shard_of(copies["row"]) < own]  # an earlier corpus stays as it is
    write_parts(work, f"_copies-{number:05d}", cut_by(copies, shard_of(copies["row"]), own))
    pairs = near_candidates(_entries(sources, "keys", number, count), sources)
    pairs = pairs[shard_of(pairs["worse"]) < own]
    write_parts(work, f"_pairs-{number:05d}", cut_by(pairs, shard_of(pairs["worse"]), own))
    return {"copies": len(copies), "pairs": len(pairs)}


def _entries(sources: Sources, kind: str, number: int, count: int) -> NDArray[np.void]:
    """The entries of one range of all shards; those of earlier corpora rank before all others."""
    parts = [np.zeros(0, ENTRY)]
    for signed, start in sources.corpora():
        for shard in range(signed.shards):
            part = signed.entries(kind, shard, number, count)
            if signed is not sources.current:
                part = part.copy()
                part["order"] = 0
                part["row"] += np.uint64(start) << SHARD
            parts.append(part)
    return np.concatenate(parts)


def exact_copies(entries: NDArray[np.void], sources: Sources) -> NDArray[np.void]:
    """Documents whose normalised text another, better one has too, with that one: COPY."""
    entries = _best_first(_shared(entries), sources)
    first = _first_of(entries, "key", "digest")
    copies = np.zeros(int((~first).sum()), COPY)
    copies["row"] = entries["row"][~first]
    copies["kept"] = entries["row"][first][np.cumsum(first)[~first] - 1]
    return copies


def near_candidates(entries: NDArray[np.void], sources: Sources) -> NDArray[np.void]:
    """Pairs that share a band key, each once, the better first: PAIR. Exact copies count as one."""
    entries = _best_first(_shared(entries), sources)
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
    pairs["tied"] = entries["order"][found[place, 1]] == pairs["order"]
    return pairs


def _best_first(entries: NDArray[np.void], sources: Sources) -> NDArray[np.void]:
    """Sorted by key and digest, in each such group by rank, address and row."""
    entries = _sorted(entries, "key", "digest", "order", "row")
    same = ~_first_of(entries, "key", "digest", "order")
    tied = same.copy()
    tied[:-1] |= same[1:]
    names = sources.names(entries["row"][tied])
    by_address = sorted(names, key=lambda row: (names[row][1], row))
    rows = np.array(sorted(names), np.uint64)
    place = np.zeros(len(rows), np.int64)
    place[np.searchsorted(rows, np.array(by_address, np.uint64))] = np.arange(len(rows))
    keyed = np.zeros(len(entries), np.int64)
    keyed[tied] = place[np.searchsorted(rows, entries["row"][tied])]
    fields = (keyed, *(entries[field] for field in ("order", "digest", "key")))
    ordered: NDArray[np.void] = entries[np.lexsort(fields)]
    return ordered


def _shared(entries: NDArray[np.void]) -> NDArray[np.void]:
    """Only those whose key another entry has too."""
    keys = np.sort(entries["key"])
    return entries[is_among(entries["key"], distinct(keys[1:][keys[1:] == keys[:-1]]))]


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
    work: Workspace,
    number: int,
    partitions: int,
    sources: Sources,
    threshold: float,
    duplicate: float,
) -> int:
    """True Jaccard similarity of the candidates of one shard: `_resembling-NNNNN`.

    Written are the pairs that reach `duplicate`, and of those that only reach `threshold` as many
    as say who is connected with whom. Returns how many there were to look at. In memory: the sets
    wanted of this shard, and of one other shard at a time.
    """
    parts = [read_part(work, f"_pairs-{part:05d}", number) for part in range(partitions)]
    pairs = _distinct(np.frombuffer(b"".join(parts), PAIR), "better", "worse")
    similarity = np.zeros(len(pairs))
    if len(pairs):
        mine = Sets.read(sources, number, place_of(pairs["worse"]))
        shards = shard_of(pairs["better"])
        edges = np.flatnonzero(np.diff(shards, prepend=-1))
        for start, stop in zip(edges, [*edges[1:], len(pairs)], strict=True):
            block = pairs[start:stop]
            other = Sets.read(sources, int(shards[start]), place_of(block["better"]))
            better, worse = place_of(block["better"]), place_of(block["worse"])
            similarity[start:stop] = similarities(other, mine, better, worse, threshold)
    reached = similarity >= threshold
    resembling = np.zeros(int(reached.sum()), RESEMBLING)
    for field in PAIR.names or ():
        resembling[field] = pairs[field][reached]
    resembling["similarity"] = similarity[reached]
    _settle_ties(resembling, sources)
    resembling = spanning(resembling, duplicate)
    work.write_bytes(f"_resembling-{number:05d}", resembling.tobytes())
    return len(pairs)


def _settle_ties(pairs: NDArray[np.void], sources: Sources) -> None:
    """Turn pairs of equal rank so that the better one, by its address, comes first."""
    tied = np.flatnonzero(pairs["tied"])
    ends = [pairs[end][tied] for end in ("better", "worse")]
    names = sources.names(np.concatenate(ends))
    for place, better, worse in zip(tied.tolist(), *(rows.tolist() for rows in ends), strict=True):
        if (names[worse][1], worse) < (names[better][1], better):
            pairs["better"][place], pairs["worse"][place] = worse, better


def spanning(pairs: NDArray[np.void], duplicate: float) -> NDArray[np.void]:
    """The pairs from `duplicate` on, and so few of the others that everything connected stays so.

    Each of those leads from a document to the first one that all pairs together connect it with.
    """
    rows, dense = np.unique(np.concatenate([pairs["better"], pairs["worse"]]), return_inverse=True)
    ends = dense.reshape(2, -1).T
    alike = pairs["similarity"] >= duplicate
    near, all_of_them = connected(len(rows), ends[alike]), connected(len(rows), ends)
    heads = np.unique(near)
    heads = heads[all_of_them[heads] != heads]
    links = np.zeros(len(heads), RESEMBLING)
    links["better"], links["worse"] = rows[all_of_them[heads]], rows[heads]
    return np.concatenate([pairs[alike], links])


class Sets:
    """The sets of some documents of one shard, sorted, by their places."""

    def __init__(self, sets: dict[int, Folded]) -> None:
        self._sets = sets

    @classmethod
    def read(cls, sources: Sources, shard: int, places: NDArray[np.int64]) -> Sets:
        wanted = distinct(places)
        with sources.open("sets", shard) as parts:
            found = (np.frombuffer(part, np.uint32) for part in parts.read(wanted))
            sets = [distinct(shingles) for shingles in found]
        return cls(dict(zip(wanted.tolist(), sets, strict=True)))

    def __getitem__(self, place: int) -> Folded:
        return self._sets[place]

    @cached_property
    def numbered(self) -> tuple[Folded, dict[int, NDArray[np.intp]]]:
        """All members of the sets, sorted, and a zero; by place the numbers of each set's there."""
        members = distinct(np.concatenate([np.zeros(0, np.uint32), *self._sets.values()]))
        numbers = {
            place: np.asarray(np.searchsorted(members, of), np.intp)
            for place, of in self._sets.items()
        }
        return np.append(members, np.uint32(0)), numbers


def similarities(
    other: Sets,
    mine: Sets,
    better: NDArray[np.int64],
    worse: NDArray[np.int64],
    threshold: float,
) -> NDArray[np.float64]:
    """`jaccard_above` of pairs (better, worse) sorted by the better one: (P,).

    Where pages are made of one template nearly all pairs are candidates. So a document with several
    partners marks its members once, and those of all partners are looked up in one go.
    """
    found = np.zeros(len(better))
    edges = np.flatnonzero(np.diff(better, prepend=-1))
    for start, stop in zip(edges.tolist(), [*edges[1:].tolist(), len(better)], strict=True):
        members, partners = other[int(better[start])], worse[start:stop].tolist()
        if len(partners) < SEVERAL:
            pairs = ((members, mine[partner]) for partner in partners)
            found[start:stop] = [jaccard_above(a, b, threshold) for a, b in pairs]
            continue
        known, numbers = mine.numbered
        marks = np.zeros(len(known), np.uint8)
        places = np.searchsorted(known[:-1], members)
        marks[places[known.take(places) == members]] = 1
        theirs = [numbers[partner] for partner in partners]
        sizes = np.array([*map(len, theirs)])
        begins = np.cumsum(sizes) - sizes
        looked_up = marks.take(np.concatenate([*theirs, [len(known) - 1]]))  # the last is no mark
        shared = np.where(sizes, np.add.reduceat(looked_up, begins, dtype=np.int64), 0)
        smaller, larger = np.minimum(sizes, len(members)), np.maximum(sizes, len(members))
        whole = smaller + larger - shared
        likeness = np.where(whole, shared / np.maximum(whole, 1), 1.0)
        found[start:stop] = np.where(smaller < threshold * larger, 0.0, likeness)
    return found


def jaccard_above(a: Folded, b: Folded, threshold: float) -> float:
    """|a ∩ b| / |a ∪ b| of two sorted sets, or 0 where their sizes alone put it below."""
    smaller, larger = sorted((len(a), len(b)))
    if smaller < threshold * larger:
        return 0.0
    both = np.concatenate([a, b])
    both.sort()
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared) if len(both) else 1.0


def copies_for(work: Workspace, partitions: int, shard: int) -> NDArray[np.void]:
    """The exact copies that stand in one shard."""
    parts = [read_part(work, f"_copies-{number:05d}", shard) for number in range(partitions)]
    return np.frombuffer(b"".join(parts), COPY)


def copies_in(work: Workspace, partition: int) -> NDArray[np.void]:
    """The exact copies found in one range of digests; all copies of a document are in the same."""
    return np.frombuffer(read_all(work, f"_copies-{partition:05d}"), COPY)
