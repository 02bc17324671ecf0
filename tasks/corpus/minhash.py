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

from tasks.corpus.arrays import distinct
from tasks.corpus.shingles import Hashes, mix

_BLOCK = 1 << 15  # shingles at a time: they stay in the second cache
_PAIRS_AT_ONCE = 1 << 22

Folded = NDArray[np.uint32]


@dataclass(frozen=True)
class Bands:
    """How signatures are cut: `bands` keys of `rows` minima each."""

    bands: int = 32
    rows: int = 4

    def keys(self, shingles: Folded, bounds: NDArray[np.int64]) -> Hashes:
        """The band keys of D sets: (D, bands). Equal keys in the same band make candidates.

        The shingles of set d, 32 bits each, stand from `bounds[d]` to `bounds[d + 1]`; repeated
        ones do no harm.
        """
        signature = minima(shingles, bounds, self.bands * self.rows)
        signature = signature.reshape(-1, self.bands, self.rows)
        seeds = np.arange(1, self.bands + 1, dtype=np.uint64)
        keys = np.broadcast_to(seeds, (len(signature), self.bands))
        for row in range(self.rows):
            keys = mix(keys ^ signature[:, :, row].astype(np.uint64))
        return keys

    def probability(self, similarity: float) -> float:
        """That a pair of this Jaccard similarity becomes a candidate."""
        return 1 - (1 - similarity**self.rows) ** self.bands


@cache
def _permutations(count: int) -> tuple[Folded, Folded]:
    seeds = mix(np.arange(1, 2 * count + 1, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95))
    halves: Folded = (seeds >> np.uint64(32)).astype(np.uint32)
    return np.bitwise_or(halves[:count], np.uint32(1)), halves[count:]


def minima(shingles: Folded, bounds: NDArray[np.int64], count: int) -> Folded:
    """The smallest image of each of D sets under `count` permutations of 32 bits: (D, count).

    x → a·x + b with a odd, modulo 2^32: the processor multiplies sixteen of those at once (64-bit
    products: far fewer), and what two shingles in 2^32 have by chance in common, verification
    sees. The image of an empty set is the largest number.
    """
    factors, offsets = _permutations(count)
    lowest = np.full((len(bounds) - 1, count), np.iinfo(np.uint32).max, np.uint32)
    filled = np.flatnonzero(np.diff(bounds))
    starts, stops = bounds[:-1][filled], bounds[1:][filled]
    first = 0
    while first < len(filled):
        last = max(int(np.searchsorted(stops, starts[first] + _BLOCK, side="right")), first + 1)
        sets, segments = filled[first:last], starts[first:last] - starts[first]
        block = shingles[starts[first] : stops[last - 1]]
        image = np.empty_like(block)
        for number in range(count):
            np.multiply(block, factors[number], out=image)
            np.add(image, offsets[number], out=image)
            lowest[sets, number] = np.minimum.reduceat(image, segments)
        first = last
    return lowest


def candidate_pairs(keys: Hashes, order: Hashes, widest: int = 64) -> NDArray[np.int64]:
    """Pairs of row numbers that share a key: (P, 2), the better one first.

    `keys` and `order` are (N,); smaller `order` is better, among equals the smaller row number. In
    a bucket of more than `widest` rows each row is paired with the `widest` best ones only, so
    that a bucket of n rows costs n · widest pairs and not n².
    """
    rows = np.arange(len(keys))
    by = np.lexsort((rows, order, keys))
    ordered = keys[by]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(by)])
    begin = np.repeat(first, np.diff(np.append(first, len(by))))
    counts = np.minimum(rows - begin, widest)  # better rows each row is paired with
    ends = np.cumsum(counts)
    found, start = [np.zeros(0, np.int64)], 0
    while start < len(by):
        before = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, before + _PAIRS_AT_ONCE, side="right")), start + 1)
        several = counts[start:stop]
        tails = np.repeat(rows[start:stop], several)
        place = np.arange(len(tails)) - np.repeat(ends[start:stop] - several - before, several)
        found.append(distinct(by[begin[tails] + place] * len(by) + by[tails]))
        start = stop
    pairs = np.concatenate(found)
    return np.column_stack(np.divmod(pairs, max(len(by), 1)))
