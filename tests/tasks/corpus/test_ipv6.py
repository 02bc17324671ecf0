"""A site that has an address of IPv6 alone: from the seed to a document, and again."""

import socket
from pathlib import Path

import pytest
from documents_of import rows
from fastwarc.warc import ArchiveIterator
from inline_shards import stages_inline
from loopback_site import Crawler, LoopbackSite, page, redirect

from tasks.corpus.extract import ExtractConfig, extract
from tasks.corpus.tombstoned import Forgotten, parse
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import MANIFEST
from tasks.state.tombstones import Tombstone

WORDS = "Words of a page that is reached by six octet pairs and by nothing else. " * 8


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")


def test_a_site_on_ipv6_from_its_robots_txt_to_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        stages_inline(monkeypatch, tmp_path / "home"),
        LoopbackSite({"/": page(text="another port of the same address")}, host="::1") as other,
        LoopbackSite({}, host="::1") as site,
    ):
        crawler = Crawler(tmp_path / "home")
        site.pages |= {
            "/": page("/moved", f"{site.url}/b", "/private/x", f"{other.url}/", text=WORDS),
            "/moved": redirect(f"{site.url}/a"),
            "/a": page(text=WORDS + "a", head=f'<link rel="canonical" href="{site.url}/a">'),
            "/b": page(text=WORDS + "b"),
            "/named": page(text=WORDS + "named"),
            "/map.txt": f"{site.url}/named\n",
            "/robots.txt": f"User-agent: *\nDisallow: /private/\nSitemap: {site.url}/map.txt\n",
        }
        host = site.url.removeprefix("http://")
        options = {"sites": ({"host": host, "headers": {"X-Six": "yes"}},), "exclude": ("/z",)}
        # A seed may be written at length; the crawl knows one spelling.
        first = crawler.crawl(site.url.replace("::1", "0:0:0:0:0:0:0:1"), **options)
        assert set(first.pages) == {f"{site.url}{path}" for path in ("/", "/a", "/b", "/named")}
        assert first.reason(f"{site.url}/private/x") == ("denied", "robots.txt disallows it")
        assert "/private/x" not in site.paths
        assert not other.requests  # another port is another host, and private
        assert all(headers["X-Six"] == "yes" for _, _, headers in site.requests)
        assert all(headers["Host"] == host for _, _, headers in site.requests)
        with open(first.work.location("warc/00000.warc.gz"), "rb") as stream:
            records = [r.headers for r in ArchiveIterator(stream, parse_http=False)]
        answers = [head for head in records if head["WARC-Type"] == "response"]
        assert {head["WARC-IP-Address"] for head in answers} == {"::1"}
        made = Manifest.model_validate_json(first.work.read_bytes(MANIFEST))
        documents = rows(extract(ExtractConfig(), crawl=made))
        assert f"{site.url}/named" in {row["url"] for row in documents}
        second = crawler.crawl(f"{site.url}/", site.url, epoch=1, **options)
        assert second.counts["pages"] == 4
        forgotten = Forgotten((Tombstone(1, *parse(host), "", 0),))
        assert all(forgotten.address(row["url"]) for row in documents)
        assert forgotten.address(other.url) is None


def test_the_seed_itself_may_be_a_page_of_a_denied_site(tmp_path: Path) -> None:
    with LoopbackSite({"/": page()}, robots="User-agent: *\nDisallow: /\n", host="::1") as site:
        with pytest.raises(Exception, match=r"\[::1\]:\d+ \(robots.txt disallows it\)"):
            Crawler(tmp_path / "home").crawl(site.url)
        assert set(site.paths) <= {"/robots.txt", "/.well-known/tdmrep.json"}
