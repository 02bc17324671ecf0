"""Who is removed for whom, and who belongs together: two readings of the same verified pairs.

Both work on whole arrays in a few rounds; a document takes bytes there, not Python objects.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def keep_best(
    count: int, pairs: Rows, similarity: NDArray[np.float64], order: NDArray[np.uint64]
) -> tuple[Rows, Rows]:
    """Rows to remove, and for each the number of the pair that shows why: (R,), (R,).

    `pairs` (P, 2) have all reached the threshold, the better row first; `order` (P,) says how good
    that one is, smaller is better. As if rows were taken from the best on, a row is removed only
    for a pair with a row that was kept. Nothing is removed by transitivity: where b resembles a
    and c but a does not resemble c, and a is best, only b goes. Of several kept rows the most
    similar one is named, then the best.
    """
    better, worse = pairs[:, 0], pairs[:, 1]
    kept, gone = np.zeros(count, bool), np.zeros(count, bool)
    better_left, worse_left = better, worse
    while True:
        waiting = np.zeros(count, bool)
        waiting[worse_left] = True
        kept |= ~waiting & ~gone  # no better row is left that might be kept
        gone[worse_left[kept[better_left]]] = True
        left = ~kept[better_left] & ~gone[better_left] & ~gone[worse_left]
        if not left.any():
            break
        better_left, worse_left = better_left[left], worse_left[left]
    shown = np.flatnonzero(gone[worse] & ~gone[better])
    shown = shown[np.lexsort((order[shown], -similarity[shown], worse[shown]))]
    rows, first = np.unique(worse[shown], return_index=True)
    return rows, shown[first]


def connected(count: int, pairs: Rows) -> Rows:
    """For each row the smallest row it is connected with: (count,). `pairs` is (P, 2).

    Labels are hooked to smaller labels and paths then halved, until no pair has two labels.
    """
    labels = np.arange(count)
    a, b = pairs[:, 0], pairs[:, 1]
    while len(a):
        of_a, of_b = labels[a], labels[b]
        lower = np.minimum(of_a, of_b)
        np.minimum.at(labels, of_a, lower)
        np.minimum.at(labels, of_b, lower)
        while (labels != labels[labels]).any():
            labels = labels[labels]
        apart = labels[a] != labels[b]
        a, b = a[apart], b[apart]
    return labels
