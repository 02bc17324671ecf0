"""Near duplicates: found where planted, verified, and never removed for a friend of a friend."""

import random
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from documents_of import TextsConfig, documents, rows, texts_of, unique, urls
from hypothesis import given
from hypothesis import strategies as st
from inline_shards import run_inline
from pydantic import ValidationError
from shared_data import shared

from tasks.corpus.clusters import connected, keep_best
from tasks.corpus.dedup import DeduplicateConfig, deduplicate, select_shard
from tasks.corpus.documents import document_id, document_shards
from tasks.corpus.matching import (
    RESEMBLING,
    Sets,
    jaccard_above,
    similarities,
    spanning,
    verify_shard,
)
from tasks.corpus.minhash import Bands, candidate_pairs, minima
from tasks.corpus.shingles import normalise
from tasks.corpus.signatures import order_of, pick_shard, signatures
from tasks.corpus.word_hashes import words_of
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Store


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    run_inline(monkeypatch)


def similarity(a: str, b: str) -> float:
    runs, bounds = words_of([a, b])[0].runs(5)
    runs = (runs >> np.uint64(32)).astype(np.uint32)
    return jaccard_above(np.unique(runs[: bounds[1]]), np.unique(runs[bounds[1] :]), 0)


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
    manifest = unique(config, documents(texts))
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


def test_a_run_that_failed_goes_on_with_the_shards_that_are_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(5)
    base = [f"w{n}" for n in range(200)]
    texts = {f"http://h/{n}": edited(base, n % 5, rng) for n in range(20)}
    given = documents(texts)
    whole = unique(DeduplicateConfig(shingle_words=4), given)
    ran: Counter[str] = Counter()

    def counted(function, fails_at: int = -1):
        def shard(work, number, *item):
            if number == fails_at and not ran["failures"]:
                ran["failures"] += 1
                raise RuntimeError("killed")
            ran[function.__name__] += 1
            return function(work, number, *item)

        return shard

    for function, fails_at in ((pick_shard, -1), (verify_shard, 3), (select_shard, -1)):
        monkeypatch.setattr(f"tasks.corpus.dedup.{function.__name__}", counted(function, fails_at))
    monkeypatch.setattr("tasks.corpus.dedup.SHARDS_PER_PARTITION", 2)
    with pytest.raises(RuntimeError, match="killed"):
        unique(DeduplicateConfig(), given)
    again = unique(DeduplicateConfig(), given)
    assert ran == {"pick_shard": 5, "verify_shard": 5, "select_shard": 5, "failures": 1}
    assert len(rows(again, "rejected-")) == len(rows(whole, "rejected-")) > 5
    assert not [name for name in Store.open().of(again).names() if name.startswith("_")]


class KeptConfig(StageConfig):
    kept: tuple[tuple[bool, ...], ...]  # of each shard


