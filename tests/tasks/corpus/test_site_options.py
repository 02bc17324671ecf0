"""Headers, cookies, proxies and delays of single sites; secrets reach the site and nothing else."""

import asyncio
import base64
import gzip
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from backports import zstd
from loopback_site import Crawler, CrawlResult, LoopbackSite, page

from tasks.corpus.crawl_config import CrawlConfig
from tasks.corpus.site_options import Site, SiteOptions
from tasks.runtime.errors import UserError

SECRET = "s3cret-4711"


@pytest.fixture
def crawler(tmp_path: Path) -> Crawler:
    return Crawler(tmp_path / "home")


def kept(result: CrawlResult) -> bytes:
    """Every byte of the artifact, unpacked."""
    files = (p for p in Path(result.work.path).rglob("*") if p.is_file())
    return b"".join(
        gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes() for p in files
    )


def test_headers_and_cookies_go_to_their_site_only(
    crawler: Crawler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SITE_TOKEN", SECRET)
    with LoopbackSite({"/": page("/a"), "/a": page()}) as one, LoopbackSite({"/": page()}) as two:
        result = crawler.crawl(
            one.url,
            two.url,
            sites=[
                {
                    "host": one.url.removeprefix("http://"),
                    "headers": {"Authorization": "Bearer ${SITE_TOKEN}", "X-Team": "mill"},
                    "cookies": {"consent": "yes", "session": "${SITE_TOKEN}"},
                }
            ],
        )
    for _, _, headers in one.requests:
        assert headers["Authorization"] == f"Bearer {SECRET}"
        assert headers["X-Team"] == "mill"
        assert headers["Cookie"] == f"consent=yes; session={SECRET}"
    assert not any({"Authorization", "X-Team", "Cookie"} & set(h) for _, _, h in two.requests)
    everything = kept(result)
    assert SECRET.encode() not in everything
    assert b"Authorization: (not recorded)" in everything and b"X-Team: mill" in everything
    assert b"${SITE_TOKEN}" in everything  # the manifest says which variable


def test_credentials_are_not_sent_over_plain_http(
    crawler: Crawler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SITE_TOKEN", SECRET)
    sites = [{"host": "example.org", "headers": {"Authorization": "${SITE_TOKEN}"}}]
    with pytest.raises(UserError, match="credentials only over https"):
        crawler.crawl("http://example.org/", sites=sites)
    with pytest.raises(UserError, match=r"names \$\{NO_SUCH\} for a.org, which is not set"):
        crawler.crawl(
            "http://a.org/", sites=[{"host": "a.org", "headers": {"X-Key": "${NO_SUCH}"}}]
        )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"host": "https://e.org/"}, "is no host"),
        ({"host": "a b"}, "is no name"),
        ({"host": "e.org:443"}, "a port that addresses leave out; write e.org,"),
        ({"host": "e.org:99999"}, "out of range"),
        ({"host": "e.org", "headers": {"Authorization": "Bearer abc"}}, "is a secret"),
        ({"host": "e.org", "headers": {"User-Agent": "Mozilla"}}, "the crawler's own"),
        ({"host": "e.org", "headers": {"X": "a\r\nB: c"}}, "cannot be sent"),
        ({"host": "e.org", "cookies": {"a": "b; c=d"}}, "cannot be sent"),
        ({"host": "e.org", "proxy": "socks5://p:1"}, "no address of an HTTP proxy"),
        ({"host": "e.org", "proxy": "http://me:secret@p:1"}, "holds a password"),
        ({"host": "e.org", "dalay": 1}, "Extra inputs"),
    ],
)
def test_mistakes_are_told_and_no_secret_is_taken(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as raised:
        CrawlConfig(seeds=("http://e.org/",), sites=(options,))
    assert "SiteOptions" not in told and raised.value


def test_the_most_particular_site_counts() -> None:
    limits = CrawlConfig(
        sites=(SiteOptions(host="e.org", delay=1), SiteOptions(host="a.e.org", delay=2))
    ).limits()
    found = [limits.site(h) for h in ("e.org", "b.e.org:8080", "x.a.e.org", "note.org")]
    assert [site.delay if site else None for site in found] == [1, 1, 2, None]
    assert Site("e.org:8080").covers("e.org:8080") and not Site("e.org:8080").covers("e.org")


@pytest.mark.parametrize(
    ("written", "host"),
    [
        ("München.de", "xn--mnchen-3ya.de"),
        ("*.example.org", "a.example.org:8080"),
        (".example.org.", "example.org"),
        ("Example.org:8080", "example.org:8080"),
        ("2001:DB8:0::1", "[2001:db8::1]:8080"),
        ("[::1]:8080", "[::1]:8080"),
    ],
)
def test_a_site_is_known_however_it_is_spelt(written: str, host: str) -> None:
    options = SiteOptions(host=written)
    assert options.resolved({}).covers(host)
    assert SiteOptions(host=options.host) == options


class Proxy:
    """Forwards plain requests; asks for a password."""

    def __init__(self) -> None:
        self.targets: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        assert self._ready.wait(10)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._stop = asyncio.Event()
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        expected = base64.b64encode(f"me:{SECRET}".encode()).decode()
        if f"Proxy-Authorization: Basic {expected}" not in head:
            writer.write(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            self.targets.append(head.split(" ")[1])
            body = page(text="by proxy").encode()
            status = "404 None" if "robots" in head or "tdmrep" in head else "200 OK"
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Type: text/html\r\nConnection: close\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
        await writer.drain()
        writer.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    running = Proxy()
    yield running
    running.stop()


def test_a_site_behind_a_proxy(
    crawler: Crawler, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROXY", f"http://me:{SECRET}@127.0.0.1:{proxy.port}")
    sites = [{"host": "far.example", "proxy": "${PROXY}"}]
    result = crawler.crawl("http://far.example/x", sites=sites)
    assert b"by proxy" in result.pages["http://far.example/x"].body
    assert "http://far.example/x" in proxy.targets
    assert SECRET.encode() not in kept(result)
    # A page may not lead the crawl to the proxy itself.
    with LoopbackSite({"/": page(f"http://127.0.0.1:{proxy.port}/")}) as site:
        result = crawler.crawl(site.url, sites=sites, domains=["127.0.0.1"], epoch=1)
    assert result.rules == {"private address": 1}
    monkeypatch.setenv("PROXY", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="proxy does not answer"):
        crawler.crawl("http://far.example/x", sites=sites, retries=0, epoch=2)


def test_a_site_has_its_own_delay(crawler: Crawler) -> None:
    with LoopbackSite({"/": page("/a", "/b"), "/a": page(), "/b": page()}) as site:
        sites = [{"host": "127.0.0.1", "delay": 0.15}]
        result = crawler.crawl(site.url, sites=sites, parallel=1)
    moments = site.times()
    assert min(b - a for a, b in pairwise(moments)) > 0.05
    assert result.outcome.reports[0].body[0]["delay, s"] == 0.15


def test_every_coding_is_offered_and_undone_and_a_clipped_one_named(crawler: Crawler) -> None:
    import brotli

    text = page(text="words " * 500).encode()
    coders = {"gzip": gzip.compress, "br": brotli.compress, "zstd": zstd.compress}

    def coded(name: str, clipped: int = 0) -> Any:
        body = coders[name](text)
        return lambda: web.Response(
            body=body[: len(body) - clipped],
            content_type="text/html",
            headers={"Content-Encoding": name},
        )

    def lying() -> web.Response:
        return web.Response(
            body=text, content_type="text/html", headers={"Content-Encoding": "gzip"}
        )

    pages = {f"/{name}": coded(name) for name in coders}
    pages |= {f"/{name}-clipped": coded(name, 7) for name in coders} | {"/lies": lying}
    with LoopbackSite({"/": page(*pages)} | pages) as site:
        result = crawler.crawl(site.url, retries=0, max_delay=0.05)
    assert site.requests[-1][2]["Accept-Encoding"] == "gzip, deflate, br, zstd"
    for name in (*coders, "lies"):
        assert result.pages[f"{site.url}/{name}"].body == text
    assert result.rules == {"truncated or damaged body": 3}
