"""Mean word length outside 3 to 10 characters: lists of numbers, ids, encoded data.

Gopher (Rae et al. 2021, appendix A.1.1). Measured on prose, where there are 20 words of it, in
languages that write blanks between words: in the others a "word" is a clause, or a line.
"""

from tasks.corpus.filters.rule import Rule
from tasks.corpus.reading import Reading

LEAST_WORDS = 20
# Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan, Dzongkha.
UNDIVIDED = frozenset({"zh", "ja", "th", "lo", "km", "my", "bo", "dz"})


def mean_word_length(reading: Reading) -> float | None:
    words = reading.prose_words
    if len(words) < LEAST_WORDS:
        return None
    return (len(reading.plain_text) - len(words) + 1) / len(words)


WORD_LENGTH = Rule(
    "word_length",
    mean_word_length,
    low="min_word_length",
    high="max_word_length",
    judges=lambda code: code not in UNDIVIDED,
)
