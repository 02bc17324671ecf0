"""Text of held-out documents that also stands in training documents: found, and cut out there.

Two things count as a leak.
 - A passage: 40 normalised characters, beginning at a word, that stand in one line of a held-out
   document. Any held-out line of 40 characters or more begins with such a window, so none of them
   is left in training as a whole, however the lines are broken there.
 - An entry: a list item or table row of training that opens with the name of a held-out heading
   (`- math.factorial: Return x!` where `## math.factorial(x, /)` is held out). Indexes and summary
   pages tell short facts that share no long passage with their source.
What stands in many groups of similar documents is nobody's own and stays: boilerplate.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.corpus.arrays import distinct
from tasks.corpus.shingles import Hashes, normalise
from tasks.corpus.word_hashes import lines_of

WINDOW = 40  # characters, normalised
SHORTEST_NAME = 6  # characters of a heading's name, normalised
_HEADING = re.compile(r"^#{1,6} +(.+)$")
_ENTRY = re.compile(r"^(?:\s*(?:[-*+]|\d{1,3}[.)])\s+|\|\s*)(.+)$")
# A name ends where its parameters, its explanation or the next cell begins.
_NAME_END = re.compile(r"\(|: |:$| [-–—]+ |\||=")
_KIND = re.compile(r"^(?:async |class |property |def |function |method |module )+")


@dataclass(frozen=True)
class Marks:
    """Hashes of what identifies a text, sorted: windows of its lines and names of its headings."""

    windows: Hashes
    names: Hashes


@dataclass(frozen=True)
class LineMarks:
    """A text cut at line breaks, with the marks of each line."""

    lines: list[str]
    window_line: NDArray[np.int64]  # (K,) the line a window begins in
    window_end_line: NDArray[np.int64]  # (K,) the line it ends in
    windows: Hashes  # (K,)
    name_line: NDArray[np.int64]  # (M,)
    names: Hashes  # (M,)


def own_marks(text: str) -> Marks:
    """What a held-out document must not share with training."""
    names = [_name(match.group(1)) for match in map(_HEADING.match, text.split("\n")) if match]
    hashes = [_hash(name) for name in names if len(name) >= SHORTEST_NAME]
    marks = line_marks(text)
    listed = np.array([bool(_ENTRY.match(line)) for line in marks.lines], dtype=bool)
    inside = (marks.window_line == marks.window_end_line) & ~listed[marks.window_line]
    return Marks(distinct(marks.windows[inside]), distinct(np.array(hashes, np.uint64)))


def line_marks(text: str) -> LineMarks:
    """The marks of a text that may have to lose lines. Windows run across line breaks."""
    lines = text.split("\n")
    words, of_line = lines_of(text)
    starts, windows = words.windows(WINDOW)
    last = np.searchsorted(words.starts, starts + WINDOW - 1, side="right") - 1
    names = [
        (number, _hash(name))
        for number, match in enumerate(map(_ENTRY.match, lines))
        if match and len(name := _name(match.group(1))) >= SHORTEST_NAME
    ]
    return LineMarks(
        lines,
        of_line[: len(starts)],
        of_line[last],
        windows,
        np.array([number for number, _ in names], np.int64),
        np.array([name for _, name in names], np.uint64),
    )


def without_leaks(
    marks: LineMarks, windows: NDArray[np.bool_], names: NDArray[np.bool_]
) -> tuple[str, set[int]]:
    """The text without the lines of these windows (K,) and names (M,), and which lines went; blank
    ones are not counted.
    """
    gone = set(marks.name_line[names].tolist())
    for first, last in zip(
        marks.window_line[windows].tolist(), marks.window_end_line[windows].tolist(), strict=True
    ):
        gone.update(range(first, last + 1))
    return _rest(marks.lines, gone)


def without_lines(text: str, spans: Iterable[tuple[int, int]]) -> tuple[str, set[int]]:
    """The text without the lines that hold a character of these ranges, and which lines went.

    Code fences stay as long as there is something between them.
    """
    lines = text.split("\n")
    begins = np.cumsum([0, *(len(line) + 1 for line in lines)])
    gone: set[int] = set()
    for start, end in spans:
        first, last = np.searchsorted(begins, [start, end - 1], side="right") - 1
        gone.update(range(int(first), int(last) + 1))
    gone -= {number for number in gone if lines[number].startswith("```")}
    return _rest(lines, gone)


def _rest(lines: list[str], gone: set[int]) -> tuple[str, set[int]]:
    kept = [line for number, line in enumerate(lines) if number not in gone]
    removed = {number for number in gone if lines[number].strip()}
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(_without_empty_fences(kept))).strip()
    return text, removed


def _without_empty_fences(lines: list[str]) -> list[str]:
    """Code blocks that lost all their lines go; one that lost some keeps both its fences."""
    kept: list[str] = []
    opened: int | None = None
    for line in lines:
        if line.startswith("```"):
            if opened is None:
                opened = len(kept)
            elif not any(inner.strip() for inner in kept[opened + 1 :]):
                del kept[opened:]
                opened = None
                continue
            else:
                opened = None
        kept.append(line)
    return kept


def _name(text: str) -> str:
    plain = text.replace("`", "").replace("**", "").strip()
    return normalise(_KIND.sub("", _NAME_END.split(plain, maxsplit=1)[0]))


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
