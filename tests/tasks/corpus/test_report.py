"""The corpus report: its numbers are those of the tables, and the page needs nothing else."""

import html
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents_of import rows
from inline_shards import stages_inline
from loopback_site import LoopbackSite, page
from test_corpus_chain import THINGS, module

from flows.corpus import CorpusParams, build_corpus
from tasks.corpus.arrays import write_array
from tasks.corpus.report import ReportConfig, report_corpus, source_of
from tasks.corpus.report_page import render
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Store

NOUNS = [
    f"{thing}{end}" for thing in ("mill", "house", "garden", "boat") for end in ("", "s", "er")
]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manifest]:
    """The corpus of a small site and a folder."""
    monkeypatch.setenv("GRISTMILL_MLFLOW_URL", "http://127.0.0.1:9")
    with stages_inline(monkeypatch, tmp_path / "home"):
        folder = tmp_path / "home" / "sources"
        folder.mkdir(parents=True)
        for number in range(3):
            chance = random.Random(number)
            lines = [
                f"The {' '.join(chance.sample(NOUNS, 6))} of the town and its {noun} were seen."
                for noun in NOUNS
            ]
            (folder / f"{number}.txt").write_text(f"Notes <b>{number}</b>.\n\n" + "\n".join(lines))
        pages = {f"/library/{t}s.html": module(n, t) for n, t in enumerate(THINGS)}
        licence = '<link rel="license" href="https://creativecommons.org/licenses/by/4.0/">'
        free = next(iter(pages))
        pages[free] = pages[free].replace("<head>", f"<head>{licence}", 1)
        pages["/copy.html"] = pages["/library/trees.html"]
        pages["/short<x>.html"] = page(text="Short.")
        # Two wishes to be left out, each of a crawled page and of a file.
        for wish in ("noai", "noindex"):
            unwilling = page(head=f'<meta name="robots" content="{wish}">')
            pages[f"/{wish}.html"] = unwilling
            (folder / f"{wish}.html").write_text(unwilling)
        with LoopbackSite({"/": page(*pages, "/missing")} | pages) as site:
            yield build_corpus(
                CorpusParams.model_validate(
                    {
                        "seeds": [f"{site.url}/"],
                        "crawl": {"delay": 0.0, "contact": "me@example.org"},
                        "sources": [{"name": "notes", "path": str(folder), "licence": "CC0-1.0"}],
                        "quality": {"max_top_grams": 9, "max_duplicate_grams": 9},
                        "split": {"seed": 0, "common_groups": 5},
                    }
                )
            )


def page_of(manifest: Manifest) -> str:
    return Store.open().of(manifest).read_bytes("report.html").decode()


class TokensConfig(StageConfig):
    pass


@stage("token-shards", version=98, retries=0)
def shards_of(config: TokensConfig, work: Workspace, *, corpus: Manifest) -> Outcome:
    """Three tokens a document, as the stage lays them out."""
    for split, output in (("train-", "tokens"), ("heldout-", "heldout-tokens")):
        for number, name in enumerate(corpus.names(split, ".parquet")):
            origins = work.store.of(corpus).read_table(name, ["warc"])["warc"].to_pylist()
            sources = [source_of(origin) for origin in origins]
            for source in set(sources):
                count = sources.count(source)
                target = f"{output}-{'' if source == 'seeds' else source + '-'}{number:05d}"
                write_array(work, f"{target}.npy", np.zeros(3 * count, np.uint16))
                write_array(work, f"{target}.documents.npy", np.arange(0, 3 * count, 3))
    return Outcome()


def test_the_report_counts_what_the_tables_hold(made: Manifest) -> None:
    tokens = shards_of(TokensConfig(), corpus=made)
    report = report_corpus(ReportConfig(), corpus=made, tokens=tokens)
    documents = [row for part in ("train-", "heldout-") for row in rows(made, part)]
    assert report.counts == {
        "documents": len(documents),
        "bytes": sum(row["bytes"] for row in documents),
        "words": sum(len(row["text"].split()) for row in documents),
        "tokens": 3 * len(documents),
    }
    text = html.unescape(re.sub(r"<[^>]+>", " ", page_of(report)))
    notes = [row for row in documents if source_of(row["warc"]) == "notes"]
    size = f"{sum(row['bytes'] for row in notes):,}"
    assert len(notes) == 3
    assert re.search(rf"notes\s+3\s+{size}\s+[\d,]+\s+9\s+CC0-1.0", text)
    stated = [row["licence"] for row in documents]
    assert stated.count("https://creativecommons.org/licenses/by/4.0/") == 1
    assert "https://creativecommons.org/licenses/by/4.0/: 1 documents" in text
    assert f"(not stated): {stated.count('')} documents" in text
    assert re.search(r"Left out by an opt-out\s+2\s", text)
    assert re.search(r"Left out by noindex\s+2\s", text)
    for told in ("exact-duplicate", "HTTP 404", "me@example.org", "licence: CC0-1.0"):
        assert told in text
    for name in ("crawl", "extract", "gather", "language", "quality", "deduplicate", "split"):
        assert name in text


def test_the_page_stands_alone_and_says_nothing_unescaped(made: Manifest) -> None:
    body = page_of(report_corpus(ReportConfig(), corpus=made))
    assert not re.search(r"<(?:script|link|img|iframe)|(?:src|href)=|@import|url\(", body)
    assert "default-src 'none'" in body
    assert "short<x>" not in body and "<b>0</b>" not in body
    assert "prefers-color-scheme: dark" in body
    assert body.count("<svg") == 4
    opened = re.findall(r"<(details|table|tr|div|svg|td|pre|code)\b", body)
    closed = re.findall(r"</(details|table|tr|div|svg|td|pre|code)>", body)
    assert sorted(opened) == sorted(closed)


def test_without_documents_or_hosts_there_is_still_a_page() -> None:
    nothing = {"documents": 0, "bytes": 0, "words": 0, "tokens": 0}
    lists = ("split", "funnel", "lengths", "language", "host", "source", "clusters", "crawl")
    empty: dict[str, Any] = {name: [] for name in lists}
    body = {"corpus": "0" * 64, "created": "", "total": nothing, "datasheet": [], "chain": []}
    assert "Corpus report" in render(empty | body)
