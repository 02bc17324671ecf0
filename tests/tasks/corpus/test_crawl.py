"""The crawler against real loopback servers: politeness, limits, safety, recrawl, bad servers."""

import asyncio
import gzip
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fastwarc.warc import ArchiveIterator
from loopback_site import Crawler, CrawlResult, LoopbackSite, page
from multidict import CIMultiDict

from tasks.corpus.crawl import CrawlConfig, SiteDown
from tasks.corpus.warc import payload_digest
from tasks.runtime.errors import UserError


@pytest.fixture
def crawler(tmp_path: Path) -> Crawler:
    return Crawler(tmp_path / "home")


def redirect(target: str, status: int = 302) -> Any:
    return lambda: web.Response(status=status, headers={"Location": target})


def small_site(**more: Any) -> dict[str, Any]:
    return {
        "/": page("/a", "/b#part", "a", "mailto:x@y.z"),
        "/a": page("/b", "/", text="page a"),
        "/b": page("/c", text="page b"),
        "/c": page(text="page c"),
    } | more


def smallest_gap(result: CrawlResult) -> float:
    """Seconds between the starts of two requests for pages, as the WARC records date them."""
    moments = sorted(datetime.fromisoformat(p.fetched_at) for p in result.pages.values())
    return min((b - a).total_seconds() for a, b in pairwise(moments))


def test_every_linked_page_is_fetched_once_and_readable(crawler: Crawler) -> None:
    with LoopbackSite(small_site()) as site:
        result = crawler.crawl(site.url)
    assert set(site.paths.values()) == {1}
    assert set(result.pages) == {f"{site.url}{path}" for path in ("/", "/a", "/b", "/c")}
    assert b"page c" in result.pages[f"{site.url}/c"].body
    for url, found in result.pages.items():
        assert payload_digest(found.body) == found.digest == result.addresses[url]["digest"]
    assert result.addresses[f"{site.url}/c"]["depth"] == 2
    assert result.addresses[f"{site.url}/c"]["source"] == f"{site.url}/b"
    assert result.counts["pages"] == 4
    assert result.counts["links_to_known"] == 2


def test_robots_rules_sitemaps_and_user_agent(crawler: Crawler) -> None:
    robots = (
        "User-agent: gristmill\nDisallow: /private/\nAllow: /private/open\n\n"
        "User-agent: *\nDisallow: /\n\nSitemap: /maps/index.xml\n"
    )
    index = "<sitemapindex><sitemap><loc>{}/maps/1.xml.gz</loc></sitemap></sitemapindex>"
    urls = "<urlset><url><loc>{0}/from-map</loc></url><url><loc>{0}/private/x</loc></url></urlset>"
    with LoopbackSite({"/": page("/private/secret", "/private/open")}, robots) as site:
        site.pages |= {
            "/private/open": page(),
            "/from-map": page(),
            "/maps/index.xml": lambda: web.Response(text=index.format(site.url)),
            "/maps/1.xml.gz": lambda: web.Response(
                body=gzip.compress(urls.format(site.url).encode())
            ),
        }
        result = crawler.crawl(site.url, contact="owner@example.org")
    assert {"/private/open", "/from-map"} <= set(site.paths)
    assert not {"/private/secret", "/private/x"} & set(site.paths)
    assert result.reason(f"{site.url}/private/secret") == ("denied", "robots.txt disallows it")
    assert result.addresses[f"{site.url}/private/secret"]["robots"] == "denied"
    assert result.rules["robots.txt disallows it"] == 2
    agent = site.requests[-1][2]
    assert agent["User-Agent"] == "Gristmill/1.0 (+owner@example.org)"
    assert agent["From"] == "owner@example.org"


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


