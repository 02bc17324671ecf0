"""Robots rules, page links and the guard against private addresses, each alone."""

import gzip
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.guard import is_public, private_seeds
from tasks.corpus.links import (
    MAX_LINKS,
    header_canonical,
    page_links,
    robots_directives,
)
from tasks.corpus.robots import Robots
from tasks.corpus.sitemaps import MAX_LINKS as MAX_SITEMAP_LINKS
from tasks.corpus.sitemaps import SitemapLinks, sitemap_links
from tasks.corpus.urls import canonical_url

BASE = "http://example.org/dir/page.html"


def robots(text: str) -> Robots:
    return Robots.of_response(200, text.encode())


def test_longest_match_and_most_specific_group_decide() -> None:
    rules = robots(
        "User-agent: *\nDisallow: /\n\nUser-agent: Gristmill\nDisallow: /a\nAllow: /a/b$\n"
        "Disallow: /*.cgi\nCrawl-delay: 0.5\n"
    )
    assert rules.allows("http://e.org/other", "Gristmill")
    assert not rules.allows("http://e.org/a/c", "Gristmill")
    assert rules.allows("http://e.org/a/b", "Gristmill")
    assert not rules.allows("http://e.org/x.cgi?y", "Gristmill")
    assert not rules.allows("http://e.org/other", "Elsebot")
    assert rules.crawl_delay("Gristmill") == 0.5
    assert rules.crawl_delay("Elsebot") is None


@pytest.mark.parametrize(
    ("status", "policy"), [(200, "rules"), (404, "all"), (401, "all"), (429, "none"), (502, "none")]
)
def test_the_status_of_robots_decides(status: int, policy: str) -> None:
    assert Robots.of_response(status, b"").policy == policy


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_robots_file(data: bytes) -> None:
    rules = Robots.of_response(200, data)
    assert rules.allows("http://e.org/", "Gristmill") in (True, False)
    rules.crawl_delay("Gristmill")
    assert isinstance(rules.sitemaps, list)


def test_request_rate_counts_as_a_delay() -> None:
    assert robots("User-agent: *\nRequest-rate: 1/5\nCrawl-delay: 2\n").crawl_delay("x") == 5


def test_links_are_resolved_deduplicated_and_in_order() -> None:
    html = b"""<html><head><base href="/other/"><link rel="canonical" href="x.html">
    <body><a href="b">b</a><a href="a#1">a</a><a href=" b ">again</a><a href="#top">top</a>
    <a href="javascript:x()">js</a><a href="tel:1">t</a><a href="http://a b/">bad</a>
    <area href="/map"><a rel="external NoFollow" href="/no">no</a><a name="anchor">none</a>"""
    found = page_links(html, BASE, None, (), "Gristmill")
    assert found.links == (
        "http://example.org/other/b",
        "http://example.org/other/a",
        "http://example.org/map",
    )
    assert found.canonical == "http://example.org/other/x.html"
    assert found.invalid == 1


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_page_and_a_sitemap(data: bytes) -> None:
    page_links(data, BASE, "utf-8", (), "Gristmill")
    page_links(b"<p>" + data, BASE, "no-such-charset", (), "Gristmill")
    for body in (data, b"<urlset>" + data, b"\x1f\x8b" + data):
        try:
            sitemap_links(body, BASE)
        except ValueError as error:
            assert str(error)


def test_pages_with_nuls_and_deep_nesting_still_have_links() -> None:
    body = b"<div>" * 20_000 + b'\x00<a href="/late\x00r">x</a>'
    page_links(body, BASE, None, (), "Gristmill")
    found = page_links(b'<p>\x00\x00</p><a href="/x">x</a>', BASE, "utf-16-nonsense", (), "g")
    assert found.links == ("http://example.org/x",)


def test_links_of_a_page_in_utf16_without_a_mark() -> None:
    body = '<p>é</p><a href="/é">x</a>'.encode("utf-16-le")
    found = page_links(body, BASE, "utf-16le", (), "Gristmill")
    assert found.links == ("http://example.org/%C3%A9",)


