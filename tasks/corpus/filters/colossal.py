"""The line rules of C4 as shares of a page's lines.

C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2) drops lines that do not end in a terminal
mark, have fewer than three words or speak of JavaScript, and pages with a curly bracket. Dropping
lines changes texts for good, and FineWeb (arXiv:2406.17557, section 3.5) found that the rule about
terminal marks alone throws away a third of all tokens; so the shares are measured here, and a page
goes by a bound that is off by default. Code is no prose: brackets in it do not count, and technical
pages are exempt from the rules about the shape of lines.
"""

from __future__ import annotations

from tasks.corpus.filters.rule import Rule
from tasks.corpus.reading import Reading

_TERMINAL = (".", "!", "?", '"', "”")
FEW_WORDS = 3


def terminal_share(reading: Reading) -> float | None:
    if reading.is_technical or not reading.prose:
        return None
    endings = sum(line.rstrip().endswith(_TERMINAL) for line in reading.prose)
    return endings / len(reading.prose)


def few_word_share(reading: Reading) -> float | None:
    if reading.is_technical or not reading.prose:
        return None
    few = sum(len(line.split(None, FEW_WORDS)) < FEW_WORDS for line in reading.prose)
    return few / len(reading.prose)


def script_share(reading: Reading) -> float | None:
    if reading.is_technical or not reading.prose:
        return None
    if "javascript" not in reading.lowered:
        return 0.0
    return sum("javascript" in line.lower() for line in reading.prose) / len(reading.prose)


def curly_share(reading: Reading) -> float | None:
    if reading.is_technical or not reading.prose:
        return None
    if "{" not in reading.plain_text:  # brackets in code spans are none
        return 0.0
    return sum("{" in line for line in reading.prose) / len(reading.prose)


TERMINAL_LINES = Rule("terminal_lines", terminal_share, low="min_terminal_lines")
FEW_WORD_LINES = Rule("few_word_lines", few_word_share, high="max_few_word_lines")
SCRIPT_LINES = Rule("script_lines", script_share, high="max_script_lines")
CURLY_LINES = Rule("curly_lines", curly_share, high="max_curly_lines")
