"""A model learned from examples: judged on what it has not seen, applied as an attribute."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from documents_of import documents, rows, urls
from inline_shards import run_inline
from shared_data import shared
from sklearn.metrics import roc_auc_score

from tasks.corpus.measure import MeasureConfig, measure
from tasks.corpus.quality import QualityConfig, quality
from tasks.corpus.quality_model import (
    QualityModelStageConfig,
    ScoreConfig,
    area,
    features,
    judge,
    score,
    train_quality_model,
)
from tasks.runtime.errors import UserError
from tasks.runtime.store import Store


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    run_inline(monkeypatch)
    folder = tmp_path / "home" / "sources"
    folder.mkdir(parents=True)
    return folder


def write(path: Path, examples: list[tuple[str, object]]) -> QualityModelStageConfig:
    lines = [json.dumps({"text": text, "label": label}) for text, label in examples]
    path.write_text("\n".join(lines) + "\n")
    return QualityModelStageConfig(examples=str(path), held_out=0.4)


def two_kinds() -> list[tuple[str, object]]:
    """Passages of a novel, and the same words in any order."""
    rng = random.Random(0)
    words = shared("text/botchan.txt").read_text().split()
    passages = [words[start : start + 150] for start in range(0, 30_000, 150)]
    good = [(" ".join(passage), "good") for passage in passages]
    bad = [(" ".join(rng.sample(passage, len(passage))), "bad") for passage in passages]
    return [*good, *bad]


def test_it_learns_what_only_pairs_of_words_tell(sources: Path) -> None:
    manifest = train_quality_model(write(sources / "e.jsonl", two_kinds()))
    assert manifest.counts["examples"] + manifest.counts["held_out"] == 400
    told = manifest.metrics
    assert 0.45 < told["majority"] < 0.6
    assert told["accuracy_low"] < told["accuracy"] < told["accuracy_high"]
    assert told["auc_low"] <= told["auc"] <= told["auc_high"]
    assert told["auc_low"] > 0.8
    assert train_quality_model.find(
        QualityModelStageConfig(examples=str(sources / "e.jsonl"), held_out=0.4), {}
    )


@pytest.mark.slow
def test_labels_by_chance_are_told_to_be_worth_nothing(sources: Path) -> None:
    rng = random.Random(1)
    examples = [(text, rng.randint(0, 1)) for text, _ in two_kinds()[:200]]
    told = train_quality_model(write(sources / "e.jsonl", examples)).metrics
    assert told["auc_low"] < 0.5 < told["auc_high"]
    assert told["accuracy_low"] < told["majority"]


def test_scores_stand_beside_documents_and_select_them(sources: Path) -> None:
    examples = two_kinds()
    model = train_quality_model(write(sources / "e.jsonl", examples))
    texts = {f"http://h/good/{n}": f"{examples[n][0]}." for n in range(10, 20)}
    texts |= {f"http://h/bad/{n}": f"{examples[n][0]}." for n in range(210, 220)}
    found = documents(texts)
    columns = measure(MeasureConfig(), documents=found)
    scores = score(ScoreConfig(), documents=found, model=model)
    by_url = {row["url"]: row["score"] for row in rows(scores, "attributes-")}
    above = [url for url, value in by_url.items() if value >= 0.5]
    assert sum("good" in url for url in above) >= 8 and sum("bad" in url for url in above) <= 2
    lax = QualityConfig()
    assert len(urls(quality(lax, documents=found, attributes=columns, scores=scores))) == 20
    strict = QualityConfig(min_model_score=0.5)
    kept = quality(strict, documents=found, attributes=columns, scores=scores)
    assert urls(kept) == above
    assert rows(kept, "rejected-")[0]["reason"].startswith("model_score 0.")
    with pytest.raises(UserError, match=r"give labelled examples \(corpus.quality_model.examples"):
        quality(strict, documents=found, attributes=columns)


def test_examples_are_known_by_content_and_mistakes_by_line(sources: Path) -> None:
    config = write(sources / "e.jsonl", two_kinds())
    first = train_quality_model(config)
    (sources / "other").mkdir()
    moved = write(sources / "other" / "e.jsonl", two_kinds())
    assert train_quality_model(moved).fingerprint == first.fingerprint
    assert Store.open().find("quality-model", first.fingerprint)
    (sources / "e.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b"}\n')
    with pytest.raises(UserError, match=r"e.jsonl, line 2, is no object with 'text' and 'label'"):
        train_quality_model(config)
    (sources / "e.jsonl.gz").write_bytes(b"no gzip at all")
    with pytest.raises(UserError, match=r"labelled examples: e.jsonl.gz cannot be read to its end"):
        train_quality_model(QualityModelStageConfig(examples=str(sources / "e.jsonl.gz")))
    with pytest.raises(UserError, match="0 good and 0 other examples are held out, and 20"):
        train_quality_model(write(sources / "e.jsonl", [(f"a{n}", n % 2) for n in range(4)][:1]))


def test_the_area_is_scikit_learns_and_a_vector_has_length_one() -> None:
    rng = np.random.default_rng(0)
    good, scores = rng.random(300) < 0.3, rng.integers(0, 20, 300) / 20
    assert area(good, scores) == pytest.approx(roc_auc_score(good, scores))
    told = judge(good, scores, 0)
    assert told.auc_low < 0.5 < told.auc_high
    places, values = features("one two two three", 1024)
    assert len(places) == 6 and values @ values == pytest.approx(1)
    assert len(features("", 1024)[0]) == 0
