"""kill -9 of a crawl: what was committed is never asked for again, and nothing is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import pytest
from aiohttp import web
from loopback_site import Crawler, LoopbackSite, in_process, page

from tasks.corpus.crawl_config import CrawlConfig
from tasks.corpus.fetch_plan import Outcome, Plan
from tasks.corpus.host_fetcher import HostFetcher
from tasks.corpus.segments import Segments
from tasks.corpus.urls import Aliases

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PARALLEL = 4
OPTIONS = {
    "timeout": 60.0,
    "parallel": PARALLEL,
    "round_seconds": 0.3,
    "delay": 0.01,
    "segment_bytes": 20_000,
}


def linked_pages(count: int) -> dict[str, str]:
    """A tree: page n links to 4n+1 … 4n+4."""
    return {
        "/" if n == 0 else f"/{n}": page(
            *(f"/{4 * n + k}" for k in range(1, 5)), text=f"page {n} " + str(n * 7919) * 40
        )
        for n in range(count)
    }


def start(home: Path, seed: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, HERE / "crawl_process.py", home, seed, json.dumps(OPTIONS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"},
    )


def crawl_with_kills(tmp_path: Path, pages: int, kills: int, seed: int) -> None:
    random_pause = random.Random(seed)
    with LoopbackSite(linked_pages(pages)) as site:
        expected = Crawler(tmp_path / "whole").crawl(site.url, **OPTIONS).outcome.content
        site.requests.clear()
        killed = 0
        for _ in range(kills):
            process = start(tmp_path / "home", site.url)
            wanted = len(site.requests) + random_pause.randint(1, pages // (kills + 1))
            while len(site.requests) < wanted and process.poll() is None:
                time.sleep(0.002)
            time.sleep(random_pause.random() * 0.05)
            if process.poll() is None:
                killed += 1
                process.send_signal(signal.SIGKILL)
            process.communicate(timeout=250)
        process = start(tmp_path / "home", site.url)
        output, _ = process.communicate(timeout=250)
    assert process.returncode == 0
    assert killed >= 1
    result = json.loads(output)
    assert result["content"] == expected
    assert result["counts"]["pages"] == pages
    paths = site.paths
    assert sum(n - 1 for n in paths.values()) <= killed * PARALLEL
    assert max(paths.values()) <= killed + 1


@pytest.mark.slow
def test_killed_crawl_refetches_nothing_but_requests_in_flight(tmp_path: Path) -> None:
    crawl_with_kills(tmp_path, pages=120, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [7])
def test_crawl_killed_ten_times_loses_nothing(tmp_path: Path, seed: int) -> None:
    crawl_with_kills(tmp_path, pages=400, kills=10, seed=seed)


def test_a_partition_has_one_writer_the_next_waits_for_its_end(tmp_path: Path) -> None:
    """A worker whose driver was killed fetches on until Ray has noticed."""
    work = Crawler(tmp_path / "home").workspace("0" * 64)
    plan = Plan("000001-0000", (), CrawlConfig().limits(), Aliases(()), (), 1000, 1)
    first = Segments(plan, work)
    got: list[Segments] = []
    second = threading.Thread(target=lambda: got.append(Segments(plan, work)))
    second.start()
    second.join(0.3)
    assert not got
    first.append(Outcome("http://h/a", "page", "error", "HTTP 404"), (), "http://h/a")
    first.close()
    second.join(10)
    assert [outcome.url for outcome in got[0].replay()] == ["http://h/a"]
    got[0].close()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "changed",
    [
        {"delay": 0.0, "parallel": 1},
        {"delay": 0.05, "parallel": 8, "parallel_total": 1},
        {"round_seconds": 0.01, "segment_bytes": 5_000, "timeout": 9.0, "retries": 0},
    ],
)
def test_a_half_finished_round_goes_on_with_another_pace(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    options = {"delay": 0.02, "parallel": 3, "round_seconds": 0.6, "keep_stale": 0}
    pages = linked_pages(45)
    with LoopbackSite(pages) as site:
        whole = Crawler(tmp_path / "whole").crawl(site.url, **options)
        site.requests.clear()
        stop = threading.Event()

        def twenty_two() -> web.Response:
            stop.set()
            return web.Response(text=pages["/22"], content_type="text/html")

        site.pages["/22"] = twenty_two
        crawler = Crawler(tmp_path / "home")

        def until_stopped(function: Any, items: Any) -> Any:
            """The round is broken off with half of its requests answered."""
            with mock.patch.object(HostFetcher, "_pause", interrupting):
                yield from in_process(function, items)

        pause = HostFetcher._pause

        def interrupting(fetcher: HostFetcher) -> float:
            if stop.is_set():
                raise Interrupted
            return pause(fetcher)

        with pytest.raises(Interrupted):
            crawler.crawl(site.url, run=until_stopped, **options)
        asked = site.paths
        assert 22 < asked.total() < 45
        site.pages["/22"] = pages["/22"]
        begun = len(site.requests)
        resumed = crawler.crawl(site.url, **options | changed)
        refetched = {path: n for path, n in site.paths.items() if n > 1}
        moments = [moment for moment, _, _ in site.requests[begun:]]
    assert resumed.outcome.content == whole.outcome.content
    assert set(refetched) <= set(asked) and sum(refetched.values()) <= 2 * 3
    if "delay" in changed:  # the new pace holds, also for a host that is known
        gaps = [after - before for before, after in pairwise(moments)]
        assert median(gaps) > 0.045 if changed["delay"] else median(gaps) < 0.01
