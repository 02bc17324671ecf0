"""Reservations against text mining: robots rules for AI crawlers, headers, meta elements."""

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from crawled import Page, crawl, html
from hypothesis import given
from hypothesis import strategies as st
from inline_shards import stages_inline
from loopback_site import Clock, Crawler, LoopbackSite, page, redirect

from tasks.corpus.extract import ExtractConfig, extract
from tasks.corpus.host_fetcher import MAX_TDM_BYTES
from tasks.corpus.opt_out import (
    MAX_LOCATIONS,
    OPT_OUT,
    Location,
    headers_reserve,
    meta_reserves,
    reserves,
    tdm_locations,
    tdm_reserves,
)
from tasks.corpus.robots import ASK_AGAIN, MAX_AGE, Robots

SEVERAL = "User-agent: GPTBot\nUser-agent: CCBot\nDisallow: /\n\nUser-agent: *\nAllow: /\n"


def robots(text: str) -> Robots:
    return Robots.of_response(200, text.encode())


@pytest.mark.parametrize(
    ("text", "out"),
    [
        (SEVERAL, True),
        ("User-agent: gptbot # no\nDisallow: /\nUser-agent: ClaudeBot\nDisallow: /\n", True),
        ("User-agent: GPTBot\nDisallow: /\n", False),  # about one company
        ("User-agent: GPTBot\nUser-agent: CCBot\nDisallow: /private/\n", False),
        ("User-agent: GPTBot\nUser-agent: CCBot\nAllow: /\n", False),
        ("User-agent: *\nDisallow: /private/\n", False),
        ("Content-Signal: search=yes, ai-train=no\nUser-agent: *\nAllow: /\n", True),
        ("User-agent: *\nContent-Signal: ai-train=yes\n", False),
        ("User-agent: *\nContent-Usage: train-ai=n\n", True),
        ("# Content-Signal: ai-train=no\n", False),
    ],
)
def test_robots_rules_for_ai_crawlers_speak_for_the_site(text: str, out: bool) -> None:
    assert bool(robots(text).opts_out("http://e.org/page")) is out


def test_rules_for_a_part_of_the_site_hold_there() -> None:
    rules = robots("User-agent: GPTBot\nUser-agent: CCBot\nDisallow: /art/\n")
    assert rules.opts_out("http://e.org/art/1") == "robots.txt shuts out GPTBot, CCBot"
    assert not rules.opts_out("http://e.org/docs/1")
    assert not Robots.of_response(404, b"").opts_out("http://e.org/art/1")


def test_headers_and_meta_elements() -> None:
    assert headers_reserve({"tdm-reservation": " 1 "}, [])
    assert not headers_reserve({"tdm-reservation": "0"}, ["noindex"])
    assert headers_reserve({"content-usage": "train-ai=n, search=y"}, [])
    assert headers_reserve({}, ["noimageai", "otherbot: NoAI, noindex"])
    assert headers_reserve({}, ["noai, max-snippet:50"])
    assert headers_reserve({}, ["max-snippet: 50, noai"])
    assert headers_reserve({}, ["noai, unavailable_after: Mon, 01 Jan 2035 10:00:00 GMT"])
    assert headers_reserve({}, ["otherbot: noai, max-image-preview: large"])
    assert not headers_reserve({}, ["noindex, max-snippet:50"])
    assert meta_reserves("robots", "index, noai") == "meta noai"
    assert meta_reserves("tdm-reservation", "1") == "meta tdm-reservation"
    assert not meta_reserves("description", "noai")
    assert reserves("Content-Signal: ai-train=no") == "Content-Signal: ai-train=no"


def reserved_header() -> web.Response:
    return web.Response(
        text=page("/behind"), content_type="text/html", headers={"TDM-Reservation": "1"}
    )


PAGES = {
    "/": page("/header", "/meta", "/plain"),
    "/header": reserved_header,
    "/meta": page("/linked", head='<meta name="robots" content="noai">'),
    "/plain": page(text="Anybody may read this."),
    "/linked": page(text="This too."),
    "/behind": page(text="Never seen."),
}


