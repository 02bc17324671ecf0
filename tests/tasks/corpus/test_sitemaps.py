"""Sitemaps: tried where none is named, believed where they say that a page changed."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from loopback_site import Crawler, LoopbackSite, page, redirect
from test_change_rate import aged

from tasks.corpus.sitemaps import last_moment, sitemap_links

HTML = page(text="There is no such page, but we say 200.")


@pytest.fixture
def crawler(tmp_path: Path) -> Crawler:
    return Crawler(tmp_path / "home")


def urlset(*entries: str) -> str:
    return f"<urlset>{''.join(f'<url>{entry}</url>' for entry in entries)}</urlset>"


def failed(result: Any) -> list[str]:
    hosts = next(report.body for report in result.outcome.reports if report.key == "crawl-hosts")
    return [row["failed"] for row in hosts]


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_a_sitemap_in_another_unicode_form_with_comments_is_read(codec: str) -> None:
    mark = "" if codec in ("utf-16", "utf-8-sig") else "\ufeff"
    named = "utf-8" if codec == "utf-8-sig" else "UTF-16"
    head = f'{mark}<?xml version="1.0" encoding="{named}"?>\n'
    entry = "<loc>http://e.org/<!-- moved -->ä</loc>"
    found = sitemap_links((head + urlset(entry)).encode(codec), "http://e.org/")
    assert (found.pages, found.damage) == (("http://e.org/%C3%A4",), "")
    listed = sitemap_links(f"{mark}http://e.org/a\nhttp://e.org/b\n".encode(codec), "http://e.org/")
    assert listed.pages == ("http://e.org/a", "http://e.org/b")


def test_a_sitemap_is_tried_once_where_robots_txt_names_none(crawler: Crawler) -> None:
    with LoopbackSite({"/": page("/a"), "/a": page(), "/alone": page(text="alone")}) as site:
        site.pages["/sitemap.xml"] = lambda: web.Response(
            text=urlset(f"<loc>{site.url}/alone</loc>"), content_type="application/xml"
        )
        result = crawler.crawl(site.url)
        assert f"{site.url}/alone" in result.pages
        assert site.paths["/sitemap.xml"] == 1
        site.requests.clear()
        result = Crawler(crawler.home / "other").crawl(site.url, try_sitemap=False)
        assert "/sitemap.xml" not in site.paths and f"{site.url}/alone" not in result.pages
        text = f"User-agent: *\nSitemap: {site.url}/mine.xml\n"
        site.pages["/robots.txt"] = lambda: web.Response(text=text)
        site.requests.clear()
        Crawler(crawler.home / "third").crawl(site.url)
        assert site.paths["/mine.xml"] == 1 and "/sitemap.xml" not in site.paths


@pytest.mark.parametrize(
    "answer",
    [
        lambda: web.Response(status=404),
        lambda: web.Response(status=403),
        lambda: web.Response(text="Not found, sorry."),
        HTML,
        redirect("/"),
    ],
)
def test_that_there_is_none_is_no_failure(crawler: Crawler, answer: Any) -> None:
    with LoopbackSite({"/": page("/a"), "/a": page(), "/sitemap.xml": answer}) as site:
        result = crawler.crawl(site.url)
        assert site.paths["/sitemap.xml"] == 1
        assert result.reason(f"{site.url}/sitemap.xml") == ("skipped", "no sitemap")
        assert set(result.pages) == {f"{site.url}/", f"{site.url}/a"}
        assert failed(result) == [""]
        assert result.counts["errors"] == 0


def test_robots_txt_is_obeyed_and_an_index_elsewhere_followed(crawler: Crawler) -> None:
    with LoopbackSite({"/": page()}, robots="User-agent: *\nDisallow: /sitemap.xml\n") as site:
        crawler.crawl(site.url)
        assert "/sitemap.xml" not in site.paths
        site.pages["/robots.txt"] = lambda: web.Response(status=404)
        site.pages["/sitemap.xml"] = redirect("/sitemap_index.xml")
        site.pages["/sitemap_index.xml"] = (
            "<sitemapindex><sitemap><loc>/m.xml</loc></sitemap></sitemapindex>"
        )
        site.pages["/m.xml"] = urlset("<loc>/deep</loc>")
        site.pages["/deep"] = page(text="deep")
        result = Crawler(crawler.home / "other").crawl(site.url)
        assert f"{site.url}/deep" in result.pages


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("excluded", [(), ("/*.xml",)])
def test_a_sitemap_that_pages_link_to_is_read_as_one(
    crawler: Crawler, named: bool, excluded: tuple[str, ...]
) -> None:
    index = "<sitemapindex><sitemap><loc>/m.xml</loc></sitemap></sitemapindex>"
    pages = {"/": page("/sitemap.xml"), "/alone": page(text="alone")}
    with LoopbackSite(pages) as site:
        for path, text in (("/sitemap.xml", index), ("/m.xml", urlset("<loc>/alone</loc>"))):
            site.pages[path] = text
        if named:
            told = f"User-agent: *\nSitemap: {site.url}/sitemap.xml\n"
            site.pages["/robots.txt"] = lambda: web.Response(text=told)
        result = crawler.crawl(site.url, exclude=excluded)
        assert set(result.pages) == {f"{site.url}/", f"{site.url}/alone"}
        assert site.paths["/sitemap.xml"] == 1


def test_what_changed_since_the_last_visit_is_asked_for_and_first(crawler: Crawler) -> None:
    """Pages that never changed are taken over unasked, but for the one whose sitemap knows."""
    old, new = "2001-01-01", (datetime.now(UTC) + timedelta(days=1)).date().isoformat()
    lastmods = {"/quiet0": old, "/quiet1": old, "/quiet2": "yesterday", "/quiet3": old}
    quiet = {path: page(text=path) for path in lastmods}

    def sitemap() -> web.Response:
        entries = (
            f"<loc>{site.url}{path}</loc><lastmod>{lastmod}</lastmod>"
            for path, lastmod in lastmods.items()
        )
        return web.Response(text=urlset(*entries), content_type="application/xml")

    with LoopbackSite({"/": page(*quiet), "/sitemap.xml": sitemap} | quiet) as site:
        for epoch in range(4):
            result = crawler.crawl(site.url, epoch=epoch)
            aged(crawler, epoch, 1)
        assert result.addresses[f"{site.url}/quiet0"]["lastmod"] == "2001-01-01T23:59:59.000000Z"
        assert result.addresses[f"{site.url}/quiet2"]["lastmod"] == ""
        lastmods["/quiet3"] = new
        site.requests.clear()
        result = crawler.crawl(site.url, epoch=4, revisit_chance=0.5)
        assert {path for path in site.paths if path.startswith("/quiet")} == {"/quiet3"}
        assert result.counts["not_asked"] == 3 and result.counts["pages"] == 5
        site.requests.clear()
        crawler.crawl(site.url, epoch=5, parallel=1)
        order = [path for _, path, _ in site.requests if path.startswith("/quiet")]
        # An old date keeps nothing from being asked.
        assert order[0] == "/quiet3" and len(order) == 4


@pytest.mark.parametrize("limit", ["max_pages", "max_pages_per_host"])
def test_a_sitemap_makes_no_room_for_other_pages_than_before(crawler: Crawler, limit: str) -> None:
    pages = {f"/{number}": page(text=f"page {number}") for number in range(6)}
    with LoopbackSite({"/": page(*pages), "/sitemap.xml": urlset()} | pages) as site:
        site.pages["/sitemap.xml"] = urlset(*(f"<loc>{site.url}{path}</loc>" for path in pages))
        first = crawler.crawl(site.url, **{limit: 4})
        second = crawler.crawl(site.url, epoch=1, **{limit: 4})
        assert len(first.pages) == 4
        assert set(second.pages) == set(first.pages)


@pytest.mark.parametrize(
    ("lastmod", "moment"),
    [
        ("2024", "2024-12-31T23:59:59"),
        ("2023-02", "2023-03-03T23:59:59"),
        (" 2024-05-01 ", "2024-05-01T23:59:59"),
        ("2024-05-01T10:20Z", "2024-05-01T10:20:59"),
        ("2024-05-01T10:20:30+02:00", "2024-05-01T08:20:30"),
        ("2024-05-01T10:20:30.45-05:30", "2024-05-01T15:50:30"),
        *((bad, "") for bad in ("2024-13-01", "01.05.2024", "2024-05-01T10:20", "May 2024", "")),
        *(
            (bad, "")
            for bad in ("2024-02-30", "0000-01-01", "9999-12-31T23:59:59-23:59", "20240501")
        ),
    ],
)
def test_dates_are_w3c_dates_and_others_are_ignored(lastmod: str, moment: str) -> None:
    assert last_moment(lastmod).removesuffix(".000000Z") == moment
    entry = f"<loc>http://e.org/a</loc><lastmod>{lastmod}</lastmod>"
    found = sitemap_links(urlset(entry, "<loc>http://e.org/b</loc>").encode(), "http://e.org/")
    assert found.pages == ("http://e.org/a", "http://e.org/b")
    assert found.lastmods == ((last_moment(lastmod), "") if moment else ())


@given(st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(9998, 1, 1)))
def test_any_moment_is_read_back(moment: datetime) -> None:
    written = moment.replace(microsecond=0).isoformat()
    assert last_moment(f"{written}Z") == f"{written}.000000Z"


@given(st.text(max_size=30))
def test_any_text_is_a_date_or_none(text: str) -> None:
    assert last_moment(text) == "" or text.strip()[:4].isdigit()
