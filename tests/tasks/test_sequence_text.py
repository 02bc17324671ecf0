"""What a batch that ended a training says: its documents by id and address, its questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flows.cli import main
from model.loader import Place
from model.train import DivergedError
from tasks.corpus.documents import document_id
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.store import MANIFEST, Store
from tasks.tokenizer import shards as shards_stage
from tasks.tokenizer.sequence_text import Passage, passages
from tasks.tokenizer.shards import ShardsConfig, write_token_shards
from tasks.training.job import JOB, PairsData
from tasks.training.worker import _explained
from tests.tasks.corpus.inline_shards import InlineSession
from tests.tasks.training.test_data_and_shapes import job
from tests.tiny_models import tokenizer


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path))
    monkeypatch.setattr(shards_stage, "ray_session", InlineSession)
    return Store.open(Settings.load())


def commit(store: Store, stage: str, tables: dict[str, pa.Table], **said: Any) -> Manifest:
    directory = store.directory(stage, f"{stage}-of-a-test")
    entries = [directory.write_table(name, table) for name, table in tables.items()]
    if stage == "tokenizer":
        entries = [directory.write_bytes("tokenizer.model", tokenizer().data)]
    marks = {"stage": stage, "fingerprint": f"{stage}-of-a-test", "content": f"{stage}-of-a-test"}
    manifest = Manifest(version=1, files=tuple(entries), **marks, **said)
    directory.write_bytes(MANIFEST, manifest.model_dump_json().encode())
    return manifest


def documents(name: str, warc: list[str]) -> pa.Table:
    texts = [f"{name}, page {number}: def f(x): return x" for number in range(len(warc))]
    return pa.table(
        {
            "id": [document_id(text) for text in texts],
            "url": [f"https://example.org/{name}/{number}" for number in range(len(warc))],
            "text": texts,
            "warc": warc,
            "weight": [1.0, 3.0, 1.0, 2.0, 0.0][: len(warc)],
        }
    )


@pytest.fixture
def shards(store: Store) -> Manifest:
    """Of a crawl and a source in one table, a crawl alone in the other; some weigh more."""
    crawled, noted = "warc/0.warc.gz", "notes:a.txt"
    tables = {
        "train-00000.parquet": documents("a", [crawled, noted, crawled, noted, crawled]),
        "train-00007.parquet": documents("b", [crawled, crawled, crawled]),
        "heldout-00000.parquet": documents("c", [crawled, noted]),
    }
    corpus = commit(store, "split", tables)
    names = commit(store, "tokenizer", {}, counts={"vocabulary": len(tokenizer())})
    return write_token_shards(ShardsConfig(), corpus=corpus, tokenizer=names)


def test_every_token_leads_back_to_its_document(store: Store, shards: Manifest) -> None:
    split = store.all("split")[0]
    texts = {
        row["id"]: (row["url"], row["text"])
        for table in store.tables(split)
        for row in table.to_pylist()
    }
    seen, met = 0, []
    for name in [n for n in shards.names() if n.endswith(".npy") and ".documents" not in n]:
        everything = list(passages(store, shards, Place(name, 0, 10**9)))
        assert [(p.address, p.text) for p in everything] == [texts[p.document] for p in everything]
        whole = "".join(passage.text for passage in everything)
        middle = list(passages(store, shards, Place(name, 7, 40)))
        assert "".join(passage.text for passage in middle) in whole
        met.append(len(middle))
        seen += len(everything)
    assert seen == (1 + 3 + 1 + 2) + (1 + 3 + 1) + 2  # copies by weight, held-out ones once
    assert max(met) > 1
    sizes = [
        len(tokenizer().encode_document(text))
        for url, text in sorted(texts.values())
        if "/a/" in url
    ]
    assert shards.counts["new_tokens_notes"] == sizes[1] + sizes[3]
    assert shards.counts["tokens_notes"] == 3 * sizes[1] + 2 * sizes[3]


def test_a_corpus_that_is_gone_leaves_the_text(store: Store, shards: Manifest) -> None:
    store.of(store.all("split")[0]).remove()
    (first, *_) = passages(store, shards, Place("tokens-notes-00000.npy", 0, 30))
    assert (first.document, first.address) == ("", "") and first.text.startswith("a, page 1")


def test_questions_are_found_by_row(store: Store) -> None:
    table = pa.table({"question": ["why?", "how?"], "answer": ["so", "thus"]})
    pairs = commit(store, "pairs", {"pairs-train.parquet": table})
    (found,) = passages(store, pairs, Place("pairs-train.parquet", 1, 1))
    assert found == Passage("", "", "how? ▶ thus")


def test_the_command_of_a_stopped_training_shows_its_first_sequence(
    store: Store, shards: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = store.directory("pretrain", "stopped")
    directory.write_bytes(JOB, job(shards).model_dump_json().encode())
    stopped = DivergedError("loss nan", [Place("tokens-notes-00000.npy", 3, 20)])
    message, _, command = _explained(stopped, directory).partition(": gristmill ")
    assert message == "loss nan"
    assert main(command.split()) == 0
    shown = capsys.readouterr().out
    assert "https://example.org/a/1\n" in shown and "page 1: def" in shown
    pairs = shards.model_copy(update={"stage": "pairs", "fingerprint": "p" * 64})
    tuning = job(shards, pairs=PairsData(pairs=pairs, passes=1, replay=0.5))
    directory.write_bytes(JOB, tuning.model_dump_json().encode())
    asked = DivergedError("loss nan", [Place("pairs-train.parquet", 4, 1)])
    assert _explained(asked, directory).endswith(
        "gristmill sequence pairs/pppppppppppp pairs-train.parquet 4 --count 1"
    )


def test_places_that_are_not_there_are_told(
    store: Store, shards: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = f"token-shards/{shards.fingerprint[:12]}"
    for words, message in (
        (
            [mark, "tokens-00009.npy", "0"],
            "has no training data 'tokens-00009.npy'; it has heldout",
        ),
        ([mark, "tokens-00000.npy", "99999"], "none at 99999 (of 1); count from 0"),
        ([mark, "tokens-00000.documents.npy", "0"], "it has heldout-tokens-00000.npy, heldout"),
        ([mark, "report.json", "0"], "has no training data 'report.json'; it has"),
        (["split/split", "tokens-00000.npy", "0"], "is neither token-shards/FINGERPRINT nor"),
        (["token-shards/zz", "x", "0"], "0 artifacts of stage 'token-shards' match 'zz'"),
    ):
        assert main(["sequence", *words]) == 1
        assert message in capsys.readouterr().err
