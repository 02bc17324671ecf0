"""Near duplicates: found where planted, verified, and never removed for a friend of a friend."""

import random
import re

import numpy as np
import pytest
from documents_of import documents, rows, urls
from hypothesis import given
from hypothesis import strategies as st
from inline_shards import run_inline
from pydantic import ValidationError
from shared_data import shared

from tasks.corpus.clusters import connected, keep_best
from tasks.corpus.dedup import DeduplicateConfig, deduplicate
from tasks.corpus.minhash import Bands, candidate_pairs, minima
from tasks.corpus.shingles import Words, jaccard, normalise


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    run_inline(monkeypatch)


def similarity(a: str, b: str) -> float:
    return jaccard(*(Words.of(normalise(text)).shingles(5) for text in (a, b)))


def edited(words: list[str], changes: int, rng: random.Random) -> str:
    """`changes` words replaced by new ones, spread over the text."""
    words = list(words)
    for position in rng.sample(range(len(words)), changes):
        words[position] = f"new{rng.randrange(10**9)}"
    return " ".join(words)


def test_planted_edits_are_found_above_and_left_below_the_threshold() -> None:
    words = re.findall(r"\S+", shared("text/botchan.txt").read_text())
    rng = random.Random(0)
    texts, truth = {}, {}
    for number in range(60):
        original = words[number * 400 : number * 400 + 400]
        # A changed word changes five shingles: 2 to 30 changes spread J from .95 to .45.
        copy = edited(original, 2 + number // 2, rng)
        texts[f"http://a/{number}"] = " ".join(original) + " and nothing more"
        texts[f"http://b/{number}/copy"] = copy
        truth[number] = similarity(texts[f"http://a/{number}"], copy)
    threshold = 0.7
    config = DeduplicateConfig(threshold=threshold, cluster_threshold=0.5)
    manifest = deduplicate(config, documents=documents(texts))
    gone = {row["url"]: row for row in rows(manifest, "rejected-")}
    removed = {
        number
        for number in truth
        if {f"http://a/{number}", f"http://b/{number}/copy"} & gone.keys()
    }
    wanted = {number for number, score in truth.items() if score >= threshold}
    assert 10 < len(wanted) < 50
    assert removed <= wanted
    assert len(removed) >= 0.95 * len(wanted)
    clusters = {row["url"]: row["cluster"] for row in rows(manifest)}
    near = [n for n, score in truth.items() if 0.55 <= score < threshold]
    assert near
    together = [n for n in near if clusters[f"http://a/{n}"] == clusters[f"http://b/{n}/copy"]]
    assert len(together) >= 0.9 * len(near)
    assert all(
        re.fullmatch(r"Jaccard similarity 0\.\d\d with http\S+", r["reason"]) for r in gone.values()
    )


def test_exact_copies_leave_the_address_that_is_no_copy() -> None:
    text = "The same text on several pages, with enough words to be a document. " * 5
    other = "Another text altogether that has nothing to do with the first one at all. " * 5
    manifest = deduplicate(
        DeduplicateConfig(),
        documents=documents(
            {
                "http://h/latest/a.html": text,
                "http://h/a.html?print=1": text.upper(),
                "http://h/library/a.html": "  " + text.replace(". ", ".\n\n"),
                "http://h/b.html": other,
            }
        ),
    )
    assert urls(manifest) == ["http://h/library/a.html", "http://h/b.html"]
    assert manifest.rules == {"exact-duplicate": 2}
    reasons = {row["reason"] for row in rows(manifest, "rejected-")}
    assert reasons == {"same text as http://h/library/a.html"}


def test_the_longest_of_near_duplicates_stays() -> None:
    base = [f"word{n}" for n in range(300)]
    texts = {"http://h/short": " ".join(base[:250]), "http://h/long/address": " ".join(base)}
    manifest = deduplicate(DeduplicateConfig(), documents=documents(texts))
    assert urls(manifest) == ["http://h/long/address"]
    assert manifest.rules == {"near-duplicate": 1}


def test_a_chain_is_not_removed_link_by_link() -> None:
    pairs = np.array([[0, 1], [1, 2], [2, 3]])
    removed = keep_best(4, np.arange(4), pairs, np.full(3, 0.9))
    assert removed == {1: (0, 0.9), 3: (2, 0.9)}
    assert connected(4, map(tuple, pairs.tolist())) == [0, 0, 0, 0]


@given(st.integers(2, 12), st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=40))
def test_whoever_goes_resembles_someone_who_stays(count: int, drawn: set) -> None:
    found = sorted({(a, b) for a, b in drawn if a < b < count})
    pairs = np.array(found, np.int64).reshape(-1, 2)
    rank = np.array(random.Random(count).sample(range(count), count))
    removed = keep_best(count, rank, pairs, np.ones(len(pairs)))
    for row, (kept, _) in removed.items():
        assert kept not in removed
        assert (min(row, kept), max(row, kept)) in found
        assert rank[kept] < rank[row]
    for a, b in found:
        assert a in removed or b in removed


@pytest.mark.parametrize("wanted", [0.3, 0.5, 0.7, 0.9])
def test_signatures_estimate_the_similarity(wanted: float) -> None:
    rng = np.random.default_rng(0)
    shared_count = round(2000 * 2 * wanted / (1 + wanted))
    common, first, second = (
        rng.integers(0, 2**64, size, np.uint64)
        for size in (shared_count, 2000 - shared_count, 2000 - shared_count)
    )
    a, b = np.unique(np.r_[common, first]), np.unique(np.r_[common, second])
    estimate = float(np.mean(minima(a, 2048) == minima(b, 2048)))
    assert abs(estimate - jaccard(a, b)) < 0.05


def test_wide_buckets_cost_no_square_of_pairs() -> None:
    pairs = candidate_pairs(np.zeros(1000, np.uint64), np.arange(1000), widest=8)
    assert len(pairs) < 8 * 1000
    assert set(pairs[:, 0].tolist()) == set(range(8))
    assert set(pairs.ravel().tolist()) == set(range(1000))


def test_bands_that_would_miss_duplicates_are_refused() -> None:
    assert Bands(14, 8).probability(0.55) < 0.2 < 0.95 < Bands(32, 4).probability(0.56)
    with pytest.raises(ValidationError, match="2 bands of 16 rows find only"):
        DeduplicateConfig(bands=2, rows=16)
    with pytest.raises(ValidationError, match=r"cluster_threshold 0.9 > threshold 0.8"):
        DeduplicateConfig(cluster_threshold=0.9)
