"""Evaluation items planted in real pages are found and told; what only resembles them is not."""

import gzip
import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documents_of import documents, rows, urls
from inline_shards import run_inline
from pydantic import ValidationError
from shared_data import shared

from tasks.corpus.decontaminate import DecontaminateConfig, decontaminate
from tasks.corpus.suites import SuiteConfig
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import Store


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GRISTMILL_SOURCE_ROOTS", f"{tmp_path}:{shared('math').parent}")
    run_inline(monkeypatch)


def articles() -> dict[str, str]:
    truth = json.loads(shared("extraction/ground-truth.json").read_text())
    return {f"http://page/{name[:8]}": item["articleBody"] for name, item in truth.items()}


def gsm8k(**options) -> DecontaminateConfig:
    suite = SuiteConfig(
        name="gsm8k", path=str(shared("math/gsm8k-test.jsonl")), fields=("question", "answer")
    )
    return DecontaminateConfig(suites=(suite,), **options)


def suite(tmp_path: Path, *texts: str, **options) -> DecontaminateConfig:
    path = tmp_path / "suite.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DecontaminateConfig(suites=(SuiteConfig(name="s", path=str(path)),), **options)


def hits(manifest: Manifest) -> list[dict]:
    return rows(manifest, "contamination-")


def test_items_planted_in_real_pages_are_found_and_told_and_real_pages_stay() -> None:
    rng = random.Random(0)
    pages = articles()
    lines = shared("math/gsm8k-test.jsonl").read_text().splitlines()
    chosen = rng.sample(range(len(lines)), 20)
    truth = {}
    for url, number in zip(sorted(pages), chosen, strict=False):
        question = json.loads(lines[number])["question"]
        if len(question.split()) < 16:
            continue
        # As on a page that quotes it: other case, line breaks, quotation marks.
        quoted = "“" + question.upper().replace(". ", ".\n") + "”"
        paragraphs = pages[url].split("\n")
        paragraphs.insert(rng.randint(0, len(paragraphs)), quoted)
        pages[url] = "\n".join(paragraphs)
        truth[url] = f"{number + 1}.question"
    manifest = decontaminate(gsm8k(), documents=documents(pages))
    assert {row["url"]: row["item"] for row in hits(manifest)} == truth
    assert len(truth) > 15 and manifest.rules == {"contaminated": len(truth)}
    assert sorted(urls(manifest)) == sorted(pages.keys() - truth.keys())
    for row in hits(manifest):
        span = pages[row["url"]][row["start"] : row["end"]]
        assert span.startswith(row["span"][:200])
        assert span.upper() == span and row["share"] == 1
    for row in rows(manifest, "rejected-"):
        assert row["reason"].startswith(f"100% of gsm8k {truth[row['url']]}: “")


def test_no_real_page_holds_an_item_of_a_suite_by_chance() -> None:
    """Ten suites of some 17,000 texts against 91 articles: the phantoms others measured."""
    suites = [
        SuiteConfig(name=path.stem, path=str(path), fields=("query", "context", "continuation"))
        for path in sorted(shared("multiple_choice").glob("*.jsonl"))
        if path.stem not in ("copa", "winograd_wsc", "winogrande")  # of shorter items only
    ]
    config = DecontaminateConfig(suites=(*suites, *gsm8k().suites))
    manifest = decontaminate(config, documents=documents(articles()))
    assert hits(manifest) == []
    assert manifest.metrics["items"] > 10_000
    assert manifest.metrics["items_too_short"] > 500


ITEM = (
    "A clockmaker in Basel repairs nine pendulum clocks every week and sells four of them at the "
    "Saturday market beside the old bridge, keeping the rest for his daughter's museum. How many "
    "clocks does the museum receive in a year of fifty-two weeks?"
)
REST = " Some words of a page that has nothing to do with any of it at all, again and again." * 4


@pytest.mark.parametrize(
    ("near", "why"),
    [
        (re.sub("nine|Saturday|rest|receive", "other", ITEM), "edited"),
        ("He says: A clockmaker in Basel repairs nine pendulum clocks every week and sells", "one"),
        ("How many clocks does the museum receive in a year of fifty-two weeks?", "the end of it"),
        (" ".join(reversed(ITEM.split())), "its words in another order"),
    ],
)
def test_near_misses_stay(tmp_path: Path, near: str, why: str) -> None:
    config = suite(tmp_path, ITEM)
    manifest = decontaminate(config, documents=documents({"http://h/near": near + REST}))
    assert urls(manifest) == ["http://h/near"], why
    found = decontaminate(config, documents=documents({"http://h/it": ITEM + REST, "b": REST}))
    assert urls(found) == ["b"]


def test_half_of_an_item_or_a_long_span_is_enough(tmp_path: Path) -> None:
    words = [f"w{n}" for n in range(300)]
    config = suite(tmp_path, " ".join(words), share=0.5, span_words=60)
    texts = {
        "half": " ".join([*words[:70], "x", *words[100:140], "x", *words[200:240]]),
        "spans": " ".join([*words[:59], "x", *words[100:159], "y"]),
        "long": " ".join(["y", *words[40:100], "x"]),
    }
    manifest = decontaminate(config, documents=documents(texts))
    assert urls(manifest) == ["spans"]
    half = next(row for row in hits(manifest) if row["url"] == "half")
    assert (half["words"], half["spans"], half["share"]) == (150, 3, 0.5)


def test_short_items_are_counted_and_not_looked_for(tmp_path: Path) -> None:
    config = suite(tmp_path, "What is the capital of France?", ITEM)
    page = {"http://h/a": "What is the capital of France? Paris." + REST}
    manifest = decontaminate(config, documents=documents(page))
    assert urls(manifest) == ["http://h/a"]
    assert manifest.metrics["items_too_short"] == 1


