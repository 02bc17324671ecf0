"""Takedown: what is forgotten is not in the next corpus, and after a purge in no earlier one."""

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from documents_of import documents, rows, unique, urls
from fastwarc.warc import ArchiveIterator
from inline_shards import stages_inline
from loopback_site import LoopbackSite, page
from test_corpus_chain import THINGS, module

from flows import forget as forget_commands
from flows.corpus import CorpusParams, build_corpus
from tasks.corpus.dedup import DeduplicateConfig
from tasks.corpus.erase import Done, _names, erase
from tasks.corpus.gather import GatherConfig, gather
from tasks.corpus.line_edits import LinesConfig, edit_lines
from tasks.corpus.pages import page_rows, read_pages
from tasks.corpus.report import ReportConfig, report_corpus
from tasks.corpus.same_document import known_ids
from tasks.corpus.source_config import SourceConfig
from tasks.corpus.tombstoned import Forgotten, parse
from tasks.corpus.warc import members
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.planning import Planned, planning
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Store
from tasks.state.leases import lease
from tasks.state.tombstones import PURGE, Tombstone, Tombstones

VICTIM = "/library/heaps.html"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackSite]:
    monkeypatch.setenv("GRISTMILL_MLFLOW_URL", "http://127.0.0.1:9")
    with stages_inline(monkeypatch, tmp_path / "home"):
        pages = {f"/library/{t}s.html": module(n, t) for n, t in enumerate(THINGS)}
        pages["/library/copy.html"] = pages[VICTIM]
        with LoopbackSite({"/": page(*pages)} | pages) as running:
            yield running


def corpus(site: LoopbackSite, **more: Any) -> Manifest:
    return build_corpus(params(site, **more))


def params(site: LoopbackSite, **more: Any) -> CorpusParams:
    return CorpusParams.model_validate(
        {
            "seeds": [f"{site.url}/"],
            "crawl": {"delay": 0.0},
            "split": {"seed": 0, "common_groups": 5},
        }
        | more
    )


def state() -> Tombstones:
    return Tombstones(Settings.load().database_url)


def bury(what: str) -> Tombstone:
    return state().add(*parse(what), "the author asked")


def purge() -> list[Done]:
    settings = Settings.load()
    return erase(settings, Forgotten.standing(settings))


def everything(manifest: Manifest) -> list[str]:
    return sorted([*urls(manifest, "train-"), *urls(manifest, "heldout-")])


def planned(site: LoopbackSite, **more: Any) -> dict[str, Planned]:
    with planning() as stages:
        build_corpus(params(site, **more))
    return {stage.stage: stage for stage in stages}


def artifacts() -> list[Manifest]:
    store = Store.open()
    return [manifest for name in store.stages() for manifest in store.all(name)]


def holders(needle: str) -> list[str]:
    """Files of the store in which a text stands, whatever they are packed with."""
    store, found = Store.open(), []
    for path in sorted(Path(store.uri).rglob("*")):
        if path.suffix == ".parquet":
            text = json.dumps(pq.read_table(path).to_pylist(), default=str, ensure_ascii=False)
        elif path.suffix == ".gz":
            text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        elif path.is_file():
            text = path.read_text(errors="replace")
        else:
            continue
        if needle in text:
            found.append(str(path.relative_to(store.uri)))
    return found


def test_a_forgotten_page_is_not_in_the_next_corpus(site: LoopbackSite) -> None:
    before = everything(corpus(site))
    gone, copy = f"{site.url}{VICTIM}", f"{site.url}/library/copy.html"
    assert (gone in before) != (copy in before)  # one of two copies
    for url in (gone, copy):
        bury(url)
    plan = planned(site)
    assert [name for name, stage in plan.items() if stage.status == "cached"] == [
        *("crawl", "extract", "measure", "signatures", "language", "quality")
    ]
    assert plan["forget"].status == "run"
    assert {plan[name].status for name in ("deduplicate", "split")} == {"unknown"}
    asked = len(site.requests)
    after = corpus(site)
    assert len(site.requests) == asked
    assert everything(after) == [url for url in before if url not in (gone, copy)]
    [left_out] = Store.open().all("forget")
    assert left_out.rules == {"tombstoned": 2}
    rejected = rows(left_out, "rejected-")
    assert {row["url"]: row["text"] for row in rejected} == {gone: "", copy: ""}
    assert "the author asked" in rejected[0]["reason"]
    # The copy alone would have come back in its place.
    state().withdraw(2)
    assert copy in everything(corpus(site))


