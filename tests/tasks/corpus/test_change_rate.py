"""How often pages change: the estimate, and what a recrawl makes of it."""

import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from aiohttp import web
from loopback_site import Crawler, LoopbackSite, page

from tasks.corpus.change_rate import History

START = datetime(2024, 1, 1, tzinfo=UTC)


def visited(changes: list[bool], days: float = 1.0) -> History:
    history = History(first=START.isoformat(), checked=START.isoformat())
    for number, changed in enumerate(changes, 1):
        history = history.after(changed, (START + timedelta(days=days * number)).isoformat())
    return history


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.5])
def test_the_estimate_nears_the_rate_of_a_poisson_process(rate: float) -> None:
    rng = random.Random(3)
    changes = [rng.random() < 1 - math.exp(-rate) for _ in range(4000)]
    assert visited(changes).changes_per_day == pytest.approx(rate, rel=0.1)
    assert visited(changes, days=7).changes_per_day == pytest.approx(rate / 7, rel=0.1)


def test_chances_are_between_never_and_surely() -> None:
    quiet, busy = visited([False] * 8), visited([True] * 8)
    now = (START + timedelta(days=9)).timestamp()
    assert 0 < quiet.chance_of_change(now) < 0.1
    assert 0.9 < busy.chance_of_change(now) < 1
    assert quiet.chance_of_change(now + 400 * 86_400) > 0.9  # asked for again at last
    assert visited([False] * 2).chance_of_change(now) > quiet.chance_of_change(now)
    assert History().chance_of_change(now) == visited([]).chance_of_change(now) == 1.0


def aged(crawler: Crawler, epoch: int, days: float) -> None:
    """As if that epoch had been crawled so many days ago."""
    work = crawler.workspace(f"{epoch:064d}")
    table = work.read_table("urls.parquet")
    for column in ("first", "checked"):
        moved = [
            (datetime.fromisoformat(m) - timedelta(days=days)).isoformat() if m else m
            for m in table[column].to_pylist()
        ]
        place = table.schema.get_field_index(column)
        table = table.set_column(place, column, pa.array(moved, pa.string()))
    work.write_table("urls.parquet", table)


def test_a_recrawl_asks_first_and_only_for_what_is_likely_to_have_changed(tmp_path: Path) -> None:
    crawler = Crawler(tmp_path / "home")
    visits = 0

    def news() -> web.Response:
        return web.Response(text=page(text=f"news of {visits}"), content_type="text/html")

    quiet = {f"/quiet{n}": page(text=f"quiet {n}") for n in range(4)}
    with LoopbackSite({"/": page(*quiet, "/news"), "/news": news} | quiet) as site:
        for visits in range(6):
            result = crawler.crawl(site.url, epoch=visits, parallel=1)
            aged(crawler, visits, 1)
        row = result.addresses[f"{site.url}/news"]
        assert (row["visits"], row["changes"]) == (5, 5)
        assert result.addresses[f"{site.url}/quiet1"]["changes"] == 0
        site.requests.clear()
        visits = 6
        result = crawler.crawl(site.url, epoch=6, parallel=1, revisit_chance=0.0)
        order = [path for _, path, _ in site.requests if path[1:5] in ("news", "quie")]
        assert order[0] == "/news" and len(order) == 5
        aged(crawler, 6, 1)
        site.requests.clear()
        visits = 7
        result = crawler.crawl(site.url, epoch=7, revisit_chance=0.5)
        assert set(site.paths) >= {"/", "/news"} and "/quiet1" not in site.paths
        assert result.counts["pages"] == 6 and result.counts["not_asked"] == 4
        assert b"quiet 3" in result.pages[f"{site.url}/quiet3"].body
        assert result.addresses[f"{site.url}/quiet3"]["visits"] == 6
        # What robots.txt has come to forbid is not taken over.
        site.pages["/robots.txt"] = lambda: web.Response(text="User-agent: *\nDisallow: /quiet3\n")
        result = crawler.crawl(site.url, epoch=8, revisit_chance=0.5)
        assert result.counts["pages"] == 5
        assert result.reason(f"{site.url}/quiet3")[0] == "denied"
