"""Servers that hang, lie, break off or are not there are counted; the rest is crawled."""

import asyncio
import gzip
import threading
from pathlib import Path
from typing import Any

import brotli
import pytest
from aiohttp import web
from loopback_site import Crawler, LoopbackSite, page, small_site

from tasks.corpus.client import Answer
from tasks.corpus.crawl import CrawlConfig, SiteDown
from tasks.corpus.fetch_plan import Request
from tasks.corpus.host_fetcher import MAX_BYTES_AT_ONCE
from tasks.corpus.judged import judged
from tasks.runtime.errors import UserError


@pytest.fixture
def crawler(tmp_path: Path) -> Crawler:
    return Crawler(tmp_path / "home")


def test_a_site_that_goes_down_is_continued_by_the_next_run(crawler: Crawler) -> None:
    pages = {"/": page(*(f"/{n}" for n in range(40)))} | {f"/{n}": page() for n in range(40)}
    with LoopbackSite(pages) as site:
        up = dict(site.pages)

        async def down(request: web.Request) -> web.Response:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

        def last_page() -> web.Response:
            site.pages = dict.fromkeys([*up, "/robots.txt"], down)
            return web.Response(text=page(), content_type="text/html")

        site.pages["/20"] = last_page
        with pytest.raises(
            SiteDown, match=r"host gives no answer.*run it again when the site answ"
        ):
            crawler.crawl(site.url, max_delay=0.05)
        answered = [path for path in site.paths if path not in ("/robots.txt",)]
        fetched = set(answered[: answered.index("/20") + 1])
        site.requests.clear()
        site.pages = up
        result = crawler.crawl(site.url, max_delay=0.05)
    assert len(result.pages) == 41
    assert len(fetched & set(site.paths)) <= 4  # asked while the site went down
    assert "/" not in site.paths


def test_a_compressed_bomb_is_too_large(crawler: Crawler) -> None:
    bomb = gzip.compress(b"\x00" * 20_000_000)

    def explode() -> web.Response:
        headers = {"Content-Encoding": "gzip"}
        return web.Response(body=bomb, content_type="text/html", headers=headers)

    with LoopbackSite(small_site(**{"/a": explode})) as site:
        result = crawler.crawl(site.url, max_bytes=100_000)
    assert result.reason(f"{site.url}/a") == ("skipped", "too large")


