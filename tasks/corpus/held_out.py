"""Marks of held-out text in ranges, none of which any process holds all of.

    mark_shard    a shard of documents  → marks of those that are held out
    join_range    a range of marks      → the different ones of all shards
    share_shard   a shard of documents  → which of them its documents have, and so their groups
    own_range     a range of marks      → without those that many groups have: boilerplate

A task that asks about its own text goes through the ranges one after another (`among`): it holds
the marks of its shard, 50 bytes a word, and of held-out text one range, `MARKS` of them at 8 bytes.
Every shard reads all ranges twice. The driver holds counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.arrays import distinct, is_among, read_array, write_array
from tasks.corpus.buckets import edge_of, keys_within, ranges, read_range, write_sorted
from tasks.corpus.groups import chosen
from tasks.corpus.leakage import LineMarks, line_marks, own_marks
from tasks.corpus.sharding import run_shards
from tasks.corpus.shingles import Hashes
from tasks.runtime.stage import Workspace
from tasks.runtime.store import Directory

KINDS = ("windows", "names")
MARKS = 1 << 22  # in a range, more or less: 32 MB of held-out marks, 64 MB of marks with groups
KEY = np.dtype([("key", "<u8")])
MARK = np.dtype([("key", "<u8"), ("group", "<u8")])


@dataclass(frozen=True)
class OwnMarks:
    """Marks of held-out text alone, written by ranges; by kind how many ranges there are, and how
    many marks were left out because many groups have them.
    """

    ranges: dict[str, int]
    common: dict[str, int]


def find_own_marks(work: Workspace, where: Directory, names: list[str], least: int) -> OwnMarks:
    """Write the marks of the documents that `groups.choose` held out, without those that at least
    so many groups have.
    """
    items = [(where, name) for name in names]
    marked = run_shards(work, "marked", mark_shard, items, label="Held-out marks")
    coarse = {kind: ranges(sum(one[kind] for one in marked), MARKS) for kind in KINDS}
    parts = [
        (kind, part, count, len(names)) for kind, count in coarse.items() for part in range(count)
    ]
    run_shards(work, "gathered", join_range, parts, label="Join marks", unit="ranges")
    askers = [(where, name, coarse, least) for name in names]
    shared = run_shards(work, "shared", share_shard, askers, label="Shared passages")
    fine = {
        kind: count * ranges(sum(one[kind] for one in shared), count * MARKS)
        for kind, count in coarse.items()
    }
    finer = [
        (kind, part, count, coarse[kind], len(names), least)
        for kind, count in fine.items()
        for part in range(count)
    ]
    common = run_shards(work, "common", own_range, finer, label="Common passages", unit="ranges")
    counted = dict.fromkeys(KINDS, 0)
    for (kind, *_), several in zip(finer, common, strict=True):
        counted[kind] += several
    return OwnMarks(fine, counted)


def mark_shard(work: Workspace, number: int, where: Directory, name: str) -> dict[str, int]:
    """`_held-KIND-NNNNN`: marks of the held-out documents of one shard."""
    held = chosen(work, number).held
    texts = where.read_table(name, ["text"])["text"].to_pylist()
    marks = [own_marks(text) for text, is_held in zip(texts, held, strict=True) if is_held]
    found = {kind: distinct(_joined(getattr(one, kind) for one in marks)) for kind in KINDS}
    for kind, values in found.items():
        write_sorted(work, f"_held-{kind}-{number:05d}", values.view(KEY))
    return {kind: len(values) for kind, values in found.items()}


def join_range(work: Workspace, number: int, kind: str, part: int, count: int, shards: int) -> int:
    """`_marks-KIND-NNNNN.npy`: the different marks of one range."""
    del number
    found = (
        read_range(work, f"_held-{kind}-{shard:05d}", part, count, KEY)["key"]
        for shard in range(shards)
    )
    marks = distinct(_joined(found))
    write_array(work, f"_marks-{kind}-{part:05d}.npy", marks)
    return len(marks)


def share_shard(
    work: Workspace, number: int, where: Directory, name: str, count: dict[str, int], least: int
) -> dict[str, int]:
    """(mark, group) for the held-out marks that documents of one shard have, of each mark no more
    groups than it needs to be common: `_shared-KIND-NNNNN`; and which documents have any:
    `_touched-NNNNN.npy`.
    """
    groups = chosen(work, number).groups
    texts = where.read_table(name, ["text"])["text"].to_pylist()
    marks: dict[str, list[Hashes]] = {kind: [] for kind in KINDS}
    for text in texts:
        one = line_marks(text)
        for kind, found in marks.items():
            found.append(getattr(one, kind))
    touched = np.zeros(len(texts), bool)
    sizes = {}
    for kind, found in marks.items():
        values = _joined(found)
        owner = np.repeat(np.arange(len(texts)), [len(own) for own in found])
        hit = among(work, f"_marks-{kind}", count[kind], values)
        touched[owner[hit]] = True
        entries = np.zeros(int(hit.sum()), MARK)
        entries["key"], entries["group"] = values[hit], groups[owner[hit]]
        entries, place = _distinct(entries)
        entries = entries[place < least]
        write_sorted(work, f"_shared-{kind}-{number:05d}", entries)
        sizes[kind] = len(entries)
    write_array(work, f"_touched-{number:05d}.npy", touched)
    return sizes


def own_range(
    work: Workspace,
    number: int,
    kind: str,
    part: int,
    count: int,
    coarse: int,
    shards: int,
    least: int,
) -> int:
    """`_own-KIND-NNNNN.npy`: marks of one range that fewer groups than `least` have. Each of the
    `coarse` ranges of `join_range` is divided into `count / coarse`. Returns how many were common.
    """
    del number
    parts = [
        read_range(work, f"_shared-{kind}-{shard:05d}", part, count, MARK)
        for shard in range(shards)
    ]
    entries, place = _distinct(np.concatenate([np.zeros(0, MARK), *parts]))
    common = entries["key"][place == least - 1]
    held = read_array(work, f"_marks-{kind}-{part * coarse // count:05d}.npy")
    held = held[keys_within(held, edge_of(part, count), edge_of(part + 1, count))]
    write_array(work, f"_own-{kind}-{part:05d}.npy", held[~is_among(held, common)])
    return len(common)


def leaks(
    work: Workspace, own: dict[str, int], marks: Sequence[LineMarks]
) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """For each text, which of its windows and which of its names are held-out text's own."""
    found = []
    for kind in KINDS:
        values = [getattr(one, kind) for one in marks]
        hit = among(work, f"_own-{kind}", own[kind], _joined(values))
        edges = np.cumsum([len(one) for one in values])
        found.append(np.split(hit, edges[:-1]) if values else [])
    return list(zip(*found, strict=True))


def among(work: Workspace, name: str, count: int, values: Hashes) -> NDArray[np.bool_]:
    """Which of `values` are in the set that `count` files hold by ranges: (len(values),)."""
    order = np.argsort(values)
    ordered = values[order]
    found = np.zeros(len(values), bool)
    for part in range(count):
        own = keys_within(ordered, edge_of(part, count), edge_of(part + 1, count))
        if own.start < own.stop:
            marks = read_array(work, f"{name}-{part:05d}.npy")
            found[order[own]] = is_among(ordered[own], marks)
    return found


def _joined(parts: Iterable[Hashes]) -> Hashes:
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def _distinct(entries: NDArray[np.void]) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """The different entries, sorted, and the place of each among those of its mark, from 0."""
    entries = entries[np.lexsort((entries["group"], entries["key"]))]
    key, group = entries["key"], entries["group"]
    new = np.ones(len(entries), bool)
    new[1:] = (key[1:] != key[:-1]) | (group[1:] != group[:-1])
    entries = entries[new]
    key = entries["key"]
    first = np.ones(len(entries), bool)
    first[1:] = key[1:] != key[:-1]
    starts = np.flatnonzero(first)
    return entries, np.arange(len(entries)) - starts[np.cumsum(first) - 1]
