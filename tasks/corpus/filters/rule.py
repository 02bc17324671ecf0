"""What a quality rule is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tasks.corpus.reading import Reading, Readings


@dataclass(frozen=True)
class Rule:
    """What is measured must lie between the config's fields `low` and `high`.

    `measure` gives the number of one document, `together` those of several where that is cheaper.
    A rule that cannot judge a document (too little prose) gives None; a document identified as
    being in a language that `judges` does not name, it is not asked about.
    """

    name: str
    measure: Callable[[Reading], float | None] | None = None
    together: Callable[[Readings], list[float | None]] | None = None
    low: str = ""  # field of QualityConfig, or empty: no lower bound
    high: str = ""
    judges: Callable[[str], bool] = lambda language: True  # ISO 639-1, or und

    def of(self, readings: Readings) -> list[float | None]:
        """The measures of these documents, in order."""
        if self.together is not None:
            return self.together(readings)
        assert self.measure is not None
        return list(map(self.measure, readings.each))
