"""Lines that do not end as sentences do, and lines too short to be any: menus, lists of links.

FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.4): at least 12% of the lines end in
punctuation, at most 67% are shorter than 30 characters. Technical pages are exempt: signatures,
tables of constants and examples have that shape by nature. Its published code has a third one, for
lists: at most .3 lines to a word; it is off here by default.
"""

from tasks.corpus.filters.rule import Rule
from tasks.corpus.reading import Reading

_ENDINGS = (".", "!", "?", '"', "”", "'", "’", ":", ")", "。", "！", "？", "」", "`")
SHORT = 30  # characters


def punctuated_share(reading: Reading) -> float | None:
    if reading.is_technical or not reading.prose:
        return None
    endings = sum(line.rstrip().endswith(_ENDINGS) for line in reading.prose)
    return endings / len(reading.prose)


def short_share(reading: Reading) -> float | None:
    if reading.is_technical or not reading.prose:
        return None
    return sum(len(line.strip()) < SHORT for line in reading.prose) / len(reading.prose)


def lines_per_word(reading: Reading) -> float | None:
    words = reading.prose_words
    return len(reading.prose) / len(words) if words and not reading.is_technical else None


PUNCTUATED_LINES = Rule("punctuated_lines", punctuated_share, low="min_punctuated_lines")
SHORT_LINES = Rule("short_lines", short_share, high="max_short_lines")
LINES_PER_WORD = Rule("lines_per_word", lines_per_word, high="max_lines_per_word")
