"""How much of a text its repeated phrases take, for many texts at once.

Gopher (Rae et al. 2021, arXiv:2112.11446, table A1) bounds the share of the characters of the most
frequent 2- to 4-gram, and of those in any duplicate 5- to 10-gram. Texts of a few kilobytes cost
more in calls than in work, so the words of several are hashed and sorted together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.shingles import Hashes, Words

Places = NDArray[np.int64]
TOP = {2: 0.20, 3: 0.18, 4: 0.16}  # words of a phrase: the bound on its share
DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


@dataclass(frozen=True)
class Phrases:
    """Shares of a text relative to their bounds, the largest of all lengths; above 1 is over."""

    top: float  # of the commonest phrase of 2 to 4 words
    duplicate: float  # of phrases of 5 to 10 words that stand there more than once


def phrases(texts: Sequence[str]) -> list[Phrases]:
    """Of normalised texts (`shingles.normalise`), each by itself."""
    counts = np.array([text.count(" ") + 1 if text else 0 for text in texts], np.int64)
    words = Words.of(" ".join(filter(None, texts)))
    owner = np.repeat(np.arange(len(texts)), counts)
    above = np.concatenate([[0], np.cumsum(words.ends - words.starts)])
    last = np.cumsum(counts)
    letters = np.maximum(above[last] - above[last - counts], 1)  # bytes without blanks
    whole = letters + np.maximum(counts - 1, 0)
    top, duplicate = np.zeros(len(texts)), np.zeros(len(texts))
    places: Places = np.arange(len(owner))
    for size, bound in TOP.items():
        grams, places = _recurring(words, owner, size, places)
        if len(grams):
            found, length = _commonest(words, owner, size, grams, places)
            top[found] = np.maximum(top[found], length / whole[found] / bound)
    for size, bound in DUPLICATE.items():
        grams, places = _recurring(words, owner, size, places)
        if len(grams) == 0:
            break
        taken = _taken(above, owner, size, grams, places, len(texts))
        np.maximum(duplicate, taken / letters / bound, out=duplicate)
    return [Phrases(*shares) for shares in zip(top.tolist(), duplicate.tolist(), strict=True)]


def _recurring(words: Words, owner: Places, size: int, among: Places) -> tuple[Hashes, Places]:
    """The grams of `size` words that stand more than once in their text, with their places.

    They are in order of text, gram and place; grams of different texts differ. Only `among` is
    looked at: where a gram recurs, each shorter one at its place does. In ordinary text few places
    are left after the first size, and hashing and sorting those costs nothing.
    """
    among = among[among <= len(owner) - size]
    text = owner.take(among)
    inside = text == owner.take(among + (size - 1))
    places, text = among[inside], text[inside]
    grams = words.spans(words.starts.take(places), words.ends.take(places + (size - 1)))
    if len(grams) == 0:
        return grams, places
    # The text in the high bits: one sort keeps texts apart and brings equal grams together.
    bits = int(text[-1]).bit_length()
    if bits:
        grams = grams >> np.uint64(bits) | text.astype(np.uint64) << np.uint64(64 - bits)
    order = np.argsort(grams)  # much faster than a stable one, which only the few left need
    ordered = grams.take(order)
    same = ordered[1:] == ordered[:-1]
    again = np.zeros(len(grams), np.bool_)
    again[order[1:][same]] = True
    again[order[:-1][same]] = True
    grams, places = grams[again], places[again]
    order = np.argsort(grams, kind="stable")
    return grams.take(order), places.take(order)


def _is_first(grams: Hashes) -> NDArray[np.bool_]:
    """Which are the first of their kind, of grams in order."""
    return np.concatenate([[True], grams[1:] != grams[:-1]])[: len(grams)]


def _commonest(
    words: Words, owner: Places, size: int, grams: Hashes, places: Places
) -> tuple[Places, NDArray[np.int64]]:
    """Texts with a gram that recurs, and the bytes that the commonest one of each takes."""
    first = np.flatnonzero(_is_first(grams))
    number = np.diff(first, append=len(grams))
    start = places[first]
    text = owner[start]
    begins = np.flatnonzero(np.concatenate([[True], text[1:] != text[:-1]]))
    most = np.repeat(np.maximum.reduceat(number, begins), np.diff(begins, append=len(text)))
    best = np.flatnonzero(number == most)
    best = best[np.concatenate([[True], text[best[1:]] != text[best[:-1]]])]
    length = words.ends[start[best] + size - 1] - words.starts[start[best]]
    return text[best], length * number[best]


def _taken(
    above: NDArray[np.int64], owner: Places, size: int, grams: Hashes, places: Places, texts: int
) -> NDArray[np.float64]:
    """Letters of each text in grams that stood there before, each counted once: (D,).

    `above` has the letters before each word and, last, all of them: (W + 1,).
    """
    again = np.sort(places[~_is_first(grams)])
    begins, ends = again.copy(), again + size
    np.maximum(begins[1:], ends[:-1], out=begins[1:])  # of one that overlaps, what is new in it
    new = above.take(ends) - above.take(begins)
    return np.asarray(np.bincount(owner.take(again), new, texts), np.float64)
