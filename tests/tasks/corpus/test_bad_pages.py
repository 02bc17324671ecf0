"""A site of all that servers do wrong: each page ends under a name, and the good ones are whole."""

import asyncio
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from documents_of import rows
from inline_shards import stages_inline
from loopback_site import Crawler, CrawlResult, LoopbackSite, page

from tasks.corpus.extract import ExtractConfig, extract
from tasks.corpus.judged import NESTED_TOO_DEEP
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import MANIFEST

GOOD = "A paragraph of a good page, with enough words in it to be taken for text. " * 6


@pytest.fixture
def crawler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crawler]:
    with stages_inline(monkeypatch, tmp_path / "home"):
        yield Crawler(tmp_path / "home")


def extracted(result: CrawlResult, **options: Any) -> Manifest:
    made = Manifest.model_validate_json(result.work.read_bytes(MANIFEST))
    return extract(ExtractConfig(**options), crawl=made)


def body(data: bytes, kind: str = "text/html", **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda: web.Response(body=data, content_type=kind, headers=named)


def html(inner: bytes) -> bytes:
    return b"<html><title>t</title><body><article>" + inner + b"</article></body></html>"


def raw(answer: bytes) -> Any:
    """Bytes on the wire as they are, whatever HTTP thinks of them."""

    async def send(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(answer)
        await asyncio.sleep(0.05)
        if request.transport is not None:
            request.transport.close()
        return web.Response()

    return send


def endless(request: web.Request) -> web.Response:
    number = int(request.query.get("n", "0"))
    return web.Response(status=302, headers={"Location": f"/endless?n={number + 1}"})


async def hundred_megabytes(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/html"})
    await response.prepare(request)
    for _ in range(100):
        await response.write(b"<p>" + b"x" * (1 << 20))
    return response


def test_every_bad_page_ends_under_a_name(crawler: Crawler) -> None:
    good = GOOD.encode()
    pages: dict[str, Any] = {
        "/good": body(html(b"<p>%s</p>" % good)),
        "/gzip-clipped": body(gzip.compress(html(good))[:-12], Content_Encoding="gzip"),
        "/gzip-lie": body(html(b"<p>lie %s</p>" % good), Content_Encoding="gzip"),
        "/length-too-long": raw(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 5000\r\n\r\n<p>half"
        ),
        "/length-too-short": raw(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 500\r\n\r\n"
            + html(b"<p>short %s</p>" % (good * 3))
        ),
        "/two-lengths": raw(
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 9\r\n\r\n<p>halves"
        ),
        "/100-megabytes": hundred_megabytes,
        "/deep": body(b"<div>" * 50_000 + b"<p>deep %s</p>" % good),
        "/nul": body(html(b"<p>n\x00u\x00l %s</p>" % good)),
        "/mixed": body(
            html("<p>Ünïcödé prösé ".encode() + b"and latin \xe9\xe8 " + good + b"</p>")
        ),
        "/utf16": body(("\ufeff" + html(good).decode()).encode("utf-16-le")),
        "/picture": body(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40),
        "/program": body(b"\x7fELF" + bytes(5000), "text/plain"),
        "/says-picture": body(html(good), "image/png"),
        "/says-nothing": raw(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + html(b"<p>" + good)),
        "/endless": endless,
        "/no-status": raw(b"<html>no status line</html>\r\n\r\n"),
        "/long-header": raw(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n<p>x"),
    }
    with LoopbackSite({"/": page(*pages)} | pages) as site:
        for number in range(1, 12):
            site.pages[f"/endless?n={number}"] = endless
        robots = b"\xef\xbb\xbfUser-agent: *\nDisallow: /mixed-not\n" + b"# filler\n" * 1_200_000
        assert len(robots) > 10_000_000
        site.pages["/robots.txt"] = body(robots, "text/plain")
        result = crawler.crawl(site.url, max_bytes=3_000_000, max_delay=0.05)
        told = {path: result.reason(f"{site.url}{path}") for path in pages}
        manifest = extracted(result)
    assert {path: reason for path, (state, reason) in told.items() if state != "fetched"} == {
        "/gzip-clipped": "truncated or damaged body",
        "/length-too-long": "truncated or damaged body",
        "/length-too-short": "not HTTP",
        "/two-lengths": "not HTTP",
        "/100-megabytes": "too large",
        "/picture": "binary: PNG image",
        "/program": "binary: program",
        "/says-picture": "content type image/png",
        "/endless": "",  # a redirect; its end is named below
        "/no-status": "not HTTP",
        "/long-header": "not HTTP",
    }
    assert result.reason(f"{site.url}/endless?n=5") == ("error", "too many redirects")
    assert sum(result.rules.values()) == 11
    read = {row["url"].removeprefix(site.url): row["text"] for row in rows(manifest)}
    for path in ("/good", "/gzip-lie", "/nul", "/mixed", "/utf16", "/says-nothing"):
        assert GOOD.strip()[:200] in read[path], path
    assert "Ünïcödé prösé and latin éè" in read["/mixed"]
    removed = {
        row["url"].removeprefix(site.url): row["rule"] for row in rows(manifest, "rejected-")
    }
    fetched = {path for path, (state, _) in told.items() if state == "fetched"} | {"/"}
    assert set(read) | set(removed) == fetched
    assert sum(manifest.rules.values()) == len(removed)


def test_a_clipped_archive_is_counted_record_by_record(crawler: Crawler) -> None:
    pages = {f"/{n}": body(html(b"<p>%d %s</p>" % (n, GOOD.encode()))) for n in range(6)}
    with LoopbackSite({"/": page(*pages)} | pages) as site:
        result = crawler.crawl(site.url)
    warc = Path(result.work.location("warc/00000.warc.gz"))
    data = bytearray(warc.read_bytes())
    table = result.work.read_table("pages.parquet").to_pylist()
    last = max(table, key=lambda row: row["offset"])
    hurt = sorted(table, key=lambda row: row["offset"])[2]
    middle = hurt["offset"] + hurt["length"] // 2
    data[middle : middle + 20] = bytes(20)
    warc.write_bytes(data[: last["offset"] + last["length"] // 2])
    manifest = extracted(result)
    assert manifest.rules["damaged-record"] == 2
    assert {row["url"] for row in rows(manifest, "rejected-")} >= {hurt["url"], last["url"]}
    assert manifest.counts["seen"] == 7


def test_a_clipped_sitemap_is_named(crawler: Crawler) -> None:
    urls = "".join(f"<url><loc>/{n}</loc></url>" for n in range(300))
    packed = gzip.compress(f"<urlset>{urls}</urlset>".encode())
    with LoopbackSite({"/": page()}, "Sitemap: /map.xml.gz\n") as site:
        site.pages["/map.xml.gz"] = body(packed[: len(packed) // 2], "application/gzip")
        result = crawler.crawl(site.url)
    state, reason = result.reason(f"{site.url}/map.xml.gz")
    assert (state, reason) == ("error", "sitemap: its gzip data end too early")


def test_a_damaged_sitemap_and_links_that_are_none_are_told(crawler: Crawler) -> None:
    with LoopbackSite({"/": page("/a", "http://a b/")}, "Sitemap: /map.xml\n") as site:
        site.pages["/map.xml"] = body(b"<urlset><url><loc>/b</loc></url><url><lo", "text/xml")
        site.pages |= {"/a": page(), "/b": page()}
        result = crawler.crawl(site.url)
    assert result.reason(f"{site.url}/map.xml") == ("fetched", "sitemap: its XML is damaged")
    assert f"{site.url}/b" in result.pages
    assert (result.counts["links_invalid"], result.counts["links_left_out"]) == (1, 0)


def test_pages_of_odd_charsets_and_depths_cost_no_others(crawler: Crawler) -> None:
    link = b'<a href="/late">x</a>'
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/html; charset="
    pages = {
        "/mac": raw(head + b"macintosh\r\n\r\n" + "<p>été</p>".encode("mac_roman")),
        "/odd": raw(head + b"undefined\r\n\r\n<p>\xe9</p>"),
        "/deep": body(b"<div>" * 300 + b"</div>" * 300 + link),
        "/deeper": body(b"<div>" * 5000 + b"</div>" * 5000 + link),
        "/late": page(),
    }
    with LoopbackSite({"/": page("/mac", "/odd", "/deep", "/deeper")} | pages) as site:
        result = crawler.crawl(site.url)
    assert {url.removeprefix(site.url) for url in result.pages} == {"/", *pages}
    assert result.reason(f"{site.url}/deep") == ("fetched", "")
    assert result.reason(f"{site.url}/deeper") == ("fetched", NESTED_TOO_DEEP)


def test_pdf_files_are_crawled_where_they_are_asked_for(crawler: Crawler) -> None:
    pdf = b"%PDF-1.4\n<a href='/never'>not a link</a>\n%%EOF\n"
    kinds = ("text/html", "application/pdf")
    with LoopbackSite({"/": page("/paper.pdf"), "/paper.pdf": body(pdf, kinds[1])}) as site:
        assert crawler.crawl(site.url).reason(f"{site.url}/paper.pdf")[1] == "file type"
        result = crawler.crawl(site.url, content_types=kinds, epoch=1)
    assert result.pages[f"{site.url}/paper.pdf"].body == pdf
    assert "/never" not in site.paths
