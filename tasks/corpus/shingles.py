"""Hashed spans of one text, all in numpy.

A text is normalised to words with one blank between, as bytes. With the prefix sums of
`table[byte] · B^i` (modulo 2^64, B odd and so invertible) the hash of any span of bytes is one
subtraction and one multiplication, and no Python loop runs over them. Where many texts are cut into
words at once, `word_hashes` is faster.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.arrays import distinct

Hashes = NDArray[np.uint64]

_BASE = np.uint64(0x9E3779B97F4A7C15 | 1)
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))
_SEPARATORS = re.compile(r"[\W_]+")
# Scripts written without blanks: each character is a word, else a whole sentence would be one.
_UNSPACED_RANGES = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x3040, 0x30FF),
    (0x3400, 0x9FFF),
    (0xF900, 0xFAFF),
)
_UNSPACED = re.compile(
    "([" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _UNSPACED_RANGES) + "])"
)
_NAMES = re.compile(r"[^\W_]+")
_BASIC = 0x10000
_FEW = 200  # of them a set is made faster than they are sorted
_BLANK = 0x20
_ASCII = "".join(chr(code).lower() if chr(code).isalnum() else " " for code in range(128))
_ASCII_BYTES = _ASCII.encode() + bytes(range(128, 256))


def normalise(text: str) -> str:
    """Lower case, letters and digits only, one blank between words. Idempotent."""
    return " ".join(normal_words(text))


def normal_words(text: str) -> list[str]:
    """The words of `normalise(text)`."""
    if text.isascii():
        return text.translate(_ASCII).split()
    signs = foreign(text)
    if any(sign.casefold() != sign for sign in signs):
        text = text.casefold()
        signs = foreign(text)
    if any(map(_UNSPACED.match, signs)):
        return _SEPARATORS.sub(" ", _UNSPACED.sub(r" \1 ", text.casefold())).split()
    for sign in signs:
        if not sign.isalnum():
            text = text.replace(sign, " ")
    # UTF-8's bytes beyond ASCII belong to letters now; `bytes` maps the others much faster.
    lowered = text.encode("utf-8", "surrogatepass").translate(_ASCII_BYTES)
    return lowered.decode("utf-8", "surrogatepass").split()


def foreign(text: str) -> set[str]:
    """The characters beyond ASCII: by numpy, as a look at each costs more than all the rest."""
    codes = code_points(text)
    found = codes[codes > 0x7F]
    return set(map(chr, (distinct(found) if len(found) > _FEW else found).tolist()))


def code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


@cache
def _letters() -> NDArray[np.bool_]:
    """Which code points of the basic plane are letters or digits."""
    return np.fromiter(map(str.isalnum, map(chr, range(_BASIC))), np.bool_, _BASIC)


def count_names(text: str) -> int:
    """Runs of letters and digits in a text."""
    if text.isascii():
        return len(text.translate(_ASCII).split())
    codes = code_points(text)
    if int(codes.max()) >= _BASIC:
        return len(_NAMES.findall(text))
    inside = _letters().take(codes)
    return int(inside[0]) + int(np.count_nonzero(inside[1:] & ~inside[:-1]))


def count_unspaced(text: str) -> int:
    """Characters of scripts that are written without blanks."""
    if text.isascii():
        return 0
    codes = code_points(text)
    inside = ((codes >= first) & (codes <= last) for first, last in _UNSPACED_RANGES)
    return sum(int(np.count_nonzero(some)) for some in inside)


def mix(values: Hashes) -> Hashes:
    """The finaliser of splitmix64: every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@cache
def _table() -> Hashes:
    return mix(np.arange(1, 257, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


@cache
def _powers(size: int, base: np.uint64) -> Hashes:
    factors = np.full(size, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _powers_for(count: int, base: np.uint64) -> Hashes:
    size = 1 << max(count - 1, 1).bit_length()
    return _powers(size, base)[:count]


@dataclass(frozen=True)
class Words:
    """A normalised text of W words: byte offsets of their starts and ends, and prefix hashes."""

    data: NDArray[np.uint8]
    starts: NDArray[np.int64]  # (W,)
    ends: NDArray[np.int64]  # (W,)
    prefix: Hashes  # (bytes + 1,)

    @classmethod
    def of(cls, normalised: str) -> Words:
        data = np.frombuffer(normalised.encode("utf-8", "replace"), np.uint8)
        blanks = np.flatnonzero(data == _BLANK)
        if len(data) == 0:
            return cls.at(data, blanks, blanks)
        starts = np.concatenate([[0], blanks + 1]).astype(np.int64)
        ends = np.concatenate([blanks, [len(data)]]).astype(np.int64)
        return cls.at(data, starts, ends)

    @classmethod
    def at(
        cls, data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> Words:
        """Normalised text whose words are known."""
        prefix = np.zeros(len(data) + 1, np.uint64)
        np.cumsum(_table().take(data) * _powers_for(len(data), _BASE), out=prefix[1:])
        return cls(data, starts, ends, prefix)

    def __len__(self) -> int:
        return len(self.starts)

    def spans(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Hashes:
        """Hashes of the byte ranges [start, end)."""
        inverse = _powers_for(len(self.data) + 1, _INVERSE)
        return mix((self.prefix.take(ends) - self.prefix.take(starts)) * inverse.take(starts))

    def grams(self, n: int) -> Hashes:
        """One hash for each run of `n` words, in order: (W - n + 1,), empty if there are fewer."""
        if len(self) < n:
            return np.zeros(0, np.uint64)
        return self.spans(self.starts[: len(self) - n + 1], self.ends[n - 1 :])

    def windows(self, size: int) -> tuple[NDArray[np.int64], Hashes]:
        """Windows of `size` bytes that begin at a word: (their starts, their hashes)."""
        starts = self.starts[self.starts + size <= len(self.data)]
        return starts, self.spans(starts, starts + size)