@stage("tested-selection", version=1, retries=0)
def selection(config: KeptConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    for name, kept in zip(document_shards(documents), config.kept, strict=True):
        table = work.store.of(documents).read_table(name)
        work.write_table(name, table.filter(pa.array(kept)))
    return Outcome()


@pytest.mark.parametrize("seed", range(4))
def test_a_selection_is_decided_as_if_nothing_else_had_been_signed(seed: int) -> None:
    rng = random.Random(seed)
    bases = [[f"w{rng.randrange(99)}" for _ in range(60)] for _ in range(5)]
    texts = [
        (f"http://h/{n}", edited(rng.choice(bases), rng.randint(0, 1), rng)) for n in range(30)
    ]
    # The same text at the same address, twice in a shard and again in others.
    for place in rng.sample(range(30), 12):
        texts[place] = texts[rng.choice([place, place - place % 4])]
    everything = texts_of(TextsConfig(texts=tuple(texts)))
    drawn = [rng.random() < 0.7 for _ in texts]
    kept = tuple(tuple(drawn[start : start + 4]) for start in range(0, 30, 4))
    selected = selection(KeptConfig(kept=kept), documents=everything)
    config = DeduplicateConfig()
    signed = signatures(config.signatures(), documents=everything)
    assert signed.counts["documents"] > len(rows(selected))
    found = deduplicate(config, documents=selected, signatures=signed)
    expected = unique(config, selected)
    assert sum(found.rules.values()) > 3
    assert found.fingerprint != expected.fingerprint and found.counts == expected.counts
    for prefix in ("documents-", "rejected-", "clusters"):
        assert rows(found, prefix) == rows(expected, prefix)


def test_signatures_of_another_kind_are_refused() -> None:
    given = documents({"http://h/a": "some text"})
    signed = signatures(DeduplicateConfig(shingle_words=3).signatures(), documents=given)
    with pytest.raises(ValueError, match=r"signatures were made with .*'shingle_words': 3"):
        deduplicate(DeduplicateConfig(), documents=given, signatures=signed)


def test_exact_copies_leave_the_address_that_is_no_copy() -> None:
    text = "The same text on several pages, with enough words to be a document. " * 5
    other = "Another text altogether that has nothing to do with the first one at all. " * 5
    manifest = unique(
        DeduplicateConfig(),
        documents(
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


@pytest.mark.parametrize("change", [str.upper, lambda text: text.replace("fifth", "other")])
def test_a_page_that_names_another_address_is_the_lesser_copy(change) -> None:
    base = [f"{kind}{n}" for n in range(80) for kind in ("first", "second", "third")]
    text = " ".join([*base, "fifth"])
    texts = {"http://h/a": change(text), "http://h/its/own/long/address": text}
    canonical = {
        "http://h/a": "http://h/its/own/long/address",
        # Its own address, spelt otherwise.
        "http://h/its/own/long/address": "https://h:443/its/own/./long/address",
    }
    kept = unique(DeduplicateConfig(), documents(texts, canonical=canonical))
    assert urls(kept) == ["http://h/its/own/long/address"]
    without = unique(DeduplicateConfig(), documents(texts))
    assert urls(without) == ["http://h/a"]
    assert kept.rules == without.rules and sum(kept.rules.values()) == 1


def test_the_longest_of_near_duplicates_stays() -> None:
    base = [f"word{n}" for n in range(300)]
    texts = {"http://h/short": " ".join(base[:250]), "http://h/long/address": " ".join(base)}
    manifest = unique(DeduplicateConfig(), documents(texts))
    assert urls(manifest) == ["http://h/long/address"]
    assert manifest.rules == {"near-duplicate": 1}


def gone_of(count: int, pairs: list, scores: list) -> dict[int, tuple[int, float]]:
    """What keep_best says, as row → (kept row, similarity); row numbers are ranks."""
    array, similarity = np.array(pairs, np.int64).reshape(-1, 2), np.array(scores, float)
    rows, shown = keep_best(count, array, similarity, array[:, 0].astype(np.uint64))
    return {
        row: (int(array[pair, 0]), float(similarity[pair]))
        for row, pair in zip(rows.tolist(), shown.tolist(), strict=True)
    }


def test_a_chain_is_not_removed_link_by_link() -> None:
    pairs = [(0, 1), (1, 2), (2, 3)]
    assert gone_of(4, pairs, [0.9] * 3) == {1: (0, 0.9), 3: (2, 0.9)}
    assert connected(5, np.array(pairs)).tolist() == [0, 0, 0, 0, 4]


graphs = st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=40)


@given(graphs, st.randoms(use_true_random=False))
def test_the_best_are_kept_as_if_taken_one_by_one(drawn: set, rng: random.Random) -> None:
    pairs = sorted((a, b) for a, b in drawn if a < b)
    scores = [rng.choice([0.8, 0.9, 1.0]) for _ in pairs]
    expected: dict[int, tuple[int, float]] = {}
    for row in range(12):
        kept = [
            (score, -a, a)
            for (a, b), score in zip(pairs, scores, strict=True)
            if b == row and a not in expected
        ]
        if kept:
            score, _, a = max(kept)
            expected[row] = (a, score)
    assert gone_of(12, pairs, scores) == expected


@given(graphs)
def test_labels_are_the_smallest_of_what_is_connected(drawn: set) -> None:
    graph = labels_by_walking(12, drawn)
    assert connected(12, np.array(sorted(drawn), np.int64).reshape(-1, 2)).tolist() == graph


@given(graphs, st.randoms(use_true_random=False))
def test_few_pairs_say_who_is_connected(drawn: set, rng: random.Random) -> None:
    drawn = {(a, b) for a, b in drawn if a < b}
    pairs = np.zeros(len(drawn), RESEMBLING)
    for field, end in (("better", 0), ("worse", 1)):
        pairs[field] = [pair[end] for pair in sorted(drawn)]
    pairs["similarity"] = [rng.choice([0.6, 0.9]) for _ in drawn]
    kept = spanning(pairs, 0.8)
    alike = pairs[pairs["similarity"] >= 0.8]
    assert kept[: len(alike)].tolist() == alike.tolist()
    assert len(kept) - len(alike) <= 11 and (kept["similarity"][len(alike) :] < 0.8).all()
    links = set(zip(kept["better"].tolist(), kept["worse"].tolist(), strict=True))
    assert labels_by_walking(12, links) == labels_by_walking(12, drawn)


def labels_by_walking(count: int, pairs: set) -> list[int]:
    labels = list(range(count))
    for _ in range(count):
        for a, b in pairs:
            labels[a] = labels[b] = min(labels[a], labels[b])
    return labels


def reference(
    texts: dict[str, str], canonical: dict[str, str], threshold: float, cluster: float
) -> tuple[dict, dict]:
    """What must go and why, and each address's cluster: every pair compared in plain Python."""

    def shingles(text: str) -> set:
        words = re.findall(r"[^\W_]+", text.casefold())
        return {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, min(len(words), 1)))}

    urls, sets = list(texts), [shingles(text) for text in texts.values()]
    sizes = np.array([len(text.encode()) for text in texts.values()])
    orders = order_of(urls, [canonical.get(url) for url in urls], sizes).tolist()
    plain = [normalise(text) for text in texts.values()]
    best = sorted(range(len(urls)), key=lambda row: (orders[row], urls[row], row))
    gone: dict[str, str] = {}
    alive = []
    for row in best:
        copied = next((other for other in alive if plain[other] == plain[row]), None)
        if copied is None:
            alive.append(row)
        else:
            gone[urls[row]] = f"same text as {urls[copied]}"
    alike = {
        (a, b): len(sets[a] & sets[b]) / len(sets[a] | sets[b])
        for a in alive
        for b in alive
        if a != b and sets[a] | sets[b]
    }
    kept: list[int] = []
    for row in alive:
        found = [(alike.get((row, k), 0), -place, k) for place, k in enumerate(kept)]
        score, _, other = max(found, default=(0, 0, 0))
        if score >= threshold:
            gone[urls[row]] = f"Jaccard similarity {score:.2f} with {urls[other]}"
        else:
            kept.append(row)
    together = {pair for pair, score in alike.items() if score >= cluster}
    labels = labels_by_walking(len(urls), together)
    ids = [document_id(text) for text in texts.values()]
    return gone, {url: ids[label] for url, label in zip(urls, labels, strict=True)}