def test_what_many_documents_say_is_no_proof(tmp_path: Path) -> None:
    licence = (
        "Permission is hereby granted free of charge to any person obtaining a copy of this "
        "software and associated documentation files to deal in the software without restriction"
    )
    pages = {f"http://h/{n}": f"Project {n}. {licence}. {n} is the end." for n in range(12)}
    config = suite(tmp_path, licence, common_documents=10)
    manifest = decontaminate(config, documents=documents(pages))
    assert len(urls(manifest)) == 12 and manifest.metrics["common_ngrams"] > 5
    assert manifest.metrics["items_too_common"] == 1  # told, as nothing is known of it then
    few = dict(list(pages.items())[:10]) | {"http://h/other": REST}
    assert urls(decontaminate(config, documents=documents(few))) == ["http://h/other"]


def test_cut_takes_the_lines_and_leaves_the_page(tmp_path: Path) -> None:
    page = f"# Clocks\n\nBefore it.\n\n> {ITEM}\n\n```\n{ITEM}\n```\n\nAfter it."
    pages = {"http://h/page": page, "http://h/only": f"# Only\n\n{ITEM}"}
    manifest = decontaminate(suite(tmp_path, ITEM, action="cut"), documents=documents(pages))
    (kept,) = rows(manifest)
    assert kept["text"] == "# Clocks\n\nBefore it.\n\nAfter it."
    assert kept["bytes"] == len(kept["text"])
    cuts = [(cut["id"], cut["line"], cut["text"]) for cut in rows(manifest, "cut-")]
    assert cuts == [(kept["id"], 5, f"> {ITEM}"), (kept["id"], 8, ITEM)]
    assert manifest.rules == {"contaminated": 1}
    assert {row["url"] for row in rows(manifest, "rejected-")} == {"http://h/only"}


@pytest.mark.parametrize("format", ["jsonl.gz", "parquet", "text"])
def test_suites_of_every_format(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"suite.{format}"
    items = [{"question": "short", "choices": ["no", ITEM]}]
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(items), path)
    elif format == "text":
        path.write_text(f"first\n\n{ITEM}\n")
    else:
        path.write_bytes(gzip.compress(json.dumps(items[0]).encode()))
    kind = "jsonl" if format == "jsonl.gz" else format
    one = SuiteConfig(name="s", path=str(path), format=kind, fields=("question", "choices"))
    config = DecontaminateConfig(suites=(one,))
    manifest = decontaminate(config, documents=documents({"it": ITEM, "not": REST}))
    assert urls(manifest) == ["not"]
    named = "2" if format == "text" else "1.choices[1]"
    assert [row["item"] for row in hits(manifest)] == [named]


def test_a_suite_is_known_by_its_content(tmp_path: Path) -> None:
    given = documents({"a": REST})
    first = decontaminate(suite(tmp_path, ITEM), documents=given)
    (tmp_path / "suite.jsonl").rename(tmp_path / "suite.moved.jsonl")
    again = decontaminate(suite(tmp_path, ITEM), documents=given)
    assert again.fingerprint == first.fingerprint
    changed = decontaminate(suite(tmp_path, ITEM + " x"), documents=given)
    assert changed.fingerprint != first.fingerprint
    assert Store.open().all("decontaminate")[0].config["suites"][0]["name"] == "s"


def test_a_date_that_nobody_can_read_costs_a_suite_no_item(tmp_path: Path) -> None:
    moment = pa.array([0], pa.int64()).cast(pa.timestamp("us", tz="Foo/Bar"))
    pq.write_table(pa.table({"text": [ITEM], "asked": moment}), tmp_path / "s.parquet")
    one = SuiteConfig(name="s", path=str(tmp_path / "s.parquet"), format="parquet")
    given = documents({"a": ITEM, "b": REST})
    assert urls(decontaminate(DecontaminateConfig(suites=(one,)), documents=given)) == ["b"]


def test_mistakes_are_told_with_a_remedy(tmp_path: Path) -> None:
    given = documents({"a": REST})
    with pytest.raises(UserError, match=r"no text in fields text of 1 items; its fields are: q"):
        (tmp_path / "q.jsonl").write_text('{"q": 1}\n')
        one = SuiteConfig(name="s", path=str(tmp_path / "q.jsonl"))
        decontaminate(DecontaminateConfig(suites=(one,)), documents=given)
    with pytest.raises(UserError, match=r"line 1 of q.jsonl is no JSON"):
        (tmp_path / "q.jsonl").write_text("{")
        decontaminate(DecontaminateConfig(suites=(one,)), documents=given)
    with pytest.raises(UserError, match="no whole Parquet file"):
        broken = one.model_copy(update={"format": "parquet"})
        decontaminate(DecontaminateConfig(suites=(broken,)), documents=given)
    for name, data in (("q.jsonl.gz", gzip.compress(b"{}")[:-9]), ("q.jsonl.zst", b"no zstd")):
        (tmp_path / name).write_bytes(data)
        clipped = one.model_copy(update={"path": str(tmp_path / name)})
        with pytest.raises(UserError, match=rf"suite 's': {name} cannot be read to its end \("):
            decontaminate(DecontaminateConfig(suites=(clipped,)), documents=given)
    with pytest.raises(UserError, match="outside the directories"):
        away = SuiteConfig(name="s", path="/etc/hosts", format="text")
        decontaminate(DecontaminateConfig(suites=(away,)), documents=given)
    with pytest.raises(ValidationError, match="each needs its own name"):
        DecontaminateConfig(suites=(one, one))