def test_other_hosts_do_not_wait_while_a_large_page_is_read(
    crawler: Crawler, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_read, in_time = threading.Event(), []

    def judge(request: Request, answer: Answer, *about: Any) -> Any:
        if len(answer.exchange.body) > MAX_BYTES_AT_ONCE:
            in_time.append(other_read.wait(10))
        elif request.url == f"{other.url}/":
            other_read.set()
        return judged(request, answer, *about)

    async def later() -> web.Response:
        await asyncio.sleep(0.5)
        return web.Response(text=page(), content_type="text/html")

    monkeypatch.setattr("tasks.corpus.host_fetcher.judged", judge)
    large = page("/a", text="word " * MAX_BYTES_AT_ONCE)
    with LoopbackSite({"/": large, "/a": page()}) as site, LoopbackSite({"/": later}) as other:
        result = crawler.crawl(f"{site.url}/", f"{other.url}/", partitions=1)
    assert in_time == [True]
    assert set(result.pages) == {f"{site.url}/", f"{site.url}/a", f"{other.url}/"}


def coded(name: str, text: str) -> Any:
    headers = {"Content-Encoding": name}
    return lambda: web.Response(body=text.encode(), content_type="text/html", headers=headers)


def test_a_content_coding_that_is_none_costs_nothing(crawler: Crawler) -> None:
    pages = {"/": coded("UTF-8", page("/a", "/b")), "/a": coded("none", page()), "/b": page()}
    with LoopbackSite(pages) as site:
        assert len(crawler.crawl(site.url).pages) == 3


def test_a_name_of_no_content_coding_is_not_believed_of_coded_bytes(crawler: Crawler) -> None:
    packed = brotli.compress(page("/a", text=" ".join(map(str, range(999)))).encode())

    def lz4() -> web.Response:
        headers = {"Content-Encoding": "lz4"}
        return web.Response(body=packed, content_type="text/plain", headers=headers)

    pdf = b"%PDF-1.7\n" + bytes(range(256)) * 9

    def none() -> web.Response:
        headers = {"Content-Encoding": "none"}
        return web.Response(body=pdf, content_type="application/pdf", headers=headers)

    types = ("text/html", "text/plain", "application/pdf")
    pages = {"/": page("/lz4", "/pdf"), "/lz4": lz4, "/pdf": none}
    with LoopbackSite(pages) as site, LoopbackSite({"/": page(), "/robots.txt": lz4}) as other:
        result = crawler.crawl(f"{site.url}/", f"{other.url}/", content_types=types)
    assert result.reason(f"{site.url}/lz4") == ("error", "content coding lz4")
    assert result.reason(f"{other.url}/") == ("error", "content coding lz4")
    assert f"{site.url}/pdf" in result.pages


def test_an_unknown_content_coding_is_asked_for_once_and_costs_no_other_page(
    crawler: Crawler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.corpus.host_fetcher.FAILURES_TO_LEAVE", 5)
    bad = {f"/bad{n}": coded("compress", page()) for n in range(20)}
    with LoopbackSite({"/": page(*bad, "/good"), "/good": page()} | bad) as site:
        result = crawler.crawl(site.url, retries=2)
    assert f"{site.url}/good" in result.pages
    assert result.rules == {"content coding compress": 20}
    assert {site.paths[path] for path in bad} == {1}


def test_endless_query_strings_stop(crawler: Crawler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.corpus.frontier.MAX_QUERIES", 20)

    def calendar(request: web.Request) -> web.Response:
        day = int(request.query.get("day", "0"))
        return web.Response(text=page(f"/?day={day + 1}"), content_type="text/html")

    with LoopbackSite({"/": calendar} | {f"/?day={n}": calendar for n in range(60)}) as site:
        result = crawler.crawl(site.url, max_depth=100)
    assert len(result.pages) == 21
    assert result.rules["trap: too many query strings"] == 1


class Calendar(dict[str, Any]):
    """Pages, and a calendar by month and day without an end."""

    def get(self, path: str, default: Any = None) -> Any:
        return self.month if path.startswith("/cal/") else super().get(path, default)

    @staticmethod
    def month(request: web.Request) -> web.Response:
        year, month = map(int, request.path.split("/")[2:4])
        days = (f"/cal/{year}/{month}/{day}" for day in range(1, 29))
        following = f"/cal/{year + month // 12}/{month % 12 + 1}"
        return web.Response(text=page(following, *days), content_type="text/html")


def test_an_endless_calendar_stops_and_numbered_articles_do_not(crawler: Crawler) -> None:
    articles = {f"/2024/05/{n}/news-of-day": page() for n in range(1, 31)}
    articles |= {f"/2024/05/17/{n}": page() for n in range(10_000, 10_030)}
    articles |= {f"/questions/{n}": page() for n in range(30)}
    articles |= {f"/3.{n}/library/os.html": page() for n in range(30)}
    with LoopbackSite({}) as site:
        site.pages = Calendar({"/": page("/cal/2024/1", *articles)} | articles)
        result = crawler.crawl(site.url, max_depth=1000, max_numbered=20)
    paths = {url.removeprefix(site.url) for url in result.pages}
    assert articles.keys() <= paths
    assert len(paths - articles.keys()) == 1 + 20 + 20  # the start, months, days
    assert set(result.rules) == {"trap: too many numbered pages"}


@pytest.mark.parametrize("kind", ["hangs", "drips", "stops short", "closes", "no HTTP"])
def test_bad_servers_are_counted_and_the_rest_is_crawled(crawler: Crawler, kind: str) -> None:
    async def bad(request: web.Request) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        if kind == "hangs":
            await asyncio.sleep(30)
        if kind == "drips":
            response = web.StreamResponse(headers={"Content-Type": "text/html"})
            await response.prepare(request)
            for _ in range(100):
                await response.write(b"x")
                await asyncio.sleep(0.2)
        if kind == "stops short":
            transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n<p>half")
        if kind == "no HTTP":
            transport.write(b"\x00\x01 this is no status line\r\n\r\n")
        transport.close()
        return web.Response()

    with LoopbackSite(small_site(**{"/a": bad})) as site:
        result = crawler.crawl(site.url, timeout=1.0)
    reasons = {
        "hangs": "timeout",
        "drips": "timeout",
        "stops short": "truncated or damaged body",
        "closes": "connection closed",
        "no HTTP": "not HTTP",
    }
    assert result.reason(f"{site.url}/a") == ("error", reasons[kind])
    assert site.paths["/a"] == 2  # one retry
    assert {f"{site.url}/b", f"{site.url}/c"} <= set(result.pages)
    assert result.rules[reasons[kind]] == 1


def test_a_host_with_too_many_bad_pages_is_left_with_what_it_gave(
    crawler: Crawler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.corpus.host_fetcher.FAILURES_TO_LEAVE", 12)

    async def hang() -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    pages = {"/": page(*(f"/{n}" for n in range(40)))} | {f"/{n}": hang for n in range(40)}
    with LoopbackSite(pages) as site:
        result = crawler.crawl(site.url, timeout=0.3, retries=0, max_delay=0.05)
    assert result.rules["too many requests of the host failed"] >= 20
    assert len(result.pages) == 1
    assert len(site.requests) < 30


def test_a_host_with_some_bad_pages_among_many_good_ones_is_not_left(
    crawler: Crawler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.corpus.host_fetcher.FAILURES_TO_LEAVE", 12)
    bad = [f"/{n}" for n in range(0, 80, 10)]
    pages: dict[str, Any] = {f"/{n}": page() for n in range(80)}
    pages |= dict.fromkeys(bad, lambda: web.Response(status=503))
    with LoopbackSite({"/": page(*pages)} | pages) as site:
        result = crawler.crawl(site.url, retries=2, max_delay=0.02)
    assert [site.paths[path] for path in bad] == [3] * 8  # 24 failures of some 100 requests
    assert result.rules == {"HTTP 503": 8}
    assert len(result.pages) == 73


def test_damaged_sitemaps_are_reported(crawler: Crawler) -> None:
    robots = "Sitemap: /broken.gz\nSitemap: /missing.xml\nSitemap: /text.txt\n"
    with LoopbackSite({"/": page(), "/x": page()}, robots) as site:
        site.pages["/broken.gz"] = lambda: web.Response(body=b"\x1f\x8b\x08garbage")
        site.pages["/text.txt"] = lambda: web.Response(text=f"{site.url}/x\n")
        result = crawler.crawl(site.url)
    state, reason = result.reason(f"{site.url}/broken.gz")
    assert state == "error"
    assert "damaged" in reason
    assert result.reason(f"{site.url}/missing.xml") == ("error", "HTTP 404")
    assert f"{site.url}/x" in result.pages


def test_unreachable_seeds_are_one_clear_sentence(crawler: Crawler) -> None:
    with pytest.raises(UserError, match=r"found no page at http://127.0.0.1:9/ \(connection ref"):
        crawler.crawl("http://127.0.0.1:9/", retries=0)
    with pytest.raises(UserError, match="name not resolved"):
        crawler.crawl("http://no-such-host.invalid/", retries=0)
    with pytest.raises(UserError, match=r"embedded:stdlib .*gristmill up"):
        crawler.crawl("embedded:stdlib", retries=0)
    with pytest.raises(ValueError, match="'exmaple' cannot be crawled"):
        CrawlConfig(seeds=("exmaple",))
    with pytest.raises(ValueError, match="embedded site is 'embedded:stdlib'"):
        CrawlConfig(seeds=("embedded:docs",))


def test_a_site_without_proper_tls_is_named(crawler: Crawler) -> None:
    with LoopbackSite(small_site()) as site:
        secure = site.url.replace("http:", "https:")
        result = crawler.crawl(site.url, f"{secure}/a", retries=2)
    assert result.reason(f"{secure}/a") == ("error", "TLS error")
    assert len(result.pages) == 4
