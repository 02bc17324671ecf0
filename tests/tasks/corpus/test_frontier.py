"""The crawl's table of addresses, alone: what enters it and what a restart makes of it."""

from typing import Any

from tasks.corpus.addresses import Address, Earlier
from tasks.corpus.crawl_report import crawl_outcome
from tasks.corpus.fetch_plan import HostPlan, HostResult, Outcome, Request
from tasks.corpus.frontier import MAX_QUERIES, Frontier
from tasks.corpus.urls import Scope

SEED = "http://e.org/"


def frontier(**scope: Any) -> Frontier:
    made = Frontier(Scope(frozenset(), **scope), 1_000_000, 5, 10.0)
    made.add_seed(SEED)
    return made


def answer(on: Frontier, url: str, *links: str, backoff: float = 0.0, **more: Any) -> None:
    """A round in which `url` alone was asked for and had these links."""
    outcome = Outcome(url, "page", "fetched", status=200, links=links, **more)
    host = HostResult("e.org", 0.0, backoff, 0.0, {}, (), (), "", 1, 1, 0.0)
    on.update([HostPlan("e.org", (Request(url),))], [outcome], [host])


def test_a_host_is_tried_once_for_a_sitemap_whatever_its_scheme() -> None:
    made = frontier()
    for scheme in ("http", "https", "http"):
        tried = (f"{scheme}://e.org/sitemap.xml",)
        made.update([], [], [HostResult("e.org", 0.0, 0.0, 0.0, {}, (), tried, "", 1, 1, 0.0)])
    sitemaps = [url for url, address in made.addresses.items() if address.kind == "sitemap"]
    assert sitemaps == ["http://e.org/sitemap.xml"]


def test_nothing_waits_for_a_sitemap_that_is_never_asked_for() -> None:
    known = {f"{SEED}a": Earlier(Address(f"{SEED}a"), f"{SEED}a", ())}
    made = Frontier(Scope(frozenset()), 9, 5, 10.0, known, lambda url: url.endswith(".xml"))
    made.add_seed(SEED)
    sitemap = HostResult("e.org", 0.0, 0.0, 0.0, {}, (f"{SEED}map.xml",), (), "", 1, 1, 0.0)
    found = Outcome(SEED, "page", "fetched", status=200, links=(f"{SEED}a",))
    made.update([HostPlan("e.org", (Request(SEED),))], [found], [sitemap])
    assert [request.url for plan in made.generate() for request in plan.requests] == [f"{SEED}a"]


def restarted(before: Frontier, **scope: Any) -> Frontier:
    after = Frontier(Scope(frozenset(), **scope), 1_000_000, 5, 10.0)
    after.restore(before.url_table(), before.host_table(), before.counts)
    return after


def test_a_restart_counts_query_strings_as_before() -> None:
    excluded = {"exclude": ("*print=1*",)}
    before = frontier(**excluded)
    answer(before, SEED, *(f"{SEED}p?n={n}&print=1" for n in range(MAX_QUERIES + 1)))
    after = restarted(before, **excluded)
    for one in (before, after):
        answer(one, f"{SEED}p?n=0&print=1", f"{SEED}p?fresh=1")
        assert one.addresses[f"{SEED}p?fresh=1"].state == "queued"


def test_a_restart_counts_numbered_pages_as_before() -> None:
    before = Frontier(Scope(frozenset()), 1_000_000, 5, 10.0, max_numbered=3)
    before.add_seed(SEED)
    answer(before, SEED, *(f"{SEED}2024/{month}" for month in (1, 2, 3)))
    after = Frontier(Scope(frozenset()), 1_000_000, 5, 10.0, max_numbered=3)
    after.restore(before.url_table(), before.host_table(), before.counts)
    for one in (before, after):
        answer(one, f"{SEED}2024/1", f"{SEED}2024/4", f"{SEED}2024/4/1")
        assert one.addresses[f"{SEED}2024/4"].reason == "trap: too many numbered pages"
        assert one.addresses[f"{SEED}2024/4/1"].state == "queued"


def test_a_page_that_a_sitemap_names_or_an_earlier_epoch_had_is_of_no_endless_calendar() -> None:
    known, named, other = (f"{SEED}2024/{month}" for month in (2, 3, 4))
    earlier = {known: Earlier(Address(known), known, ())}
    made = Frontier(Scope(frozenset()), 1_000_000, 5, 10.0, earlier, max_numbered=1)
    made.add_seed(SEED)
    answer(made, SEED, f"{SEED}2024/1", known)
    sitemap = HostResult("e.org", 0.0, 0.0, 0.0, {}, (f"{SEED}map.xml",), (), "", 1, 1, 0.0)
    made.update([], [], [sitemap])
    found = Outcome(f"{SEED}map.xml", "sitemap", "fetched", status=200, links=(named,))
    made.update([HostPlan("e.org", (Request(f"{SEED}map.xml", "sitemap"),))], [found], [])
    answer(made, f"{SEED}2024/1", other)
    assert {made.addresses[url].state for url in (known, named)} == {"queued"}
    assert made.addresses[other].reason == "trap: too many numbered pages"


def test_a_shorter_way_to_a_page_counts() -> None:
    made = frontier(max_depth=2)
    answer(made, SEED, f"{SEED}a", f"{SEED}b")
    answer(made, f"{SEED}a", f"{SEED}c")
    answer(made, f"{SEED}c", f"{SEED}deep")
    deep = made.addresses[f"{SEED}deep"]
    assert (deep.state, deep.reason, deep.depth) == ("skipped", "too deep", 3)
    answer(made, f"{SEED}b", f"{SEED}deep", f"{SEED}c")
    deep = made.addresses[f"{SEED}deep"]
    assert (deep.state, deep.reason, deep.depth) == ("queued", "", 2)
    assert deep.source == f"{SEED}b"
    assert made.addresses[f"{SEED}c"].state == "fetched"


def test_a_shorter_way_to_a_page_that_waits_brings_it_nearer() -> None:
    made = frontier(max_depth=9)
    answer(made, SEED, f"{SEED}a", f"{SEED}b")
    answer(made, f"{SEED}a", f"{SEED}c")
    answer(made, f"{SEED}c", f"{SEED}d")
    assert made.addresses[f"{SEED}d"].depth == 3
    answer(made, f"{SEED}b", f"{SEED}d")
    assert made.addresses[f"{SEED}d"].depth == 2


def test_a_host_that_is_backed_off_from_is_so_in_the_next_round() -> None:
    made = frontier()
    answer(made, SEED, *(f"{SEED}{n}" for n in range(50)), backoff=1.0)
    for one in (made, restarted(made)):
        (plan,) = one.generate()
        assert (plan.backoff, len(plan.requests)) == (1.0, 10)  # a round is ten seconds


def test_hosts_that_failed_stand_in_the_report_beside_those_that_gave_most() -> None:
    made = Frontier(Scope(frozenset()), 1_000_000, 5, 10.0)
    for number in range(300):
        url = f"http://h{number}.org/"
        made.add_seed(url)
        failed = Outcome(url, "page", "error", "timeout", bytes=1)
        plan = HostPlan(f"h{number}.org", (Request(url),))
        good = Outcome(url, "page", "fetched", status=200, bytes=1)
        made.update([plan], [failed if number in (7, 299) else good], [])
    rows = crawl_outcome(made, [], 1).reports[0].body
    assert len(rows) == 201
    assert {row["host"] for row in rows if row["failed"]} == {"h7.org", "h299.org"}
    assert rows[-1]["host"] == "(100 others)" and rows[-1]["fetched"] == 100
