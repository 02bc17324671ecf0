"""Which pages of the cache belong to whom, and what the free ones still hold.

A page is PAGE tokens. A sequence owns one run of neighbouring pages, as many as it can ever need,
so attention reads a plain view: a page table would copy every key and value through a gather first
(width 512, 32 sequences of 256 tokens, one core: 0.8 ms a layer for attention, 1.7 ms for the
gather). Pages that were filled keep their content when they are freed, under a chained hash (the
model's version, then all tokens up to the page's end), until a new run covers them. A prompt that
begins like an earlier one takes that content: in place where the pages are free and room follows,
otherwise by a copy, which costs a hundredth of computing it.
"""

import hashlib
import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

PAGE = 16


def page_hashes(root: bytes, tokens: Sequence[int]) -> Iterator[bytes]:
    """One hash for each full page of `tokens`; equal hashes mean equal tokens from the start on."""
    for end in range(PAGE, len(tokens) + 1, PAGE):
        root = next_hash(root, tokens[end - PAGE : end])
        yield root


def next_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a page of tokens after the page (or root) `before`."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Run:
    """Neighbouring pages first, first + 1, …"""

    first: int
    count: int

    @property
    def pages(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass(frozen=True)
class Copy:
    """Content to be copied: a page of the cache onto another."""

    source: int
    target: int


@dataclass(frozen=True)
class Allocation:
    """A run whose first `hits` pages hold what was asked for, once the copies are made."""

    run: Run
    hits: int
    copies: tuple[Copy, ...]


class PageTable:
    """Owners and contents of `count` pages. It moves no data: it says what must be moved."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.owned = np.zeros(count, dtype=bool)
        self.used = np.zeros(count, dtype=np.int64)  # when a content was last of use; 0: none
        self.hashes: list[bytes | None] = [None] * count
        self.index: dict[bytes, int] = {}
        self._clock = itertools.count(1)

    @property
    def free(self) -> int:
        return self.count - int(self.owned.sum())

    def hits(self, hashes: Sequence[bytes]) -> list[int]:
        """Pages that hold the longest known beginning of a chain of hashes."""
        found = []
        for hash in hashes:
            page = self.index.get(hash)
            if page is None:
                break
            found.append(page)
        return found

    def allocate(self, count: int, hits: Sequence[int]) -> Allocation | None:
        """Reserve a run of `count` pages that begins with the content of the pages `hits`.

        None when no run of free pages is long enough: `compact`, or wait. Where the only room is
        where the hits lie, their content is given up.
        """
        assert len(hits) <= count <= self.count
        found = self._in_place(count, hits) or self._with_copies(count, hits)
        if found is None and hits:
            found = self._with_copies(count, ())
        if found is None:
            return None
        run = found.run
        self.owned[run.first : run.first + count] = True
        now = next(self._clock)
        for copy in found.copies:
            self.used[copy.source] = now
        return found

    def fill(self, page: int, hash: bytes) -> None:
        """The page now holds this content; the first page to hold it is the one found."""
        if self.index.setdefault(hash, page) == page:
            self.hashes[page] = hash

    def release(self, run: Run) -> None:
        """Give a run back; its contents stay until something else needs the room."""
        now = next(self._clock)
        self.owned[run.first : run.first + run.count] = False
        for page in run.pages:
            self.used[page] = now if self.hashes[page] is not None else 0

    def compact(self, runs: Sequence[Run]) -> list[Run]:
        """Where to move the owned `runs` so that all free pages are neighbours, in their order
        and to the left; contents of free pages are forgotten. Move data from the left to the right.
        """
        order = sorted(range(len(runs)), key=lambda i: runs[i].first)
        contents = {run.first: [self.hashes[page] for page in run.pages] for run in runs}
        self.index.clear()
        self.hashes = [None] * self.count
        self.owned[:] = False
        self.used[:] = 0
        moved = list(runs)
        cursor = 0
        for i in order:
            run = moved[i] = Run(cursor, runs[i].count)
            self.owned[cursor : cursor + run.count] = True
            for page, hash in zip(run.pages, contents[runs[i].first], strict=True):
                if hash is not None:
                    self.fill(page, hash)
            cursor += run.count
        return moved

    def check(self, runs: Sequence[Run]) -> None:
        """Raise AssertionError unless exactly the pages of `runs` are owned, each once, and every
        hash leads to the page that holds it.
        """
        owners = np.zeros(self.count, dtype=np.int64)
        for run in runs:
            owners[run.first : run.first + run.count] += 1
        assert (owners <= 1).all(), "two sequences own one page"
        assert ((owners == 1) == self.owned).all(), "a page is leaked or owned by nobody"
        for hash, page in self.index.items():
            assert self.hashes[page] == hash, f"page {page} is listed under another hash"
        listed = sum(hash is not None for hash in self.hashes)
        assert listed == len(self.index), "a page's hash is not listed"

    def _in_place(self, count: int, hits: Sequence[int]) -> Allocation | None:
        """The hits themselves, when they are free neighbours with enough free pages behind."""
        if not hits or any(page != hits[0] + i for i, page in enumerate(hits)):
            return None
        first, end = hits[0], hits[0] + count
        if end > self.count or self.owned[first:end].any():
            return None
        self._forget(range(first + len(hits), end))
        return Allocation(Run(first, count), len(hits), ())

    def _with_copies(self, count: int, hits: Sequence[int]) -> Allocation | None:
        """A run elsewhere, to which the hits are copied."""
        first = self._oldest_window(count, hits)
        if first is None:
            return None
        run = Run(first, count)
        self._forget(run.pages)
        copies = tuple(Copy(page, to) for page, to in zip(hits, run.pages, strict=False))
        return Allocation(run, len(hits), copies)

    def _oldest_window(self, count: int, kept: Sequence[int]) -> int | None:
        """The first page of the free window whose contents were of use longest ago."""
        never = np.iinfo(np.int64).max
        cost = np.where(self.owned, never, self.used)
        cost[list(kept)] = never
        worst = sliding_window_view(cost, count).max(axis=1)
        first = int(worst.argmin())
        return None if worst[first] == never else first

    def _forget(self, pages: range) -> None:
        for page in pages:
            hash, self.hashes[page] = self.hashes[page], None
            self.used[page] = 0
            if hash is not None:
                del self.index[hash]
