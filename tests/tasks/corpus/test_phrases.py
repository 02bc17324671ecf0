"""Repeated phrases, found in many texts at once, are what plain Python finds in each alone."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tasks.corpus.phrases import DUPLICATE, TOP, phrases

wordy = st.lists(st.sampled_from(["a", "bb", "ccc", "é", "日"]), max_size=60).map(" ".join)


def plain_top(text: str) -> set[float]:
    """The share that may be told: of several equally common phrases any may be taken."""
    words = text.split()
    possible = {0.0}
    for size, bound in TOP.items():
        grams = Counter(" ".join(words[i : i + size]) for i in range(len(words) - size + 1))
        most = max(grams.values(), default=0)
        if most > 1:
            taken = {len(gram.encode()) * most for gram, count in grams.items() if count == most}
            shares = {taken_by_one / len(text.encode()) / bound for taken_by_one in taken}
            possible = {max(before, share) for before in possible for share in shares}
    return possible


def plain_duplicate(text: str) -> float:
    words = text.split()
    lengths = [len(word.encode()) for word in words]
    largest = 0.0
    for size, bound in DUPLICATE.items():
        seen, inside = set(), set()
        for i in range(len(words) - size + 1):
            gram = tuple(words[i : i + size])
            if gram in seen:
                inside.update(range(i, i + size))
            seen.add(gram)
        largest = max(largest, sum(lengths[i] for i in inside) / max(sum(lengths), 1) / bound)
    return largest


@given(st.lists(wordy, max_size=9))
def test_several_texts_at_once_are_measured_like_each_alone(texts: list[str]) -> None:
    together = phrases(texts)
    assert together == [phrases([text])[0] for text in texts]
    for text, found in zip(texts, together, strict=True):
        assert any(abs(found.top - share) < 1e-9 for share in plain_top(text))
        assert abs(found.duplicate - plain_duplicate(text)) < 1e-9
