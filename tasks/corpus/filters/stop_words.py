"""English prose without the words English cannot do without: keyword lists, generated names.

Gopher (Rae et al. 2021, appendix A.1.1): at least two of eight. Applied to what was identified as
English, where there are 100 words of prose that are mostly ASCII; other languages have other words.
"""

from tasks.corpus.filters.rule import Rule
from tasks.corpus.reading import Reading

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
LEAST_WORDS = 100


def _is_mostly_ascii(reading: Reading) -> bool:
    words = reading.prose_words
    return reading.plain_text.isascii() or sum(map(str.isascii, words)) >= 0.8 * len(words)


def distinct_stop_words(reading: Reading) -> float | None:
    words = reading.prose_words
    if len(words) < LEAST_WORDS or not _is_mostly_ascii(reading):
        return None
    return len(STOP_WORDS & reading.distinct_words)


ENGLISH_STOP_WORDS = Rule(
    "stop_words", distinct_stop_words, low="min_stop_words", judges=lambda code: code == "en"
)