def test_a_tombstone_that_meets_nothing_reruns_nothing_else(site: LoopbackSite) -> None:
    before = corpus(site)
    bury("example.org")
    plan = planned(site)
    assert (plan["forget"].status, plan["split"].status) == ("run", "unknown")
    assert "depends on what" in plan["deduplicate"].why
    assert corpus(site).fingerprint == before.fingerprint
    assert {stage.status for stage in planned(site).values()} == {"cached"}
    bury("example.com")
    assert "forget.tombstones 1 → 2" in planned(site)["forget"].why


def test_a_crawl_never_asks_for_what_is_forgotten(site: LoopbackSite) -> None:
    bury(f"{site.url}{VICTIM}")
    corpus(site)
    assert VICTIM not in site.paths
    [crawled] = Store.open().all("crawl")
    assert crawled.rules == {"tombstoned": 1}
    bury(site.url.removeprefix("http://"))
    with pytest.raises(UserError, match=r"no page at .*\(tombstoned\)"):
        corpus(site, epoch=1)


def test_a_purge_leaves_nothing_behind_and_all_else_whole(site: LoopbackSite) -> None:
    before = everything(corpus(site))
    telling = "search_heap"
    assert len({name.split("/")[0] for name in holders(telling)}) >= 6
    for path in (VICTIM, "/library/copy.html"):
        bury(f"{site.url}{path}")
    done = purge()
    assert {result.stage for result in done} >= {"crawl", "extract", "quality", "deduplicate"}
    assert holders(telling) == []
    # Other pages' links to it are theirs, and stay.
    linked = {name.rpartition("/")[2] for name in holders(VICTIM)}
    assert linked == {"links.parquet", "00000.warc.gz"}
    store = Store.open()
    for manifest in artifacts():
        store.verify(manifest)
        assert manifest.erased[0].tombstones == (1, 2)
        assert "erased on request" in manifest.not_replayable
    [crawled] = store.all("crawl")
    pages = {found.url for found in read_pages(store.of(crawled), page_rows(store.of(crawled)))}
    assert f"{site.url}/library/trees.html" in pages and f"{site.url}{VICTIM}" not in pages
    with open(store.of(crawled).location("warc/00000.warc.gz"), "rb") as stream:
        assert len(list(ArchiveIterator(stream, parse_http=False, verify_digests=True))) > 30
    assert [erasure.finished is not None for erasure in state().erased()] == [True] * len(done)
    assert "erased on request" in planned(site)["crawl"].why
    after = corpus(site)
    assert set(before) - set(everything(after)) <= {
        f"{site.url}{VICTIM}",
        f"{site.url}/library/copy.html",
    }
    assert everything(after) and VICTIM not in "".join(everything(after))
    assert purge() == []


@pytest.mark.parametrize("what", ["http://h/gone", "before", "id"])
def test_what_was_cut_out_of_a_document_is_erased_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with stages_inline(monkeypatch, tmp_path / "home"):
        texts = {
            f"http://h/{name}": f"A whole sentence of some words about {name}.\nHome of {name}"
            for name in ("stays", "gone")
        }
        made = edit_lines(LinesConfig(rules=("punctuation",)), documents=documents(texts))
        kept, cut = (row for row in rows(made, "cut-"))
        assert (kept["text"], cut["text"]) == ("Home of stays", "Home of gone")
        bury(cut.get(what, what))
        purge()
        (left,) = Store.open().all("lines")
        assert rows(left, "cut-") == [kept]


def test_what_was_cut_out_of_a_payload_is_erased_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stages_inline(monkeypatch, tmp_path / "home"):
        inbox = tmp_path / "home" / "sources"
        inbox.mkdir(parents=True)
        for name in ("stays", "gone"):
            lines = (f"A whole sentence of some words about {name}.", f"Home of {name}")
            text = "".join(f"<p>{line}</p>" for line in lines)
            (inbox / f"{name}.html").write_text(f"<article>{text}</article>")
        source = SourceConfig(name="pages", path=str(inbox))
        read = gather(GatherConfig(sources=(source,)))
        config = LinesConfig(rules=("punctuation",))
        edited = edit_lines(config, documents=read)
        assert sorted(row["text"] for row in rows(edited, "cut-")) == [
            "Home of gone",
            "Home of stays",
        ]
        digests = {row["url"]: row["digest"] for row in rows(read)}
        bury(next(digest for url, digest in digests.items() if "gone" in url))
        purge()
        (left,) = Store.open().all("lines")
        assert [row["text"] for row in rows(left, "cut-")] == ["Home of stays"]
        assert holders("Home of gone") == []