@pytest.mark.parametrize("depth", [300, 2000])
def test_links_within_and_behind_deep_nesting_are_found(depth: int) -> None:
    errors = b"</b><nosuch>&nosuch;</nosuch>" * 300
    body = errors + b"<div>" * depth + b'<a href="/in">x</a>' + b"</div>" * depth
    found = page_links(body + b'<a href="/behind">x</a>', BASE, None, (), "Gristmill")
    assert found.links == ("http://example.org/in", "http://example.org/behind")
    assert not found.clipped


def test_a_page_nested_deeper_than_the_parser_follows_says_so() -> None:
    errors = b"</b><nosuch>&nosuch;</nosuch>" * 300
    body = b'<a href="/before">x</a>' + errors + b"<div>" * 5000 + b'<a href="/in">x</a>'
    found = page_links(body, BASE, None, (), "Gristmill")
    assert found.links == ("http://example.org/before",)
    assert found.clipped


@pytest.mark.parametrize(
    ("label", "encoding", "word"),
    [
        ("macintosh", "mac_roman", "été"),
        ("x-mac-cyrillic", "mac_cyrillic", "мир"),
        ("cp858", "cp858", "été"),
        ("iso-2022-kr", "iso2022_kr", "한국"),
        ("euc-jp", "euc_jp", "日本"),
        ("x-sjis", "shift_jis", "日本"),
    ],
)
def test_links_of_a_page_in_a_charset_of_another_name(label: str, encoding: str, word: str) -> None:
    body = f'<p>{word}</p><a href="/{word}">x</a>'.encode(encoding)
    found = page_links(body, BASE, label, (), "Gristmill")
    assert found.links == (canonical_url(f"/{word}", BASE),)


@pytest.mark.parametrize(
    "label", ["base64", "undefined", "idna", "punycode", "rot13", "", "no\0", "\ud800"]
)
def test_links_of_a_page_whose_charset_is_none(label: str) -> None:
    for body in (b'<p>\xe9\x1b</p><a href="/x">x</a>', b'<a href="/x">x</a>'):
        found = page_links(body, BASE, label, (), "Gristmill")
        assert found.links == ("http://example.org/x",)


LABELS = ("iso-8859-1", "latin1", "us-ascii", "windows-1252", "iso-8859-9", "iso-8859-11", "big5")


@pytest.mark.parametrize("label", [*LABELS, "tis-620", "shift_jis", "euc-kr", "euc-jp", "utf-8"])
@pytest.mark.parametrize("place", ["header", "meta"])
def test_a_page_in_utf8_is_read_to_its_end_whatever_it_says_of_itself(
    label: str, place: str
) -> None:
    meta = f'<meta charset="{label}">' if place == "meta" else ""
    opt_out = '<meta name="robots" content="noindex, noai">'
    head = f"<html><head>{meta}<title>“Ángel” Íñigo и мир</title>{opt_out}</head>"
    page = f'{head}<body><a href="/first">x</a>{"y" * 9000}“hi”<a href="/last">x</a>'
    found = page_links(page.encode(), BASE, label if place == "header" else None, (), "Gristmill")
    assert found.links == ("http://example.org/first", "http://example.org/last")
    assert found.noindex and found.reserved == "meta noai"


@pytest.mark.parametrize("label", LABELS)
def test_a_byte_that_its_charset_has_no_character_for_ends_no_page(label: str) -> None:
    body = b'<p>\xe9\xff \x81 \x9d\x8d</p><a href="/x">x</a>' * 2
    found = page_links(body, BASE, label, (), "Gristmill")
    assert found.links == ("http://example.org/x",)


@pytest.mark.parametrize(
    "content", ["0; url=/next", "5;URL='/next'", '0, url="/next"', " 3 ; /next", "0.5;url = /next"]
)
def test_a_meta_refresh_is_a_link(content: str) -> None:
    quoted = content.replace('"', "&quot;")
    html = f'<meta http-equiv="Refresh" content="{quoted}"><p>Moved.</p>'.encode()
    assert page_links(html, BASE, None, (), "Gristmill").links == ("http://example.org/next",)
    alone = b'<meta http-equiv="refresh" content="30"><p>Reloads itself.</p>'
    assert page_links(alone, BASE, None, (), "Gristmill").links == ()


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (['</x>; rel="canonical"'], "http://example.org/x"),
        (["<y.css>; rel=preload; as=style, </x>;rel=canonical"], "http://example.org/x"),
        (["</a>; rel=next", '<x>; title="t"; rel="self Canonical"'], "http://example.org/dir/x"),
        (["</x>; rel=alternate", "no link at all", ""], ""),
        (["<mailto:a@b>; rel=canonical"], ""),
    ],
)
def test_a_link_header_may_name_the_canonical_address(lines: list[str], found: str) -> None:
    assert header_canonical(lines, BASE) == found


