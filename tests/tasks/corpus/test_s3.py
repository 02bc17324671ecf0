"""The corpus behind S3's protocol: sources read from there, stages and a purge that write there."""

import gzip
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documents_of import documents, rows, urls
from inline_shards import stages_inline
from loopback_site import LoopbackSite, page
from shared_data import shared
from test_corpus_chain import THINGS, module
from test_forget import VICTIM, bury, everything, params, purge
from test_quality import DOCUMENTATION, PROSE

from flows.corpus import build_corpus
from tasks.corpus.erase import erase
from tasks.corpus.gather import GatherConfig, gather
from tasks.corpus.measure import MeasureConfig, measure
from tasks.corpus.quality import QualityConfig, quality
from tasks.corpus.report import ReportConfig, report_corpus
from tasks.corpus.source_config import SourceConfig, content_digest
from tasks.corpus.tombstoned import Forgotten
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.planning import planning
from tasks.runtime.settings import Settings
from tasks.runtime.store import Store
from tasks.state.tombstones import Tombstones
from tests.s3_server import S3Server, s3_server

WARC = "warc/sample-0000.warc.gz"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        running.bucket("texts")
        running.bucket("store")
        yield running


@pytest.fixture(autouse=True)
def home(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GRISTMILL_STORE", f"s3://store/{tmp_path.name}")
    monkeypatch.setenv("GRISTMILL_SOURCE_ROOTS", "s3://texts")
    with stages_inline(monkeypatch, tmp_path / "home"):
        yield tmp_path / "home"


def gathered(*sources: SourceConfig) -> Manifest:
    return gather(GatherConfig(sources=sources))


def test_warc_parquet_and_jsonl_are_read_where_they_lie(server: S3Server, home: Path) -> None:
    server.put("texts/crawl/deep/a.warc.gz", shared(WARC).read_bytes())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["a row of a table"], "url": ["http://h/t"]}), sink)
    server.put("texts/tables/a.parquet", sink.getvalue().to_pybytes())
    server.put("texts/lines/a.jsonl.gz", gzip.compress(b'{"text": "a line"}\n'))
    server.put("texts/lines/b.txt", b"not of this format")
    server.put("texts/warc.paths", b"crawl/deep/a.warc.gz\ncrawl/missing.warc.gz\n")
    made = gathered(
        SourceConfig(name="w", path="s3://texts/crawl/", format="warc"),
        SourceConfig(name="p", path="s3://texts/tables/a.parquet", format="parquet"),
        SourceConfig(name="j", path="s3://texts/lines", format="jsonl"),
    )
    found = rows(made)
    of = Counter(row["warc"].partition(":")[0] for row in found)
    assert of["p"] == of["j"] == 1 and of["w"] > 3
    assert {"w:deep/a.warc.gz", "p:a.parquet", "j:a.jsonl.gz"} == {row["warc"] for row in found}
    listed = gathered(SourceConfig(name="l", path="s3://texts/warc.paths", format="warc-list"))
    assert Counter(row["text"] for row in rows(listed)) == Counter(
        row["text"] for row in found if row["warc"].startswith("w:")
    )
    assert listed.rules["missing-file"] == 1
    assert not [path for path in (home / "work").rglob("*") if path.is_file()]  # copies are gone


def test_another_state_of_an_object_is_another_source(server: S3Server) -> None:
    source = SourceConfig(name="j", path="s3://texts/one/a.jsonl", format="jsonl")
    server.put("texts/one/a.jsonl", b'{"text": "one"}\n')
    before = content_digest(source, Settings.load())
    assert content_digest(source, Settings.load()) == before
    server.put("texts/one/a.jsonl", b'{"text": "another"}\n')
    assert content_digest(source, Settings.load()) != before


def test_what_is_wrong_with_a_source_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, sentence in (
        ("s3://other/x.jsonl", "none of the remote roots"),
        ("s3://texts/../other/x.jsonl", "none of the remote roots"),
        ("s3://texts/no/x.jsonl", "is not there; check the source's path"),
        ("s3://texts/nothing/", "nothing of format 'jsonl'"),
    ):
        with pytest.raises(UserError, match=sentence):
            gathered(SourceConfig(name="j", path=path, format="jsonl"))
    with s3_server(INITIAL_NO_AUTH_ACTION_COUNT="0") as strict:
        monkeypatch.setenv("GRISTMILL_STORE", "")  # in the home; the source alone is refused
        monkeypatch.setenv("AWS_ENDPOINT_URL", strict.url)
        for path in ("s3://texts/x.jsonl", "s3://texts/"):
            with pytest.raises(UserError, match="is denied; give credentials"):
                gathered(SourceConfig(name="j", path=path, format="jsonl"))


def test_stages_and_a_purge_in_a_bucket() -> None:
    texts = {"http://h/a": PROSE, "http://gone.example/d": DOCUMENTATION, "http://h/short": "no"}
    found = documents(texts)
    columns = measure(MeasureConfig(), documents=found)
    kept = quality(QualityConfig(), documents=found, attributes=columns)
    assert urls(kept) == ["http://h/a", "http://gone.example/d"]
    settings = Settings.load()
    Tombstones(settings.database_url).add("domain", "gone.example", "asked for")
    forgotten = Forgotten.standing(settings)
    done = {one.stage: one.action for one in erase(settings, forgotten)}
    assert done == dict.fromkeys(("tested-documents", "measure", "quality"), "rewritten")
    store = Store.open()
    left = store.find("quality", kept.fingerprint)
    assert left is not None and urls(left) == ["http://h/a"] and left.not_replayable
    for manifest in (left, *store.all("measure"), *store.all("tested-documents")):
        store.verify(manifest)
    assert erase(settings, forgotten) == []


@pytest.mark.slow
def test_a_whole_corpus_is_made_crawled_again_and_purged_in_a_bucket(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRISTMILL_MLFLOW_URL", "http://127.0.0.1:9")
    pages = {f"/library/{t}s.html": module(n, t) for n, t in enumerate(THINGS)}
    with LoopbackSite({"/": page(*pages)} | pages) as site:
        victim = f"{site.url}{VICTIM}"
        made = build_corpus(params(site))
        assert victim in everything(made)
        with planning() as planned:
            build_corpus(params(site))
        assert {step.status for step in planned} == {"cached"}
        assert build_corpus(params(site, epoch=1)).fingerprint == made.fingerprint
    report_corpus(ReportConfig(), corpus=made)
    store = Store.open()
    for stage in store.stages():
        for manifest in store.all(stage):
            store.verify(manifest)
    bury(victim)
    assert {done.action for done in purge()} == {"rewritten", "deleted"}
    for stage in store.stages():
        for manifest in store.all(stage):
            store.verify(manifest)
            for table in store.tables(manifest):
                assert victim not in table.to_pydict().get("url", [])
    assert purge() == []
    assert not (home / "store").exists()
