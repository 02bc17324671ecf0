"""Too short to say anything, or too long to be a document.

Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1): 50 to 100,000 words. Code counts, by the
names in it, because a reference page may be nearly all signatures. In scripts without blanks, where
a run of letters is a clause, two characters more are a word more.
"""

from tasks.corpus.filters.rule import Rule
from tasks.corpus.reading import Reading
from tasks.corpus.shingles import count_unspaced


def word_count(reading: Reading) -> float:
    return reading.word_count + count_unspaced(reading.text) // 2


WORDS = Rule("words", word_count, low="min_words", high="max_words")
