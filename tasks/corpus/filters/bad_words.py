"""Words of abuse and of pornography, per 1,000 words of a page.

C4 (Raffel et al. 2020, section 2.2) throws away every page with one word of a public list, which
also removed medicine, law and what minorities write of themselves (Dodge et al. 2021,
arXiv:2104.08758, section 5.3). So this is a rate, a column beside the document, and its bound is
off by default. The lists are our own, short and English (`bad_words.txt`): words with an ordinary
second meaning are left out.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tasks.corpus.filters.rule import Rule
from tasks.corpus.reading import Reading

LISTS = Path(__file__).with_name("bad_words.txt")


@cache
def words_of(section: str) -> frozenset[str]:
    """The words under a heading such as `[toxic]`; they are compared in lower case."""
    found: dict[str, set[str]] = {}
    words: set[str] = set()
    for line in LISTS.read_text().splitlines():
        if line.startswith("["):
            words = found.setdefault(line.strip("[]"), set())
        elif not line.startswith("#"):
            words.update(line.split())
    return frozenset(found[section])


def _rate(reading: Reading, section: str) -> float | None:
    words = reading.normal_words
    if not words:
        return None
    bad = words_of(section)
    if bad.isdisjoint(reading.distinct_words):
        return 0.0
    return 1000 * sum(word in bad for word in words) / len(words)


def toxic_rate(reading: Reading) -> float | None:
    return _rate(reading, "toxic")


def adult_rate(reading: Reading) -> float | None:
    return _rate(reading, "adult")


TOXIC_WORDS = Rule("toxic_words", toxic_rate, high="max_toxic_words")
ADULT_WORDS = Rule("adult_words", adult_rate, high="max_adult_words")