def test_a_crawl_leaves_reserved_pages_out_and_says_why(tmp_path: Path) -> None:
    with LoopbackSite(PAGES) as site:
        found = Crawler(tmp_path / "a").crawl(site.url)
        assert {u.removeprefix(site.url) for u in found.pages} == {"/", "/plain", "/linked"}
        assert found.reason(f"{site.url}/header") == ("skipped", f"{OPT_OUT}: tdm-reservation: 1")
        assert found.reason(f"{site.url}/meta") == ("skipped", f"{OPT_OUT}: meta noai")
        every = Crawler(tmp_path / "b").crawl(site.url, honour_opt_outs=False)
        assert len(every.pages) == len(PAGES)
    with LoopbackSite(PAGES, robots=SEVERAL + "\nUser-agent: Elsebot\nDisallow: /\n") as site:
        told = Crawler(tmp_path / "c").crawl(site.url, honour_opt_outs=False)
        assert len(told.pages) == len(PAGES)
        with pytest.raises(Exception, match=f"{OPT_OUT}: robots.txt shuts out GPTBot, CCBot"):
            Crawler(tmp_path / "d").crawl(site.url)


def test_pages_of_other_peoples_archives_are_asked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "<p>A paragraph with enough words in it to be taken for the text.</p>" * 5
    meta = html("meta", text, head='<meta name="tdm-reservation" content="1">')
    with stages_inline(monkeypatch, tmp_path / "home"):
        crawled = crawl(
            Page(url="http://e.org/a", body=html("a", text)),
            Page(url="http://e.org/b", body=meta),
            Page(url="http://e.org/c", body=html("c", text), headers=(("TDM-Reservation", "1"),)),
        )
        assert extract(ExtractConfig(), crawl=crawled).rules == {"opt-out": 2}
        every = extract(ExtractConfig(honour_opt_outs=False), crawl=crawled)
        assert every.counts["documents"] == 3


def test_a_tdm_file_reserves_what_its_longest_location_says(tmp_path: Path) -> None:
    crawler = Crawler(tmp_path / "home")
    rules = [
        {"location": "/", "tdm-reservation": 1, "tdm-policy": "https://e.org/policy"},
        {"location": "/open/", "tdm-reservation": 0},
        {"location": "/open/*.pdf$", "tdm-reservation": "1"},
    ]
    pages = {"/open/": page("/closed", "/open/a", "/open/b.pdf"), "/closed": page()}
    pages |= {"/open/a": page(), "/open/b.pdf": page()}
    with LoopbackSite(pages) as site:
        site.pages["/.well-known/tdmrep.json"] = lambda: web.json_response(rules)
        result = crawler.crawl(f"{site.url}/open/")
        heedless = crawler.crawl(f"{site.url}/open/", honour_opt_outs=False, epoch=1)
    assert set(result.pages) == {f"{site.url}/open/", f"{site.url}/open/a"}
    assert result.reason(f"{site.url}/closed") == ("denied", f"{OPT_OUT}: tdmrep.json reserves /")
    assert site.paths["/.well-known/tdmrep.json"] == 1
    assert f"{site.url}/closed" in heedless.pages


TDM = "/.well-known/tdmrep.json"
RESERVED = [{"location": "/closed", "tdm-reservation": 1}]


def tdm_site(answer: Any) -> LoopbackSite:
    site = LoopbackSite({"/": page("/closed", "/open"), "/closed": page(), "/open": page()})
    site.pages |= {TDM: answer, "/elsewhere.json": lambda: web.json_response(RESERVED)}
    return site


def large() -> web.Response:
    """Some 140 kB, of which the first location counts."""
    open_ones = [{"location": f"/x{n}", "tdm-reservation": 0} for n in range(3000)]
    return web.json_response([*RESERVED, *open_ones])


def marked() -> web.Response:
    return web.Response(body=json.dumps(RESERVED).encode("utf-16"))


class Busy:
    """Answers at the second time."""

    asked = False

    def __call__(self) -> web.Response:
        first, self.asked = not self.asked, True
        return web.Response(status=503) if first else web.json_response(RESERVED)


