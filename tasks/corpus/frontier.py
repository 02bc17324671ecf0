"""The crawl's state: every address ever seen, what became of it, and what to ask for next.

Generate → fetch → update, the round of the engines that crawl the whole web. `generate` and
`update` are deterministic: the same answers give the same state, whatever the timing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from tasks.corpus.addresses import (
    CARRIED_STATES,
    DOCUMENT_STATES,
    HOSTS,
    URLS,
    Address,
    Earlier,
    Host,
)
from tasks.corpus.fetch_plan import HostPlan, HostResult, Outcome, Request
from tasks.corpus.revisit import NOT_ASKED, Revisit, may_have_passed, remember, take_over
from tasks.corpus.robots import Robots
from tasks.corpus.urls import Scope, host_of, numbered_shape

MAX_QUERIES = 500  # distinct query strings below one path; more is an endless space
TRIED = "tried, as robots.txt names no sitemap"
OF_PAGES = ("file type", "excluded", "not included")  # reasons that are none for a sitemap
CIRCLE = "redirects in a circle"
MAX_REQUESTS_PER_ROUND = 1000  # of one host


class Frontier:
    """URL and host tables in memory, in order of discovery.

    A row costs some 600 bytes, so one driver holds a few million addresses; beyond that the tables
    are to be cut by host, as rounds already are.
    """

    def __init__(
        self,
        scope: Scope,
        max_pages: int,
        max_redirects: int,
        round_seconds: float,
        earlier: Mapping[str, Earlier] | None = None,
        forgotten: Callable[[str], object] = lambda url: None,
        revisit: Revisit | None = None,
        max_pages_per_host: int | None = None,
        max_numbered: int = 10_000,
    ) -> None:
        self.scope, self.max_pages, self.max_redirects = scope, max_pages, max_redirects
        self.max_pages_per_host, self.max_numbered = max_pages_per_host, max_numbered
        self.round_seconds = round_seconds
        self.earlier = earlier or {}
        self._known_hosts = {host_of(url) for url in self.earlier}
        self.forgotten = forgotten
        self.revisit = revisit or Revisit()
        self.begun = time.time()  # saved with the rounds: one crawl is of one moment
        self.addresses: dict[str, Address] = {}
        self.hosts: dict[str, Host] = {}
        self.counts: Counter[str] = Counter()
        self._queries: Counter[tuple[str, str]] = Counter()
        self._numbered: Counter[tuple[str, str]] = Counter()

    # --- discovery -------------------------------------------------------------------------------

    def add_seed(self, url: str) -> None:
        self._include_host(host_of(url))
        self._add(Address(url))

    def _include_host(self, host: str) -> None:
        self.hosts.setdefault(host, Host(host)).in_scope = True
        self.scope = dataclasses.replace(self.scope, hosts=self.scope.hosts | {host})

    def _add(self, address: Address) -> None:
        known = self.addresses.get(address.url)
        if known is not None and address.kind == "sitemap" and _may_be_sitemap(known):
            known = None  # a page had a link to it
        if known is not None:
            self.counts["links to a known address"] += 1
            if known.state == "queued" and known.kind == address.kind:
                if address.depth < known.depth:
                    known.depth, known.source = address.depth, address.source
                known.lastmod = max(known.lastmod, address.lastmod)
                return
            if known.reason == NOT_ASKED and address.lastmod > known.checked:
                known.state, known.reason, known.lastmod = "queued", "", address.lastmod
            if known.reason != "too deep" or address.depth >= known.depth:
                return  # else a shorter way was found to it: it is judged anew
        reason = self._out_of_scope(address)
        if reason == "other host":
            host = host_of(address.url)
            self.hosts.setdefault(host, Host(host)).links += 1
            self.counts["links to another host"] += 1
            return
        reason = reason or self._endless(address)
        if reason:
            address.state, address.reason = "skipped", reason
        self.addresses[address.url] = address
        host = host_of(address.url)
        self.hosts.setdefault(host, Host(host)).in_scope = True

    def _out_of_scope(self, address: Address) -> str:
        reason = self.scope.reason(address.url, address.depth)
        if address.kind == "sitemap" and reason in OF_PAGES:
            return ""  # sitemaps are read, not kept: their own names say nothing
        return reason

    def _endless(self, address: Address) -> str:
        """Why one more address in scope is one of an endless space, or empty. Counts it."""
        parts = urlsplit(address.url)
        reason = ""
        if shape := numbered_shape(address.url):
            self._numbered[parts.netloc, shape] += 1
            over = self._numbered[parts.netloc, shape] > self.max_numbered
            if over and not self._is_vouched_for(address):
                reason = "trap: too many numbered pages"
        if parts.query:
            self._queries[parts.netloc, parts.path] += 1
            if self._queries[parts.netloc, parts.path] > MAX_QUERIES:
                reason = "trap: too many query strings"
        return reason

    def _is_vouched_for(self, address: Address) -> bool:
        """Whether an earlier epoch had the page or a sitemap names it."""
        source = self.addresses.get(address.source)
        return address.url in self.earlier or (source is not None and source.kind == "sitemap")

    # --- generate --------------------------------------------------------------------------------

    def generate(self) -> list[HostPlan]:
        """The next round's requests by host: nearest to the seeds first, as many as fit."""
        left = self.max_pages - sum(a.is_document for a in self.addresses.values())
        if left <= 0:
            return []
        queued = self._queue()
        # Stable: then by discovery. In a first epoch every chance is 1.
        queued.sort(key=lambda a: (a.kind != "sitemap", -round(self._chance(a), 3), a.depth))
        chosen: dict[str, list[Request]] = {}
        had = self._documents_by_host() if self.max_pages_per_host else Counter[str]()
        for address in queued:
            if address.kind == "page" and left <= 0:
                continue
            host = host_of(address.url)
            if self.max_pages_per_host and had[host] >= self.max_pages_per_host:
                continue
            requests = chosen.setdefault(host, [])
            if len(requests) < self._room(host):
                requests.append(self._request(address))
                left -= address.kind == "page"
                had[host] += address.kind == "page"
        plans = []
        for host, requests in sorted(chosen.items()):
            row = self.hosts[host]
            plans.append(
                HostPlan(
                    host,
                    tuple(requests),
                    row.robots,
                    row.delay,
                    row.backoff,
                    row.not_before,
                    row.left,
                )
            )
        return plans

    def _documents_by_host(self) -> Counter[str]:
        return Counter(host_of(a.url) for a in self.addresses.values() if a.is_document)

    def _queue(self) -> list[Address]:
        """The addresses to ask for; on the way, those that need no asking are done with."""
        queued: list[Address] = []
        todo = deque(a for a in self.addresses.values() if a.state == "queued")
        maps = [a.url for a in todo if a.kind == "sitemap" and not self.forgotten(a.url)]
        unread = {host_of(url) for url in maps} & self._known_hosts
        while todo:
            address = todo.popleft()
            if self.forgotten(address.url):  # asked here: a tombstone may be younger than the crawl
                address.state, address.reason = "skipped", "tombstoned"
            elif address.depth and address.kind == "page" and host_of(address.url) in unread:
                # Till its sitemap has said what changed. New ones wait too: under max_pages they
                # would take the place of known ones.
                continue
            elif self._needs_no_visit(address):
                known = len(self.addresses)
                self._take_over(address)
                found = itertools.islice(self.addresses.values(), known, None)
                todo.extend(a for a in found if a.state == "queued")
            else:
                queued.append(address)
        return queued

    def _chance(self, address: Address) -> float:
        """How likely another visit finds something new."""
        earlier = self.earlier.get(address.url)
        if earlier is None or address.kind != "page":
            return 1.0
        # A sitemap is believed where it says that a page changed, not where it says it did not.
        if address.lastmod > earlier.address.checked:
            return 1.0
        return earlier.address.history.chance_of_change(self.begun)

    def _needs_no_visit(self, address: Address) -> bool:
        return (
            address.depth > 0
            and address.url in self.earlier
            and not self.earlier[address.url].address.stale
            and self._chance(address) < self.revisit.chance
            and self.revisit.allowed(self.hosts[host_of(address.url)], address.url)
        )

    def _take_over(self, address: Address) -> None:
        known = self.earlier[address.url].address
        outcome = Outcome(address.url, "page", "not_modified", NOT_ASKED, digest=known.digest)
        self._follow(address, outcome, self._merge(address, outcome))
        self.counts["pages not asked for again"] += 1

    def _room(self, host: str) -> int:
        """Requests of one host that fit a round; a first round is small, its delay is unknown."""
        row = self.hosts[host]
        if row.delay is None:
            return 10
        delay = max(row.delay, row.backoff, 1e-3)
        return max(5, min(int(self.round_seconds / delay), MAX_REQUESTS_PER_ROUND))

    def _request(self, address: Address) -> Request:
        earlier = self.earlier.get(address.url)
        if earlier is None:
            return Request(address.url, address.kind)
        known = earlier.address
        return Request(
            address.url,
            address.kind,
            known.etag,
            known.modified,
            known.digest,
            known.record_id,
            earlier.record_url,
            known.fetched_at,
            known.content_type,
        )

    # --- update ----------------------------------------------------------------------------------

    def update(
        self, plans: Iterable[HostPlan], outcomes: Iterable[Outcome], hosts: Iterable[HostResult]
    ) -> dict[str, tuple[str, ...]]:
        """Merge a round's outcomes in the order of its plan, then those of a round that was longer
        before it was taken up again; returns the links of pages read."""
        by_url = {outcome.url: outcome for outcome in outcomes}
        planned = [request.url for plan in plans for request in plan.requests]
        known = self.addresses
        further = (u for u in sorted(by_url) if u in known and known[u].state == "queued")
        links: dict[str, tuple[str, ...]] = {}
        for url in dict.fromkeys([*planned, *further]):
            address, outcome = known[url], by_url.get(url)
            if outcome is None:
                continue
            if url not in self.revisit.leads:
                outcome = without_failure(address, outcome)
            outcome, address.stale = self.revisit.kept(outcome, self.earlier.get(url))
            found = self._merge(address, outcome)
            if found:
                links[url] = found
            self._follow(address, outcome, found)
        for result in hosts:
            row = self.hosts[result.host]
            row.delay, row.backoff = result.delay, result.backoff
            row.not_before = result.not_before
            row.robots, row.left = result.robots, result.left
            row.requests += result.requests
            row.bytes += result.bytes
            row.paused += result.paused
            named = f"robots.txt of {result.host}"
            for source, sitemaps in ((TRIED, result.tried), (named, result.sitemaps)):
                for sitemap in sitemaps:
                    names = {sitemap}
                    if source == TRIED:  # once for a host, not for http and for https
                        bare = sitemap.partition(":")[2]
                        names |= {f"http:{bare}", f"https:{bare}"}
                    met = [self.addresses[name] for name in names & self.addresses.keys()]
                    if all(one.url == sitemap and _may_be_sitemap(one) for one in met):
                        self._add(Address(sitemap, "sitemap", source=source))
        self._ask_again(time.time())
        return links

    def _ask_again(self, now: float) -> None:
        """Queue what nobody could say of whether it may be fetched, where it is time to ask anew.

        Here and not in `generate`: a round that was killed is generated as it was.
        """
        unsaid = {
            host.host
            for host in self.hosts.values()
            if not host.left
            and any(r.policy == "none" and r.is_stale(now) for r in host.robots.values())
        }
        if not unsaid:
            return
        for address in self.addresses.values():
            unasked = address.state in ("denied", "error", "stale") and not address.seconds
            if unasked and host_of(address.url) in unsaid:
                address.state, address.reason = "queued", ""

    def _merge(self, address: Address, outcome: Outcome) -> tuple[str, ...]:
        for name in (
            *("state", "reason", "status", "content_type", "etag", "modified", "digest", "bytes"),
            *("seconds", "fetched_at", "noindex", "canonical", "location", "record_id"),
            *("segment", "offset", "length"),
        ):
            setattr(address, name, getattr(outcome, name))
        address.robots = "denied" if outcome.state == "denied" else "allowed"
        if outcome.state in ("error", "stale") and not outcome.status:
            address.robots = ""  # nobody said
        self.counts["links that are no address"] += outcome.links_invalid
        self.counts["links left out"] += outcome.links_left_out
        earlier = self.earlier.get(address.url)
        if outcome.state in DOCUMENT_STATES:
            remember(address, outcome, earlier.address if earlier else None)
        if outcome.state in CARRIED_STATES and earlier is not None:
            take_over(address, outcome, earlier.address)
            return earlier.links
        return outcome.links

    def _follow(self, address: Address, outcome: Outcome, links: tuple[str, ...]) -> None:
        if outcome.location:
            if address.redirects >= self.max_redirects:
                address.state, address.reason = "error", "too many redirects"
                return
            if circle := self._circle(address):
                for one in circle:
                    one.state, one.reason = "error", CIRCLE
                return
            if address.depth == 0 and address.kind == "page":
                self._include_host(host_of(outcome.location))  # a seed may have moved
            self._add(
                Address(
                    outcome.location,
                    address.kind,
                    depth=address.depth,
                    redirects=address.redirects + 1,
                    source=TRIED if address.source == TRIED else address.url,
                )
            )
        if address.canonical and address.canonical != address.url:
            # Its own name for itself: where that exists, deduplication has the choice.
            self._add(Address(address.canonical, depth=address.depth + 1, source=address.url))
        for link, lastmod in itertools.zip_longest(links, outcome.lastmods, fillvalue=""):
            self._add(Address(link, depth=address.depth + 1, source=address.url, lastmod=lastmod))
        for sitemap in outcome.sitemaps:
            if address.depth < 3:  # an index of indexes, and no deeper
                self._add(Address(sitemap, "sitemap", depth=address.depth + 1, source=address.url))

    def _circle(self, address: Address) -> list[Address]:
        """The addresses of a chain of redirects back to `address`; none where the chain ends."""
        chain = [address]
        while len(chain) <= self.max_redirects + 1:
            target = chain[-1].location
            if target == address.url:
                return chain
            following = self.addresses.get(target)
            if following is None or following.state != "redirect":
                break
            chain.append(following)
        return []

    def close(self) -> None:
        """Name the reason of what is still queued when nothing more may be fetched."""
        had = self._documents_by_host()
        most = self.max_pages_per_host
        for address in self.addresses.values():
            if address.state == "queued":
                over = most is not None and had[host_of(address.url)] >= most
                reason = "over max_pages_per_host" if over else "over max_pages"
                address.state, address.reason = "skipped", reason

    # --- persistence -----------------------------------------------------------------------------

    def url_table(self) -> pa.Table:
        return pa.Table.from_pylist([vars(a) for a in self.addresses.values()], schema=URLS)

    def host_table(self) -> pa.Table:
        rows = [
            vars(host)
            | {"robots": json.dumps({o: dataclasses.asdict(r) for o, r in host.robots.items()})}
            for host in self.hosts.values()
        ]
        return pa.Table.from_pylist(rows, schema=HOSTS)

    def restore(self, urls: pa.Table, hosts: pa.Table, counts: Mapping[str, int]) -> None:
        """Take up the state another process saved."""
        self.addresses = {row["url"]: Address(**row) for row in urls.to_pylist()}
        self.hosts = {row["host"]: _host(row) for row in hosts.to_pylist()}
        self.counts = Counter(counts)
        known = frozenset(name for name, host in self.hosts.items() if host.in_scope)
        self.scope = dataclasses.replace(self.scope, hosts=self.scope.hosts | known)
        for address in self.addresses.values():
            if not self._out_of_scope(address):
                self._endless(address)


def _may_be_sitemap(known: Address) -> bool:
    """Whether an address that was taken for that of a page has not been asked for as one."""
    return known.kind == "page" and (known.state == "queued" or known.reason in OF_PAGES)


def without_failure(address: Address, outcome: Outcome) -> Outcome:
    """A sitemap nobody promised: where there is none, nothing failed."""
    passing = not outcome.status or (outcome.status != 200 and may_have_passed(outcome))
    if address.source != TRIED or passing:
        return outcome
    elsewhere = outcome.state == "redirect" and "sitemap" in outcome.location
    if elsewhere or outcome.links or outcome.sitemaps or outcome.state == "not_modified":
        return outcome
    return dataclasses.replace(outcome, state="skipped", reason="no sitemap", location="")


def _host(row: dict[str, Any]) -> Host:
    robots = {origin: Robots(**values) for origin, values in json.loads(row["robots"]).items()}
    return Host(**(row | {"robots": robots}))
