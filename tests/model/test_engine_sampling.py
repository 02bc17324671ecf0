"""Sampling against the definition: the drawn tokens follow the truncated distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine.sampling import Sampling, choose, uniforms
from model.engine.text import TextStream
from tests.tiny_models import tokenizer


def allowed(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution by the book, token by token over the sorted vocabulary."""
    probabilities = (logits.double() / sampling.temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    if sampling.top_k:
        order = order[: sampling.top_k]
    kept, total = [], float(probabilities[order].sum())
    mass = 0.0
    for token in order.tolist():
        if mass >= sampling.top_p * total:
            break
        kept.append(token)
        mass += float(probabilities[token])
    best = float(probabilities.max())
    kept = [token for token in kept if float(probabilities[token]) >= sampling.min_p * best]
    result = torch.zeros_like(probabilities)
    result[kept] = probabilities[kept]
    return result / result.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=5),
        Sampling(temperature=1.3, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(temperature=2.0, top_k=300, top_p=0.9, min_p=0.01),
        Sampling(temperature=1.0, top_p=0.9999),
    ],
    ids=lambda s: f"t{s.temperature}k{s.top_k}p{s.top_p}m{s.min_p}",
)
def test_drawn_tokens_follow_the_truncated_distribution(sampling: Sampling) -> None:
    torch.manual_seed(0)
    logits, draws = torch.randn(400) * 2, 20_000
    expected = allowed(logits, sampling)
    same = [Sampling(**{**vars(sampling), "seed": 11})] * draws
    tokens = torch.tensor(choose(logits.expand(draws, -1), same, list(range(draws))))
    seen = torch.bincount(tokens, minlength=400).double() / draws
    assert not bool(seen[expected == 0].any())
    # Three standard deviations of every bin, and a little for the many bins.
    assert bool(((seen - expected).abs() <= 4 * (expected / draws).sqrt() + 2e-4).all())


def test_noise_is_even_and_depends_on_all_three() -> None:
    count = 50_000
    noise = uniforms([1] * count, [0] * count, list(range(count)))
    assert abs(float(noise.mean()) - 0.5) < 0.01 and noise.min() >= 0 and noise.max() < 1
    other = [uniforms([2], [0], [0]), uniforms([1], [1], [0]), uniforms([1], [0], [1])]
    assert len({float(noise[0]), *map(float, other)}) == 4
    assert float(uniforms([-1], [0], [0])) == float(uniforms([2**64 - 1], [0], [0]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"max_tokens": -1},
        {"stop": ("",)},
    ],
)
def test_impossible_values_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="abcé✓ \n", max_size=40),
    stops=st.lists(st.text(alphabet="abcé✓ \n", min_size=1, max_size=5), max_size=3),
)
def test_text_streams_up_to_the_first_stop_string(text: str, stops: list[str]) -> None:
    names = tokenizer()
    stream = TextStream(names, tuple(stops))
    pieces = []
    for token in names.encode(text):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    ends = [text.index(stop) for stop in stops if stop in text]
    joined = "".join(pieces)
    # The stop string that is complete first wins; one that begins earlier may end later.
    assert stream.stopped == bool(ends)
    assert text.startswith(joined)
    if ends:
        assert joined == text or any(text[len(joined) :].startswith(stop) for stop in stops)
    else:
        assert joined == text


def test_any_top_k_beyond_the_vocabulary_keeps_all_of_it() -> None:
    logits = torch.randn(1, 50)
    drawn = [
        [
            choose(logits, [Sampling(temperature=1.0, seed=n, top_k=top_k)], [0])[0]
            for n in range(40)
        ]
        for top_k in (50, 51, 2**31, 2**70)
    ]
    assert len(set(drawn[0])) > 10 and drawn == [drawn[0]] * 4
    few = Sampling(temperature=5.0, seed=1, top_k=2)
    both = choose(logits.repeat(2, 1), [few, Sampling(1.0, top_k=2**70)], [0, 0])
    assert both[0] in logits[0].topk(2).indices


def test_a_temperature_next_to_nothing_is_greedy() -> None:
    logits = torch.randn(1, 50) * 10
    for temperature in (5e-324, 1e-308, 1e-6):
        for more in ({}, {"top_p": 0.5}, {"top_k": 3}):
            asked = Sampling(temperature=temperature, seed=1, **more)
            assert choose(logits, [asked], [0]) == [int(logits.argmax())]
    small = Sampling(temperature=1e-5, seed=1)
    assert choose(logits * 100, [small], [0]) == [int(logits.argmax())]
