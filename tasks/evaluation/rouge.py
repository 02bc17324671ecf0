"""ROUGE-L: how much of two texts agrees in order (Lin 2004, https://aclanthology.org/W04-1013).

Words are runs of a-z and 0-9 after lowering case, without stemming, as Google's `rouge-score` cuts
them; the score is the F1 of the longest common subsequence.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"[a-z0-9]+")


def rouge_l(reference: str, answer: str) -> float:
    """F1 between 0 and 1; 0 when either text has no word."""
    wanted, given = (_WORD.findall(text.lower()) for text in (reference, answer))
    common = longest_common_subsequence(wanted, given)
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def longest_common_subsequence(left: list[str], right: list[str]) -> int:
    """Its length; time len(left) · len(right), one row of memory."""
    row = [0] * (len(right) + 1)
    for word in left:
        above = 0
        for column, other in enumerate(right, start=1):
            here = row[column]
            row[column] = above + 1 if word == other else max(here, row[column - 1])
            above = here
    return row[-1]
