"""The crawler asks a host as rarely as it wishes: rules, delays, pauses, limits over all hosts."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from loopback_site import Clock, Crawler, CrawlResult, LoopbackSite, page, small_site

from tasks.corpus.crawl import SiteDown
from tasks.corpus.robots import ASK_AGAIN, MAX_AGE, MAX_BYTES
from tasks.runtime.errors import UserError


@pytest.fixture
def crawler(tmp_path: Path) -> Crawler:
    return Crawler(tmp_path / "home")


class Slow:
    """A page that takes its time; `most`: how many asked for it at once."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def __call__(self) -> web.Response:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.02)
        self.now -= 1
        return web.Response(text=page(), content_type="text/html")


def smallest_gap(result: CrawlResult) -> float:
    """Seconds between the starts of two requests for pages, as the WARC records date them."""
    moments = sorted(datetime.fromisoformat(p.fetched_at) for p in result.pages.values())
    return min((b - a).total_seconds() for a, b in pairwise(moments))


@pytest.mark.parametrize(("status", "pages"), [(404, 1), (403, 1), (500, 0), (503, 0), (429, 0)])
def test_missing_robots_allow_and_broken_robots_forbid(
    crawler: Crawler, status: int, pages: int
) -> None:
    with LoopbackSite({"/": page(), "/robots.txt": lambda: web.Response(status=status)}) as site:
        if pages:
            assert crawler.crawl(site.url, max_delay=0.1).counts["pages"] == 1
        else:
            with pytest.raises(UserError, match=f"robots.txt answered {status}"):
                crawler.crawl(site.url, max_delay=0.1)
    assert site.paths["/"] == pages


def test_crawl_delay_spaces_requests_and_is_capped(crawler: Crawler) -> None:
    robots = "User-agent: *\nCrawl-delay: 0.2\n"
    with LoopbackSite(small_site(), robots) as site:
        result = crawler.crawl(site.url)
    assert len(result.pages) == 4
    assert smallest_gap(result) > 0.1  # 0.2 s between starts, less the jitter of a busy machine
    with (
        LoopbackSite(small_site(), "User-agent: *\nCrawl-delay: 3600\n") as slow,
        pytest.raises(UserError, match="asks for 3600 s between requests"),
    ):
        crawler.crawl(slow.url, epoch=1)
    assert set(slow.paths) == {"/robots.txt"}


def test_default_delay_applies_when_robots_say_nothing(crawler: Crawler) -> None:
    with LoopbackSite(small_site()) as site:
        result = crawler.crawl(site.url, delay=0.2)
    assert smallest_gap(result) > 0.1


def test_retry_after_is_honoured(crawler: Crawler) -> None:
    answers = iter([429, 503])

    def busy() -> web.Response:
        status = next(answers, None)
        if status is None:
            return web.Response(text=page(), content_type="text/html")
        return web.Response(status=status, headers={"Retry-After": "1"})

    with LoopbackSite({"/": busy}) as site:
        result = crawler.crawl(site.url, retries=2)
    times = site.times()
    assert len(times) == 3
    assert times[2] - times[0] > 1.5  # twice a second, less the jitter of a busy machine
    assert result.counts["pages"] == 1


def test_a_site_that_asks_for_a_long_pause_is_continued_by_the_next_run(crawler: Crawler) -> None:
    answer = {"Retry-After": "86400"}
    broken = {"/a": lambda: web.Response(status=503, headers=answer)}
    with LoopbackSite(small_site(**broken)) as site:
        with pytest.raises(SiteDown, match=r"stopped after 1 pages .*pause longer than max_delay"):
            crawler.crawl(site.url, max_delay=0.2, parallel=1)
        assert site.paths["/a"] == 1
        assert "/b" not in site.paths
        site.pages["/a"] = page()
        result = crawler.crawl(site.url, max_delay=0.2, parallel=1)
    assert len(result.pages) == 4
    assert site.paths["/"] == site.paths["/robots.txt"] == 1


def test_a_huge_robots_file_with_a_byte_order_mark_is_read(crawler: Crawler) -> None:
    robots = "\ufeffUser-agent: *\nDisallow: /a\n" + "# filler\n" * 200_000
    with LoopbackSite(small_site(), robots) as site:
        result = crawler.crawl(site.url)
    assert result.reason(f"{site.url}/a")[0] == "denied"


