"""Pages of too few sentences: titles, teasers, labels.

C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2): at least three, later corpora ask for five.
A sentence ends in a mark before a blank or the line's end, or in one of the marks of scripts
without blanks. Technical pages are exempt: a reference may be one sentence to a function.
"""

from __future__ import annotations

import re

from tasks.corpus.filters.rule import Rule
from tasks.corpus.reading import Reading

_END = re.compile(r"[.!?…。！？](?:(?<=[。！？])|[\"'”’)\]]*(?=\s|$))")


def sentence_count(reading: Reading) -> float | None:
    return None if reading.is_technical else len(_END.findall(reading.prose_text))


SENTENCES = Rule("sentences", sentence_count, low="min_sentences")
