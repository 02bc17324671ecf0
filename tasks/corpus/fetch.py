"""Fetching one partition of a round: some hosts, each polite, all at once, into one WARC segment.

A partition's outcome is a function of its plan and of the segments it wrote. Run again after a
kill, it reads what its segments already hold and asks only for the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import ssl
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from tasks.corpus import warc
from tasks.corpus.guard import GuardedResolver, PrivateAddressError
from tasks.corpus.links import page_links, sitemap_links
from tasks.corpus.robots import MAX_REDIRECTS, Robots
from tasks.corpus.urls import Aliases, canonical_url, host_of
from tasks.runtime.stage import Workspace

SEGMENTS = "_segments"
FAILURES_TO_GIVE_UP = 5  # requests in a row without any answer: the host is down
HOSTS_AT_ONCE = 200  # of one partition; each has its own connections
MAX_ERROR_BODY = 64 * 1024
MAX_SITEMAP_BYTES = 50 * 1024 * 1024
REDIRECT = frozenset({301, 302, 303, 307, 308})
RETRIED = frozenset({429, 500, 502, 503, 504})


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


@dataclass(frozen=True)
class HostPlan:
    """A host's requests of this round, and how it wants to be asked."""

    host: str
    requests: tuple[Request, ...]
    robots: dict[str, Robots] = field(default_factory=dict)  # by origin
    delay: float | None = None  # seconds; None while its robots.txt is unknown
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


@dataclass(frozen=True)
class Plan:
    """Everything one Ray task needs; plain data."""

    name: str  # "0003-007": round and partition
    hosts: tuple[HostPlan, ...]
    limits: Limits
    aliases: Aliases
    private: tuple[tuple[str, int], ...]
    segment_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What became of one request; stands as JSON in the metadata record that commits it.

    `state` is fetched, not_modified, redirect, denied (by robots), skipped (by a limit) or error.
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
            key: tuple(values[key]) for key in ("links", "sitemaps") if key in values
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
    not_before: float
    robots: dict[str, Robots]
    sitemaps: tuple[str, ...]  # named by robots.txt
    left: str
    requests: int
    bytes: int
    paused: float  # seconds this host made us wait


@dataclass(frozen=True)
class PartitionResult:
    outcomes: tuple[Outcome, ...]
    hosts: tuple[HostResult, ...]
    segments: tuple[str, ...]


def fetch_partition(plan: Plan, work: Workspace) -> PartitionResult:
    """Fetch what the plan asks for and its segments do not hold yet. The Ray task of the crawl."""
    segments = _Segments(plan, work)
    try:
        done = list(segments.replay())
        results = asyncio.run(_fetch(plan, segments, done))
    finally:
        segments.close()
    names = segments.commit()
    outcomes = [outcome for outcome in done if outcome.kind != "robots"]
    return PartitionResult(tuple(outcomes), tuple(results), tuple(names))


class _Segments:
    """The partition's WARC files: the open one on this machine, full ones in the work directory."""

    def __init__(self, plan: Plan, work: Workspace) -> None:
        self._plan, self._work = plan, work
        self._local = work.scratch("open")
        self._number = 0
        self._writer: warc.SegmentWriter | None = None

    def _name(self, number: int) -> str:
        return f"{self._plan.name}-{number:04d}.warc.gz"

    def replay(self) -> Iterator[Outcome]:
        """What earlier attempts committed; an open segment is cut back to its last commit."""
        while True:
            name = self._name(self._number)
            if self._work.has(f"{SEGMENTS}/{name}"):
                data = self._work.read_bytes(f"{SEGMENTS}/{name}")
                (self._local / name).unlink(missing_ok=True)
                self._number += 1
            elif (self._local / name).exists():
                warc.mend(self._local / name)
                data = (self._local / name).read_bytes()
                self._number += 1
            else:
                break
            for values, member in warc.commits(data):
                yield Outcome.of_commit(values, name, member)

    def append(self, outcome: Outcome, records: tuple[bytes, ...], url: str) -> Outcome:
        """Write an outcome with its request and response records; returns it with its place."""
        if self._writer is not None and self._writer.size >= self._plan.segment_bytes:
            self._writer.close()
            self._writer = None
            self._number += 1
        if self._writer is None:
            self._writer = warc.SegmentWriter(
                self._local / self._name(self._number),
                software="Gristmill",
                robots="RFC 9309",
                format="WARC File Format 1.1",
                **{"http-header-user-agent": self._plan.limits.user_agent},
            )
        commit = warc.metadata_record(url, outcome.record_id, outcome.commit())
        places = self._writer.append([*records, commit])
        if len(records) < 2:
            return outcome
        return dataclasses.replace(
            outcome,
            segment=self._name(self._number),
            offset=places[1][0],
            length=places[1][1],
        )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def commit(self) -> list[str]:
        """Copy the segments into the work directory, where the next step finds them."""
        names = []
        for number in range(self._number + 1):
            name = self._name(number)
            if (self._local / name).exists():
                if not self._work.has(f"{SEGMENTS}/{name}"):
                    self._work.put(self._local / name, f"{SEGMENTS}/{name}")
                (self._local / name).unlink()
            if self._work.has(f"{SEGMENTS}/{name}"):
                names.append(name)
        return names


