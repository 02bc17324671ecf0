"""Whether a document holds items of an evaluation, and where.

An item's n-grams (runs of 13 words, as GPT-3's authors took, arXiv:2005.14165, appendix C) are
looked for in documents. One of them alone proves nothing: wherever a single short span counted,
others measured 18% phantom contamination. A document holds an item
 - when what they share covers a stated share of the item's words, by several distinct n-grams or
   the whole item, or
 - when one unbroken span they share is long.
N-grams of many documents are quotations, licences, set phrases: they say nothing of an item.
Items shorter than an n-gram are not looked for at all, and told.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.suites import Index


@dataclass(frozen=True)
class Proof:
    """What makes a document contaminated."""

    n: int  # words of an n-gram
    share: float  # of the item's words
    distinct: int  # n-grams, unless the whole item is there
    span: int  # words of one span that are enough by themselves


@dataclass(frozen=True)
class Contamination:
    """An item that a document holds: which, how much of it, and the words of the document."""

    item: int
    words: int  # of the item's that the document has
    share: float
    spans: tuple[tuple[int, int], ...]  # [first, last) words of the document


def contaminations(
    places: NDArray[np.int64], grams: NDArray[np.int64], index: Index, proof: Proof
) -> list[Contamination]:
    """The items that a document holds, by item. `places` (H,) are the words where n-grams `grams`
    (H,) of the index begin in it, common ones left out.
    """
    counts = index.bounds[grams + 1] - index.bounds[grams]
    hit = np.repeat(np.arange(len(grams)), counts)
    begins = np.repeat(index.bounds[grams], counts)
    occurrence = begins + np.arange(len(hit)) - np.repeat(np.cumsum(counts) - counts, counts)
    items = index.item[occurrence].astype(np.int64)
    found = []
    for item in np.unique(items).tolist():
        mine = items == item
        theirs = np.unique(index.place[occurrence[mine]]).astype(np.int64)
        covered = _runs(theirs, proof.n)
        words = sum(last - first for first, last in covered)
        size = int(index.words[item])
        spans = _runs(np.unique(places[hit[mine]]), proof.n)
        longest = max(last - first for first, last in spans)
        whole = words == size
        several = len(theirs) >= proof.distinct or whole
        if (words >= proof.share * size and several) or longest >= proof.span:
            found.append(Contamination(item, words, words / size, spans))
    return found


def _runs(starts: NDArray[np.int64], n: int) -> tuple[tuple[int, int], ...]:
    """Sorted starts of runs of `n` words as ranges of words that do not touch."""
    breaks = np.flatnonzero(np.diff(starts) > n) + 1
    firsts = starts[np.concatenate([[0], breaks]).astype(np.int64)]
    lasts = starts[np.concatenate([breaks - 1, [len(starts) - 1]]).astype(np.int64)] + n
    return tuple(zip(firsts.tolist(), lasts.tolist(), strict=True))