def test_directives_speak_to_whom_they_name() -> None:
    assert robots_directives(["noindex, nofollow"], "Gristmill") == (True, True)
    assert robots_directives(["none"], "Gristmill") == (True, True)
    assert robots_directives(["otherbot: noindex, nofollow"], "Gristmill") == (False, False)
    assert robots_directives(["GRISTMILL: nofollow", "all"], "Gristmill") == (False, True)
    assert robots_directives(["max-snippet: 5, noindex"], "Gristmill") == (True, False)


def test_sitemaps_of_every_kind() -> None:
    xml = b"""\xef\xbb\xbf<?xml version="1.0"?><urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">
    <url><loc> http://example.org/a </loc><image><loc>http://example.org/i.png</loc></image></url>
    <url><loc>/b&amp;c</loc></url></urlset>"""
    assert sitemap_links(xml, BASE).pages == ("http://example.org/a", "http://example.org/b&c")
    assert sitemap_links(gzip.compress(xml), BASE) == sitemap_links(xml, BASE)
    lines = sitemap_links(b"http://example.org/x\n\nnot one\n", BASE)
    assert lines.pages[0] == "http://example.org/x"
    index = b"<sitemapindex><sitemap><loc>/s2.xml</loc></sitemap></sitemapindex>"
    assert sitemap_links(index, BASE) == SitemapLinks(maps=("http://example.org/s2.xml",))
    bomb = b"<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;'>]><urlset>&b;</urlset>"
    assert not sitemap_links(bomb, BASE).pages


def test_a_sitemap_of_several_gzip_members_is_read_to_its_end() -> None:
    head, tail = b"<urlset><url><loc>/a</loc></url>", b"<url><loc>/b</loc></url></urlset>"
    found = sitemap_links(gzip.compress(head) + gzip.compress(tail), BASE)
    assert found.pages == ("http://example.org/a", "http://example.org/b")
    assert not found.damage


def test_a_clipped_sitemap_gives_what_it_has_and_says_so() -> None:
    found = sitemap_links(b"<urlset><url><loc>/a</loc></url><url><loc>/b</lo", BASE)
    assert found.pages[0] == "http://example.org/a"
    assert found.damage == "its XML is damaged"


def test_links_beyond_the_most_that_are_taken_are_counted() -> None:
    anchors = b"".join(b'<a href="/%d">x</a>' % number for number in range(MAX_LINKS + 7))
    found = page_links(anchors, BASE, None, (), "Gristmill")
    assert (len(found.links), found.left_out) == (MAX_LINKS, 7)
    lines = b"".join(b"http://e.org/%d\n" % number for number in range(MAX_SITEMAP_LINKS + 7))
    named = sitemap_links(lines, BASE)
    assert (len(named.pages), named.left_out) == (MAX_SITEMAP_LINKS, 7)
    entries = b"".join(b"<url><loc>%s</loc></url>" % line for line in lines.split())
    named = sitemap_links(b"<urlset>%s</urlset>" % entries, BASE)
    assert (len(named.pages), named.left_out) == (MAX_SITEMAP_LINKS, 7)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
        "not an address",
    ],
)
def test_private_addresses_are_recognised(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111"])
def test_public_addresses_are_recognised(address: str) -> None:
    assert is_public(address)


def test_only_private_seeds_open_a_door(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(host: str, port: int, **_: object) -> list[object]:
        ip = {"public.example": "93.184.216.34", "mixed.example": "93.184.216.34"}.get(host, host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))]

    monkeypatch.setattr("tasks.corpus.guard.socket.getaddrinfo", answers)
    seeds = ["http://127.0.0.1:4202/", "https://public.example/", "http://10.1.1.1/"]
    assert private_seeds(seeds) == (("10.1.1.1", 80), ("127.0.0.1", 4202))
