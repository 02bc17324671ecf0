"""The same line, paragraph or phrase over and over.

Gopher (Rae et al. 2021, appendix A.1.1, table A1): shares of duplicate lines and paragraphs, of the
characters in them, of the characters of the most frequent 2- to 4-gram, and of those in any
duplicate 5- to 10-gram (each character counted once; `phrases`). Lines of code and headings repeat
by nature (`return False`) and are left out. Of technical pages only lines of 40 characters and more
count, at a third of their share: families of functions describe the same arguments (measured in the
standard library's documentation: json .34, pickle .38, unicodedata .44 of the characters).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tasks.corpus.filters.rule import Rule
from tasks.corpus.reading import Reading, Readings

SUBSTANTIAL = 40  # characters
TECHNICAL_ALLOWANCE = 3


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


def top_grams(readings: Readings) -> list[float | None]:
    """Largest excess over Gopher's bounds (.20, .18, .16 for 2, 3 and 4 words); above 1 is over."""
    return [found.top if found else None for found in readings.phrases]


def duplicate_grams(readings: Readings) -> list[float | None]:
    """Largest excess over Gopher's bounds (.15 down to .10 for 5 to 10 words); above 1 is over."""
    return [found.duplicate if found else None for found in readings.phrases]


DUPLICATE_LINES = Rule("duplicate_lines", duplicate_lines, high="max_duplicate_lines")
DUPLICATE_LINE_CHARACTERS = Rule(
    "duplicate_line_characters", duplicate_line_characters, high="max_duplicate_line_characters"
)
DUPLICATE_PARAGRAPHS = Rule(
    "duplicate_paragraphs", duplicate_paragraphs, high="max_duplicate_paragraphs"
)
TOP_GRAMS = Rule("top_grams", together=top_grams, high="max_top_grams")
DUPLICATE_GRAMS = Rule("duplicate_grams", together=duplicate_grams, high="max_duplicate_grams")
