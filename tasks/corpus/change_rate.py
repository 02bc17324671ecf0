"""How often a page changes, and so how likely it has changed since it was last looked at.

Cho and Garcia-Molina, Estimating frequency of change (ACM TOIT 3(3), 2003): of n visits at about
equal intervals X found a change; changes being a Poisson process, the rate for an interval is
−ln((n − X + ½) / (n + ½)), which is nearly without bias where −ln(1 − X/n) is not and is infinite
for X = n. It is 0 for a page that was never seen to change, which would never be asked for again;
so we divide by n + 1: half a change more, that counts less with every visit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

DAY = 86_400.0


@dataclass(frozen=True)
class History:
    """Visits after the first, how many of them found other content, first and last visit."""

    visits: int = 0
    changes: int = 0
    first: str = ""  # ISO 8601
    checked: str = ""

    def after(self, changed: bool, moment: str) -> History:
        return History(self.visits + 1, self.changes + changed, self.first or moment, moment)

    @property
    def changes_per_day(self) -> float:
        """0 where nothing can be said: one visit, or all at the same moment."""
        span = _seconds(self.checked) - _seconds(self.first)
        if not self.visits or span <= 0:
            return 0.0
        rate = -math.log((self.visits - self.changes + 0.5) / (self.visits + 1))
        return rate * self.visits / (span / DAY)

    def chance_of_change(self, now: float) -> float:
        """Between 0 and 1, at Unix time `now`; 1 where nothing can be said."""
        rate = self.changes_per_day
        if not rate:
            return 1.0
        return 1 - math.exp(-rate * max(now - _seconds(self.checked), 0.0) / DAY)


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp() if moment else 0.0
