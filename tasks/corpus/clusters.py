"""Who is removed for whom, and who belongs together: two readings of the same verified pairs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def keep_best(
    count: int, rank: NDArray[np.int64], pairs: NDArray[np.int64], similarity: NDArray[np.float64]
) -> dict[int, tuple[int, float]]:
    """Rows to remove: row → (the kept row it duplicates, their similarity).

    Rows are taken from the best rank on; one is removed only for a verified pair with a row that
    was kept. Nothing is removed by transitivity: where b resembles a and c but a does not resemble
    c, and a is best, only b goes. `pairs` (P, 2) have all reached the threshold.
    """
    neighbours: dict[int, list[tuple[int, float]]] = {}
    for (a, b), score in zip(pairs.tolist(), similarity.tolist(), strict=True):
        neighbours.setdefault(a, []).append((b, score))
        neighbours.setdefault(b, []).append((a, score))
    removed: dict[int, tuple[int, float]] = {}
    for row in sorted(neighbours, key=lambda row: int(rank[row])):
        kept = [
            (score, -int(rank[other]), other)
            for other, score in neighbours[row]
            if rank[other] < rank[row] and other not in removed
        ]
        if kept:
            score, _, other = max(kept)
            removed[row] = (other, score)
    return removed


class DisjointSets:
    """Union by smallest member, with path halving: the root of a set is its smallest element."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, item: int) -> int:
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parent[max(a, b)] = min(a, b)

    def roots(self) -> list[int]:
        return [self.find(item) for item in range(len(self._parent))]


def connected(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each row the smallest row it is connected with."""
    sets = DisjointSets(count)
    for a, b in pairs:
        sets.join(a, b)
    return sets.roots()
