"""Stages that a person asks for stand in the chain, in order; without them it is as before."""

import json
import random
from pathlib import Path

import pytest

from flows.corpus import CorpusParams, build_corpus
from tasks.corpus.report import ReportConfig, report_corpus
from tasks.runtime.manifest import Manifest
from tasks.runtime.planning import planning
from tasks.runtime.store import Store


class InlineSession:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def map(self, function, items, **_):
        for index, item in enumerate(items):
            yield index, function(*item)


WORDS = ("the", "a", "of", "and", "to", "in", "is", "that", "it", "with", "for", "as", "was")
ITEM = "How many of the small clocks in the town of the lake are slow by an hour in a year of rain?"
NOTICE = "This page was made by the society of the lake and is not to be copied."


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path))
    monkeypatch.setattr("tasks.corpus.sharding.ray_session", InlineSession)
    (tmp_path / "sources").mkdir()
    return tmp_path / "sources"


def prose(seed: int) -> str:
    rng = random.Random(seed)
    lines = []
    for _ in range(8):
        words = [rng.choice(WORDS) if n % 2 else f"thing{rng.randrange(99)}" for n in range(14)]
        lines.append(f"{' '.join(words).capitalize()} of number {seed}.")
    return "\n\n".join(lines)


def source(home: Path, name: str, texts: list[str]) -> dict:
    path = home / f"{name}.jsonl"
    rows = [{"url": f"http://h/{name}/{n}", "text": text} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": name, "path": str(path), "format": "jsonl"}


def chain(manifest: Manifest) -> list[str]:
    """Stages from the split back to the source."""
    store = Store.open()
    known = {m.fingerprint: m for stage in store.stages() for m in store.all(stage)}
    names = []
    while "documents" in manifest.inputs:
        names.append(manifest.stage)
        manifest = known[manifest.inputs["documents"]]
    return names


def texts_of(manifest: Manifest) -> list[str]:
    tables = [t for prefix in ("train-", "heldout-") for t in Store.open().tables(manifest, prefix)]
    return [text for table in tables for text in table["text"].to_pylist()]


def test_every_option_is_a_stage_of_the_chain_and_none_by_default(home: Path) -> None:
    first = [f"{NOTICE}\n\n{prose(n)}" for n in range(8)]
    params = {"seeds": [], "sources": [source(home, "first", first)]}
    plain = build_corpus(CorpusParams.model_validate(params))
    after = chain(plain)
    assert after[:2] == ["split", "deduplicate"]
    edited = build_corpus(CorpusParams.model_validate(params | {"lines": {"rules": ["words"]}}))
    assert chain(edited) == [*after, "lines"]

    second = [first[0], *(f"{NOTICE}\n\n{prose(n)}" for n in range(20, 26))]
    second[2] += f"\n\n{ITEM}"
    (home / "suite.txt").write_text(ITEM)
    suite = {"name": "clocks", "path": str(home / "suite.txt"), "format": "text"}
    asked = CorpusParams.model_validate(
        {
            "seeds": [],
            "sources": [source(home, "second", second)],
            "deduplicate": {"against": ["previous"]},
            "boilerplate": {"scope": "host", "documents": 3},
            "decontaminate": {"suites": [suite]},
        }
    )
    built = build_corpus(asked)
    assert chain(built) == ["split", "decontaminate", "boilerplate", *after[1:]]
    texts = texts_of(built)
    assert len(texts) == 5 and sum(NOTICE in text for text in texts) == 1
    assert not any(ITEM in text for text in texts)
    # What a corpus was compared with is no part of it: the report tells of one chain.
    stages = [made.stage for made in Store.open().lineage(built)]
    assert sorted(stages) == sorted(set(stages))
    report = report_corpus(ReportConfig(), corpus=built)
    page = Store.open().of(report).read_bytes("report.html").decode()
    assert "earlier-exact-duplicate" in page and "contaminated" in page
    with planning() as planned:
        build_corpus(asked)
    assert {plan.status for plan in planned} == {"cached"}


def test_a_quality_model_scores_and_another_bound_runs_only_the_selection(home: Path) -> None:
    rng = random.Random(0)
    good = [prose(n) for n in range(200, 320)]
    bad = [" ".join(rng.sample(text.split(), len(text.split()))) for text in good]
    rows = [{"text": text, "label": 1} for text in good] + [{"text": t, "label": 0} for t in bad]
    (home / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = {
        "seeds": [],
        "sources": [source(home, "mixed", [prose(n) for n in range(8)])],
        "quality_model": {"examples": str(home / "examples.jsonl"), "held_out": 0.3},
    }
    built = build_corpus(CorpusParams.model_validate(params))
    store = Store.open()
    model, chosen = store.latest("quality-model"), store.latest("quality")
    assert model and chosen and model.metrics["auc_low"] > 0.5
    assert "scores" in chosen.inputs
    assert "quality-model" in [made.stage for made in store.lineage(built)]
    strict = params | {"quality": {"min_model_score": 0.001}}
    with planning() as planned:
        build_corpus(CorpusParams.model_validate(strict))
    again = [step.stage for step in planned if step.status != "cached"]
    assert again == ["quality", "deduplicate", "split"]
    with planning() as planned:
        build_corpus(CorpusParams.model_validate(params | {"quality": {"min_words": 60}}))
    again = [step.stage for step in planned if step.status != "cached"]
    assert again == ["quality", "deduplicate", "split"]


# All that is known of one document; no threshold is among them.
KNOWN_OF_EACH = ["gather", "lines", "pii", "measure", "signatures"]


def of_all_documents(home: Path) -> dict:
    """Parameters of a corpus with every kind of document that a threshold may take out."""
    texts = [prose(n) for n in range(12)]
    texts += [f"{prose(20)}\n\nAsk jane{n}@company.io about it." for n in range(3)]
    texts += [f"Of the few words that there are in number {n} this is one.\n\n" * 2 for n in (1, 2)]
    texts += [texts[3], texts[4] + "\n\nAnd a line of its own in the second copy of the text."]
    mixed = "Das ist the house of the man und die Frau with the Kind in the garden der Stadt. "
    texts += [f"{mixed}{mixed}It is number 3."]
    lines = {"rules": ["javascript"]}
    return {
        "seeds": [],
        "sources": [source(home, "all", texts)],
        "lines": lines,
        "pii": {"action": "drop", "most": 1},
        "quality": {"min_words": 20, "max_duplicate_lines": 1, "max_duplicate_grams": 9}
        | {"max_duplicate_line_characters": 1, "max_duplicate_paragraphs": 1, "max_top_grams": 9},
    }


@pytest.mark.parametrize(
    "changed",
    [{"quality": {"min_words": 60}}, {"pii": {"most": 0}}, {"language": {"threshold": 0.97}}],
    ids=lambda changed: next(iter(changed)),
)
def test_another_threshold_runs_nothing_but_the_selection(
    home: Path, monkeypatch: pytest.MonkeyPatch, changed: dict
) -> None:
    params = of_all_documents(home)
    before = texts_of(build_corpus(CorpusParams.model_validate(params)))
    asked = params | {name: params.get(name, {}) | bound for name, bound in changed.items()}
    with planning() as planned:
        build_corpus(CorpusParams.model_validate(asked))
    assert [step.stage for step in planned if step.status == "cached"][:5] == KNOWN_OF_EACH
    ran = [step.stage for step in planned if step.stage not in KNOWN_OF_EACH]
    assert ran == ["language", "quality", "pii-drop", "deduplicate", "split"]
    again = build_corpus(CorpusParams.model_validate(asked))
    monkeypatch.setenv("GRISTMILL_HOME", str(home.parent / "other"))
    monkeypatch.setenv("GRISTMILL_SOURCE_ROOTS", str(home))
    fresh = build_corpus(CorpusParams.model_validate(asked))
    assert fresh.fingerprint == again.fingerprint
    tables = [entry for entry in fresh.files if entry.name.endswith(".parquet")]
    assert tables == [entry for entry in again.files if entry.name.endswith(".parquet")]
    assert texts_of(fresh) != before
