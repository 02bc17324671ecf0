"""What a quality rule is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tasks.corpus.reading import Reading


@dataclass(frozen=True)
class Rule:
    """`measure` gives the number that must lie between the config's fields `low` and `high`.

    A rule that cannot judge a document (too little prose, another language) gives None.
    """

    name: str
    measure: Callable[[Reading], float | None]
    low: str = ""  # field of QualityConfig, or empty: no lower bound
    high: str = ""
