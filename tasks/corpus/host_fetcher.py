"""One host, asked politely: robots.txt first, a delay between requests, patience and its end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from urllib.parse import urlsplit

from tasks.corpus import warc
from tasks.corpus.charset import decode_marked
from tasks.corpus.client import Answer, Client, FetchError
from tasks.corpus.fetch_plan import (
    LONG_PAUSE,
    NO_ANSWER,
    TOO_MANY_FAILURES,
    HostPlan,
    HostResult,
    Outcome,
    Plan,
    Request,
)
from tasks.corpus.judged import REDIRECT, RETRIED, Judged, Retry, judged
from tasks.corpus.opt_out import MAX_LOCATIONS, OPT_OUT, tdm_locations
from tasks.corpus.robots import MAX_BYTES, MAX_REDIRECTS, Robots
from tasks.corpus.segments import Segments
from tasks.corpus.urls import canonical_url, host_of

FAILURES_TO_PROBE = 5  # failed requests in a row: is it the host, or are it these pages?
FAILURES_TO_LEAVE = 50  # failed requests of a round, if they are also a large share of it:
SHARE_TO_LEAVE = 0.5  # some bad pages, each asked for several times, are no reason
TDM_FILE = "/.well-known/tdmrep.json"
MAX_TDM_BYTES = 1024 * 1024
MAX_SITEMAP_BYTES = 50 * 1024 * 1024
# To read so much takes a fifth of a second at worst, of a page whose elements are nested as deep
# as can be. What is longer is read aside: other hosts do not wait for it (lxml lets go of the GIL).
MAX_BYTES_AT_ONCE = 256 * 1024


class _LeadsNowhere(FetchError):
    """A redirect led to another origin, which gives no answer and will give none."""


class HostFetcher:
    """One host's requests, spaced by its delay, at most `parallel` in flight."""

    def __init__(
        self,
        host: HostPlan,
        plan: Plan,
        client: Client,
        segments: Segments,
        done: list[Outcome],
    ) -> None:
        self._host, self._aliases, self._limits = host, plan.aliases, plan.limits
        self._client, self._segments, self._done = client, segments, done
        self._robots = dict(host.robots)
        self._site = plan.limits.site(host.host)
        own_delay = self._site.delay if self._site else None
        self._default_delay = plan.limits.delay if own_delay is None else own_delay
        # By the rules as they were read and the settings as they are: a person may have changed
        # the delay since. What trouble had added to the old one stays.
        self._base_delay = None if host.delay is None else self._wanted_delay()
        in_trouble = host.backoff > (host.delay or 0.0)
        self._delay = self._default_delay if self._base_delay is None else self._base_delay
        self._delay = max(self._delay, host.backoff if in_trouble else 0.0)
        self._latency = 0.0  # seconds an answer takes, smoothed
        self._last_start = -math.inf  # monotonic seconds, like _hold_until
        self._hold_until = time.monotonic() + max(host.not_before - time.time(), 0)
        self._failed_in_a_row = self._failed = 0  # attempts without an answer, or with a 5xx
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
            self._delay,
            time.time() + max(self._pause(), 0),
            self._robots,
            tuple(self._sitemaps()),
            tuple(self._tried()) if self._limits.try_sitemap else (),
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

    def _tried(self) -> Iterator[str]:
        """/sitemap.xml of origins whose robots.txt names none and lets us have it."""
        for origin, robots in self._robots.items():
            url = f"{origin}/sitemap.xml"
            place = self._aliases.place(url)
            reserved = self._limits.honour_opt_outs and robots.opts_out(place)
            if not robots.sitemaps and robots.allows(place, self._limits.token) and not reserved:
                yield url

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
        if self._failed_in_a_row >= FAILURES_TO_PROBE and not self._left:
            await self._probe(_origin(request.url))
        if self._left:
            return self._unasked(request, "error", self._left)
        place = self._aliases.place(request.url)
        origin = _origin(request.url)
        if origin not in self._robots or self._robots[origin].is_stale(time.time()):
            await self._fetch_robots(origin)
            if self._left:
                return self._unasked(request, "error", self._left)
        robots = self._robots[origin]
        if robots.failure:
            return self._unasked(request, "error", robots.failure)
        if robots.policy == "none":
            return self._unasked(request, "denied", f"robots.txt answered {robots.status}")
        if not robots.allows(place, self._limits.token):
            return self._unasked(request, "denied", "robots.txt disallows it")
        if self._limits.honour_opt_outs and (signal := robots.opts_out(place)):
            return self._unasked(request, "denied", f"{OPT_OUT}: {signal}")
        if self._delay > self._limits.max_delay:
            return self._unasked(
                request, "denied", f"asks for {self._delay:.0f} s between requests"
            )
        return None

    def _unasked(self, request: Request, state: str, reason: str) -> Outcome:
        return Outcome(request.url, request.kind, state, reason)

    def _wanted_delay(self) -> float:
        """Seconds between requests by robots.txt, that of the slowest origin, or by default."""
        asked = [robots.crawl_delay(self._limits.token) for robots in self._robots.values()]
        return max((delay for delay in asked if delay is not None), default=self._default_delay)

    def _set_robots(self, origin: str, robots: Robots) -> None:
        self._robots[origin] = robots
        self._base_delay = self._wanted_delay()
        fresh = self._host.delay is None and not self._failed  # only the default is undone
        self._delay = max(self._base_delay, 0.0 if fresh else self._delay)

    async def _fetch_robots(self, origin: str) -> None:
        """Ask for an origin's robots.txt, then for what it reserves from text mining."""
        url = f"{origin}/robots.txt"
        before = self._robots.get(origin)
        answer: Answer | None = None
        try:
            answer = await self._ask_first(url, MAX_BYTES + 1)  # one more tells that there is more
            robots = dataclasses.replace(_robots_of(answer), read_at=time.time())
            self._set_robots(origin, robots)  # its delay holds for the next request already
            if robots.policy == "none" and (answer.retry_after or 0) > self._limits.max_delay:
                self._left = LONG_PAUSE
        except FetchError as error:
            robots = Robots("none", failure=error.reason, read_at=time.time())
        if robots.policy != "none":
            robots = await self._with_reservations(origin, robots, before)
        elif before is not None:
            robots = before.kept_in_place_of(robots, time.time())
        self._set_robots(origin, robots)
        if answer is None or robots.failure or self._left:
            return
        digest, identifier = warc.payload_digest(answer.exchange.body), warc.record_id()
        outcome = Outcome(
            url,
            "robots",
            "fetched",
            status=answer.exchange.status,
            digest=digest,
            record_id=identifier,
            robots=dataclasses.asdict(robots),
            fetched_at=warc.warc_date(),
        )
        records = warc.response_records(answer.exchange, digest, identifier)
        self._done.append(self._segments.append(outcome, records, self._aliases.place(url)))

    async def _with_reservations(
        self, origin: str, robots: Robots, before: Robots | None
    ) -> Robots:
        """The rules with what the origin reserves from text mining, for as long as it cannot say
        with what it reserved `before`. If it never said, nobody knows what of it may be had.
        """
        if not self._wants_tdm(origin, robots) or self._delay > self._limits.max_delay:
            return robots
        try:
            return dataclasses.replace(robots, tdm=await self._fetch_tdm(origin))
        except FetchError as error:
            if before is not None and self._wants_tdm(origin, before):
                return robots.with_tdm_of(before, time.time())
            return Robots("none", failure=error.reason, read_at=time.time())

    def _wants_tdm(self, origin: str, robots: Robots) -> bool:
        place = self._aliases.place(f"{origin}{TDM_FILE}")
        return self._limits.honour_opt_outs and robots.allows(place, self._limits.token)

    async def _fetch_tdm(self, origin: str) -> str:
        """The origin's TDM reservations, empty where it has none. Raises FetchError where it cannot
        say. A redirect to another origin that is not there leads to no file: where unknown
        addresses are sent to a page for signing in, it says nothing of this one.
        """
        try:
            answer = await self._ask_first(f"{origin}{TDM_FILE}", MAX_TDM_BYTES)
        except _LeadsNowhere:
            return ""
        except FetchError as error:
            raise FetchError(f"tdmrep.json: {error.reason}") from error
        found = _robots_of(answer)
        if found.policy == "none":
            raise FetchError(f"tdmrep.json answered {found.status}")
        if found.policy == "all":
            return ""
        body = answer.exchange.body
        text = decode_marked(body) or body.decode("utf-8", "replace")
        if answer.refused and text.lstrip().startswith(("[", "{")):  # no page that says "not found"
            raise FetchError(f"tdmrep.json: {answer.refused}")
        locations = tdm_locations(text)
        if len(locations) > MAX_LOCATIONS:
            raise FetchError(f"tdmrep.json: more than {MAX_LOCATIONS:,} locations")
        return text if locations else ""

    async def _ask_first(self, url: str, max_bytes: int) -> Answer:
        """What stands at an address that is asked for before all pages: once more, and again, where
        the server cannot say. Raises FetchError.
        """
        failure: FetchError | None = None
        for attempt in range(1, self._limits.retries + 2):
            failure = after = None
            try:
                answer = await self._follow(url, max_bytes)
                after = answer.retry_after
                if _robots_of(answer).policy != "none":
                    break
            except FetchError as error:
                failure = error
                if _is_final(error):
                    break
            if attempt > self._limits.retries:
                break
            if after is not None and after > self._limits.max_delay:
                break
            pause = 2.0 ** (attempt - 1) if after is None else after
            await asyncio.sleep(min(pause, self._limits.max_delay))
        if failure is not None:
            raise failure
        return answer

    async def _follow(self, url: str, max_bytes: int) -> Answer:
        """The answer at the end of a chain of redirects, or the one that leads no further. Raises
        FetchError, _LeadsNowhere among them.
        """
        target = url
        for _ in range(MAX_REDIRECTS + 1):
            await asyncio.sleep(max(self._pause(), 0))
            self._last_start = time.monotonic()
            self._requests += 1
            place = self._aliases.place(target)
            try:
                answer = await self._client.ask(place, max_bytes=max_bytes, site=self._site)
            except FetchError as error:
                if _is_final(error) and _origin(target) != _origin(url):
                    raise _LeadsNowhere(error.reason) from error
                raise
            self._bytes += len(answer.exchange.body)
            if answer.exchange.status not in REDIRECT or not answer.location:
                break
            try:
                target = canonical_url(answer.location, place)
            except ValueError:
                break
        return answer

    async def _attempt(self, request: Request, attempt: int) -> None:
        """One request; its outcome is committed, or it waits for another attempt."""
        begun = time.monotonic()
        try:
            result = await self._get(request)
        except FetchError as error:
            failed = Outcome(request.url, request.kind, "error", error.reason)
            result = Retry(failed, None) if error.may_pass else (failed, ())
        outcome = result.outcome if isinstance(result, Retry) else result[0]
        seconds = round(time.monotonic() - begun, 4)
        outcome = dataclasses.replace(
            outcome, seconds=seconds, fetched_at=outcome.fetched_at or warc.warc_date()
        )
        if not isinstance(result, Retry):
            self._failed_in_a_row = 0
            self._delay = max(self._least_delay(), self._delay * 0.9)
            place = self._aliases.place(request.url)
            self._done.append(self._segments.append(outcome, result[1], place))
            return
        self._slow_down(result.after)
        if attempt <= self._limits.retries and not self._left:
            self._waiting.append((request, attempt + 1))
        else:
            # Not committed: a failure that may pass is asked again when the round is.
            self._done.append(outcome)

    def _least_delay(self) -> float:
        """The host's delay, or as long as it takes to answer: one that is slow has enough to do.

        Where no delay is wanted, none is made of that either.
        """
        base = self._base_delay or 0.0
        return max(base, min(self._latency, self._limits.max_delay)) if base else 0.0

    def _slow_down(self, after: float | None) -> None:
        """Back off from a host in trouble: its own Retry-After, or longer with every failure."""
        limit = self._limits.max_delay
        self._failed_in_a_row += 1
        self._failed += 1
        if self._failed >= max(FAILURES_TO_LEAVE, SHARE_TO_LEAVE * self._requests):
            self._left = TOO_MANY_FAILURES
        if after is not None and after > limit:
            self._left = LONG_PAUSE
        self._delay = min(max(2 * self._delay, 0.25), max(limit, self._base_delay or 0.0))
        pause = after if after is not None else 0.25 * 2.0 ** min(self._failed_in_a_row, 6)
        self._hold_until = max(self._hold_until, time.monotonic() + min(pause, limit))

    async def _probe(self, origin: str) -> None:
        """After many failures in a row: a host that still answers only has some bad pages."""
        await asyncio.sleep(max(self._pause(), 0))
        self._last_start = time.monotonic()
        self._requests += 1
        try:
            answer = await self._client.ask(
                self._aliases.place(f"{origin}/robots.txt"), site=self._site
            )
            alive = answer.exchange.status not in RETRIED
        except FetchError:
            alive = False
        if alive:
            self._failed_in_a_row = 0
        else:
            self._left = self._left or NO_ANSWER

    async def _get(self, request: Request) -> Judged | Retry:
        headers = {}
        if request.etag:
            headers["If-None-Match"] = request.etag
        if request.modified:
            headers["If-Modified-Since"] = request.modified
        place = self._aliases.place(request.url)
        types = self._limits.content_types if request.kind == "page" else None
        size = self._limits.max_bytes if request.kind == "page" else MAX_SITEMAP_BYTES
        self._requests += 1
        answer = await self._client.ask(place, headers, types, size, self._site)
        self._latency += 0.3 * (answer.seconds - self._latency)
        self._bytes += len(answer.exchange.body)
        judge = partial(judged, request, answer, place, self._limits, self._aliases)
        large = len(answer.exchange.body) > MAX_BYTES_AT_ONCE
        return await asyncio.to_thread(judge) if large else judge()


def _is_final(error: FetchError) -> bool:
    """Whether an address that is asked for before all pages will not answer within this visit."""
    return not error.may_pass or error.reason == "name not resolved"


def _robots_of(answer: Answer) -> Robots:
    """RFC 9309, section 2.3.1; redirects that lead nowhere count as no file."""
    status = answer.exchange.status
    if status in REDIRECT and answer.location:
        return Robots("all", "", status)
    return Robots.of_response(status, answer.exchange.body)


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
