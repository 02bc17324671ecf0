"""The tables a crawl is: a row for every address ever seen, a row for every host."""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa

from tasks.corpus.change_rate import History
from tasks.corpus.robots import Robots

# The body of these stands in a record of the epoch before; a stale one could not be had for a
# passing reason.
CARRIED_STATES = frozenset({"not_modified", "stale"})
DOCUMENT_STATES = CARRIED_STATES | {"fetched"}

URLS = pa.schema(
    [
        ("url", pa.string()),
        ("kind", pa.string()),  # page or sitemap
        ("state", pa.string()),  # queued, stale, or as in tasks.corpus.fetch_plan.Outcome
        ("reason", pa.string()),  # why it is not a document, or stale
        ("status", pa.int32()),  # HTTP
        ("depth", pa.int32()),  # links from a seed
        ("redirects", pa.int32()),  # hops that led here
        ("source", pa.string()),  # the page that named it; empty for seeds
        ("robots", pa.string()),  # allowed, denied, or empty where nobody asked
        ("noindex", pa.bool_()),
        ("content_type", pa.string()),
        ("etag", pa.string()),
        ("modified", pa.string()),
        ("digest", pa.string()),
        ("bytes", pa.int64()),
        ("seconds", pa.float64()),
        ("fetched_at", pa.string()),
        ("canonical", pa.string()),
        ("location", pa.string()),  # where a redirect points
        ("record_id", pa.string()),
        ("segment", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("visits", pa.int32()),  # after the first, over all epochs (tasks.corpus.change_rate)
        ("changes", pa.int32()),
        ("first", pa.string()),
        ("checked", pa.string()),
        ("stale", pa.int32()),  # epochs in a row in which it could not be had
        ("lastmod", pa.string()),  # when it changed last by its sitemap, ISO 8601, or empty
    ]
)
HOSTS = pa.schema(
    [
        ("host", pa.string()),
        ("in_scope", pa.bool_()),
        ("delay", pa.float64()),  # seconds between requests; null until robots.txt was asked
        ("backoff", pa.float64()),  # longer delay to which trouble or slow answers led, seconds
        ("not_before", pa.float64()),
        ("robots", pa.string()),  # JSON: origin → what its robots.txt said
        ("left", pa.string()),  # why it is asked nothing more, or empty
        ("requests", pa.int64()),
        ("bytes", pa.int64()),
        ("paused", pa.float64()),  # seconds
        ("links", pa.int64()),  # links to a host out of scope
    ]
)


@dataclass
class Address:
    """One row of the URL table."""

    url: str
    kind: str = "page"
    state: str = "queued"
    reason: str = ""
    status: int = 0
    depth: int = 0
    redirects: int = 0
    source: str = ""
    robots: str = ""
    noindex: bool = False
    content_type: str = ""
    etag: str = ""
    modified: str = ""
    digest: str = ""
    bytes: int = 0
    seconds: float = 0.0
    fetched_at: str = ""
    canonical: str = ""
    location: str = ""
    record_id: str = ""
    segment: str = ""
    offset: int = 0
    length: int = 0
    visits: int = 0
    changes: int = 0
    first: str = ""
    checked: str = ""
    stale: int = 0
    lastmod: str = ""

    @property
    def history(self) -> History:
        return History(self.visits, self.changes, self.first or self.fetched_at, self.checked)

    @property
    def is_document(self) -> bool:
        return self.kind == "page" and self.state in DOCUMENT_STATES and not self.noindex


@dataclass
class Host:
    """One row of the host table."""

    host: str
    in_scope: bool = False
    delay: float | None = None
    backoff: float = 0.0
    not_before: float = 0.0
    robots: dict[str, Robots] = field(default_factory=dict)
    left: str = ""
    requests: int = 0
    bytes: int = 0
    paused: float = 0.0
    links: int = 0


@dataclass(frozen=True)
class Earlier:
    """What the epoch before knew of a page: enough for a conditional request and for its 304."""

    address: Address
    record_url: str
    links: tuple[str, ...]
