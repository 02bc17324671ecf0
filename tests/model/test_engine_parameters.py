"""Each parameter of a request against its definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.engine import ConstraintError, Core, PromptError, Sampling, Update, generate_batch
from tests.tiny_models import VOCABULARY, tokenizer, transformer

PROMPT = list(range(30, 60))


def answer(sampling: Sampling, prompt: list[int] = PROMPT, **options):
    (generated,) = generate_batch(transformer(), None, [prompt], [sampling], **options)
    return generated


def by_hand(sampling: Sampling, count: int) -> list[int]:
    """Greedy with penalties and bias as the definitions say, one full forward a token."""
    model, tokens = transformer(), list(PROMPT)
    for _ in range(count):
        logits = model(torch.tensor([tokens]))[0, -1].clone()
        said = tokens[len(PROMPT) :]
        for token in set(tokens):
            factor = sampling.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in set(said):
            logits[token] -= sampling.presence_penalty
            logits[token] -= sampling.frequency_penalty * said.count(token)
        for token, bias in sampling.logit_bias:
            logits[token] += bias
        tokens.append(int(logits.argmax()))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize(
    "change",
    [
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 3.0},
        {"frequency_penalty": 2.0, "presence_penalty": -0.5},
        {"logit_bias": ((40, 5.0), (41, -100.0), (300, 4.0))},
        {"repetition_penalty": 1.2, "frequency_penalty": 1.0, "logit_bias": ((7, 2.0),)},
    ],
)
def test_penalties_and_bias_follow_their_definitions(change: dict) -> None:
    sampling = Sampling(max_tokens=20, **change)
    assert answer(sampling).tokens == by_hand(sampling, 20) != by_hand(Sampling(), 20)


def test_min_tokens_and_ignore_eos() -> None:
    free = answer(Sampling(max_tokens=20)).tokens
    end = free[3]
    at = free.index(end)
    stopped = answer(Sampling(max_tokens=20), stop_ids=[end])
    assert (stopped.finish_reason, len(stopped.tokens)) == ("stop", at + 1)
    more = answer(Sampling(max_tokens=20, min_tokens=8), stop_ids=[end])
    assert len(more.tokens) >= 8 and end not in more.tokens[:8]
    assert answer(Sampling(max_tokens=20, ignore_eos=True), stop_ids=[end]).tokens == free
    own = answer(Sampling(max_tokens=20, ignore_eos=True, stop_ids=(free[2],)), stop_ids=[end])
    assert own.finish_reason == "stop" and own.tokens == free[: free.index(free[2]) + 1]


def test_a_stop_string_before_min_tokens_is_text() -> None:
    model, names = transformer(), tokenizer()
    prompt = names.encode("def main():")
    (free,) = generate_batch(model, names, [prompt], [Sampling(max_tokens=30)], stop_ids=[])
    early = names.decode(free.tokens[:3])
    for least in (0, 6):
        sampling = Sampling(max_tokens=30, min_tokens=least, stop=(early[:2],))
        (cut,) = generate_batch(model, names, [prompt], [sampling], stop_ids=[])
        assert len(cut.tokens) >= least
        assert cut.text == ("" if not least else free.text[: len(cut.text)])


def test_logprobs_are_the_models_own() -> None:
    model = transformer()
    for temperature in (0.0, 1.5):
        sampling = Sampling(
            temperature=temperature, seed=2, max_tokens=8, logprobs=5, logit_bias=((3, 1.0),)
        )
        made = answer(sampling)
        logits = model(torch.tensor([PROMPT + made.tokens]))[0, len(PROMPT) - 1 : -1]
        expected = logits.log_softmax(-1)
        assert len(made.logprobs) == 8
        for row, (token, entry) in enumerate(zip(made.tokens, made.logprobs, strict=True)):
            assert entry.token == token
            assert entry.logprob == pytest.approx(float(expected[row, token]), abs=1e-4)
            values, ids = expected[row].topk(5)
            assert [id for id, _ in entry.top] == ids.tolist()
            assert [v for _, v in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_prompt_logprobs_score_a_text_without_generating() -> None:
    sampling = Sampling(max_tokens=0, logprobs=2, prompt_logprobs=True)
    made = answer(sampling, prefill_tokens=9)
    assert made.tokens == [] and made.finish_reason == "length"
    expected = transformer()(torch.tensor([PROMPT]))[0].log_softmax(-1)
    first, *rest = made.prompt_logprobs
    assert first is None and len(rest) == len(PROMPT) - 1
    for position, entry in enumerate(rest):
        assert entry is not None and entry.token == PROMPT[position + 1]
        assert entry.logprob == pytest.approx(float(expected[position, entry.token]), abs=1e-4)


class EvenTokens:
    """A constraint for the test: even ids only, and at most `left` of them, then token 0."""

    def __init__(self) -> None:
        self.left = 5

    def allowed(self) -> torch.Tensor:
        mask = torch.zeros(VOCABULARY, dtype=torch.bool)
        if self.left:
            mask[2::2] = True
        else:
            mask[0] = True
        return mask

    def push(self, token: int) -> None:
        self.left -= 1


def test_a_constraint_shapes_the_answer_and_only_its_own() -> None:
    model = transformer()
    bound = Sampling(temperature=1.0, seed=1, max_tokens=20, constraint=EvenTokens)
    free = Sampling(temperature=1.0, seed=1, max_tokens=20)
    one, two, three = generate_batch(model, None, [PROMPT] * 3, [bound, free, bound], stop_ids=[0])
    assert one.tokens == three.tokens and one.tokens[-1] == 0 and len(one.tokens) == 6
    assert all(token % 2 == 0 for token in one.tokens)
    assert any(token % 2 for token in two.tokens)


class Dictated:
    """A form that is one list of tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.left = list(tokens)

    def allowed(self) -> torch.Tensor:
        return torch.arange(VOCABULARY) == self.left[0]

    def push(self, token: int) -> None:
        self.left.remove(token)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_token_without_text_before_a_stop_string_is_kept(streamed: bool) -> None:
    names = tokenizer()
    before = [*names.encode("a"), names.end_of_turn]
    dictated = [*before, *names.encode("S"), names.end_of_turn, *names.encode("T")]
    sampling = Sampling(ignore_eos=True, stop=("ST",), constraint=lambda: Dictated(dictated))
    core = Core(transformer(), names, slots=1)
    core.add(core.sequence("a", PROMPT, sampling, streamed=streamed))
    updates: list[Update] = []
    while core.has_work:
        updates += core.step()
    assert [token for u in updates for token in u.tokens[: u.kept]] == before
    assert "".join(update.text for update in updates) == "a"


