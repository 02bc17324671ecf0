"""A Markdown text as units that may go but are never torn: lines, code blocks, tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.shingles import Hashes
from tasks.corpus.word_hashes import TextWords, line_words, places_of

_WORD = re.compile(r"[^\W_]")


@dataclass(frozen=True)
class Unit:
    """Lines [first, last) of a text. Of prose each line is a unit."""

    kind: Literal["line", "code", "table"]
    first: int
    last: int


def units_of(lines: list[str]) -> Iterator[Unit]:
    """The units of a text, in order; blank lines are none. A fence never closed ends the text."""
    number = 0
    while number < len(lines):
        start, said = number, lines[number].lstrip()
        number += 1
        if said.startswith(("```", "~~~")):
            mark = said[: len(said) - len(said.lstrip(said[0]))]
            while number < len(lines) and not lines[number].lstrip().startswith(mark):
                number += 1
            number = min(number + 1, len(lines))
            yield Unit("code", start, number)
        elif said.startswith("|"):
            while number < len(lines) and lines[number].lstrip().startswith("|"):
                number += 1
            yield Unit("table", start, number)
        elif said:
            yield Unit("line", start, number)


@dataclass(frozen=True)
class Units:
    """The units of many texts, and their runs of prose.

    A segment is prose between code blocks and tables: `segments` holds (text, first, last line).
    """

    lines: list[list[str]]  # of each text
    units: list[tuple[int, Unit]]  # number of the text, unit
    hashes: Hashes  # (U,) of each unit's words
    words: NDArray[np.int64]  # (U,) how many each has
    segments: list[tuple[int, int, int]]
    of_lines: TextWords
    edges: NDArray[np.int64]  # (S, 2), words of each segment

    @classmethod
    def of(cls, texts: Sequence[str]) -> Units:
        lines = [text.split("\n") for text in texts]
        units = [(row, unit) for row, own in enumerate(lines) for unit in units_of(own)]
        words = line_words(texts)
        above = np.cumsum([0, *map(len, lines)]).tolist()
        firsts = np.array([above[row] + unit.first for row, unit in units], np.int64)
        # Between units stand blank lines only, which have no words.
        whole = TextWords(words.hashes, np.append(words.bounds[firsts], len(words.hashes)))
        segments: list[tuple[int, int, int]] = []
        before = -1  # the text whose prose goes on
        for row, unit in units:
            if unit.kind == "line" and before == row:
                segments[-1] = (row, segments[-1][1], unit.last)
            elif unit.kind == "line":
                segments.append((row, unit.first, unit.last))
            before = row if unit.kind == "line" else -1
        spans = [(above[row] + first, above[row] + last) for row, first, last in segments]
        edges = words.bounds[np.array(spans, np.int64).reshape(-1, 2)]
        return cls(lines, units, whole.whole(), np.diff(whole.bounds), segments, words, edges)

    def spans(self, n: int) -> tuple[Hashes, NDArray[np.int64], NDArray[np.int64]]:
        """Hashes of all runs of `n` words of prose, the segment of each and its word there."""
        sizes = self.edges[:, 1] - self.edges[:, 0]
        inside = np.zeros(len(self.of_lines.hashes) + 1, np.int64)
        np.add.at(inside, self.edges[:, 0], 1)
        np.add.at(inside, self.edges[:, 1], -1)
        prose = self.of_lines.hashes[np.cumsum(inside)[:-1] > 0]
        words = TextWords(prose, np.concatenate([[0], np.cumsum(sizes)]))
        runs, bounds = words.runs(n)
        owner = np.repeat(np.arange(len(sizes)), np.diff(bounds))
        place = np.arange(len(runs)) - bounds[owner]
        long = sizes[owner] >= n
        return runs[long], owner[long], place[long]

    def places(
        self, segment: int, starts: NDArray[np.int64], n: int
    ) -> tuple[list[tuple[int, int, int]], int]:
        """Where the runs of `n` words stand that begin at these words of a segment: (line, start,
        end) characters, with the punctuation after them; and how many unbroken spans they are.
        """
        row, first, last = self.segments[segment]
        breaks = np.flatnonzero(np.diff(starts) > n) + 1
        spans = [(int(run[0]), int(run[-1]) + n) for run in np.split(starts, breaks)]
        found = []
        begin = 0
        for number in range(first, last):
            line = self.lines[row][number]
            words = places_of(line)
            for a, b in spans:
                if inside := words[max(a - begin, 0) : max(b - begin, 0)]:
                    end = inside[-1][1]
                    while end < len(line) and not (line[end].isalnum() or line[end].isspace()):
                        end += 1
                    found.append((number, inside[0][0], end))
            begin += len(words)
        return found, len(spans)


def without(lines: list[str], gone: set[int], spans: Iterable[tuple[int, int, int]]) -> str:
    """The text without these lines and without these spans (line, start, end characters).

    A line that a span leaves without a letter or digit goes as well.
    """
    cut: dict[int, list[tuple[int, int]]] = {}
    for place, start, end in spans:
        cut.setdefault(place, []).append((start, end))
    kept = []
    for number, line in enumerate(lines):
        if number in gone:
            continue
        if number in cut:
            left, at = "", 0
            for start, end in sorted(cut[number]):
                left = _joined(left, line[at:start])
                at = max(at, end)
            line = _joined(left, line[at:]).rstrip()
            if not _WORD.search(line):
                continue
        kept.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def _joined(left: str, right: str) -> str:
    return left + (right.lstrip(" ") if left.endswith(" ") else right)
