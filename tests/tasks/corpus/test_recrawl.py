"""Later epochs: what cannot be had for the moment stays, what is gone goes, settings may change."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from loopback_site import Crawler, LoopbackSite, page, redirect, small_site

from flows.corpus import CorpusParams
from flows.retrain import next_epoch
from tasks.corpus.crawl import crawl
from tasks.corpus.crawl_config import CrawlConfig, CrawlOptions
from tasks.runtime.errors import UserError
from tasks.runtime.planning import planning


@pytest.fixture
def crawler(tmp_path: Path) -> Crawler:
    return Crawler(tmp_path / "home")


@pytest.fixture
def site() -> Iterator[LoopbackSite]:
    with LoopbackSite(small_site()) as running:
        yield running


def failing(status: int) -> Any:
    return lambda: web.Response(status=status, text="not now")


def cut_off(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(failing(503), "HTTP 503"), (failing(429), "HTTP 429"), (cut_off, "connection closed")],
)
def test_a_page_that_fails_for_the_moment_stays_as_it_was(
    crawler: Crawler, site: LoopbackSite, answer: Any, reason: str
) -> None:
    first = crawler.crawl(site.url)
    good, site.pages["/b"] = site.pages["/b"], answer  # which alone leads to /c
    second = crawler.crawl(site.url, epoch=1, retries=0)
    b, c = f"{site.url}/b", f"{site.url}/c"
    assert second.reason(b) == ("stale", reason)
    assert second.addresses[b]["stale"] == 1
    assert second.addresses[b]["robots"] == ("allowed" if reason.startswith("HTTP") else "")
    assert second.pages[b].body == first.pages[b].body
    assert second.pages[b].fetched_at == first.pages[b].fetched_at
    assert second.outcome.content == first.outcome.content
    assert (second.counts["stale"], second.counts["gone"], c in second.pages) == (1, 0, True)
    hosts = next(r.body for r in second.outcome.reports if r.key == "crawl-hosts")
    assert (hosts[0]["stale"], hosts[0]["failed"]) == (f"1 {reason}", "")
    site.pages["/b"] = good
    third = crawler.crawl(site.url, epoch=2)
    assert third.reason(b) == ("not_modified", "") and third.addresses[b]["stale"] == 0
    assert third.addresses[b]["visits"] == 1  # the visit in vain says nothing of its changes


def test_an_error_page_says_nothing_of_the_page_that_stays(crawler: Crawler) -> None:
    """Its ETag and date would be asked for next time, and a 304 to them be believed."""

    def answering(status: int, tag: str, date: str) -> Any:
        headers = {"ETag": tag, "Last-Modified": date}
        return lambda: web.Response(
            status=status, text=page(text=tag), content_type="text/html", headers=headers
        )

    good = ('"page"', "Sun, 01 Feb 2026 00:00:00 GMT")
    with LoopbackSite({"/": page("/a"), "/a": answering(200, *good)}) as site:
        crawler.crawl(site.url)
        site.pages["/a"] = answering(503, '"error"', "Mon, 02 Feb 2026 00:00:00 GMT")
        second = crawler.crawl(site.url, epoch=1, retries=0)
        row = second.addresses[f"{site.url}/a"]
        assert row["state"] == "stale"
        assert (row["etag"], row["modified"]) == good


def test_it_stays_for_so_many_epochs_and_no_longer(crawler: Crawler, site: LoopbackSite) -> None:
    crawler.crawl(site.url, retries=0, keep_stale=2)
    site.pages["/c"] = failing(500)
    c = f"{site.url}/c"
    kept = [crawler.crawl(site.url, epoch=n, retries=0, keep_stale=2) for n in (1, 2, 3)]
    assert [c in result.pages for result in kept] == [True, True, False]
    assert kept[2].reason(c) == ("error", "HTTP 500")
    assert kept[2].counts["gone"] == 1


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (failing(404), "error"),
        (failing(410), "error"),
        (page(head='<meta name="tdm-reservation" content="1">'), "skipped"),
    ],
)
def test_what_is_gone_or_reserved_goes_at_once(
    crawler: Crawler, site: LoopbackSite, answer: Any, state: str
) -> None:
    crawler.crawl(site.url)
    site.pages["/c"] = answer
    second = crawler.crawl(site.url, epoch=1)
    assert second.reason(f"{site.url}/c")[0] == state
    assert (second.counts["gone"], second.counts["stale"]) == (1, 0)


def test_what_robots_txt_forbids_goes_and_what_it_cannot_say_stays(
    crawler: Crawler, site: LoopbackSite
) -> None:
    with LoopbackSite(small_site()) as other:
        seeds = (site.url, other.url)
        crawler.crawl(*seeds, retries=0)
        site.pages["/robots.txt"] = failing(503)
        other.pages["/robots.txt"] = lambda: web.Response(text="User-agent: *\nDisallow: /c\n")
        second = crawler.crawl(*seeds, epoch=1, retries=0)
        assert second.reason(f"{site.url}/c") == ("stale", "robots.txt answered 503")
        assert second.reason(f"{other.url}/c") == ("denied", "robots.txt disallows it")
        assert (second.counts["stale"], second.counts["gone"]) == (4, 1)


def test_ways_to_pages_are_known_when_a_redirect_or_a_sitemap_fails(crawler: Crawler) -> None:
    sitemap = "<urlset><url><loc>{0}/alone</loc></url></urlset>"
    pages = {"/": page("/moved"), "/moved": redirect("/new"), "/new": page(), "/alone": page()}
    with LoopbackSite(pages) as site:
        site.pages["/map.xml"] = sitemap.format(site.url)
        text = f"User-agent: *\nSitemap: {site.url}/map.xml\n"
        site.pages["/robots.txt"] = lambda: web.Response(text=text)
        first = crawler.crawl(site.url, retries=0, keep_stale=1)
        assert {f"{site.url}/new", f"{site.url}/alone"} < set(first.pages)
        site.pages["/moved"] = site.pages["/map.xml"] = failing(502)
        second = crawler.crawl(site.url, epoch=1, retries=0, keep_stale=1)
        assert set(second.pages) == set(first.pages)
        third = crawler.crawl(site.url, epoch=2, retries=0, keep_stale=1)
        assert set(third.pages) == {f"{site.url}/"}


def test_pages_are_known_when_the_index_of_their_sitemap_fails(crawler: Crawler) -> None:
    """Through a redirect, an index and a sitemap: whichever of them fails, twice in a row."""
    pages: dict[str, Any] = {"/": page(), "/alone": page(text="alone")}
    pages["/map.xml"] = redirect("/index.xml")
    pages["/index.xml"] = "<sitemapindex><sitemap><loc>/m.xml</loc></sitemap></sitemapindex>"
    pages["/m.xml"] = "<urlset><url><loc>/alone</loc></url></urlset>"
    with LoopbackSite(pages) as site:
        text = f"User-agent: *\nSitemap: {site.url}/map.xml\n"
        site.pages["/robots.txt"] = lambda: web.Response(text=text)
        first = crawler.crawl(site.url)
        assert f"{site.url}/alone" in first.pages
        for number, path in enumerate(("/index.xml", "/m.xml", "/map.xml", "/map.xml")):
            good, site.pages[path] = site.pages[path], failing(503)
            later = crawler.crawl(site.url, epoch=number + 1, retries=0)
            assert set(later.pages) == set(first.pages), path
            assert later.reason(f"{site.url}{path}") == ("error", "HTTP 503")
            site.pages[path] = good


@pytest.mark.parametrize(("status", "known"), [(429, True), (503, True), (404, False)])
def test_pages_are_known_when_a_sitemap_that_nobody_named_fails(
    crawler: Crawler, status: int, known: bool
) -> None:
    sitemap = "<urlset><url><loc>/alone</loc></url></urlset>"
    pages = {"/": page(), "/alone": page(text="alone"), "/sitemap.xml": sitemap}
    with LoopbackSite(pages) as site:
        crawler.crawl(site.url)
        site.pages["/sitemap.xml"] = failing(status)
        second = crawler.crawl(site.url, epoch=1, retries=0)
        assert (f"{site.url}/alone" in second.pages) is known
        assert second.reason(f"{site.url}/sitemap.xml") == ("error", f"HTTP {status}")


def test_a_recrawl_that_has_nothing_new_to_say_is_refused(crawler: Crawler) -> None:
    with LoopbackSite(small_site()) as site:
        crawler.crawl(site.url)
    with pytest.raises(UserError, match="connection refused"):
        crawler.crawl(site.url, epoch=1, retries=0)


def conditional(body: str, asked: list[str]) -> Any:
    def answer(request: web.Request) -> web.Response:
        if "If-None-Match" in request.headers:
            asked.append(request.path)
            return web.Response(status=304)
        return web.Response(text=body, content_type="text/html", headers={"ETag": '"1"'})

    return answer


def note(result: Any) -> str:
    return next(str(r.body) for r in result.outcome.reports if r.key == "crawl-epoch")


def test_other_pace_limits_and_scope_lose_nothing_and_others_start_anew_saying_so(
    crawler: Crawler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRISTMILL_HOME", str(crawler.home))
    asked: list[str] = []
    pages = {path: conditional(body, asked) for path, body in small_site().items()}
    with LoopbackSite(pages) as site:
        first = crawler.crawl(site.url)
        others = {"delay": 0.01, "parallel": 2, "max_pages": 100, "max_depth": 3, "max_delay": 9.0}
        second = crawler.crawl(site.url, epoch=1, exclude=("/z",), keep_stale=1, **others)
        assert sorted(asked) == ["/", "/a", "/b", "/c"]
        assert second.counts["not_modified"] == 4
        assert "goes on from epoch 0" in note(second) and "max_pages 2000 → 100" in note(second)
        asked.clear()
        more = crawler.crawl(site.url, f"{site.url}/c", epoch=2)
        assert sorted(asked) == ["/", "/a", "/b", "/c"]
        assert "goes on from epoch 1" in note(more) and "crawl.seeds" in note(more)
        asked.clear()
        with planning() as planned:
            crawl(CrawlConfig(seeds=(site.url,), epoch=3, user_agent="Other/2.0"))
        assert "epoch 3 asks for every page anew, not as epoch 1" in planned[0].why
        third = crawler.crawl(site.url, epoch=3, user_agent="Other/2.0")
        assert not asked and third.counts["fetched"] == 4
        assert "asks for every page anew" in note(third)
        assert 'crawl.user_agent "Gristmill/1.0" → "Other/2.0"' in note(third)
        assert set(third.pages) == set(first.pages)


def refuse(manifest: Path) -> None:
    """Give a crawl a setting that was accepted once, and no longer is."""
    made = json.loads(manifest.read_text())
    made["config"]["exclude"] = ["private"]
    manifest.write_text(json.dumps(made))


def test_a_crawl_whose_settings_are_refused_by_now_is_named_and_stops_no_retrain(
    crawler: Crawler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRISTMILL_HOME", str(crawler.home))
    with LoopbackSite(small_site()) as site:
        crawler.crawl(site.url)
        crawler.crawl(site.url, epoch=1)
        zero, one = (crawler.workspace(f"{n:064d}").path + "/manifest.json" for n in (0, 1))
        refuse(Path(one))
        second = crawler.crawl(site.url, epoch=2)
        assert second.counts["not_modified"] == 4
        assert "goes on from epoch 0" in note(second)
        assert "of epoch 1 the settings are refused by now" in note(second)
        assert next_epoch(CorpusParams(seeds=(site.url,), crawl=CrawlOptions(exclude=()))) == 3
        refuse(Path(zero))
        Path(crawler.workspace(f"{2:064d}").path, "manifest.json").unlink()
        with planning() as planned:
            crawl(CrawlConfig(seeds=(site.url,), epoch=3))
        assert "asks for every page anew: of epoch 0, 1 the settings are" in planned[0].why
        with planning() as planned:
            crawl(CrawlConfig(seeds=(site.url,)))
        assert "refused" not in planned[0].why


def test_of_two_crawls_of_the_same_epoch_it_goes_on_from_that_with_the_same_settings(
    crawler: Crawler, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoopbackSite(small_site()) as site:
        crawler.crawl(site.url)
        with monkeypatch.context() as patch:  # a short one, to try something, made later
            work = crawler.workspace("f" * 64)
            patch.setattr(crawler, "workspace", lambda fingerprint: work)
            crawler.crawl(site.url, max_pages=1)
        second = crawler.crawl(site.url, epoch=1)
        assert second.counts["not_modified"] == 4
        assert "with other settings: none" in note(second)


def test_a_page_that_is_too_large_by_now_is_not_kept_by_a_304(crawler: Crawler) -> None:
    asked: list[str] = []
    bodies = {"/": page("/long"), "/long": page(text="long " * 100)}
    with LoopbackSite({path: conditional(body, asked) for path, body in bodies.items()}) as site:
        crawler.crawl(site.url)
        second = crawler.crawl(site.url, epoch=1, max_bytes=300)
    assert asked == ["/"]
    assert second.reason(f"{site.url}/long") == ("skipped", "too large")
