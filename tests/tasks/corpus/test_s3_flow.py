"""The corpus flow of a running stack whose store is a bucket, from the command line."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_site import LoopbackSite, page
from test_corpus_chain import THINGS, module

from tasks.runtime.store import Store
from tests.conftest import Stack, running_stack
from tests.flows.killable_stack import put_small_site
from tests.s3_server import s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def with_small_site(home: Path) -> None:
    put_small_site(home / "site")


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    with s3_server() as server:
        server.bucket("bucket")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        with running_stack(with_small_site, store="s3://bucket/gristmill") as running:
            yield running


def test_the_corpus_flow_makes_its_artifacts_in_a_bucket(stack: Stack) -> None:
    pages = {f"/library/{t}s.html": module(n, t) for n, t in enumerate(THINGS)}
    with LoopbackSite({"/": page(*pages)} | pages) as site:
        asked = ["--set", f"corpus.seeds={json.dumps([site.url])}", "--set", "corpus.crawl.delay=0"]
        stack.gristmill("run", "corpus", *asked, "--watch")
        plan = stack.gristmill("plan", "corpus", *asked)
    status = {line.split()[0]: line.split()[2] for line in plan.splitlines()}
    assert status["crawl"] == status["quality"] == status["split"] == "cached"
    store = Store.open(stack.settings)
    corpus = store.latest("split")
    assert corpus is not None
    chain = store.lineage(corpus)
    assert {"crawl", "extract", "measure", "quality"} < {manifest.stage for manifest in chain}
    for manifest in chain:
        store.verify(manifest)
    found = {url for table in store.tables(corpus) for url in table["url"].to_pylist()}
    assert found == {f"{site.url}{path}" for path in pages}
    assert not (stack.settings.home / "store").exists()
