"""Words without a letter in them: tables of figures, dumps.

Gopher (Rae et al. 2021, appendix A.1.1): at least 80% of the words hold an alphabetic character.
Measured on prose; letters of every script count. Technical pages are exempt: theirs are doctests
and tables of constants.
"""

from itertools import filterfalse

from tasks.corpus.filters.rule import Rule
from tasks.corpus.reading import Reading

LEAST_WORDS = 20


def alphabetic_share(reading: Reading) -> float | None:
    words = reading.prose_words
    if reading.is_technical or len(words) < LEAST_WORDS:
        return None
    # Most words begin with a letter, or are nothing else.
    doubtful = (word for word in filterfalse(str.isalpha, words) if not word[0].isalpha())
    return 1 - sum(not any(map(str.isalpha, word)) for word in doubtful) / len(words)


ALPHABETIC = Rule("alphabetic_words", alphabetic_share, low="min_alphabetic_words")
