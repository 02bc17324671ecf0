"""The crawl stage on a real Ray node, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_site import LoopbackSite, page

ROOT = Path(__file__).parents[3]
SCRIPT = """
import json, sys
from tasks.corpus.crawl import CrawlConfig, crawl
from tasks.runtime.errors import UserError
from tasks.runtime.ray_session import ray_session
from tasks.runtime.store import Store

seed = sys.argv[1]
options = {"delay": 0.0, "exclude": ()}
with ray_session():
    first = crawl(CrawlConfig(seeds=(seed,), **options))
    again = crawl(CrawlConfig(seeds=(seed,), **options))
    recrawl = crawl(CrawlConfig(seeds=(seed,), epoch=1, **options))
    try:
        crawl(CrawlConfig(seeds=("http://127.0.0.1:9/",), retries=0))
    except UserError as error:
        message = str(error)
store = Store.open()
store.verify(recrawl)
print(json.dumps({
    "same": first == again,
    "content": first.content == recrawl.content != first.fingerprint,
    "counts": first.counts,
    "files": [f.name for f in first.files],
    "message": message,
    "artifacts": len(store.all("crawl")),
    "left": sorted(p.name for p in (store.cache.parent / "store" / "crawl").iterdir()),
    "known": sorted(m.fingerprint for m in store.all("crawl")),
}))
"""


@pytest.mark.slow  # starts a Ray node of its own; the chain test crawls on the stack's
def test_the_stage_runs_on_ray_is_cached_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    pages = {"/": page("/a", "/b"), "/a": page("/b"), "/b": page(text="b")}
    environment = os.environ | {
        "GRISTMILL_HOME": str(tmp_path / "home"),
        "GRISTMILL_RAY_ADDRESS": "local",
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(ROOT),
    }
    with LoopbackSite(pages) as site:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, site.url],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        assert site.paths["/a"] == 2  # once per epoch, not for the cached call
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["same"]
    assert said["content"]
    assert said["counts"]["pages"] == 3
    assert said["files"] == [
        "hosts.parquet",
        "links.parquet",
        "pages.parquet",
        "report.json",
        "urls.parquet",
        "warc/00000.warc.gz",
    ]
    assert "connection refused" in said["message"]
    assert said["artifacts"] == 2
    assert said["left"] == said["known"]
