"""What goes into fetching a partition and what comes out: plain data for Ray tasks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tasks.corpus import warc
from tasks.corpus.robots import Robots
from tasks.corpus.site_options import Site
from tasks.corpus.urls import Aliases

SEGMENTS = "_segments"

# Why a host is left in the middle of a crawl; the first two may have passed by the next run.
NO_ANSWER = "host gives no answer"
LONG_PAUSE = "host asks for a pause longer than max_delay"
TOO_MANY_FAILURES = "too many requests of the host failed"
DOWN = frozenset({NO_ANSWER, LONG_PAUSE})


@dataclass(frozen=True)
class Request:
    """One address to ask for, with what is known of its last answer."""

    url: str  # by its document name
    kind: str = "page"  # or "sitemap"
    etag: str = ""
    modified: str = ""
    digest: str = ""
    record_id: str = ""
    record_url: str = ""  # the address that record carries
    fetched_at: str = ""
    content_type: str = ""


@dataclass(frozen=True)
class HostPlan:
    """A host's requests of this round, and how it wants to be asked."""

    host: str
    requests: tuple[Request, ...]
    robots: dict[str, Robots] = field(default_factory=dict)  # by origin
    delay: float | None = None  # seconds; None while its robots.txt is unknown
    backoff: float = 0  # seconds between requests to which trouble or slowness led
    not_before: float = 0  # Unix time
    left: str = ""  # why it is asked nothing more


@dataclass(frozen=True)
class Limits:
    """How every host is asked. Seconds and bytes."""

    user_agent: str
    token: str  # product token matched against robots.txt
    contact: str
    delay: float
    max_delay: float
    timeout: float
    max_bytes: int
    retries: int
    parallel: int
    content_types: tuple[str, ...]
    honour_opt_outs: bool = True
    try_sitemap: bool = True
    sites: tuple[Site, ...] = ()

    def site(self, host: str) -> Site | None:
        """The options of the most particular site that covers `host`."""
        covering = [site for site in self.sites if site.covers(host)]
        return max(covering, key=lambda site: len(site.host), default=None)


@dataclass(frozen=True)
class Plan:
    """Everything one Ray task needs; plain data."""

    name: str  # "0003-007": round and partition
    hosts: tuple[HostPlan, ...]
    limits: Limits
    aliases: Aliases
    private: tuple[tuple[str, int], ...]
    segment_bytes: int
    parallel: int  # requests of all its hosts in flight, at most


@dataclass(frozen=True)
class Outcome:
    """What became of one request; stands as JSON in the metadata record that commits it.

    `state` is fetched, not_modified (by status 304 or by the same payload), redirect, denied (by
    robots), skipped (by a limit) or error.
    """

    url: str
    kind: str
    state: str
    reason: str = ""
    status: int = 0
    content_type: str = ""
    etag: str = ""
    modified: str = ""
    digest: str = ""
    bytes: int = 0
    seconds: float = 0
    fetched_at: str = ""
    noindex: bool = False
    canonical: str = ""
    links: tuple[str, ...] = ()
    sitemaps: tuple[str, ...] = ()
    lastmods: tuple[str, ...] = ()  # of the links of a sitemap, one each or none at all
    links_invalid: int = 0  # that are no address
    links_left_out: int = 0  # behind the most that are taken from one page or sitemap
    location: str = ""
    robots: dict[str, Any] | None = None
    record_id: str = ""
    segment: str = ""  # where the record stands; not part of the JSON
    offset: int = 0
    length: int = 0

    def commit(self) -> dict[str, Any]:
        place = {"segment", "offset", "length"}
        values = {k: v for k, v in vars(self).items() if k not in place and v not in ("", 0, ())}
        return values | {"url": self.url, "kind": self.kind, "state": self.state}

    @classmethod
    def of_commit(cls, values: dict[str, Any], segment: str, at: warc.Member | None) -> Outcome:
        lists: dict[str, Any] = {
            key: tuple(values[key]) for key in ("links", "sitemaps", "lastmods") if key in values
        }
        outcome = cls(**(values | lists))
        if at is None:
            return outcome
        return dataclasses.replace(outcome, segment=segment, offset=at.offset, length=at.length)


@dataclass(frozen=True)
class HostResult:
    """A host after the round."""

    host: str
    delay: float | None
    backoff: float
    not_before: float
    robots: dict[str, Robots]
    sitemaps: tuple[str, ...]  # named by robots.txt
    tried: tuple[str, ...]  # sitemaps where they mostly are, as robots.txt names none
    left: str
    requests: int
    bytes: int
    paused: float  # seconds this host made us wait


@dataclass(frozen=True)
class PartitionResult:
    outcomes: tuple[Outcome, ...]
    hosts: tuple[HostResult, ...]
    segments: tuple[str, ...]