def test_redirects_are_followed_bounded_and_loops_end(crawler: Crawler) -> None:
    chain = {f"/r{n}": redirect(f"/r{n + 1}") for n in range(12)}
    pages = small_site(
        **{"/": page("/moved", "/loop", "/r0")},
        **{"/moved": redirect("/a", 301), "/loop": redirect("/pool"), "/pool": redirect("/loop")},
        **chain,
    )
    with LoopbackSite(pages) as site:
        result = crawler.crawl(site.url, max_redirects=3)
    assert result.reason(f"{site.url}/moved") == ("redirect", "")
    assert result.addresses[f"{site.url}/moved"]["location"] == f"{site.url}/a"
    assert f"{site.url}/a" in result.pages
    assert site.paths["/loop"] == site.paths["/pool"] == 1
    assert result.reason(f"{site.url}/r3") == ("error", "too many redirects")
    assert "/r4" not in site.paths


def test_a_moved_seed_brings_its_new_host_into_scope(crawler: Crawler) -> None:
    with LoopbackSite(small_site()) as site:
        moved = site.url.replace("127.0.0.1", "localhost")
        with LoopbackSite({"/": redirect(f"{moved}/")}) as old:
            # The new host is private and no seed: it stays out of reach unless named as well.
            with pytest.raises(UserError, match="private address"):
                crawler.crawl(old.url)
            result = crawler.crawl(old.url, f"{moved}/c", epoch=1)
    assert f"{moved}/a" in result.pages


def test_private_addresses_are_reached_only_at_their_seed(crawler: Crawler) -> None:
    with LoopbackSite({"/": page(), "/admin": page()}) as inner:
        by_name = f"http://localhost:{inner.port}/admin"
        pages = {
            "/": page("/to-inner", "/to-name", "/to-meta", "/to-mapped"),
            "/to-inner": redirect(f"{inner.url}/admin"),
            "/to-name": redirect(by_name),
            "/to-meta": redirect("http://169.254.169.254/latest/meta-data/"),
            "/to-mapped": redirect(f"http://[::ffff:127.0.0.1]:{inner.port}/admin"),
        }
        with LoopbackSite(pages) as site:
            result = crawler.crawl(
                site.url, domains=["127.0.0.1", "localhost", "169.254.169.254", "::ffff:7f00:1"]
            )
    assert not inner.requests
    assert result.rules["private address"] == 4
    assert result.reason(by_name) == ("error", "private address")


def test_noindex_nofollow_and_canonical(crawler: Crawler) -> None:
    def tagged() -> web.Response:
        headers = CIMultiDict(
            [("X-Robots-Tag", "otherbot: nofollow, none"), ("X-Robots-Tag", "gristmill: noindex")]
        )
        return web.Response(text=page("/d"), content_type="text/html", headers=headers)

    pages = {
        "/": page("/noindex", "/nofollow", "/tagged") + '<a href="/never" rel="nofollow">x</a>',
        "/noindex": page("/b", head='<meta name="robots" content="noindex">'),
        "/nofollow": page("/never", head='<meta name="ROBOTS" content="NoFollow">'),
        "/tagged": tagged,
        "/b": page(head='<link rel="canonical" href="/c">'),
        "/d": page(),
        "/never": page(),
    }
    with LoopbackSite(pages) as site:
        result = crawler.crawl(site.url)
    assert "/never" not in site.paths
    assert {f"{site.url}/b", f"{site.url}/d", f"{site.url}/nofollow"} <= set(result.pages)
    assert not {f"{site.url}/noindex", f"{site.url}/tagged"} & set(result.pages)
    assert result.rules["noindex"] == 2
    assert result.pages[f"{site.url}/b"].url == f"{site.url}/b"
    assert result.addresses[f"{site.url}/b"]["canonical"] == f"{site.url}/c"


def test_limits_of_pages_depth_size_and_type(crawler: Crawler) -> None:
    chain = {f"/{n}": page(f"/{n + 1}") for n in range(1, 9)}
    pages = {
        "/": page("/1", "/big", "/image", "/lies.zip", "/empty"),
        "/big": page(text="x" * 50_000),
        "/image": lambda: web.Response(body=b"\x89PNG", content_type="image/png"),
        "/empty": lambda: web.Response(text="", content_type="text/html"),
    } | chain
    with LoopbackSite(pages) as site:
        result = crawler.crawl(site.url, max_depth=3, max_bytes=10_000)
    assert result.reason(f"{site.url}/big") == ("skipped", "too large")
    assert result.reason(f"{site.url}/image") == ("skipped", "content type image/png")
    assert result.reason(f"{site.url}/lies.zip") == ("skipped", "file type")
    assert result.reason(f"{site.url}/empty") == ("skipped", "empty")
    assert result.reason(f"{site.url}/4") == ("skipped", "too deep")
    assert len(result.pages) == 4
    with LoopbackSite(pages) as site:
        result = crawler.crawl(site.url, max_pages=3, epoch=1)
    assert len(result.pages) == 3
    assert "over max_pages" in result.rules


