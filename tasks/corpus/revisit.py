"""What a later epoch makes of pages it knows: which it asks for, and which it keeps without.

A page that cannot be had for a passing reason stays as it was, for some epochs; so do the links and
redirects that lead to others. What is gone (404, 410), or no longer wants to be had, goes at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tasks.corpus.addresses import Address, Earlier, Host
from tasks.corpus.fetch_plan import Outcome

# 0: no answer at all. 200: a sitemap that could not be read. 408, 425, 429: ask again later.
PASSING = frozenset({0, 200, 408, 425, 429})
LASTING = frozenset({"private address", "credentials only over https"})
NO_ROBOTS = "robots.txt answered"
NOT_ASKED = "not asked"


def may_have_passed(outcome: Outcome) -> bool:
    """Whether what kept us from an address may be over by the next epoch."""
    if outcome.state == "denied":
        return outcome.reason.startswith(NO_ROBOTS)  # with 5xx or 429: nobody said no
    if outcome.state != "error" or outcome.reason in LASTING:
        return False
    return outcome.status in PASSING or outcome.status >= 500


@dataclass(frozen=True)
class Lead:
    """Where an address that is no document itself led in the epoch before."""

    location: str = ""
    links: tuple[str, ...] = ()
    sitemaps: tuple[str, ...] = ()  # that a sitemap names
    stale: int = 0


@dataclass(frozen=True)
class Revisit:
    """How known pages are taken up.

    Those less likely to have changed than `chance`, where `allowed` says that robots.txt as it is
    now lets us have them, are taken over without asking. For `keep_stale` epochs in a row what
    cannot be had stays as it was; `leads` are the redirects and sitemaps of the epoch before.
    """

    chance: float = 0.0
    allowed: Callable[[Host, str], bool] = lambda host, url: False
    keep_stale: int = 0
    leads: Mapping[str, Lead] = field(default_factory=dict)

    def kept(self, outcome: Outcome, earlier: Earlier | None) -> tuple[Outcome, int]:
        """The outcome, or what it was before in its place, and for how many epochs it has been."""
        lead = self.leads.get(outcome.url)
        if (earlier is None and lead is None) or not may_have_passed(outcome):
            return outcome, 0
        stale = 1 + (earlier.address.stale if earlier else lead.stale if lead else 0)
        if stale > self.keep_stale:
            return outcome, 0
        if earlier is not None:
            return dataclasses.replace(outcome, state="stale", digest=earlier.address.digest), stale
        assert lead is not None
        outcome = dataclasses.replace(
            outcome, location=lead.location, links=lead.links, sitemaps=lead.sitemaps
        )
        return outcome, stale


def take_over(address: Address, outcome: Outcome, known: Address) -> None:
    """An address whose body stands in the record of the epoch before."""
    address.content_type, address.bytes = known.content_type, known.bytes
    address.canonical, address.noindex = known.canonical, known.noindex
    address.etag, address.modified = known.etag, known.modified
    if outcome.state != "stale":  # an error page has validators of its own
        address.etag = outcome.etag or address.etag
        address.modified = outcome.modified or address.modified
    address.record_id, address.fetched_at = known.record_id, known.fetched_at
    address.segment, address.offset, address.length = "", known.offset, known.length


def remember(address: Address, outcome: Outcome, known: Address | None) -> None:
    """What this visit says of how often the page changes; one in vain says nothing."""
    if known is None:
        address.first = address.checked = outcome.fetched_at
        return
    history = known.history
    if outcome.state != "stale" and outcome.reason != NOT_ASKED:
        history = history.after(outcome.digest != known.digest, outcome.fetched_at)
    address.visits, address.changes = history.visits, history.changes
    address.first, address.checked = history.first, history.checked
