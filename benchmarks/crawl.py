"""Crawling: processor time a page beside Scrapy; ten `kill -9` cost only what was in flight.

    python benchmarks/crawl.py [--quick]

Both fetch the same generated site (`crawl_server`, a process of its own that counts nowhere) with
16 requests at once and politeness off. Ours is the crawl stage on Ray as a flow runs it: the driver
and every Ray worker from start to end, imports, robots.txt, WARC files, tables and manifest
included; Ray's own daemons are told apart. Scrapy is a spider that follows the links of each page
(`response.follow_all`), asks for no robots.txt and keeps nothing: its whole process.

Then a crawl of several hosts is killed at random moments, ten times, and started again each time
(`crawl_kills`): was a page lost, or asked for more often than it was in flight at a kill?
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from benchmarks.crawl_kills import (
    HOSTS,
    KILLS,
    LATENCY,
    PARALLEL,
    QUICK_KILLS,
    crawl_here,
    killed_and_resumed,
)
from benchmarks.crawl_server import running
from benchmarks.one_core import worker
from benchmarks.report import finish

TARGETS: dict[str, tuple[str, float]] = {
    "cpu_of_scrapy": ("<=", 2 / 3),
    "pages_lost": ("<=", 0),
    "pages_differ": ("<=", 0),
    "most_in_flight_of_a_host": ("<=", PARALLEL),
    "refetched_beyond_in_flight": ("<=", 0),
}


class Processes:
    """CPU seconds of this process's descendants by kind, those that ended meanwhile included."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[bool, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self._look()

    def _look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                times, command = process.cpu_times(), " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            is_worker = command.startswith("ray::") or "default_worker.py" in command
            self._seen[process.pid] = (is_worker, times.user + times.system)

    def end(self) -> dict[str, float]:
        self._stop.set()
        self._thread.join()
        self._look()
        return {
            name: sum(cpu for is_worker, cpu in self._seen.values() if is_worker == wanted)
            for name, wanted in (("workers", True), ("daemons", False))
        }


def crawl_ours(seed: str, pages: int) -> dict[str, Any]:
    """The crawl stage on a Ray of its own, in a fresh process."""
    home = Path(tempfile.mkdtemp(prefix="gristmill-bench-"))
    os.environ |= {
        "GRISTMILL_HOME": str(home),
        "GRISTMILL_RAY_ADDRESS": "local",
        "RAY_AUTH_MODE": "disabled",
    }
    watched = Processes()
    try:
        from tasks.corpus.crawl import CrawlConfig, crawl
        from tasks.runtime.ray_session import leave_ray, ray_session

        with ray_session():
            connected, begun = time.process_time(), time.monotonic()
            manifest = crawl(
                CrawlConfig(
                    seeds=(seed,), exclude=(), delay=0.0, parallel=PARALLEL, max_pages=2 * pages
                )
            )
            seconds, stage = time.monotonic() - begun, time.process_time() - connected
        cpu = watched.end()
        leave_ray()
        return cpu | {
            "pages": manifest.counts["pages"],
            "driver": time.process_time(),
            "stage_driver": stage,
            "seconds": seconds,
        }
    finally:
        shutil.rmtree(home)


def crawl_scrapy(seed: str) -> dict[str, Any]:
    import scrapy
    from scrapy.crawler import CrawlerProcess

    class Spider(scrapy.Spider):
        name = "benchmark"
        start_urls = (seed,)
        pages = 0

        def parse(self, response: Any, **_: Any) -> Any:
            type(self).pages += 1
            yield from response.follow_all(css="a")

    begun = time.monotonic()
    process = CrawlerProcess(
        {
            "LOG_LEVEL": "ERROR",
            "TELNETCONSOLE_ENABLED": False,
            "ROBOTSTXT_OBEY": False,
            "DOWNLOAD_DELAY": 0,
            "CONCURRENT_REQUESTS": PARALLEL,
            "CONCURRENT_REQUESTS_PER_DOMAIN": PARALLEL,
        }
    )
    process.crawl(Spider)
    process.start()
    seconds = time.monotonic() - begun
    return {"pages": Spider.pages, "cpu": time.process_time(), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller site, one round of each")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, *rest = arguments.worker
        if kind == "ours":
            result = crawl_ours(rest[0], int(rest[1]))
        elif kind == "scrapy":
            result = crawl_scrapy(rest[0])
        else:
            result = crawl_here(rest[3:], int(rest[0]), rest[1], rest[2])
        print(json.dumps(result))
        return
    pages, rounds, kills = (2000, 1, QUICK_KILLS) if arguments.quick else (4000, 2, KILLS)
    folder = Path(tempfile.mkdtemp(prefix="gristmill-bench-"))
    ours, peer = [], []
    try:
        with running(pages, folder) as server:
            for _ in range(rounds):
                ours.append(worker(__file__, "ours", *server.seeds, str(pages)))
                peer.append(worker(__file__, "scrapy", *server.seeds))
            served = server.cpu() / (2 * rounds)
        with running(25 * kills, folder, HOSTS, LATENCY) as server:
            killed = killed_and_resumed(__file__, server, 25 * kills * HOSTS, kills)
    finally:
        shutil.rmtree(folder)
    # Scrapy takes the seed twice: a start request is not remembered as seen.
    assert all(0 <= run["pages"] - pages <= 1 for run in (*ours, *peer)), (ours, peer)

    def per_page(runs: list[dict[str, Any]], *names: str) -> float:
        """Milliseconds of processor time a page."""
        total = statistics.median(sum(run[name] for name in names) for run in runs)
        return round(1000 * total / pages, 3)

    mine, theirs = per_page(ours, "driver", "workers"), per_page(peer, "cpu")
    finish(
        "crawl",
        {
            "pages": pages,
            "cpu_ms_per_page": mine,
            "cpu_ms_per_page_without_start": per_page(ours, "stage_driver", "workers"),
            "scrapy_cpu_ms_per_page": theirs,
            "cpu_of_scrapy": round(mine / theirs, 3),
            "ray_daemons_cpu_ms_per_page": per_page(ours, "daemons"),
            "site_server_cpu_ms_per_page": round(1000 * served / pages, 3),
            "pages_per_second": round(pages / statistics.median(r["seconds"] for r in ours), 1),
            "scrapy_pages_per_second": round(
                pages / statistics.median(r["seconds"] for r in peer), 1
            ),
            **killed,
        },
        TARGETS | {"kills": (">=", kills)},
    )


if __name__ == "__main__":
    main()
