"""Hashed spans are what plain Python says they are."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tasks.corpus.matching import jaccard_above
from tasks.corpus.shingles import Words, normalise
from tasks.corpus.word_hashes import line_words, places_of, words_of

texts = st.text(max_size=200)
wordy = st.lists(st.sampled_from(["ab", "Ab", "b", "é", "c1", "日本", "x_y", "-"]), max_size=40)


@given(texts)
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert once == " ".join(once.split())


@given(texts, st.sampled_from([" ", "\n\n", "\t-- ", "* "]))
def test_layout_and_case_make_no_difference(text: str, separator: str) -> None:
    ascii_words = [word for word in text.split() if word.isascii()]
    assert normalise(separator.join(ascii_words)) == normalise(" ".join(ascii_words).upper())


@given(st.lists(wordy.map(" ".join) | texts, max_size=6), st.integers(1, 6))
def test_runs_are_equal_exactly_where_the_words_are(several: list[str], n: int) -> None:
    words, plain = words_of(several)
    assert plain == [normalise(text).encode("utf-8", "replace") for text in several]
    runs, bounds = words.runs(n)
    assert len(bounds) == len(several) + 1
    expected = []
    for text, a, b in zip(plain, bounds, bounds[1:], strict=False):
        tokens = text.decode().split()
        of_text = [tuple(tokens[i : i + n]) for i in range(max(len(tokens) - n + 1, 1))]
        expected += of_text if tokens else []
        assert b - a == (len(of_text) if tokens else 0)
    assert len(runs) == len(expected)
    assert len(set(runs.tolist())) == len(set(expected))
    assert len(set(zip(runs.tolist(), expected, strict=True))) == len(set(expected))


@given(texts | wordy.map(" ".join) | st.text("İßﬁΌς日ก ำ_é-", max_size=20))
def test_words_are_found_again_where_they_stand(text: str) -> None:
    found = [normalise(text[start:end]) for start, end in places_of(text)]
    expected = normalise(text).split()
    assert len(found) == len(expected)
    assert all(word in whole.split() for word, whole in zip(expected, found, strict=True))


@given(st.lists(texts | st.text("aé日\n\r\x85 .", max_size=30), max_size=5))
def test_lines_have_the_words_they_would_have_alone(several: list[str]) -> None:
    alone = words_of([line for text in several for line in text.split("\n")])[0]
    together = line_words(several)
    assert together.hashes.tolist() == alone.hashes.tolist()
    assert together.bounds.tolist() == alone.bounds.tolist()


def test_words_hash_alike_wherever_blocks_are_cut() -> None:
    rng = random.Random(0)
    vocabulary = [rng.choice("abcdé") * rng.randint(1, 9) + str(n) for n in range(50)]
    text = " ".join(rng.choices(vocabulary, k=60_000))  # some blocks long
    hashes = words_of(["a few words", text, "x" * 300_000 + " tail"])[0]
    assert hashes.bounds.tolist() == [0, 3, 60_003, 60_005]
    words = ["a", "few", "words", *text.split(), "x" * 300_000, "tail"]
    assert len(set(zip(words, hashes.hashes.tolist(), strict=True))) == len(set(words))
    assert len(set(hashes.hashes.tolist())) == len(set(words))


@given(wordy, st.integers(1, 12))
def test_windows_begin_at_words_and_hash_their_bytes(words: list[str], size: int) -> None:
    data = normalise(" ".join(words)).encode()
    starts, hashes = Words.of(data.decode()).windows(size)
    begins = [i for i in range(len(data)) if i == 0 or data[i - 1 : i] == b" "]
    assert starts.tolist() == [i for i in begins if i + size <= len(data)]
    spans = [data[i : i + size] for i in starts.tolist()]
    assert len(set(zip(spans, hashes.tolist(), strict=True))) == len(set(spans))
    assert len(set(hashes.tolist())) == len(set(spans))


def test_the_same_words_hash_alike_in_every_text() -> None:
    runs, bounds = words_of(["one two three four", "zero one two three four five"])[0].runs(3)
    assert set(runs[: bounds[1]].tolist()) < set(runs[bounds[1] :].tolist())


def test_scripts_without_blanks_have_words_too() -> None:
    assert normalise("日本語 text。") == "日 本 語 text"


@given(st.sets(st.integers(0, 50)), st.sets(st.integers(0, 50)))
def test_jaccard_is_that_of_sets(a: set[int], b: set[int]) -> None:
    arrays = [np.array(sorted(s), np.uint32) for s in (a, b)]
    expected = len(a & b) / len(a | b) if a | b else 1.0
    assert jaccard_above(*arrays, 0.0) == expected
    assert jaccard_above(*arrays, 0.5) == expected or expected < 0.5