@pytest.mark.parametrize("answer", [large, marked, redirect("/elsewhere.json", 301), Busy()])
def test_a_tdm_file_is_read_though_large_moved_or_unavailable_for_a_moment(
    tmp_path: Path, answer: Any
) -> None:
    with tdm_site(answer) as site:
        result = Crawler(tmp_path / "home").crawl(site.url)
    assert {url.removeprefix(site.url) for url in result.pages} == {"/", "/open"}


def down() -> web.Response:
    return web.Response(status=503)


async def silent() -> web.Response:
    await asyncio.sleep(30)
    return web.Response()


def too_many() -> web.Response:
    return web.json_response([{"location": f"/{n}"} for n in range(MAX_LOCATIONS + 1)])


def too_large() -> web.Response:
    return web.Response(text="[" + " " * MAX_TDM_BYTES + "]")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (down, "tdmrep.json answered 503"),
        (silent, "tdmrep.json: timeout"),
        (too_large, "tdmrep.json: too large"),
        (too_many, "tdmrep.json: more than 10,000 locations"),
    ],
)
def test_nothing_is_taken_from_a_site_that_cannot_say_what_it_reserves(
    tmp_path: Path, answer: Any, reason: str
) -> None:
    with LoopbackSite({"/": page()}) as other, tdm_site(answer) as site:
        limits = {"timeout": 0.5, "max_delay": 0.1}
        result = Crawler(tmp_path / "a").crawl(f"{site.url}/", f"{other.url}/", **limits)
        assert set(result.pages) == {f"{other.url}/"}
        assert result.reason(f"{site.url}/") == ("error", reason)
        assert site.paths["/"] == 0
        every = Crawler(tmp_path / "b").crawl(site.url, honour_opt_outs=False, **limits)
        assert len(every.pages) == 3


@pytest.mark.parametrize(
    "answer",
    [
        lambda: web.Response(text=page(text="no such page " * 100_000), content_type="text/html"),
        lambda: web.Response(status=403),
        redirect("/.well-known/tdmrep.json"),
        redirect("mailto:a@b.org"),
        redirect("http://10.0.0.1/login"),
        redirect("http://login.invalid/"),
    ],
)
def test_a_site_without_a_tdm_file_reserves_nothing_by_it(tmp_path: Path, answer: Any) -> None:
    with tdm_site(answer) as site:
        result = Crawler(tmp_path / "home").crawl(site.url)
    assert len(result.pages) == 3
    (host,) = result.work.read_table("hosts.parquet").to_pylist()
    assert len(host["robots"]) < 1000  # nothing but reservations is kept


def test_what_was_reserved_stays_so_while_the_site_cannot_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with tdm_site(lambda: web.json_response(RESERVED)) as site:

        def first() -> web.Response:
            clock.ahead = MAX_AGE + 60
            site.pages[TDM] = down
            return web.Response(text=page("/closed", "/open"), content_type="text/html")

        site.pages["/"] = first
        result = Crawler(tmp_path / "home").crawl(site.url, max_delay=0.1)
    assert site.paths[TDM] > 1
    assert {url.removeprefix(site.url) for url in result.pages} == {"/", "/open"}


def test_new_rules_hold_with_what_was_reserved_while_the_site_cannot_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with tdm_site(lambda: web.json_response(RESERVED)) as site:

        def first() -> web.Response:
            clock.ahead = MAX_AGE + 60
            rules = "User-agent: *\nDisallow: /open\n"
            site.pages |= {TDM: down, "/robots.txt": lambda: web.Response(text=rules)}
            links = page("/closed", "/open", "/a")
            return web.Response(text=links, content_type="text/html")

        def a() -> web.Response:
            clock.ahead += ASK_AGAIN + 60
            site.pages[TDM] = lambda: web.json_response([{"location": "/b", "tdm-reservation": 1}])
            return web.Response(text=page("/b", "/c"), content_type="text/html")

        site.pages |= {"/": first, "/a": a, "/b": page(), "/c": page()}
        result = Crawler(tmp_path / "home").crawl(site.url, max_delay=0.1)
    assert {url.removeprefix(site.url) for url in result.pages} == {"/", "/a", "/c"}
    assert result.reason(f"{site.url}/open") == ("denied", "robots.txt disallows it")
    assert result.reason(f"{site.url}/closed")[1] == f"{OPT_OUT}: tdmrep.json reserves /closed"
    assert result.reason(f"{site.url}/b")[1] == f"{OPT_OUT}: tdmrep.json reserves /b"


