"""Ten `kill -9` of a crawl on Ray: of its driver, its workers, the raylet and the whole node.

The crawl stage runs as in production: a driver of its own, connected to a standing node, on whose
workers partitions are fetched. After each kill a person's commands follow: the node is started
again where it is gone, and the same crawl is run again.

A request is *in flight* from the moment it arrives at the server until its record stands in a
segment of the crawl (the metadata record that commits it). When all processes of a killed attempt
are gone, the server's log says what was asked for and the segments say what is recorded: what is
in the one and not in the other was in flight at this kill, unanswered or answered and not yet
recorded. An attempt ends as a whole: when a worker is killed, the driver ends the others. A page
may be asked for once, and once more for every kill at which it was in flight. Since a crawler
could also record late, their number is bounded too: at most `parallel` of a host at a kill.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from benchmarks.crawl_server import Server
from benchmarks.one_core import CHECKOUT, worker
from benchmarks.ray_node import Node
from tasks.corpus import warc

PARALLEL = 16
HOSTS = 4
KILLS, QUICK_KILLS = 10, 4
LATENCY = 0.02
"""Seconds an answer of the server takes, at most: then requests are really in flight."""
PATIENCE = 60.0
"""Seconds after a kill until what is left of the attempt is ended too."""
FETCHING = "ray::fetch_partition"
ROBOTS, TDM = "/robots.txt", "/.well-known/tdmrep.json"


def crawl_here(seeds: list[str], pages: int, home: str, address: str) -> dict[str, Any]:
    """The crawl stage in this process, its partitions on the workers of a node."""
    os.environ |= {
        "GRISTMILL_HOME": home,
        "GRISTMILL_RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "disabled",
    }
    from tasks.corpus.crawl import crawl
    from tasks.corpus.crawl_config import CrawlConfig
    from tasks.corpus.pages import page_rows, read_pages
    from tasks.runtime.ray_session import leave_ray
    from tasks.runtime.store import Store

    manifest = crawl(
        CrawlConfig(
            seeds=tuple(seeds),
            exclude=(),
            delay=0.0,
            parallel=PARALLEL,
            max_pages=2 * pages,
            round_seconds=0.2,
        )
    )
    leave_ray()
    store = Store.open()
    store.verify(manifest)
    directory = store.of(manifest)
    told = hashlib.sha256()
    for page in read_pages(directory, page_rows(directory)):
        told.update(f"{page.url}\t{page.content_type}\t{page.depth}\t{len(page.body)}\n".encode())
        told.update(page.body)
    return {"pages": manifest.counts["pages"], "bytes": told.hexdigest()}


class Killed:
    """One crawl, what is done to it, and what that costs."""

    def __init__(self, script: str, server: Server, pages: int, node: Node, home: Path) -> None:
        self.server, self.pages, self.node, self.home = server, pages, node, home
        self._command = [sys.executable, script, "--worker", "here", str(pages), str(home)]
        self._command += [node.address, *server.seeds]
        self.random = random.Random()
        self.in_flight: Counter[str] = Counter()  # at how many kills, by address
        self.unanswered = 0
        self.most_in_flight = 0  # of one host at one kill
        self.killed: Counter[str] = Counter()

    def victims(self, kills: int) -> list[str]:
        """Each kind once, the others by chance; the raylet and the node cost a start of Ray."""
        fixed = ["driver", "worker", "raylet", "node"]
        chosen = fixed + self.random.choices(["driver", "worker"], k=kills - len(fixed))
        self.random.shuffle(chosen)
        return chosen

    def run(self, kills: int) -> None:
        for number, victim in enumerate(self.victims(kills)):
            process = subprocess.Popen(
                self._command,
                cwd=CHECKOUT,
                env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                self._wait(process, (self.pages - self._asked()) // (kills - number + 1))
                answers = self.server.answers()
                self._kill(victim, process)
                self._wait_for_the_end(process)
                if process.returncode == 0:
                    return  # it was through before it could be killed
                self.killed[victim] += 1
            finally:
                process.kill()
            self._note_in_flight(answers)
            if not self.node.named("raylet"):
                self.node.kill()
                self.node.start()

    def _asked(self) -> int:
        return self.server.requests().total()

    def _wait(self, process: subprocess.Popen[bytes], most: int) -> None:
        """Until so many more requests at most, and a moment that may lie between two rounds."""
        wanted = self._asked() + self.random.randint(1, max(most, 1))
        while process.poll() is None and self._asked() < wanted:
            time.sleep(0.01)
        time.sleep(self.random.random() * 0.1)

    def _kill(self, victim: str, process: subprocess.Popen[bytes]) -> None:
        if victim == "node":
            process.kill()
            self.node.kill()
        elif victim == "driver":
            process.kill()
        else:
            name = FETCHING if victim == "worker" else "raylet"
            while not (found := self.node.named(name)) and process.poll() is None:
                time.sleep(0.005)
            with contextlib.suppress(psutil.NoSuchProcess):
                if found:
                    self.random.choice(found).kill()

    def _wait_for_the_end(self, process: subprocess.Popen[bytes]) -> None:
        """Until the driver is gone, and with it the workers that fetch for it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        process.kill()
        process.wait()
        deadline = time.monotonic() + PATIENCE
        while left := self.node.named(FETCHING):
            if time.monotonic() > deadline:
                raise SystemExit(f"{len(left)} workers fetch on, their driver is gone")
            time.sleep(0.02)

    def _note_in_flight(self, answers: Counter[str]) -> None:
        """answers: those given before the kill; what else came goes to nobody."""
        recorded = self._recorded()
        by_host: Counter[str] = Counter()
        for url, count in self.server.requests().items():
            # Both files of an origin stand in one record.
            if url.replace(TDM, ROBOTS) not in recorded:
                self.in_flight[url] += 1
                self.unanswered += answers[url] < count
                by_host[url.split("/")[2]] += 1
        self.most_in_flight = max([self.most_in_flight, *by_host.values()])

    def _recorded(self) -> set[str]:
        """The addresses that have a commit in a segment, open or whole."""
        places = ("work/*/open", "store/crawl/*/_segments", "store/crawl/*/warc")
        return {
            str(values["url"])
            for place in places
            for path in self.home.glob(f"{place}/*.warc.gz")
            for values, _ in warc.commits(path.read_bytes())
        }

    def beyond(self) -> int:
        """Requests that neither a first one nor a kill accounts for."""
        asked = self.server.requests()
        return sum(max(count - 1 - self.in_flight[url], 0) for url, count in asked.items())


