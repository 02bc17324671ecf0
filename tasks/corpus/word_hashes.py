"""The words of many texts at once, as hashes in one numpy array.

A Python call per text costs more than the work on a text of a few kilobytes, so texts are joined
and cut into words together. A word's hash does not depend on where it stands; a run of words is
hashed from its words' hashes. Measured on real articles: 65 MB/s a core; text by text, 15.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.shingles import Hashes, Words, foreign, mix, normalise

_END = b"\n"  # of a text; normalised text has none
_BLOCK = 1 << 17  # bytes at a time: they stay in the second cache
_BASE = np.uint64(0x9E3779B97F4A7C15 | 1)
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))
_STEP = 0xD6E8FEB86659FD93  # odd; between neighbouring words of a run
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_WORD = re.compile(rf"(?![\W_]){_UNSPACED.pattern}|(?:(?!{_UNSPACED.pattern})[^\W_])+")
_TABLE = bytes(
    code if code >= 0x80 or chr(code).isalnum() else 0x20 for code in range(256)
)  # UTF-8's bytes from 0x80 on belong to letters once the other signs are gone


_LINES = _TABLE[:10] + _END + _TABLE[11:]  # line breaks stay


@dataclass(frozen=True)
class TextWords:
    """The words of D texts: `hashes` (W,), those of text d from `bounds[d]` to `bounds[d + 1]`."""

    hashes: Hashes
    bounds: NDArray[np.int64]  # (D + 1,)

    def runs(self, n: int) -> tuple[Hashes, NDArray[np.int64]]:
        """Hashes of every run of `n` words of a text, in order, and their bounds (D + 1,).

        A text of fewer words is one run as a whole, an empty one has none.
        """
        total, sizes = len(self.hashes), np.diff(self.bounds)
        runs = np.zeros(total, np.uint64)
        factors = [np.uint64(pow(_STEP, k, 1 << 64)) for k in range(n)]
        for k, factor in enumerate(factors):
            runs[: max(total - k, 0)] += self.hashes[k:] * factor
        valid = np.ones(total, bool)
        for k in range(1, n):
            valid[self.bounds[1:][sizes >= k] - k] = False
        for short in np.flatnonzero((sizes > 0) & (sizes < n)).tolist():
            start, size = int(self.bounds[short]), int(sizes[short])
            words = self.hashes[start : start + size]
            runs[start] = (words * np.array(factors[:size])).sum() + np.uint64(size)
            valid[start] = True
        counts = np.where(sizes >= n, sizes - n + 1, np.minimum(sizes, 1))
        return mix(runs[valid]), np.concatenate([[0], np.cumsum(counts)])

    def whole(self) -> Hashes:
        """One hash for each text's words in their order: (D,). Equal texts, equal hashes."""
        sizes = np.diff(self.bounds)
        place = np.arange(len(self.hashes)) - np.repeat(self.bounds[:-1], sizes)
        sums = np.zeros(len(sizes), np.uint64)
        filled = sizes > 0
        if filled.any():
            weighed = self.hashes * _powers_to(int(sizes.max()))[place]
            sums[filled] = np.add.reduceat(weighed, self.bounds[:-1][filled])
        return mix(sums + sizes.astype(np.uint64))


def words_of(texts: Sequence[str]) -> tuple[TextWords, list[bytes]]:
    """The words of these texts, and each text normalised as `shingles.normalise` does, UTF-8."""
    hashes, counts, plain = [np.zeros(0, np.uint64)], [], []
    for block in _blocks(texts, _TABLE):
        cut = _cut(block)
        hashes.append(_hashed(cut.data, cut.starts, cut.stops))
        counts.append(np.diff(cut.bounds))
        for a, b in itertools.pairwise(cut.bounds.tolist()):
            text = cut.data[cut.starts[a] : cut.stops[b - 1]] if b > a else cut.data[:0]
            plain.append(text.tobytes())
    bounds = np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts]))
    return TextWords(np.concatenate(hashes), bounds), plain


