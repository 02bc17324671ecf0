"""kill -9 of a crawl: what was committed is never asked for again, and nothing is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loopback_site import Crawler, LoopbackSite, page

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
