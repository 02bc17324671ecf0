"""Hashed spans are what plain Python says they are."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tasks.corpus.shingles import Words, jaccard, normalise

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


@given(wordy, st.integers(1, 6))
def test_grams_are_equal_exactly_where_the_words_are(words: list[str], n: int) -> None:
    normalised = normalise(" ".join(words))
    tokens = normalised.split()
    expected = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    hashes = Words.of(normalised).grams(n).tolist()
    assert len(hashes) == len(expected)
    assert len(set(hashes)) == len(set(expected))
    assert len(set(zip(hashes, expected, strict=True))) == len(set(expected))


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
    a, b = Words.of("one two three four"), Words.of("zero one two three four five")
    assert set(a.grams(3).tolist()) < set(b.grams(3).tolist())
    assert len(Words.of("two words").shingles(5)) == 1
    assert len(Words.of("").shingles(5)) == 0


def test_scripts_without_blanks_have_words_too() -> None:
    assert normalise("日本語 text。") == "日 本 語 text"


@given(st.sets(st.integers(0, 50)), st.sets(st.integers(0, 50)))
def test_jaccard_is_that_of_sets(a: set[int], b: set[int]) -> None:
    arrays = [np.array(sorted(s), np.uint64) for s in (a, b)]
    expected = len(a & b) / len(a | b) if a | b else 1.0
    assert jaccard(*arrays) == expected