async def _fetch(plan: Plan, segments: _Segments, done: list[Outcome]) -> list[HostResult]:
    limits = plan.limits
    resolver = GuardedResolver(plan.private)
    connector = aiohttp.TCPConnector(resolver=resolver, limit=0, ttl_dns_cache=300)
    headers = {
        "User-Agent": limits.user_agent,
        "Accept": "text/html,application/xhtml+xml,text/plain;q=0.9,*/*;q=0.1",
        "Accept-Encoding": "gzip, deflate",
    }
    if "@" in limits.contact:
        headers["From"] = limits.contact.removeprefix("mailto:")
    async with aiohttp.ClientSession(
        connector=connector,
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=limits.timeout, sock_connect=min(limits.timeout, 15)),
        max_line_size=16_384,
        max_field_size=32_768,
    ) as session:
        # aiohttp would repeat a request on a dropped connection by itself, without the delay.
        session._retry_connection = False
        fetchers = [
            HostFetcher(host, plan, session, resolver, segments, done) for host in plan.hosts
        ]
        room = asyncio.Semaphore(HOSTS_AT_ONCE)

        async def fetch_host(fetcher: HostFetcher) -> None:
            async with room:
                await fetcher.run()

        await asyncio.gather(*(fetch_host(fetcher) for fetcher in fetchers))
    return [fetcher.result() for fetcher in fetchers]


@dataclass(frozen=True)
class _Retry:
    """A request worth repeating, with the outcome it has if it is not repeated."""

    outcome: Outcome
    records: tuple[bytes, ...]
    after: float | None  # seconds the server asked for


@dataclass
class _Answer:
    exchange: warc.Exchange
    etag: str
    modified: str
    content_type: str
    charset: str | None
    directives: tuple[str, ...]
    location: str
    retry_after: float | None
    refused: str = ""  # why the body was not read to its end