def test_ids_outside_the_vocabulary_are_refused_wherever_they_stand() -> None:
    core = Core(transformer(), None)
    for sampling in (Sampling(logit_bias=((VOCABULARY, 1.0),)), Sampling(stop_ids=(-1,))):
        with pytest.raises(PromptError, match="outside the vocabulary"):
            core.sequence("x", PROMPT, sampling)


def test_rows_beyond_the_tokenizer_are_never_chosen() -> None:
    names = tokenizer()
    model = transformer(vocab_size=VOCABULARY + 64)
    model.model.embed_tokens.weight[VOCABULARY:] *= 100
    sampling = Sampling(temperature=2.0, seed=1, max_tokens=60, ignore_eos=True)
    (made,) = generate_batch(model, names, [PROMPT], [sampling])
    assert max(made.tokens) < VOCABULARY


class Failing:
    """A constraint that breaks after `left` tokens, in one of its two methods."""

    def __init__(self, left: int, method: str, error: Exception) -> None:
        self.left, self.method, self.error = left, method, error

    def allowed(self) -> torch.Tensor:
        if self.method == "allowed" and self.left == 0:
            raise self.error
        return torch.ones(VOCABULARY, dtype=torch.bool)

    def push(self, token: int) -> None:
        self.left -= 1
        if self.method == "push" and self.left == 0:
            raise self.error


@pytest.mark.parametrize("method", ["allowed", "push"])
def test_what_fails_for_one_answer_ends_that_one_alone(method: str) -> None:
    free = Sampling(temperature=1.0, seed=1, max_tokens=20)
    (expected,) = generate_batch(transformer(), None, [PROMPT], [free])
    core = Core(transformer(), None, slots=4)
    told = ConstraintError("too large")
    for id, error in (("form", told), ("fault", RuntimeError("a fault"))):
        bound = replace(free, constraint=lambda error=error: Failing(3, method, error))
        core.add(core.sequence(id, PROMPT, bound, streamed=False))
    core.add(core.sequence("free", PROMPT, free, streamed=False))
    ended = {}
    while core.has_work:
        ended |= {update.id: update for update in core.step()}
        core.check()
    assert ended["free"].tokens == expected.tokens
    assert (ended["form"].finish_reason, ended["form"].problem) == ("error", "too large")
    assert (ended["fault"].finish_reason, ended["fault"].problem) == ("error", "")
    assert len(ended["form"].tokens) == 3


def test_numbers_that_no_tensor_holds_end_their_own_answer() -> None:
    class Odd(Sampling):
        """As if one of its numbers could not be computed with."""

        @property
        def min_p(self) -> float:
            raise OverflowError("no number")

    odd = Odd.__new__(Odd)
    odd.__dict__.update(Sampling(temperature=1.0, seed=1, max_tokens=20, top_k=5).__dict__)
    free = Sampling(temperature=1.0, seed=1, max_tokens=20)
    broken, answered = generate_batch(transformer(), None, [PROMPT] * 2, [odd, free])
    assert broken.finish_reason == "error" and broken.tokens == []
    assert answered.tokens == answer(free).tokens
