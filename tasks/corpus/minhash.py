"""MinHash signatures and locality-sensitive hashing, vectorised.

Broder 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3. A pair of Jaccard
similarity J becomes a candidate with probability 1 − (1 − J^r)^b. With b = 32 bands of r = 4 rows
that is .95 at J = .55 and .9999 at J = .7; 14 bands of 8, the usual choice, reach .61 over
J = .5–.95. False candidates cost one exact comparison each, because every candidate is verified.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.shingles import Hashes, mix

_BLOCK = 1 << 14  # shingles at a time: they stay in the first cache


@dataclass(frozen=True)
class Bands:
    """How signatures are cut: `bands` keys of `rows` minima each."""

    bands: int = 32
    rows: int = 4

    def keys(self, shingles: Hashes) -> Hashes:
        """The band keys of one set: (bands,). Equal keys in the same band make candidates."""
        signature = minima(shingles, self.bands * self.rows).reshape(self.bands, self.rows)
        keys = np.arange(1, self.bands + 1, dtype=np.uint64)
        for row in range(self.rows):
            keys = mix(keys ^ signature[:, row].astype(np.uint64))
        return keys

    def probability(self, similarity: float) -> float:
        """That a pair of this Jaccard similarity becomes a candidate."""
        return 1 - (1 - similarity**self.rows) ** self.bands


@cache
def _permutations(count: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    seeds = mix(np.arange(1, 2 * count + 1, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95))
    halves: NDArray[np.uint32] = (seeds >> np.uint64(32)).astype(np.uint32)
    return np.bitwise_or(halves[:count], np.uint32(1)), halves[count:]


def minima(shingles: Hashes, count: int) -> NDArray[np.uint32]:
    """The smallest image of the set under `count` random permutations of 32 bits: (count,).

    x → a·x + b with a odd, modulo 2^32: the processor multiplies eight of those at once (64-bit
    products: one), and what two shingles in 2^32 have by chance in common, verification forgives.
    """
    factors, offsets = _permutations(count)
    lowest = np.full(count, np.iinfo(np.uint32).max, np.uint32)
    folded = (shingles >> np.uint64(32)).astype(np.uint32)
    for start in range(0, len(folded), _BLOCK):
        block = folded[start : start + _BLOCK]
        for number in range(count):
            lowest[number] = min(lowest[number], (block * factors[number] + offsets[number]).min())
    return lowest


def candidate_pairs(keys: Hashes, rank: NDArray[np.int64], widest: int = 64) -> NDArray[np.int64]:
    """Pairs of row numbers that share a key of one band: (P, 2), the better ranked first.

    `keys` is (N,); `rank` (N,) orders the rows, smaller is better. In a bucket of more than
    `widest` rows each row is paired with the `widest` best ones only, so that a bucket of n rows
    costs n · widest pairs and not n².
    """
    order = np.lexsort((rank, keys))
    sorted_keys = keys[order]
    first = np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]])
    sizes = np.diff(np.r_[first, len(order)])
    pairs = []
    for start, size in zip(first[sizes > 1], sizes[sizes > 1], strict=True):
        bucket = order[start : start + size]
        heads = bucket[: min(size - 1, widest)]
        for position, head in enumerate(heads):
            tail = bucket[position + 1 :]
            pairs.append(np.column_stack([np.full(len(tail), head), tail]))
    return np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int64)