def test_no_row_of_another_shard_names_what_is_erased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither as the text that it was removed for, nor as its canonical address."""
    with stages_inline(monkeypatch, tmp_path / "home"):
        texts = {f"http://h/{n}": f"A text of its own, number {n}." for n in range(8)}
        texts["http://h/7/copy"] = texts["http://h/0"]  # of the third shard; the other of the first
        given = documents(texts, canonical={"http://h/5": "http://h/0"})
        made = unique(DeduplicateConfig(), given)
        assert rows(made, "rejected-")[0]["reason"] == "same text as http://h/0"
        bury("http://h/0")
        purge()
        assert urls(made) == [f"http://h/{n}" for n in range(1, 8)]
        assert [row["reason"] for row in rows(made, "rejected-")] == ["same text as (erased)"]
        told = {row["url"]: row["canonical"] for row in rows(made)}
        assert told["http://h/5"] == "(erased)" and set(told.values()) == {"", "(erased)"}
        for left in Store.open().all("deduplicate"):
            Store.open().verify(left)


@pytest.mark.parametrize("by", ["url", "digest"])
def test_a_purge_takes_the_records_of_payloads_that_did_not_change(
    site: LoopbackSite, by: str
) -> None:
    corpus(site)
    corpus(site, epoch=1)
    second = max(Store.open().all("crawl"), key=lambda made: made.config["epoch"])
    assert second.counts["not_modified"] > 10 and second.counts["fetched"] == 0
    rows_of = page_rows(Store.open().of(second)).to_pylist()
    victim = next(row for row in rows_of if row["url"].endswith(VICTIM))
    bury(victim["url"] if by == "url" else victim["digest"])
    bury(f"{site.url}/library/copy.html")
    purge()
    assert holders("search_heap") == []
    for made in Store.open().all("crawl"):
        packed = Path(Store.open().of(made).location("warc/00000.warc.gz")).read_bytes()
        targets = {member.field(b"warc-target-uri").decode() for member in members(packed)}
        assert victim["fetch_url"] not in targets


def test_a_report_that_quotes_what_is_purged_goes_too(site: LoopbackSite) -> None:
    site.pages["/library/short.html"] = page(text="Ten words are far too few to be kept here.")
    site.pages["/"] += '<a href="/library/short.html">short</a>'
    made = corpus(site)
    report_corpus(ReportConfig(), corpus=made)
    bury(f"{site.url}/library/short.html")  # removed for its length; the split never had it
    done = {result.stage: result.action for result in purge()}
    assert done["corpus-report"] == "deleted" and "split" not in done
    again = report_corpus(ReportConfig(), corpus=made)
    assert "Ten words" not in Store.open().of(again).read_bytes("report.html").decode()


class EmptyConfig(StageConfig):
    pass


@stage("token-shards", version=99, retries=0)
def tokens_of(config: EmptyConfig, work: Workspace, *, corpus: Manifest) -> Outcome:
    work.write_bytes("tokens-00000.npy", b"the text in another form")
    return Outcome()


@stage("pretrain", version=99, retries=0)
def model_of(config: EmptyConfig, work: Workspace, *, shards: Manifest) -> Outcome:
    work.write_bytes("model.safetensors", b"weights")
    return Outcome()


@pytest.mark.slow
@pytest.mark.parametrize("survived", [0, 2, 5, 6])
def test_a_killed_purge_is_ended_by_the_next(
    site: LoopbackSite, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    """Killed before the manifest of one artifact is written; the last one marks the model."""
    made = corpus(site)
    model_of(EmptyConfig(), shards=tokens_of(EmptyConfig(), corpus=made))
    bury(f"{site.url}{VICTIM}")
    bury(f"{site.url}/library/copy.html")
    amend, calls = Store.amend, iter(range(100))

    def dies(self: Store, manifest: Manifest, **changes: Any) -> Manifest:
        if next(calls) == survived:
            raise KeyboardInterrupt
        return amend(self, manifest, **changes)

    monkeypatch.setattr(Store, "amend", dies)
    with pytest.raises(KeyboardInterrupt):
        purge()
    monkeypatch.setattr(Store, "amend", amend)
    purge()
    assert holders("search_heap") == []
    for manifest in artifacts():
        Store.open().verify(manifest)
    assert Store.open().all("token-shards") == []
    [model] = Store.open().all("pretrain")
    assert "from what it was made of" in model.not_replayable
    assert all(erasure.finished for erasure in state().erased())
    # What is made of the purged artifacts is clean, and stays.
    model_of(EmptyConfig(), shards=tokens_of(EmptyConfig(), corpus=made))
    assert purge() == []


def test_other_forms_of_the_text_are_deleted_and_models_marked(site: LoopbackSite) -> None:
    made = corpus(site)
    model = model_of(EmptyConfig(), shards=tokens_of(EmptyConfig(), corpus=made))
    bury(everything(made)[0])
    done = {result.stage: result.action for result in purge()}
    assert (done["token-shards"], done["pretrain"]) == ("deleted", "marked")
    store = Store.open()
    assert store.all("token-shards") == []
    [marked] = store.all("pretrain")
    assert marked.fingerprint == model.fingerprint
    assert "from what it was made of" in marked.not_replayable
    store.verify(marked)


def test_a_document_is_forgotten_by_any_of_its_digests(site: LoopbackSite) -> None:
    made = corpus(site, pii={"action": "mask"})
    document = rows(made, "train-")[0]
    whole = document["id"]
    ids = known_ids(Settings.load(), whole)
    assert whole == ids[0]
    [crawled] = Store.open().all("crawl")
    pages = page_rows(Store.open().of(crawled)).to_pylist()
    other = rows(made, "train-")[1]
    payload = next(page["digest"] for page in pages if page["url"] == other["url"])
    for one in ids:
        bury(one)
    bury(payload)
    found = everything(corpus(site, pii={"action": "mask"}))
    assert document["url"] not in found and other["url"] not in found
    assert found
    purge()
    assert not {document["url"], other["url"]} & {
        row["url"] for manifest in Store.open().all("extract") for row in rows(manifest)
    }


@pytest.mark.parametrize("digest", ["sha256:" + "A" * 52, "sha1:" + "A" * 32])
def test_for_a_payload_digest_no_table_of_documents_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str
) -> None:
    monkeypatch.delattr("tasks.corpus.same_document._documents")
    assert known_ids(Settings(home=tmp_path), digest) == [digest]


def test_it_is_said_which_pages_a_payload_digest_finds(
    site: LoopbackSite, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    forget_commands.add_arguments(parser)
    for what, told in (("sha1:" + "A" * 32, True), ("0123456789abcdef", False)):
        forget_commands.forget(Settings.load(), parser.parse_args([what]))
        assert ("by its address or its id" in capsys.readouterr().out) is told


@pytest.mark.parametrize(
    ("text", "needle", "named"),
    [
        ('{"url": "http://a.example/1"}', "http://a.example/1", True),
        ("see `http://a.example/1`: gone", "http://a.example/1", True),
        ("It is http://a.example/1. Then", "http://a.example/1", True),
        ("http://a.example/1#part", "http://a.example/1", True),
        ("http://a.example/10", "http://a.example/1", False),
        ("http://a.example/1/2", "http://a.example/1", False),
        ("http://a.example/1.html", "http://a.example/1", False),
        ("http://a.example:80/x", "a.example", True),
        ("http://www.a.example/", "a.example", True),
        ("http://not-a.example/", "a.example", False),
        ("http://a.example.org/", "a.example", False),
    ],
)
def test_a_report_names_whole_addresses_and_hosts(text: str, needle: str, named: bool) -> None:
    assert _names(text, [needle]) is named


def test_a_purge_waits_for_nobody(site: LoopbackSite) -> None:
    with (
        lease(Settings.load().database_url, "crawl/abc", patience=1),
        pytest.raises(UserError, match="crawl/abc is being made now"),
    ):
        purge()


def test_no_stage_begins_and_no_other_purge_while_one_runs(site: LoopbackSite) -> None:
    made = corpus(site)
    with ThreadPoolExecutor(1) as thread:
        with lease(Settings.load().database_url, PURGE, patience=1):
            tokens = thread.submit(tokens_of, EmptyConfig(), corpus=made)
            time.sleep(1)
            assert Store.open().all("token-shards") == []
            with pytest.raises(UserError, match="another purge is under way"):
                purge()
        assert tokens.result(10).stage == "token-shards"
    assert purge() == []


def test_half_made_artifacts_whose_text_no_table_tells_go_with_a_purge(site: LoopbackSite) -> None:
    made = corpus(site)
    store, home = Store.open(), Settings.load().home
    mark = "f" * 64
    half_made = {"token-shards": "tokens-00000.npy", "deduplicate": "_names/0", "pretrain": "_best"}
    for name, file in half_made.items():
        store.directory(name, mark).write_bytes(file, b"some of it")
    scratch = home / "work" / f"gather-{mark[:16]}"
    scratch.mkdir(parents=True)
    bury("http://elsewhere.example/")
    assert purge() == []  # none of it is here: what was begun goes on
    assert scratch.exists()
    bury(everything(made)[0])
    removed = {(done.stage, done.fingerprint) for done in purge() if done.action == "removed"}
    assert removed == {("token-shards", mark), ("deduplicate", mark)}
    assert store.unfinished("deduplicate") == store.unfinished("token-shards") == []
    assert store.unfinished("pretrain") == [mark]
    assert not scratch.exists()
