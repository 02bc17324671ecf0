"""A corpus compared with earlier ones: what those had is not taken again, and stays explained."""

import random

import pytest
from documents_of import documents, rows, unique, urls
from inline_shards import run_inline

from tasks.corpus.dedup import DeduplicateConfig
from tasks.corpus.documents import document_shards
from tasks.corpus.earlier import earlier_corpora
from tasks.corpus.pii import PIIConfig, pii
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.planning import planning
from tasks.runtime.stage import Outcome, Workspace, stage


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    run_inline(monkeypatch)


def text(seed: int, words: int = 200) -> str:
    rng = random.Random(seed)
    return " ".join(f"{rng.choice('abcdefgh')}{rng.randrange(500)}" for _ in range(words))


def corpus(texts: dict[str, str], *against: str) -> Manifest:
    config = DeduplicateConfig(against=against)
    given = documents(texts)
    return unique(config, given, **earlier_corpora(config, given))


FIRST = {f"http://h/{n}": text(n) for n in range(6)}
SECOND = {
    "http://h/0": text(0).upper(),  # the same words
    "http://h/1": text(1) + " and some words more at the end of a longer page",
    "http://h/7": text(7),
    "http://h/7/copy/": text(7),
    "http://h/8": text(8),
}


def test_what_an_earlier_corpus_had_is_removed_and_explained() -> None:
    first = corpus(FIRST)
    second = corpus(SECOND, first.fingerprint[:12])
    assert urls(second) == ["http://h/7", "http://h/8"]
    assert second.rules == {
        "earlier-exact-duplicate": 1,
        "earlier-near-duplicate": 1,
        "exact-duplicate": 1,
    }
    reasons = {row["url"]: row["reason"] for row in rows(second, "rejected-")}
    known = f"of corpus {first.fingerprint[:12]}"
    assert reasons["http://h/0"] == f"same text as http://h/0 {known}"
    # The longer page would be the better copy, had the other not been trained on already.
    assert reasons["http://h/1"].endswith(f"with http://h/1 {known}")


@stage("tested-older", version=1, retries=0)
def older(config: DeduplicateConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    """The same documents as they were before they knew their canonical address."""
    for name in document_shards(documents):
        table = work.store.of(documents).read_table(name)
        work.write_table(name, table.drop_columns(["canonical"]))
    return Outcome()


def test_a_corpus_of_before_canonical_addresses_serves() -> None:
    before = older(DeduplicateConfig(), documents=documents(FIRST))
    first = unique(DeduplicateConfig(), before)
    assert "canonical" not in rows(first)[0]
    assert urls(corpus(SECOND, first.fingerprint)) == ["http://h/7", "http://h/8"]


def test_previous_means_all_that_came_before_and_the_same_when_repeated() -> None:
    first = corpus(FIRST, "previous")
    assert first.rules == {}
    second = corpus(SECOND, "previous")
    third = corpus({**FIRST, **SECOND, "http://h/9": text(9)}, "previous")
    assert urls(third) == ["http://h/9"]
    assert corpus(SECOND, "previous").fingerprint == second.fingerprint
    assert corpus(FIRST, "previous").fingerprint == first.fingerprint == corpus(FIRST).fingerprint
    with planning() as planned:
        corpus(SECOND, "previous")
    assert {plan.status for plan in planned} == {"cached"}


def test_another_filter_over_the_same_pages_is_no_later_corpus() -> None:
    corpus(FIRST)
    given = documents(SECOND)
    masked = pii(PIIConfig(action="mask").masking(), documents=given)
    config = DeduplicateConfig(against=("previous",))
    corpus(SECOND, "previous")
    again = unique(config, masked, **earlier_corpora(config, masked))
    assert urls(again) == ["http://h/7", "http://h/8"]


def test_a_corpus_is_not_compared_with_itself() -> None:
    first = corpus(FIRST)
    with pytest.raises(UserError, match="made of the same documents: none would be left"):
        corpus(FIRST, first.fingerprint)
    with pytest.raises(UserError, match="0 artifacts of stage 'deduplicate' match 'abc'"):
        corpus(FIRST, "abc")


def test_nothing_new_is_said_with_what_to_do() -> None:
    corpus(FIRST)
    known = {url + "?again": words for url, words in FIRST.items()}
    with pytest.raises(UserError, match="name fewer corpora in deduplicate"):
        corpus(known, "previous")