def killed_and_resumed(script: str, server: Server, pages: int, kills: int) -> dict[str, float]:
    """Kill the crawl so many times, let it end, and compare with one that was left alone."""
    folder = Path(tempfile.mkdtemp(prefix="gristmill-bench-"))
    try:
        with Node(2) as node:

            def crawl(home: Path) -> dict[str, Any]:
                return worker(script, "here", str(pages), str(home), node.address, *server.seeds)

            whole = crawl(folder / "whole")
            server.forget()
            killed = Killed(script, server, pages, node, folder / "killed")
            begun = time.monotonic()
            killed.run(kills)
            resumed = crawl(killed.home)
            refetched = sum(count - 1 for count in server.requests().values())
            return {
                "kills": killed.killed.total(),
                **{f"kills_of_{name}": count for name, count in sorted(killed.killed.items())},
                "seconds_with_kills": round(time.monotonic() - begun, 1),
                "pages_lost": abs(pages - resumed["pages"]),
                "pages_differ": int(whole["bytes"] != resumed["bytes"]),
                "in_flight_at_kills": killed.in_flight.total(),
                "unanswered_at_kills": killed.unanswered,
                "most_in_flight_of_a_host": killed.most_in_flight,
                "refetched": refetched,
                "refetched_beyond_in_flight": killed.beyond(),
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
