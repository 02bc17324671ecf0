"""Guessing ahead changes when tokens come, never which."""

from __future__ import annotations

import pytest

from model.engine import Core, Sampling, generate_batch
from model.engine.speculation import NgramIndex
from tests.tiny_models import tokenizer, transformer

PROMPT = [*range(30, 50)] * 3


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=60),
        Sampling(max_tokens=60, logprobs=1),
        Sampling(temperature=0.6, top_k=3, seed=5, max_tokens=60),
        Sampling(temperature=1.0, seed=5, max_tokens=60, repetition_penalty=1.3),
    ],
)
@pytest.mark.parametrize("ends", [(), (41, 200)])
def test_answers_are_the_same_with_guesses(sampling: Sampling, ends: tuple[int, ...]) -> None:
    model = transformer()
    prompts = [PROMPT, PROMPT[:25], PROMPT[7:], [9, 8, 7]]
    plain = generate_batch(model, None, prompts, sampling, stop_ids=ends)
    guessed = generate_batch(model, None, prompts, sampling, stop_ids=ends, speculate=4)
    assert [a.tokens for a in guessed] == [a.tokens for a in plain]
    assert [a.finish_reason for a in guessed] == [a.finish_reason for a in plain]
    assert [len(a.logprobs) for a in guessed] == [len(a.logprobs) for a in plain]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_are_the_same_with_a_draft_model(temperature: float) -> None:
    model = transformer()
    sampling = Sampling(temperature=temperature, seed=3, max_tokens=50)
    prompts = [PROMPT, PROMPT[:25], [9, 8, 7], [5], [40, 41]]
    plain = generate_batch(model, None, prompts, sampling, stop_ids=(41,))
    for draft in (model, transformer(seed=1, layers=1)):
        guessed = generate_batch(
            model, None, prompts, sampling, slots=2, stop_ids=(41,), speculate=3, draft=draft
        )
        assert [a.tokens for a in guessed] == [a.tokens for a in plain]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_that_thinks_alike_is_always_right(temperature: float) -> None:
    model = transformer()
    core = Core(model, None, slots=2, speculate=3, draft=model)
    for name in "ab":
        sampling = Sampling(temperature=temperature, seed=ord(name), max_tokens=41)
        core.add(core.sequence(name, PROMPT[: ord(name) - 80], sampling))
    while core.has_work:
        core.step()
        core.check()
    counters = core.counters
    assert counters.accepted_tokens == counters.drafted_tokens == 60  # 1 + 10 · (3 + 1) tokens each
    assert counters.steps <= 12  # one more while the second waits for the page both begin with


def test_a_draft_model_must_have_the_context() -> None:
    with pytest.raises(ValueError, match="context of 64 tokens is shorter than the model's 128"):
        Core(transformer(), None, speculate=2, draft=transformer(context=64))


def test_a_repeating_answer_takes_fewer_steps_and_leaks_nothing() -> None:
    core = Core(transformer(), tokenizer(), slots=2, stop_ids=(), speculate=4)
    core.add(core.sequence("a", PROMPT, Sampling(max_tokens=60, logit_bias=())))
    tokens: list[int] = []
    while core.has_work:
        for update in core.step():
            tokens += update.tokens
        core.check()
    assert len(tokens) == 60
    counters = core.counters
    assert counters.steps == 60 - counters.accepted_tokens
    assert 0 < counters.accepted_tokens <= counters.drafted_tokens


def test_an_index_finds_what_followed_last_time() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 4, 9, 2, 3])
    assert index.guess(3) == [4, 9, 2]
    index.extend([5, 2, 3])
    assert index.guess(2) == [5, 2]  # the latest
    index.extend([7])
    assert index.guess(2) == [] == index.guess(0)