class HostFetcher:
    """One host's requests, spaced by its delay, at most `parallel` in flight."""

    def __init__(
        self,
        host: HostPlan,
        plan: Plan,
        session: aiohttp.ClientSession,
        resolver: GuardedResolver,
        segments: _Segments,
        done: list[Outcome],
    ) -> None:
        self._host, self._aliases, self._limits = host, plan.aliases, plan.limits
        self._session, self._resolver = session, resolver
        self._segments, self._done = segments, done
        self._robots = dict(host.robots)
        self._base_delay = host.delay
        self._delay = host.delay if host.delay is not None else plan.limits.delay
        self._last_start = -math.inf  # monotonic seconds, like _hold_until
        self._hold_until = time.monotonic() + max(host.not_before - time.time(), 0)
        self._silent = 0  # requests in a row without an answer
        self._left = host.left
        self._paused = 0.0
        own = [outcome for outcome in done if host_of(outcome.url) == host.host]
        self._requests, self._bytes = len(own), sum(outcome.bytes for outcome in own)
        for outcome in own:
            if outcome.robots is not None:
                self._set_robots(outcome.url.removesuffix("/robots.txt"), Robots(**outcome.robots))
            if outcome.fetched_at:  # the delay goes on across a restart
                ago = time.time() - datetime.fromisoformat(outcome.fetched_at).timestamp()
                self._last_start = max(self._last_start, time.monotonic() - max(ago, 0.0))
        finished = {outcome.url for outcome in own}
        self._waiting = deque((r, 1) for r in host.requests if r.url not in finished)

    def result(self) -> HostResult:
        return HostResult(
            self._host.host,
            self._base_delay,
            time.time() + max(self._pause(), 0),
            self._robots,
            tuple(self._sitemaps()),
            self._left,
            self._requests,
            self._bytes,
            round(self._paused, 3),
        )

    def _sitemaps(self) -> Iterator[str]:
        for origin, robots in self._robots.items():
            for url in robots.sitemaps:
                with contextlib.suppress(ValueError):
                    yield self._aliases.name(canonical_url(url, self._aliases.place(f"{origin}/")))

    async def run(self) -> None:
        running: set[asyncio.Task[None]] = set()
        try:
            while self._waiting or running:
                if self._waiting and len(running) < self._limits.parallel:
                    request, attempt = self._waiting[0]
                    verdict = await self._verdict(request)
                    if verdict is not None:
                        self._waiting.popleft()
                        self._done.append(verdict)
                        continue
                    pause = self._pause()
                    if pause <= 0:
                        self._waiting.popleft()
                        self._last_start = time.monotonic()
                        running.add(asyncio.create_task(self._attempt(request, attempt)))
                        continue
                    self._paused += pause
                    await asyncio.sleep(pause)
                else:
                    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in running if task.done()]:
                    running.remove(task)
                    task.result()
        finally:
            for task in running:
                task.cancel()

    def _pause(self) -> float:
        """Seconds until the next request may start; start to start, as robots.txt means it."""
        return max(self._last_start + self._delay, self._hold_until) - time.monotonic()

    async def _verdict(self, request: Request) -> Outcome | None:
        """The outcome of a request that must not be made; None when it may."""
        if self._left:
            return self._unasked(request, "error", self._left)
        place = self._aliases.place(request.url)
        origin = _origin(request.url)
        if origin not in self._robots:
            await self._fetch_robots(origin)
        robots = self._robots[origin]
        if robots.failure:
            return self._unasked(request, "error", robots.failure)
        if robots.policy == "none":
            return self._unasked(request, "denied", f"robots.txt answered {robots.status}")
        if not robots.allows(place, self._limits.token):
            return self._unasked(request, "denied", "robots.txt disallows it")
        if self._delay > self._limits.max_delay:
            return self._unasked(
                request, "denied", f"asks for {self._delay:.0f} s between requests"
            )
        return None

    def _unasked(self, request: Request, state: str, reason: str) -> Outcome:
        return Outcome(request.url, request.kind, state, reason)

    def _set_robots(self, origin: str, robots: Robots) -> None:
        self._robots[origin] = robots
        asked = robots.crawl_delay(self._limits.token)
        self._base_delay = self._limits.delay if asked is None else asked
        self._delay = max(self._base_delay, 0.0)

    async def _fetch_robots(self, origin: str) -> None:
        """Ask for an origin's robots.txt, following redirects (RFC 9309, section 2.3.1.2)."""
        target = url = f"{origin}/robots.txt"
        failure = ""
        records: tuple[bytes, ...] = ()
        outcome = Outcome(url, "robots", "error")
        robots = Robots("none")
        for attempt in range(1, self._limits.retries + 2):
            for _ in range(MAX_REDIRECTS + 1):
                await asyncio.sleep(max(self._pause(), 0))
                self._last_start = time.monotonic()
                try:
                    answer = await self._ask(
                        self._aliases.place(target), {}, None, MAX_ERROR_BODY * 8
                    )
                    failure = ""
                except _FAILURES as error:
                    failure = _failure(error)
                    break
                status = answer.exchange.status
                robots = Robots.of_response(status, answer.exchange.body)
                identifier = warc.record_id()
                digest = warc.payload_digest(answer.exchange.body)
                records = warc.response_records(answer.exchange, digest, identifier)
                outcome = Outcome(
                    url, "robots", "fetched", status=status, digest=digest, record_id=identifier
                )
                if status not in REDIRECT or not answer.location:
                    break
                try:
                    target = canonical_url(answer.location, self._aliases.place(target))
                except ValueError:
                    robots = Robots("all", "", status)
                    break
            else:
                robots = Robots("all", "", status)  # five redirects count as no file
            worth = failure not in ("private address", "name not resolved", "TLS error")
            if robots.policy != "none" or attempt > self._limits.retries or (failure and not worth):
                break
            await asyncio.sleep(min(2.0 ** (attempt - 1), self._limits.max_delay))
        if failure:
            robots, records = Robots("none", failure=failure), ()
            outcome = Outcome(url, "robots", "error", failure)
        outcome = dataclasses.replace(
            outcome, robots=dataclasses.asdict(robots), fetched_at=warc.warc_date()
        )
        self._done.append(self._segments.append(outcome, records, self._aliases.place(url)))
        self._set_robots(origin, robots)

    async def _attempt(self, request: Request, attempt: int) -> None:
        """One request; its outcome is committed, or it waits for another attempt."""
        begun = time.monotonic()
        try:
            result = await self._get(request)
            self._silent = 0
        except _FAILURES as error:
            reason = _failure(error)
            final = isinstance(error, PrivateAddressError) or reason in (
                "private address",
                "TLS error",
            )
            if not final:
                self._silent += 1
                if self._silent >= FAILURES_TO_GIVE_UP:
                    self._left = "host gives no answer"
            failed = Outcome(request.url, request.kind, "error", reason)
            result = (failed, ()) if final else _Retry(failed, (), None)
        if isinstance(result, _Retry):
            self._slow_down(result.after, attempt)
            if result.after is not None and result.after > self._limits.max_delay:
                self._left = "host asks for a pause longer than max_delay"
            if attempt <= self._limits.retries and not self._left:
                self._waiting.append((request, attempt + 1))
                return
            outcome, records = result.outcome, result.records
        else:
            outcome, records = result
            self._delay = max(self._base_delay or 0.0, self._delay * 0.9)
        seconds = round(time.monotonic() - begun, 4)
        outcome = dataclasses.replace(
            outcome, seconds=seconds, fetched_at=outcome.fetched_at or warc.warc_date()
        )
        place = self._aliases.place(request.url)
        self._done.append(self._segments.append(outcome, records, place))

    def _slow_down(self, after: float | None, attempt: int) -> None:
        """Back off from a host in trouble: its own Retry-After, or twice the delay."""
        limit = self._limits.max_delay
        self._delay = min(max(2 * self._delay, 0.25), max(limit, self._base_delay or 0.0))
        pause = min(after, limit) if after is not None else min(0.5 * 2.0 ** (attempt - 1), limit)
        self._hold_until = max(self._hold_until, time.monotonic() + pause)

    async def _get(self, request: Request) -> tuple[Outcome, tuple[bytes, ...]] | _Retry:
        headers = {}
        if request.etag:
            headers["If-None-Match"] = request.etag
        if request.modified:
            headers["If-Modified-Since"] = request.modified
        place = self._aliases.place(request.url)
        types = self._limits.content_types if request.kind == "page" else None
        size = self._limits.max_bytes if request.kind == "page" else MAX_SITEMAP_BYTES
        answer = await self._ask(place, headers, types, size)
        exchange = answer.exchange
        identifier = warc.record_id()
        outcome = Outcome(
            request.url,
            request.kind,
            "fetched",
            status=exchange.status,
            content_type=answer.content_type,
            etag=answer.etag,
            modified=answer.modified,
            digest=warc.payload_digest(exchange.body),
            bytes=len(exchange.body),
            fetched_at=exchange.date,
            record_id=identifier,
        )
        if exchange.status == 304 and request.digest:
            outcome = dataclasses.replace(
                outcome, state="not_modified", digest=request.digest, content_type=""
            )
            earlier = warc.Earlier(
                request.record_id, request.record_url, request.fetched_at, request.digest
            )
            records = warc.revisit_records(exchange, earlier, identifier)
            return outcome, records
        records = warc.response_records(exchange, outcome.digest, identifier)
        if exchange.status in REDIRECT:
            return self._redirected(outcome, answer, place), records
        if exchange.status != 200:
            failed = dataclasses.replace(outcome, state="error", reason=f"HTTP {exchange.status}")
            if exchange.status in RETRIED:
                return _Retry(failed, records, answer.retry_after)
            return failed, records
        if answer.refused:
            return dataclasses.replace(
                outcome, state="skipped", reason=answer.refused, digest="", bytes=0, record_id=""
            ), ()
        if not exchange.body:
            return dataclasses.replace(outcome, state="skipped", reason="empty"), records
        return self._read(request, outcome, answer, place, records)

    def _redirected(self, outcome: Outcome, answer: _Answer, place: str) -> Outcome:
        try:
            location = self._aliases.name(canonical_url(answer.location, place))
        except ValueError:
            return dataclasses.replace(outcome, state="error", reason="redirect to no address")
        return dataclasses.replace(outcome, state="redirect", location=location)

    def _read(
        self,
        request: Request,
        outcome: Outcome,
        answer: _Answer,
        place: str,
        records: tuple[bytes, ...],
    ) -> tuple[Outcome, tuple[bytes, ...]]:
        body, names = answer.exchange.body, self._aliases.name
        if request.kind == "sitemap":
            try:
                pages, maps = sitemap_links(body, place)
            except ValueError as error:
                return dataclasses.replace(
                    outcome, state="error", reason=f"sitemap: {error}"
                ), records
            return dataclasses.replace(
                outcome, links=tuple(map(names, pages)), sitemaps=tuple(map(names, maps))
            ), records
        if answer.content_type.partition(";")[0].strip().lower() == "text/plain":
            return outcome, records
        found = page_links(body, place, answer.charset, answer.directives, self._limits.token)
        outcome = dataclasses.replace(
            outcome,
            links=tuple(map(names, found.links)),
            canonical=names(found.canonical),
            noindex=found.noindex,
        )
        # A noindex page is read for its links and not kept.
        return outcome, () if found.noindex else records

    async def _ask(
        self, url: str, headers: dict[str, str], types: tuple[str, ...] | None, max_bytes: int
    ) -> _Answer:
        """One HTTP request. Raises one of _FAILURES when no whole answer comes."""
        self._resolver.check_literal(url)
        self._requests += 1
        date = warc.warc_date()
        async with self._session.get(
            URL(url, encoded=True), headers=headers, allow_redirects=False
        ) as response:
            address = _peer(response)
            content_type = response.headers.get("Content-Type", "")
            refused = ""
            if response.status == 200 and types is not None:
                media = content_type.partition(";")[0].strip().lower() or "text/html"
                if media not in types:
                    refused = f"content type {media}"
                elif (response.content_length or 0) > max_bytes:
                    refused = "too large"
            body = bytearray()
            if not refused:
                limit = max_bytes if response.status == 200 else MAX_ERROR_BODY
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > limit:
                        if response.status == 200:
                            refused = "too large"
                        body = body[:limit]
                        response.close()
                        break
            self._bytes += len(body)
            request_info = response.request_info
            path = URL(url, encoded=True).raw_path_qs
            head = f"GET {path} HTTP/1.1\r\n" + "".join(
                f"{name}: {value}\r\n" for name, value in request_info.headers.items()
            )
            pairs = tuple(
                (k.decode("utf-8", "surrogateescape"), v.decode("utf-8", "surrogateescape"))
                for k, v in response.raw_headers
            )
            return _Answer(
                warc.Exchange(
                    url,
                    (head + "\r\n").encode("utf-8", "replace"),
                    response.status,
                    response.reason or "",
                    pairs,
                    bytes(body),
                    address,
                    date,
                ),
                response.headers.get("ETag", ""),
                response.headers.get("Last-Modified", ""),
                content_type,
                response.charset,
                tuple(response.headers.getall("X-Robots-Tag", [])),
                response.headers.get("Location", ""),
                _retry_after(response.headers.get("Retry-After", "")),
                refused,
            )


_FAILURES = (aiohttp.ClientError, TimeoutError, OSError, ValueError)


def _failure(error: BaseException) -> str:
    """A failed request's reason in a few words, the same for the same cause."""
    causes: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in causes:
        causes.append(following)
        inner = getattr(following, "os_error", None)
        following = inner if isinstance(inner, BaseException) else following.__cause__
    if any(isinstance(cause, PrivateAddressError) for cause in causes):
        return "private address"
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "name not resolved"
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return "TLS error"
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        return "connection refused"
    if isinstance(error, aiohttp.ContentTypeError | aiohttp.ClientPayloadError):
        return "truncated or damaged body"
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError):
        return "connection closed"
    if isinstance(error, aiohttp.ClientConnectorError | OSError):
        return "no connection"
    return "not HTTP"


def _peer(response: aiohttp.ClientResponse) -> str:
    connection = response.connection
    if connection is None or connection.transport is None:
        return ""
    peer = connection.transport.get_extra_info("peername")
    return str(peer[0]) if peer else ""


def _retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, section 10.2.3): a number or a date."""
    if not value:
        return None
    try:
        return max(float(int(value)), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