def test_rules_that_hid_the_tdm_file_are_no_word_on_what_it_reserves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with tdm_site(down) as site:
        hidden = f"User-agent: *\nDisallow: {TDM}\n"

        def first() -> web.Response:
            clock.ahead = MAX_AGE + 60
            site.pages["/robots.txt"] = lambda: web.Response(status=404)
            return web.Response(text=page("/open"), content_type="text/html")

        site.pages |= {"/": first, "/robots.txt": lambda: web.Response(text=hidden)}
        result = Crawler(tmp_path / "home").crawl(site.url, max_delay=0.1)
    assert result.reason(f"{site.url}/open") == ("error", "tdmrep.json answered 503")


def test_a_long_pause_for_the_tdm_file_alone_leaves_no_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with tdm_site(lambda: web.json_response(RESERVED)) as site:

        def first() -> web.Response:
            clock.ahead = MAX_AGE + 60
            site.pages[TDM] = lambda: web.Response(status=429, headers={"Retry-After": "86400"})
            return web.Response(text=page("/closed", "/open"), content_type="text/html")

        site.pages["/"] = first
        result = Crawler(tmp_path / "home").crawl(site.url, max_delay=0.1)
    assert site.paths[TDM] == 2
    assert {url.removeprefix(site.url) for url in result.pages} == {"/", "/open"}


@pytest.mark.parametrize(
    ("text", "path", "reserved"),
    [
        ('[{"location": "/a*", "tdm-reservation": 1}]', "/abc", True),
        ('[{"location": "/a*", "tdm-reservation": 1}]', "/b", False),
        ('[{"location": "/a$", "tdm-reservation": 1}]', "/a", True),
        ('[{"location": "/a$", "tdm-reservation": 1}]', "/ab", False),
        ('{"tdm-reservation": 1}', "/anything", True),
        ('[{"location": "/x(", "tdm-reservation": 1}, 3, null]', "/x(y", True),
        ('[{"location": 7, "tdm-reservation": []}]', "/", False),
        ('[{"location": "/*.pdf$", "tdm-reservation": 1}]', "/x.pdf/y.pdf", True),
        ('[{"location": "/*.pdf$", "tdm-reservation": 1}]', "/x.pdf?y", False),
        ('[{"location": "/a*a$", "tdm-reservation": 1}]', "/a", False),
        ('[{"location": "/a*", "tdm-reservation": 1}, {"location": "/ab"}]', "/ab", False),
        ('[{"location": "/ab"}, {"location": "/a*", "tdm-reservation": 1}]', "/ab", True),
        ('[{"location": "/"}, {"location": "/", "tdm-reservation": 1}]', "/", True),
        ("<html>not found</html>", "/", False),
        ("[" * 100_000, "/", False),
        ("", "/", False),
    ],
)
def test_any_text_is_a_tdm_file(text: str, path: str, reserved: bool) -> None:
    assert bool(tdm_reserves(tdm_locations(text), path)) is reserved


def test_a_pattern_of_many_stars_takes_no_time() -> None:
    bomb = json.dumps([{"location": "/*a" * 200, "tdm-reservation": 1}])
    tdm_reserves(tdm_locations(bomb), "/" + "a" * 300 + "b")


@given(st.text("/ab*$", max_size=8), st.text("/ab", max_size=12))
def test_locations_match_as_their_regular_expressions_do(pattern: str, path: str) -> None:
    parts = (re.escape(part) for part in pattern.removesuffix("$").split("*"))
    expression = ".*".join(parts) + (r"\Z" if pattern.endswith("$") else "")
    assert Location(pattern, True).matches(path) is bool(re.match(expression, path))


def test_many_locations_take_no_time() -> None:
    rules = [{"location": f"/*x{n}/*.pdf$", "tdm-reservation": 1} for n in range(MAX_LOCATIONS)]
    robots = Robots("all", tdm=json.dumps(rules))
    assert robots.opts_out("http://e.org/x1/a.pdf")
    begun = time.process_time()
    for n in range(10):
        assert not robots.opts_out(f"http://e.org/page/{n}")
    assert time.process_time() - begun < 1