def test_a_compressed_bomb_is_too_large(crawler: Crawler) -> None:
    bomb = gzip.compress(b"\x00" * 20_000_000)

    def explode() -> web.Response:
        headers = {"Content-Encoding": "gzip"}
        return web.Response(body=bomb, content_type="text/html", headers=headers)

    with LoopbackSite(small_site(**{"/a": explode})) as site:
        result = crawler.crawl(site.url, max_bytes=100_000)
    assert result.reason(f"{site.url}/a") == ("skipped", "too large")


def test_compressed_pages_are_stored_decoded(crawler: Crawler) -> None:
    def zipped() -> web.Response:
        headers = {"Content-Encoding": "gzip"}
        body = gzip.compress(page("/b", text="zipped").encode())
        return web.Response(body=body, content_type="text/html", headers=headers)

    with LoopbackSite({"/": zipped, "/b": page()}) as site:
        result = crawler.crawl(site.url)
    assert b"zipped" in result.pages[f"{site.url}/"].body
    assert f"{site.url}/b" in result.pages


def test_endless_query_strings_stop(crawler: Crawler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.corpus.frontier.MAX_QUERIES", 20)

    def calendar(request: web.Request) -> web.Response:
        day = int(request.query.get("day", "0"))
        return web.Response(text=page(f"/?day={day + 1}"), content_type="text/html")

    with LoopbackSite({"/": calendar} | {f"/?day={n}": calendar for n in range(60)}) as site:
        result = crawler.crawl(site.url, max_depth=100)
    assert len(result.pages) == 21
    assert result.rules["trap: too many query strings"] == 1


def test_a_recrawl_of_an_unchanged_site_has_the_same_content(crawler: Crawler) -> None:
    bodies = small_site()

    def answer(request: web.Request) -> web.Response:
        body = bodies[request.path]
        etag = f'"{payload_digest(body.encode())[7:20]}"'
        if request.headers.get("If-None-Match") == etag:
            return web.Response(status=304, headers={"ETag": etag})
        return web.Response(text=body, content_type="text/html", headers={"ETag": etag})

    with LoopbackSite(dict.fromkeys(bodies, answer)) as site:
        first = crawler.crawl(site.url)
        second = crawler.crawl(site.url, epoch=1)
        bodies["/c"] = page(text="another page c")
        third = crawler.crawl(site.url, epoch=2)
        del bodies["/c"], site.pages["/c"]
        bodies["/b"] = page(text="no link any more")
        fourth = crawler.crawl(site.url, epoch=5)
    assert first.outcome.content == second.outcome.content != third.outcome.content
    assert second.counts["not_modified"] == 4
    assert second.counts["fetched"] == 0
    assert second.counts["changed"] == second.counts["new"] == second.counts["gone"] == 0
    assert third.counts["changed"] == 1
    assert (fourth.counts["gone"], fourth.counts["changed"]) == (1, 1)
    # The recrawl holds the bodies itself: the epoch before may be deleted.
    crawler.workspace(f"{0:064d}").remove()
    kept = second.pages[f"{site.url}/c"]
    assert kept.body == first.pages[f"{site.url}/c"].body
    assert kept.record_id == first.pages[f"{site.url}/c"].record_id
    with open(second.work.location(kept.warc), "rb") as stream:
        records = list(ArchiveIterator(stream, parse_http=False))
        revisits = [r.headers for r in records if r.headers["WARC-Type"] == "revisit"]
    refers = {headers["WARC-Refers-To"] for headers in revisits}
    assert refers == {found.record_id for found in first.pages.values()}


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


def test_a_huge_robots_file_with_a_byte_order_mark_is_read(crawler: Crawler) -> None:
    robots = "\ufeffUser-agent: *\nDisallow: /a\n" + "# filler\n" * 200_000
    with LoopbackSite(small_site(), robots) as site:
        result = crawler.crawl(site.url)
    assert result.reason(f"{site.url}/a")[0] == "denied"


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


def test_the_embedded_name_does_not_depend_on_a_port(crawler: Crawler) -> None:
    pages = {"/index.html": page("/a"), "/a": page()}
    with LoopbackSite(pages) as one:
        first = crawler.crawl("embedded:stdlib", embedded=one.url)
    with LoopbackSite(pages) as two:
        second = crawler.crawl("embedded:stdlib", embedded=two.url, epoch=1)
    assert set(first.pages) == {"embedded://stdlib/index.html", "embedded://stdlib/a"}
    assert first.outcome.content == second.outcome.content
    assert first.pages["embedded://stdlib/a"].fetch_url == f"{one.url}/a"


def test_several_hosts_are_crawled_side_by_side(crawler: Crawler) -> None:
    with LoopbackSite(small_site()) as one, LoopbackSite(small_site()) as two:
        one.pages["/"] = page("/a", f"{two.url}/c", "http://unrelated.example/")
        result = crawler.crawl(one.url, f"{two.url}/b")
    assert len(result.pages) == 6
    hosts = {row["host"]: row for row in result.outcome.reports[0].body}
    assert {one.url[7:], two.url[7:]} == set(hosts)
    assert hosts[two.url[7:]]["fetched"] == 2
    assert result.counts["links_out_of_scope"] == 1


def test_segments_are_rolled_and_packed_by_size(crawler: Crawler) -> None:
    pages = {"/": page(*(f"/{n}" for n in range(30)))} | {
        f"/{n}": page(text=str(n) * 200) for n in range(30)
    }
    with LoopbackSite(pages) as site:
        result = crawler.crawl(site.url, segment_bytes=4000)
    files = {found.warc for found in result.pages.values()}
    assert len(files) > 3
    assert len(result.pages) == 31
    for n in range(30):
        assert (str(n) * 200).encode() in result.pages[f"{site.url}/{n}"].body


def test_a_site_is_reached_over_ipv6(crawler: Crawler) -> None:
    with LoopbackSite(small_site(), host="::1") as site:
        result = crawler.crawl(site.url.replace("::1", "0:0:0:0:0:0:0:1"))
    assert set(result.pages) == {f"{site.url}{path}" for path in ("/", "/a", "/b", "/c")}


def test_a_site_without_proper_tls_is_named(crawler: Crawler) -> None:
    with LoopbackSite(small_site()) as site:
        secure = site.url.replace("http:", "https:")
        result = crawler.crawl(site.url, f"{secure}/a", retries=2)
    assert result.reason(f"{secure}/a") == ("error", "TLS error")
    assert len(result.pages) == 4


def test_a_page_is_also_fetched_by_the_name_it_gives_itself(crawler: Crawler) -> None:
    pages = {
        "/": page("/print"),
        "/print": page(head='<link rel="canonical" href="/real">'),
        "/real": page(text="the real one", head='<link rel="canonical" href="/real">'),
    }
    with LoopbackSite(pages) as site:
        result = crawler.crawl(site.url)
    assert f"{site.url}/real" in result.pages
    assert result.addresses[f"{site.url}/real"]["source"] == f"{site.url}/print"


def test_requests_in_flight_are_bounded_over_all_hosts(crawler: Crawler) -> None:
    now = most = 0

    async def slow() -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return web.Response(text=page(), content_type="text/html")

    pages = {"/": page(*(f"/{n}" for n in range(12)))} | {f"/{n}": slow for n in range(12)}
    with LoopbackSite(pages) as site:
        crawler.crawl(site.url, parallel=8, parallel_total=2)
        assert most == 2
        crawler.crawl(site.url, parallel=8, parallel_total=50, epoch=1)
        assert most > 2