def test_a_rule_cut_in_two_by_the_most_that_is_read_is_no_rule(crawler: Crawler) -> None:
    head, cut = b"User-agent: *\nDisallow: /a\n", b"\nDisallow: /"
    filler = b"#" * (MAX_BYTES - len(head + cut))
    robots = head + filler + cut + b"only-this\nDisallow: /b\n"
    with LoopbackSite(small_site(**{"/": page("/a", "/b")})) as site:
        site.pages["/robots.txt"] = lambda: web.Response(body=robots)
        result = crawler.crawl(site.url)
    assert {url.removeprefix(site.url) for url in result.pages} == {"/", "/b", "/c"}
    assert result.reason(f"{site.url}/a") == ("denied", "robots.txt disallows it")
    hosts = next(report.body for report in result.outcome.reports if report.key == "crawl-hosts")
    assert (
        hosts[0]["note"] == f"longer than 524,288 bytes, the rest not read: {site.url}/robots.txt"
    )


def test_a_file_as_long_as_is_read_has_all_its_lines(crawler: Crawler) -> None:
    head, last = b"User-agent: *\n", b"\nDisallow: /a"
    robots = head + b"#" * (MAX_BYTES - len(head + last)) + last
    with LoopbackSite(small_site()) as site:
        site.pages["/robots.txt"] = lambda: web.Response(body=robots)
        result = crawler.crawl(site.url)
    assert result.reason(f"{site.url}/a") == ("denied", "robots.txt disallows it")
    hosts = next(report.body for report in result.outcome.reports if report.key == "crawl-hosts")
    assert "longer" not in hosts[0]["note"]


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be", "utf-8-sig"])
def test_rules_in_another_unicode_form_hold(crawler: Crawler, codec: str) -> None:
    mark = "\ufeff" if codec == "utf-16-be" else ""
    robots = f"{mark}User-agent: *\nDisallow: /a\n".encode(codec)
    with LoopbackSite(small_site()) as site:
        site.pages["/robots.txt"] = lambda: web.Response(body=robots)
        result = crawler.crawl(site.url)
    assert result.reason(f"{site.url}/a") == ("denied", "robots.txt disallows it")
    assert site.paths["/a"] == 0


@pytest.mark.parametrize("digits", [400, 5000])
def test_numbers_that_no_float_holds_end_no_crawl(crawler: Crawler, digits: int) -> None:
    number = "9" * digits
    never = {"Retry-After": number}
    odd = {"Retry-After": f"Mon, 01 Jan 2024 00:00:00 +{number}"}
    pages = small_site(
        **{
            "/a": lambda: web.Response(text=page("/b"), content_type="text/html", headers=never),
            "/b": lambda: web.Response(text=page("/c"), content_type="text/html", headers=odd),
        }
    )
    with LoopbackSite(pages, f"User-agent: *\nRequest-rate: 1/{number}\n") as site:
        assert len(crawler.crawl(site.url).pages) == 4
        site.pages["/c"] = lambda: web.Response(status=503, headers=never)
        with pytest.raises(SiteDown, match="asks for a pause longer than max_delay"):
            crawler.crawl(site.url, epoch=1)
    assert site.paths["/c"] == 2


def test_several_hosts_are_crawled_side_by_side(crawler: Crawler) -> None:
    with LoopbackSite(small_site()) as one, LoopbackSite(small_site()) as two:
        one.pages["/"] = page("/a", f"{two.url}/c", "http://unrelated.example/")
        result = crawler.crawl(one.url, f"{two.url}/b")
    assert len(result.pages) == 6
    hosts = {row["host"]: row for row in result.outcome.reports[0].body}
    assert {one.url[7:], two.url[7:]} == set(hosts)
    assert hosts[two.url[7:]]["fetched"] == 2
    assert result.counts["links_out_of_scope"] == 1


def test_requests_in_flight_are_bounded_over_all_hosts(crawler: Crawler) -> None:
    slow = Slow()
    pages = {"/": page(*(f"/{n}" for n in range(12)))} | {f"/{n}": slow for n in range(12)}
    with LoopbackSite(pages) as site:
        crawler.crawl(site.url, parallel=8, parallel_total=2)
        assert slow.most == 2
        crawler.crawl(site.url, parallel=8, parallel_total=50, epoch=1)
        assert slow.most > 2


def test_as_many_partitions_at_most_as_requests_may_be_in_flight(crawler: Crawler) -> None:
    slow = Slow()

    def at_once(function: Any, items: list[Any]) -> Any:
        with ThreadPoolExecutor(8) as threads:
            yield from enumerate(threads.map(lambda item: function(*item), items))

    with ExitStack() as sites:
        pages = {"/": slow} | {f"/{n}": slow for n in range(3)}
        urls = [sites.enter_context(LoopbackSite(pages)).url for _ in range(4)]
        seeds = [f"{url}/{n}" for url in urls for n in range(3)]
        result = crawler.crawl(*seeds, run=at_once, partitions=8, parallel_total=1)
    assert result.counts["pages"] == 12
    assert slow.most == 1


