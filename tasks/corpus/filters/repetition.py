"""The same line, paragraph or phrase over and over.

Gopher (Rae et al. 2021, appendix A.1.1, table A1): shares of duplicate lines and paragraphs, of the
characters in them, of the characters of the most frequent 2- to 4-gram, and of those in any
duplicate 5- to 10-gram (each character counted once). Lines of code and headings repeat by nature
(`return False`) and are left out. Of technical pages only lines of 40 characters and more count, at
a third of their share: families of functions describe the same arguments (measured in the standard
library's documentation: json .34, pickle .38, unicodedata .44 of the characters).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.arrays import is_among
from tasks.corpus.filters.rule import Rule
from tasks.corpus.reading import Reading
from tasks.corpus.shingles import Hashes, Words

Places = NDArray[np.int64]
LEAST_WORDS = 50
SUBSTANTIAL = 40  # characters
TECHNICAL_ALLOWANCE = 3
TOP_SIZES = (2, 3, 4)
DUPLICATE_SIZES = (5, 6, 7, 8, 9, 10)


def _prose(reading: Reading) -> list[str]:
    if reading.is_technical:
        return [line for line in reading.prose if len(line) >= SUBSTANTIAL]
    return list(reading.prose)


def _shares(parts: Sequence[str]) -> tuple[float, float]:
    """Share of the parts that repeat an earlier one, and of the characters in those."""
    counted = Counter(parts)
    total = sum(len(part) * count for part, count in counted.items())
    repeats = sum(count - 1 for count in counted.values())
    characters = sum(len(part) * (count - 1) for part, count in counted.items())
    return repeats / max(len(parts), 1), characters / max(total, 1)


def duplicate_lines(reading: Reading) -> float:
    return _shares(_prose(reading))[0] / (TECHNICAL_ALLOWANCE if reading.is_technical else 1)


def duplicate_line_characters(reading: Reading) -> float:
    return _shares(_prose(reading))[1] / (TECHNICAL_ALLOWANCE if reading.is_technical else 1)


def duplicate_paragraphs(reading: Reading) -> float | None:
    return None if reading.is_technical else _shares(reading.paragraphs)[0]


def _words(reading: Reading) -> Words | None:
    if reading.is_technical or len(reading.prose_words) < LEAST_WORDS:
        return None
    return reading.words


def _recurring(words: Words, size: int, among: Places | None) -> tuple[Hashes, Places]:
    """The grams of `size` words that stand there more than once, with their places.

    Those of one gram stand together, in ascending order of place. Only `among` is looked at: where
    a gram recurs, each shorter one at its place does. In ordinary text few places are left after
    the first size, and hashing and sorting those costs nothing.
    """
    last = len(words) - size
    places = np.arange(last + 1) if among is None else among[among <= last]
    found = words.spans(words.starts[places], words.ends[places + size - 1])
    ordered = np.sort(found)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(again) == 0:
        return again, places[:0]
    hit = is_among(found, again)
    found, places = found[hit], places[hit]
    order = np.argsort(found, kind="stable")
    return found[order], places[order]


def top_grams(reading: Reading) -> float | None:
    """Largest excess over Gopher's bounds (.20, .18, .16 for 2, 3 and 4 words); above 1 is over."""
    words = _words(reading)
    if words is None:
        return None
    share, places = 0.0, None
    for size, bound in zip(TOP_SIZES, (0.20, 0.18, 0.16), strict=True):
        grams, places = _recurring(words, size, places)
        if len(grams) == 0:
            break
        first = np.flatnonzero(np.concatenate([[True], grams[1:] != grams[:-1]]))
        number = np.diff(first, append=len(grams))
        best = int(np.argmax(number))
        start = places[first[best]]
        length = int(words.ends[start + size - 1] - words.starts[start])
        share = max(share, length * int(number[best]) / len(words.data) / bound)
    return share


def duplicate_grams(reading: Reading) -> float | None:
    """Largest excess over Gopher's bounds (.15 down to .10 for 5 to 10 words); above 1 is over."""
    words = _words(reading)
    if words is None:
        return None
    lengths = words.ends - words.starts
    total = max(int(lengths.sum()), 1)
    share, places = 0.0, None
    for size, bound in zip(DUPLICATE_SIZES, (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), strict=True):
        grams, places = _recurring(words, size, places)
        if len(grams) == 0:
            break
        # Places of one gram are in ascending order: all but the first repeat it.
        repeated = places[1:][grams[1:] == grams[:-1]]
        covered = np.zeros(len(words) + 1, np.int64)
        covered[repeated] = 1
        np.subtract.at(covered, repeated + size, 1)
        inside = np.cumsum(covered)[:-1] > 0
        share = max(share, int(lengths[inside].sum()) / total / bound)
    return share


DUPLICATE_LINES = Rule("duplicate_lines", duplicate_lines, high="max_duplicate_lines")
DUPLICATE_LINE_CHARACTERS = Rule(
    "duplicate_line_characters", duplicate_line_characters, high="max_duplicate_line_characters"
)
DUPLICATE_PARAGRAPHS = Rule(
    "duplicate_paragraphs", duplicate_paragraphs, high="max_duplicate_paragraphs"
)
TOP_GRAMS = Rule("top_grams", top_grams, high="max_top_grams")
DUPLICATE_GRAMS = Rule("duplicate_grams", duplicate_grams, high="max_duplicate_grams")