def line_words(texts: Sequence[str]) -> TextWords:
    """The words of every line of these texts, one after another: as of so many texts."""
    hashes, counts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for block in _blocks(texts, _LINES):
        cut = _cut(block)
        hashes.append(_hashed(cut.data, cut.starts, cut.stops))
        counts.append(np.diff(cut.bounds))
    bounds = np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts]))
    return TextWords(np.concatenate(hashes), bounds)


@dataclass(frozen=True)
class _Cut:
    """Texts that `_END` separates, as bytes of words with one byte after each."""

    data: NDArray[np.uint8]
    starts: NDArray[np.int64]  # (W,) of words
    stops: NDArray[np.int64]  # (W,)
    bounds: NDArray[np.int64]  # (D + 1,), words of each text


def _cut(block: list[bytes]) -> _Cut:
    data = np.frombuffer(_END.join([*block, b""]), np.uint8)
    letter = data > 0x20
    kept = letter.copy()
    kept[1:] |= letter[:-1]  # every word with the one byte that follows it
    compact, places = data[kept], np.flatnonzero(kept & ~letter)
    stops = np.flatnonzero(compact <= 0x20)
    starts = np.concatenate([[0], stops[:-1] + 1]) if len(stops) else stops
    ends = np.flatnonzero(data == _END[0])
    bounds = np.concatenate([[0], np.searchsorted(places, ends, side="right")])
    return _Cut(compact, starts, stops, bounds)


def lines_of(text: str) -> tuple[Words, NDArray[np.int64]]:
    """The words of a text's lines, normalised and with one blank between, and the line of each."""
    cut = _cut([_spaced(text, _LINES)])
    data = np.maximum(cut.data[:-1], 0x20)  # line breaks too are blanks between words
    of_line = np.repeat(np.arange(len(cut.bounds) - 1), np.diff(cut.bounds))
    return Words.at(data, cut.starts, cut.stops), of_line


def places_of(text: str) -> list[tuple[int, int]]:
    """Where each word that `words_of` finds stands in the text itself: [start, end) characters."""
    folded, origin = [], []
    for place, letter in enumerate(text):
        small = letter.casefold()
        folded.append(small)
        origin += [place] * len(small)
    found = _WORD.finditer("".join(folded))
    return [(origin[match.start()], origin[match.end() - 1] + 1) for match in found]


def _blocks(texts: Sequence[str], table: bytes) -> Iterator[list[bytes]]:
    block: list[bytes] = []
    size = 0
    for text in texts:
        block.append(_spaced(text, table))
        size += len(block[-1])
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _spaced(text: str, table: bytes = _TABLE) -> bytes:
    """Letters and digits in lower case, everything else as `table` says; not yet single blanks."""
    if not text.isascii():
        signs = foreign(text)
        if any(map(str.isalnum, signs)):
            text = text.casefold()
            if _UNSPACED.search(text):
                text = "\n".join(map(normalise, text.split("\n")))
            signs = foreign(text)
        for sign in signs:
            if not sign.isalnum():
                text = text.replace(sign, " ")
    return text.encode().lower().translate(table)


def _powers_to(count: int) -> Hashes:
    factors = np.full(count, _STEP, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


@cache
def _powers(base: np.uint64) -> Hashes:
    factors = np.full(_BLOCK, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _hashed(data: NDArray[np.uint8], starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Hashes:
    """Hashes of the words [start, stop): sums of letter · B^place, divided by B^start.

    Summed in pieces of `_BLOCK` bytes that end between words, so that powers need no more places.
    (A single word longer than that is hashed by its length and its first letters.)
    """
    hashes = np.empty(len(starts), np.uint64)
    first = 0
    while first < len(starts):
        begin = starts[first]
        last = max(int(np.searchsorted(stops, begin + _BLOCK, side="left")), first + 1)
        piece = data[begin : stops[last - 1]][: _BLOCK - 1]
        prefix = np.zeros(len(piece) + 1, np.uint64)
        np.cumsum(piece * _powers(_BASE)[: len(piece)], out=prefix[1:])
        a = starts[first:last] - begin
        b = np.minimum(stops[first:last] - begin, len(piece))
        sums = (prefix[b] - prefix[a]) * _powers(_INVERSE)[a]
        hashes[first:last] = mix(sums + (stops[first:last] - starts[first:last]).view(np.uint64))
        first = last
    return hashes
