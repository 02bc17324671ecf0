"""Which documents belong together, and which groups of them are held out: without the corpus in one
process.

    key_shard     a shard of documents  → hashes of what they are grouped by; address and size
    join_range    a range of hashes     → pairs of documents that have one in common
    (the driver)  those pairs only      → the first document of each group
    choose_shard  groups that begin in a shard → whether they are held out

The driver holds about 50 bytes for each document that belongs with another, nothing for the others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.buckets import (
    Parts,
    cut_by,
    ranges,
    read_part,
    read_range,
    write_parts,
    write_sorted,
)
from tasks.corpus.clusters import connected
from tasks.corpus.sharding import run_shards
from tasks.corpus.signatures import SHARD, place_of, shard_of
from tasks.runtime.stage import Workspace
from tasks.runtime.store import Directory

SHARDS_PER_RANGE = 64  # whose keys a task holds: 32 bytes a document
KEY = np.dtype([("key", "<u8"), ("row", "<u8")])
MEMBER = np.dtype([("row", "<u8"), ("root", "<u8")])
DECIDED = np.dtype([("row", "<u8"), ("root", "<u8"), ("held", "?")])


@dataclass(frozen=True)
class Rule:
    """How documents are grouped and groups chosen."""

    patterns: tuple[str, ...]  # with one group each
    seed: int
    fraction: float  # of the groups
    largest: float  # share of all text


@dataclass(frozen=True)
class Choice:
    """What came of it: documents, their groups and how many of those are held out."""

    documents: int
    groups: int
    held: int


@dataclass(frozen=True)
class Chosen:
    """For each document of a shard its group (first document) and whether it is held out."""

    groups: NDArray[np.uint64]
    held: NDArray[np.bool_]


def choose(rule: Rule, work: Workspace, where: Directory, names: list[str]) -> Choice:
    """Group all documents and choose the groups to hold out, one at least and not all of them.

    `chosen` then tells it shard by shard. With fewer than two groups nothing is chosen.
    """
    shards = len(names)
    items = [(rule, where, name) for name in names]
    sizes = run_shards(work, "keyed", key_shard, items, label="Groups")
    count = ranges(shards, SHARDS_PER_RANGE)
    run_shards(
        work, "joined", join_range, [(count, shards)] * count, label="Join groups", unit="ranges"
    )
    parts = [work.read_bytes(f"_joins-{number:05d}") for number in range(count)]
    pairs = np.frombuffer(b"".join(parts), "<u8").reshape(-1, 2)
    rows, dense = np.unique(pairs, return_inverse=True)
    members = np.zeros(len(rows), MEMBER)
    members["row"] = rows
    members["root"] = rows[connected(len(rows), dense.reshape(-1, 2))]
    write_parts(work, "_members", cut_by(members, shard_of(members["root"]), shards))
    write_parts(work, "_joined", cut_by(members, shard_of(members["row"]), shards))
    del pairs, dense, rows, members

    seen, total = (sum(size[key] for size in sizes) for key in ("documents", "bytes"))
    found = run_shards(
        work,
        "chosen",
        choose_shard,
        [(rule, total, size["documents"], shards) for size in sizes],
        label="Choose groups",
    )
    groups, held = (sum(one[key] for one in found) for key in ("groups", "held"))
    if groups < 2:
        return Choice(seen, groups, 0)
    swap: dict[str, int] = {}
    if held == 0:
        # A small corpus: one group, the one a larger fraction would have taken first.
        small = [one["small"] for one in found if one["small"]]
        swap["held"] = min(small or [one["any"] for one in found if one["any"]])[1]
        held = 1
    elif held == groups:
        swap["released"] = max(one["last"] for one in found if one["last"])[1]
        held -= 1
    work.write_json("_swap.json", swap)
    return Choice(seen, groups, held)


def key_shard(
    work: Workspace, number: int, rule: Rule, where: Directory, name: str
) -> dict[str, int]:
    """`_keys-NNNNN`, what documents are grouped by; `_weights-NNNNN`, size and address of each."""
    table = where.read_table(name, ["url", "cluster", "bytes"])
    patterns = [re.compile(pattern) for pattern in rule.patterns]
    keys: list[tuple[int, int]] = []
    weights: list[bytes] = []
    sizes = table["bytes"].to_pylist()
    columns = zip(table["url"].to_pylist(), table["cluster"].to_pylist(), sizes, strict=True)
    for place, (url, cluster, size) in enumerate(columns):
        row = (number << int(SHARD)) + place
        keys.append((_hash("cluster", cluster), row))
        for pattern in patterns:
            if match := pattern.search(url):
                keys.append((_hash(pattern.pattern, match.group(1) or ""), row))
        weights.append(f"{size}\n{stable_key(url)}".encode("utf-8", "surrogatepass"))
    write_sorted(work, f"_keys-{number:05d}", np.array(keys, KEY))
    write_parts(work, f"_weights-{number:05d}", weights)
    return {"documents": len(sizes), "bytes": sum(sizes)}


def _hash(kind: str, value: str) -> int:
    text = f"{kind}\0{value}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def join_range(work: Workspace, number: int, count: int, shards: int) -> int:
    """`_joins-NNNNN`: (first, other) documents that have a key of this range in common."""
    parts = [read_range(work, f"_keys-{shard:05d}", number, count, KEY) for shard in range(shards)]
    entries = np.concatenate([np.zeros(0, KEY), *parts])
    entries = entries[np.lexsort((entries["row"], entries["key"]))]
    first = np.ones(len(entries), bool)
    first[1:] = entries["key"][1:] != entries["key"][:-1]
    firsts = entries["row"][first][np.cumsum(first) - 1]
    pairs = np.column_stack([firsts, entries["row"]])[firsts != entries["row"]]
    work.write_bytes(f"_joins-{number:05d}", pairs.astype("<u8").tobytes())
    return len(pairs)


def choose_shard(
    work: Workspace, number: int, rule: Rule, total: int, documents: int, shards: int
) -> dict[str, Any]:
    """`_decided-NNNNN`, a part for each shard: its documents of groups that begin in this one.

    A group's draw is the hash of its smallest address, so it neither depends on how many documents
    there are nor on their order. Returns how many groups there are and are held out, and (draw,
    group) of the first that might be: among small ones, among any; and of the last that is.
    """
    members = np.frombuffer(read_part(work, "_members", number), MEMBER)
    joined = np.frombuffer(read_part(work, "_joined", number), MEMBER)
    first = number << int(SHARD)
    alone = np.setdiff1d(first + np.arange(documents, dtype=np.uint64), joined["row"])
    rows = np.concatenate([members["row"], alone])
    roots = np.concatenate([members["root"], alone])
    smallest: dict[int, str] = {}
    sizes: dict[int, int] = {}
    for row, root, size, key in _weights(work, rows, roots):
        del row
        smallest[root] = min(smallest.get(root, key), key)
        sizes[root] = sizes.get(root, 0) + size
    draws = {root: draw(rule.seed, key) for root, key in smallest.items()}
    small = {root for root, size in sizes.items() if size <= rule.largest * total}
    held = {root for root in small if draws[root] < rule.fraction}
    decided = np.zeros(len(rows), DECIDED)
    decided["row"], decided["root"] = rows, roots
    decided["held"] = [root in held for root in roots.tolist()]
    write_parts(work, f"_decided-{number:05d}", cut_by(decided, shard_of(rows), shards))
    ranked = [(value, root) for root, value in draws.items()]
    return {
        "groups": len(draws),
        "held": len(held),
        "small": min((one for one in ranked if one[1] in small), default=None),
        "any": min(ranked, default=None),
        "last": max((one for one in ranked if one[1] in held), default=None),
    }


def _weights(
    work: Workspace, rows: NDArray[np.uint64], roots: NDArray[np.uint64]
) -> Iterator[tuple[int, int, int, str]]:
    """(row, root, bytes, address) of documents, wherever they stand; one shard after another."""
    by = np.argsort(rows)
    rows, roots = rows[by], roots[by]
    shards = shard_of(rows)
    for shard in np.unique(shards).tolist():
        mine = shards == shard
        with Parts(work, f"_weights-{shard:05d}") as parts:
            found = parts.read(place_of(rows[mine]))
            for row, root, part in zip(
                rows[mine].tolist(), roots[mine].tolist(), found, strict=True
            ):
                size, _, key = part.decode("utf-8", "surrogatepass").partition("\n")
                yield row, root, int(size), key


def chosen(work: Workspace, number: int) -> Chosen:
    """What `choose` said of the documents of one shard, in their order."""
    joined = np.frombuffer(read_part(work, "_joined", number), MEMBER)
    sources = {number, *shard_of(joined["root"]).tolist()}
    parts = [read_part(work, f"_decided-{shard:05d}", number) for shard in sorted(sources)]
    decided = np.frombuffer(b"".join(parts), DECIDED)
    decided = decided[np.argsort(decided["row"])]
    swap = json.loads(work.read_bytes("_swap.json"))
    held = decided["held"].copy()
    if "held" in swap:
        held |= decided["root"] == np.uint64(swap["held"])
    if "released" in swap:
        held &= decided["root"] != np.uint64(swap["released"])
    return Chosen(decided["root"].copy(), held)


def stable_key(url: str) -> str:
    """The address without scheme and port: the same site on another port divides the same way."""
    parts = urlsplit(url)
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.hostname or ''}{parts.path}{query}"


def draw(seed: int, key: str) -> float:
    digest = hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64