def crawl_with_old_rules(
    crawler: Crawler, monkeypatch: pytest.MonkeyPatch, after: float, later: Any
) -> tuple[CrawlResult, LoopbackSite]:
    """A crawl in small rounds; `after` seconds pass behind the first page, and robots.txt answers
    with `later` from then on."""
    clock = Clock(monkeypatch)
    with LoopbackSite({}, "User-agent: *\nDisallow: /b\n") as site:

        def first() -> web.Response:
            clock.ahead = after
            site.pages["/robots.txt"] = later
            return web.Response(text=page("/a", "/b"), content_type="text/html")

        site.pages |= {"/": first, "/a": page(), "/b": page()}
        return crawler.crawl(site.url), site


def test_rules_older_than_a_day_are_asked_for_again(
    crawler: Crawler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other() -> web.Response:
        return web.Response(text="User-agent: *\nDisallow: /a\n")

    result, site = crawl_with_old_rules(crawler, monkeypatch, MAX_AGE + 60, other)
    assert site.paths["/robots.txt"] == 2
    assert result.reason(f"{site.url}/a") == ("denied", "robots.txt disallows it")
    assert f"{site.url}/b" in result.pages


def test_old_rules_hold_while_the_server_cannot_say(
    crawler: Crawler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> web.Response:
        return web.Response(status=500)

    result, site = crawl_with_old_rules(crawler, monkeypatch, MAX_AGE + 60, broken)
    assert site.paths["/robots.txt"] > 1
    assert f"{site.url}/a" in result.pages
    assert result.reason(f"{site.url}/b") == ("denied", "robots.txt disallows it")


def test_rules_of_today_are_not_asked_for_again(
    crawler: Crawler, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, site = crawl_with_old_rules(crawler, monkeypatch, MAX_AGE / 2, None)
    assert site.paths["/robots.txt"] == 1


def test_a_host_that_could_not_say_is_asked_again_later_in_the_crawl(
    crawler: Crawler, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with (
        LoopbackSite({"/": page()}) as other,
        LoopbackSite({"/": page("/a"), "/b": page()}) as site,
    ):
        other.pages["/robots.txt"] = lambda: web.Response(status=503)

        def a() -> web.Response:
            clock.ahead = ASK_AGAIN + 60
            other.pages["/robots.txt"] = lambda: web.Response(status=404)
            return web.Response(text=page("/b"), content_type="text/html")

        site.pages["/a"] = a
        result = crawler.crawl(site.url, f"{other.url}/", max_delay=0.1)
    assert f"{other.url}/" in result.pages
    assert f"{site.url}/b" in result.pages


def test_retry_after_of_robots_is_honoured(crawler: Crawler) -> None:
    answers = iter([503])

    def busy() -> web.Response:
        status = next(answers, 404)
        return web.Response(status=status, headers={"Retry-After": "2"})

    with LoopbackSite({"/": page(), "/robots.txt": busy}) as site:
        assert crawler.crawl(site.url).counts["pages"] == 1
    first, second = [moment for moment, path, _ in site.requests if path == "/robots.txt"]
    assert second - first > 1.5  # without it, a second
    pause = {"Retry-After": "86400"}
    long = {"/": page(), "/robots.txt": lambda: web.Response(status=503, headers=pause)}
    with LoopbackSite(long) as site, pytest.raises(UserError, match="pause longer than max_delay"):
        crawler.crawl(site.url, epoch=1)
    assert site.paths["/robots.txt"] == 1


def test_a_slow_host_is_asked_as_often_as_it_answers(crawler: Crawler) -> None:
    async def slow() -> web.Response:
        await asyncio.sleep(0.1)
        return web.Response(text=page(), content_type="text/html")

    pages = {"/": page(*(f"/{n}" for n in range(16)))} | {f"/{n}": slow for n in range(16)}
    with LoopbackSite(pages) as site:
        crawler.crawl(site.url, delay=0.01)
        assert min(b - a for a, b in pairwise(sorted(site.times())[-4:])) > 0.05
        site.requests.clear()
        crawler.crawl(site.url, delay=0.0, parallel=16, epoch=1)  # no politeness, no slowing down
        assert site.times()[-1] - site.times()[1] < 0.5
