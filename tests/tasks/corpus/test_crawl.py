"""The crawler against real loopback servers: what it finds, follows, keeps and crawls again."""

import gzip
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fastwarc.warc import ArchiveIterator
from loopback_site import Crawler, LoopbackSite, page, redirect, small_site
from multidict import CIMultiDict

from tasks.corpus.warc import REVISIT_IDENTICAL, payload_digest
from tasks.runtime.errors import UserError


@pytest.fixture
def crawler(tmp_path: Path) -> Crawler:
    return Crawler(tmp_path / "home")


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


def test_redirects_are_followed_bounded_and_loops_end(crawler: Crawler) -> None:
    chain = {f"/r{n}": redirect(f"/r{n + 1}") for n in range(12)}
    pages = small_site(
        **{"/": page("/moved", "/loop", "/self", "/into", "/r0")},
        **{"/self": redirect("/self"), "/into": redirect("/loop")},
        **{"/moved": redirect("/a", 301), "/loop": redirect("/pool"), "/pool": redirect("/loop")},
        **chain,
    )
    with LoopbackSite(pages) as site:
        result = crawler.crawl(site.url, max_redirects=3)
    assert result.reason(f"{site.url}/moved") == ("redirect", "")
    assert result.addresses[f"{site.url}/moved"]["location"] == f"{site.url}/a"
    assert f"{site.url}/a" in result.pages
    assert site.paths["/loop"] == site.paths["/pool"] == site.paths["/self"] == 1
    for path in ("/loop", "/pool", "/self"):
        assert result.reason(f"{site.url}{path}") == ("error", "redirects in a circle")
    assert result.rules["redirects in a circle"] == 3
    assert result.reason(f"{site.url}/into") == ("redirect", "")
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


def test_a_directive_for_our_own_agent_holds_for_pages_of_any_type(crawler: Crawler) -> None:
    def tagged(kind: str) -> Any:
        headers = {"X-Robots-Tag": "mybot: noindex"}
        return lambda: web.Response(text="words", content_type=kind, headers=headers)

    pages = {
        "/": page("/text", "/file"),
        "/text": tagged("text/plain"),
        "/file": tagged("application/pdf"),
    }
    kinds = ("text/html", "text/plain", "application/pdf")
    with LoopbackSite(pages) as site:
        ours = crawler.crawl(site.url, user_agent="mybot/1.0", content_types=kinds)
        assert (len(ours.pages), ours.rules) == (1, {"noindex": 2})
        assert len(Crawler(crawler.home / "b").crawl(site.url, content_types=kinds).pages) == 3


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


def test_compressed_pages_are_stored_decoded(crawler: Crawler) -> None:
    def zipped() -> web.Response:
        headers = {"Content-Encoding": "gzip"}
        body = gzip.compress(page("/b", text="zipped").encode())
        return web.Response(body=body, content_type="text/html", headers=headers)

    with LoopbackSite({"/": zipped, "/b": page()}) as site:
        result = crawler.crawl(site.url)
    assert b"zipped" in result.pages[f"{site.url}/"].body
    assert f"{site.url}/b" in result.pages


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


def test_a_payload_that_did_not_change_is_not_stored_again(crawler: Crawler) -> None:
    """By a server that knows no conditional requests."""
    kinds = {"/c": "text/html"}

    def c() -> web.Response:
        return web.Response(text=page(text="page c"), content_type=kinds["/c"])

    with LoopbackSite(small_site(**{"/c": c})) as site:
        first = crawler.crawl(site.url)
        second = crawler.crawl(site.url, epoch=1)
        kinds["/c"] = "text/plain"
        third = crawler.crawl(site.url, epoch=2)
        site.pages["/a"] = page("/b", "/", text="another page a")
        fourth = crawler.crawl(site.url, epoch=3)
    assert (second.counts["fetched"], second.counts["not_modified"]) == (0, 4)
    assert second.outcome.content == first.outcome.content
    assert {u: p.record_id for u, p in second.pages.items()} == {
        u: p.record_id for u, p in first.pages.items()
    }
    with open(second.work.location("warc/00000.warc.gz"), "rb") as stream:
        entries = list(ArchiveIterator(stream, parse_http=True))
        revisits = [entry for entry in entries if entry.headers["WARC-Type"] == "revisit"]
        assert len(revisits) == 4
        for entry in revisits:
            body = second.pages[entry.headers["WARC-Target-URI"]]
            assert entry.headers["WARC-Profile"] == REVISIT_IDENTICAL
            assert entry.headers["WARC-Refers-To"] == body.record_id
            assert entry.headers["WARC-Refers-To-Date"] == body.fetched_at
            assert entry.headers["WARC-Payload-Digest"] == body.digest
    assert (third.counts["fetched"], third.counts["not_modified"]) == (1, 3)
    assert third.pages[f"{site.url}/c"].content_type.startswith("text/plain")
    assert (fourth.counts["fetched"], fourth.counts["changed"]) == (1, 1)
    assert set(fourth.pages) == set(first.pages)  # links of what did not change are known


def test_the_embedded_name_does_not_depend_on_a_port(crawler: Crawler) -> None:
    pages = {"/index.html": page("/a"), "/a": page()}
    with LoopbackSite(pages) as one:
        first = crawler.crawl("embedded:stdlib", embedded=one.url)
    with LoopbackSite(pages) as two:
        second = crawler.crawl("embedded:stdlib", embedded=two.url, epoch=1)
    assert set(first.pages) == {"embedded://stdlib/index.html", "embedded://stdlib/a"}
    assert first.outcome.content == second.outcome.content
    assert first.pages["embedded://stdlib/a"].fetch_url == f"{one.url}/a"


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


def test_names_in_headers_and_refreshes_are_followed(crawler: Crawler) -> None:
    def named() -> web.Response:
        headers = {"Link": '</real>; rel="canonical"'}
        return web.Response(text="Words.", content_type="text/plain", headers=headers)

    refresh = page(head='<meta http-equiv="refresh" content="0; url=/c">')
    pages = {"/": page("/print", "/old"), "/print": named, "/real": page(), "/old": refresh}
    with LoopbackSite(small_site(**pages)) as site:
        result = crawler.crawl(site.url)
    assert result.addresses[f"{site.url}/print"]["canonical"] == f"{site.url}/real"
    assert {f"{site.url}{path}" for path in ("/real", "/c")} <= set(result.pages)


def test_one_host_cannot_fill_the_crawl(crawler: Crawler) -> None:
    many = {"/": page(*(f"/{n}" for n in range(30)))} | {f"/{n}": page() for n in range(30)}
    with LoopbackSite(many, "Sitemap: /map.txt\n") as large, LoopbackSite(small_site()) as small:
        large.pages["/map.txt"] = lambda: web.Response(text=f"{large.url}/29\n")
        result = crawler.crawl(large.url, small.url, max_pages_per_host=5)
    assert len(result.pages) == 5 + 4
    assert sum(url.startswith(large.url) for url in result.pages) == 5
    assert result.rules == {"over max_pages_per_host": 26}