@pytest.mark.parametrize("seed", range(4))
def test_partitions_decide_as_if_every_pair_had_been_compared(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    words = [f"w{n}" for n in range(400)]
    texts: dict[str, str] = {"http://h/empty": "", "http://h/dots": "...", "http://h/few": "a b"}
    for family in range(12):
        base = rng.choices(words, k=rng.randint(4, 120))
        for copy in range(rng.randint(1, 6)):
            text = edited(base, rng.randint(0, len(base) // 20), rng)
            if rng.random() < 0.3:
                text = text.upper() + " ."
            texts[f"http://h/{family}/{'latest/' * (copy == 1)}{'x' * rng.randint(1, 5)}{copy}"] = (
                text
            )
    names = list(texts)
    rng.shuffle(names)
    texts = {name: texts[name] for name in names}
    canonical = {name: rng.choice(names) for name in names if rng.random() < 0.2}
    gone, clusters = reference(texts, canonical, 0.7, 0.4)
    monkeypatch.setattr("tasks.corpus.dedup.SHARDS_PER_PARTITION", 1 + seed)
    if seed == 0:  # ranges are parts of slots
        monkeypatch.setattr("tasks.corpus.buckets.SLOTS", 4)
        monkeypatch.setattr("tasks.corpus.buckets._SLOT", 2**62)
        monkeypatch.setattr("tasks.corpus.dedup.partitions_of", lambda shards: 11)
    config = DeduplicateConfig(threshold=0.7, cluster_threshold=0.4, bands=128, rows=2)
    manifest = unique(config, documents(texts, canonical=canonical))
    removed = {row["url"]: row["reason"] for row in rows(manifest, "rejected-")}
    assert removed == gone
    assert len(removed) > 5
    assert {row["url"]: row["cluster"] for row in rows(manifest)} == {
        url: cluster for url, cluster in clusters.items() if url not in gone
    }
    listed = Store.open().of(manifest).read_table("clusters.parquet").to_pylist()
    sizes = Counter(clusters[url] for url, reason in gone.items() if reason.startswith("Jacc"))
    sizes.update(clusters[url] for url in texts if url not in gone)
    for reason in gone.values():
        if reason.startswith("same"):
            sizes[clusters[reason.removeprefix("same text as ")]] += 1
    expected = {cluster: size for cluster, size in sizes.items() if size > 1}
    assert {row["cluster"]: row["documents"] for row in listed} == expected
    assert Counter(row["cluster"] for row in listed) == expected
    assert sum({row["cluster"]: row["removed"] for row in listed}.values()) == len(gone)
    assert gone.keys() <= {row["url"] for row in listed}
    assert manifest.counts["clusters"] == len(sizes)


sets_of_numbers = st.lists(st.sets(st.integers(0, 30), max_size=20), min_size=1, max_size=8)


@given(sets_of_numbers, sets_of_numbers, st.floats(0, 1))
def test_many_pairs_at_once_are_compared_like_each_alone(
    left: list[set[int]], right: list[set[int]], threshold: float
) -> None:
    other, mine = (
        Sets({n: np.array(sorted(one), np.uint32) for n, one in enumerate(several)})
        for several in (left, right)
    )
    better, worse = np.divmod(np.arange(len(left) * len(right)), len(right))
    found = similarities(other, mine, better, worse, threshold)
    pairs = zip(better.tolist(), worse.tolist(), strict=True)
    assert found.tolist() == [jaccard_above(other[a], mine[b], threshold) for a, b in pairs]


@pytest.mark.parametrize("wanted", [0.3, 0.5, 0.7, 0.9])
def test_signatures_estimate_the_similarity(wanted: float) -> None:
    rng = np.random.default_rng(0)
    shared_count = round(2000 * 2 * wanted / (1 + wanted))
    common, first, second = (
        rng.integers(0, 2**64, size, np.uint64)
        for size in (shared_count, 2000 - shared_count, 2000 - shared_count)
    )
    a, b = np.unique(np.r_[common, first]), np.unique(np.r_[common, second])
    folded = (np.concatenate([a, b]) >> np.uint64(32)).astype(np.uint32)
    first, second = minima(folded, np.array([0, len(a), len(folded)]), 2048)
    estimate = float(np.mean(first == second))
    assert abs(estimate - jaccard_above(a, b, 0)) < 0.05


def test_wide_buckets_cost_no_square_of_pairs() -> None:
    pairs = candidate_pairs(np.zeros(1000, np.uint64), np.arange(1000, dtype=np.uint64), widest=8)
    assert len(pairs) < 8 * 1000
    assert set(pairs[:, 0].tolist()) == set(range(8))
    assert set(pairs.ravel().tolist()) == set(range(1000))


def test_bands_that_would_miss_duplicates_are_refused() -> None:
    assert Bands(14, 8).probability(0.55) < 0.2 < 0.95 < Bands(32, 4).probability(0.56)
    with pytest.raises(ValidationError, match="2 bands of 16 rows find only"):
        DeduplicateConfig(bands=2, rows=16)
    with pytest.raises(ValidationError, match=r"cluster_threshold 0.9 > threshold 0.8"):
        DeduplicateConfig(cluster_threshold=0.9)
