"""Hash signs and ellipses in place of words: tag clouds and teasers.

Gopher (Rae et al. 2021, appendix A.1.1): at most one in ten words, and at most 30% of the lines end
in an ellipsis. Headings' marks and code do not count.
"""

from tasks.corpus.filters.rule import Rule
from tasks.corpus.reading import Reading

LEAST_WORDS = 20


def symbol_share(reading: Reading) -> float | None:
    words = reading.prose_words
    if len(words) < LEAST_WORDS:
        return None
    symbols = sum(map(reading.plain_text.count, ("#", "…", "...")))
    return symbols / len(words)


def ellipsis_share(reading: Reading) -> float | None:
    if not reading.prose:
        return None
    endings = sum(line.rstrip().endswith(("…", "...")) for line in reading.prose)
    return endings / len(reading.prose)


SYMBOLS = Rule("symbols", symbol_share, high="max_symbols")
ELLIPSES = Rule("ellipsis_lines", ellipsis_share, high="max_ellipsis_lines")
