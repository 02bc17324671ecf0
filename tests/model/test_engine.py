"""The engine against the plain forward pass, and what a batch must never do to its members."""

from __future__ import annotations

import queue
import random
import threading
from dataclasses import replace

import pytest
import torch

from model.engine import (
    Core,
    Engine,
    EngineBusy,
    EngineClosed,
    PromptError,
    Sampling,
    Update,
    generate_batch,
    load_model,
)
from model.huggingface import FormatError
from model.rope_scaling import RopeScaling
from model.transformer import Transformer
from tests.tiny_models import (
    BERT,
    DEEPSEEK2,
    DEEPSEEK3,
    GEMMA2,
    GEMMA3,
    GPT2,
    VOCABULARY,
    model_directory,
    tokenizer,
    transformer,
)

VARIANTS = [
    {},
    {"heads": 4, "kv_heads": 2},
    {"sliding_window": 8},
    {"qk_norm": True, "head_dim": 48, "heads": 4, "kv_heads": 1},
    {"qkv_bias": True, "tied_embeddings": False},
    {"rope_scaling": RopeScaling("llama3", 8.0, 16, 1.0, 4.0)},
    {"qkv_bias": True, "rope_scaling": RopeScaling("yarn", 4.0, 16, beta_fast=4.0)},
    GEMMA2,
    GEMMA3,
    GEMMA3 | {"rope_scaling": RopeScaling("linear", 8.0)},
    GPT2,
    DEEPSEEK2,
    DEEPSEEK2 | {"query_latent": 28, "expert_groups": 4, "groups_per_token": 2},
    DEEPSEEK3 | {"layers": 3},
    DEEPSEEK3 | {"rope_scaling": RopeScaling("yarn", 4.0, 16, mscale=1.0, mscale_all_dim=0.8)},
]
GREEDY = Sampling(max_tokens=24)


def prompts(count: int, longest: int = 40, seed: int = 1) -> list[list[int]]:
    draw = random.Random(seed)
    lengths = [draw.randint(1, longest) for _ in range(count)]
    return [[draw.randrange(20, VOCABULARY) for _ in range(length)] for length in lengths]


def continued(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by the plain forward pass, everything computed anew for each token."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("flags", VARIANTS)
def test_greedy_equals_the_plain_forward_whoever_is_in_the_batch(flags: dict) -> None:
    model = transformer(**flags)
    asked = prompts(12)
    answers = generate_batch(model, None, asked, GREEDY, slots=5)
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer.tokens == continued(model, prompt, 24)
        assert answer.prompt_tokens == len(prompt)
        assert answer.finish_reason == "length"


@pytest.mark.parametrize("flags", [{"kv_latent": 15}, {"kv_latent": 16, "query_latent": 9}])
def test_latents_of_an_odd_number_of_channels(flags: dict) -> None:
    """What transformers itself refuses, so it is held to the plain forward alone."""
    model = transformer(**DEEPSEEK2 | flags)
    (prompt,) = prompts(1)
    (answer,) = generate_batch(model, None, [prompt], GREEDY)
    assert answer.tokens == continued(model, prompt, 24)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("flags", [{"qkv_bias": True}, GPT2, DEEPSEEK2, DEEPSEEK3])
def test_smaller_weights_think_nearly_the_same(weights: str, flags: dict) -> None:
    model = transformer(**flags)
    asked = [prompt + [30] * 14 for prompt in prompts(6)]
    scoring = Sampling(max_tokens=4, logprobs=0, prompt_logprobs=True)
    whole = generate_batch(model, None, asked, scoring)
    small = generate_batch(model, None, asked, scoring, weights=weights)
    differences = [
        abs(a.logprob - b.logprob)
        for one, other in zip(whole, small, strict=True)
        for a, b in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True)
    ]
    assert 0 < sum(differences) / len(differences) < 0.15
    assert all(len(answer.tokens) == 4 for answer in small)


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd() -> None:
    model = transformer()
    asked = prompts(16)
    mixed = [
        Sampling(temperature=1.2, top_p=0.9, top_k=40, min_p=0.01, seed=7, max_tokens=24),
        Sampling(temperature=0.8, seed=-3, max_tokens=24),
        GREEDY,
        Sampling(temperature=2.0, top_p=0.95, seed=2**63 - 1, max_tokens=24),
    ] * 4
    together = generate_batch(model, None, asked, mixed, slots=7)
    for prompt, sampling, answer in zip(asked, mixed, together, strict=True):
        (alone,) = generate_batch(model, None, [prompt], [sampling])
        assert alone.tokens == answer.tokens


def test_seeds_and_choices_differ() -> None:
    prompt = prompts(1)[0]
    samplings = [
        Sampling(temperature=1.0, seed=seed, choice=choice, max_tokens=16)
        for seed in (1, 2)
        for choice in (0, 1)
    ]
    answers = generate_batch(transformer(), None, [prompt] * 4, samplings)
    assert len({tuple(answer.tokens) for answer in answers}) == 4


def test_an_end_token_ends_the_answer() -> None:
    model = transformer()
    prompt = prompts(1)[0]
    whole = continued(model, prompt, 24)
    end = whole[5]
    (answer,) = generate_batch(model, None, [prompt], GREEDY, stop_ids=[end])
    assert answer.tokens == whole[: whole.index(end) + 1]
    assert answer.finish_reason == "stop"


def test_the_context_ends_the_answer() -> None:
    prompt = prompts(1)[0] * 200
    model = transformer(context=32)
    (answer,) = generate_batch(model, None, [prompt[:30]], Sampling())
    assert len(answer.tokens) == 2 and answer.finish_reason == "length"
    assert answer.tokens == continued(model, prompt[:30], 2)
    with pytest.raises(PromptError, match="maximum context length is 32"):
        generate_batch(model, None, [prompt[:32]])


@pytest.mark.parametrize("bad", [[], [VOCABULARY], [-1]])
def test_prompts_that_are_none_are_refused(bad: list[int]) -> None:
    with pytest.raises(PromptError):
        generate_batch(transformer(), None, [bad])


def test_stop_strings_end_the_text_even_across_tokens() -> None:
    model, names = transformer(), tokenizer()
    prompt = names.encode("def main():")
    free = Sampling(temperature=1.0, seed=3, max_tokens=60)
    (whole,) = generate_batch(model, names, [prompt], [free])
    for start in range(0, len(whole.text) - 4, 3):
        stop = whole.text[start : start + 4]
        sampling = Sampling(temperature=1.0, seed=3, max_tokens=60, stop=("\0none", stop))
        (cut,) = generate_batch(model, names, [prompt], [sampling])
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert cut.finish_reason == "stop"
        assert cut.tokens == whole.tokens[: len(cut.tokens)]


@pytest.mark.parametrize("speculate", [0, 4])
def test_a_stream_tells_of_a_token_when_all_of_its_text_is_out(speculate: int) -> None:
    """So it never tells of one that turns out to be part of a stop string."""
    model, names = transformer(), tokenizer()
    prompt = names.encode("def main():") * 3
    free = Sampling(temperature=1.3, seed=3, max_tokens=60, ignore_eos=True, logprobs=0)
    (whole,) = generate_batch(model, names, [prompt], [free])
    for start in range(0, len(whole.text) - 4, 3):
        stop = whole.text[start : start + 4]
        sampling = replace(free, stop=("\0none", stop, stop[:2] + "\0"))
        core = Core(model, names, slots=2, speculate=speculate)
        core.add(core.sequence("streamed", prompt, sampling))
        core.add(core.sequence("whole", prompt, sampling, streamed=False))
        text: dict[str, str] = {"streamed": "", "whole": ""}
        kept: dict[str, list[int]] = {"streamed": [], "whole": []}
        while core.has_work:
            for update in core.step():
                assert len(update.logprobs) == len(update.tokens)
                assert [entry.token for entry in update.logprobs] == update.tokens
                text[update.id] += update.text
                kept[update.id] += update.tokens[: update.kept]
                if update.finish_reason is None:
                    assert text[update.id].startswith(names.decode(kept[update.id]))
        assert text["streamed"] == text["whole"] == whole.text[: whole.text.index(stop)]
        assert kept["streamed"] == kept["whole"]


def test_slots_match_sequences_through_any_order_of_ends() -> None:
    draw = random.Random(5)
    core = Core(transformer(), None, slots=6, prefill_tokens=60)
    waiting = [
        core.sequence(str(n), prompt, Sampling(max_tokens=draw.randint(1, 20)))
        for n, prompt in enumerate(prompts(40))
    ]
    ended: set[str] = set()
    while waiting or core.has_work:
        for _ in range(draw.randint(0, 3)):
            if waiting:
                core.add(waiting.pop())
        ended |= {update.id for update in core.step() if update.finish_reason}
        everyone = [*core.scheduler.running, *core.scheduler.waiting]
        if everyone and draw.random() < 0.3:
            ended |= {update.id for update in core.abort([draw.choice(everyone).id])}
        core.check()
    assert len(ended) == 40
    assert not core.scheduler.running


class Listener:
    """Collects updates in the engine's thread and hands them to the test's."""

    def __init__(self) -> None:
        self.queue: queue.Queue[Update] = queue.Queue()

    def __call__(self, updates: list[Update]) -> None:
        for update in updates:
            self.queue.put(update)

    def finished(self) -> tuple[list[Update], str]:
        updates = [self.queue.get(timeout=30)]
        while updates[-1].finish_reason is None:
            updates.append(self.queue.get(timeout=30))
        return updates, "".join(update.text for update in updates)


@pytest.fixture(scope="module")
def engine():
    engine = Engine(transformer(), tokenizer(), slots=4)
    yield engine
    engine.close()


def test_streamed_pieces_join_to_the_whole(engine: Engine) -> None:
    prompt = engine.tokenizer.encode("import os")
    for sampling in (Sampling(max_tokens=40), Sampling(temperature=1.5, seed=1, max_tokens=40)):
        streamed, whole = Listener(), Listener()
        engine.submit(prompt, sampling, streamed)
        engine.submit(prompt, sampling, whole, streamed=False)
        pieces, text = streamed.finished()
        (last,), same = whole.finished()
        assert text == same
        assert [token for piece in pieces for token in piece.tokens] == last.tokens
        assert pieces[-1].completion_tokens == len(last.tokens)
        assert len(pieces) > 10
        assert engine.tokenizer.decode(last.tokens) == text


def test_characters_are_never_split(engine: Engine) -> None:
    # Random weights give many byte tokens: every piece must still be whole characters.
    listeners = [Listener() for _ in range(8)]
    for seed, listener in enumerate(listeners):
        engine.submit([5], Sampling(temperature=3.0, seed=seed, max_tokens=100), listener)
    for listener in listeners:
        pieces, text = listener.finished()
        tokens = [token for piece in pieces for token in piece.tokens]
        assert text == engine.tokenizer.decode(tokens)


def test_abort_frees_the_slot_and_tells_the_end(engine: Engine) -> None:
    listeners = [Listener() for _ in range(12)]
    ids = [engine.submit([5, 6, 7], Sampling(), listener) for listener in listeners]
    listeners[0].queue.get(timeout=30)
    for id in ids:
        engine.abort(id)
    engine.abort("unknown")
    ends = [listener.finished()[0][-1] for listener in listeners]
    assert {end.finish_reason for end in ends} <= {"abort", "stop", "length"}
    assert ends[-1].finish_reason == "abort" and ends[-1].prompt_tokens == 3
    counters = engine.counters()
    assert counters.running == counters.waiting == 0 and engine.idle
    engine.check()


def test_a_full_queue_is_said_at_once() -> None:
    engine = Engine(transformer(), tokenizer(), slots=1, max_waiting=2)
    try:
        engine.submit([5], Sampling(), lambda _: None)
        with pytest.raises(EngineBusy, match=r"3 answers do not fit beside the 1 under way \(3 at"):
            engine.submit([5], Sampling(), lambda _: None, room=3)
        with pytest.raises(EngineBusy):
            for _ in range(50):
                engine.submit([5], Sampling(), lambda _: None)
    finally:
        engine.close()


def test_nobody_is_refused_who_finds_a_free_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(transformer(), tokenizer(), slots=4, max_waiting=2)
    reading, going_on = threading.Event(), threading.Event()
    forward = engine._core.runner.forward

    def held_up(*arguments: object) -> torch.Tensor:
        reading.set()
        assert going_on.wait(60)
        return forward(*arguments)

    monkeypatch.setattr(engine._core.runner, "forward", held_up)
    try:
        listeners = [Listener() for _ in range(6)]
        engine.submit([5], GREEDY, listeners[0])
        assert reading.wait(60)  # one is in a step, which may last
        for listener in listeners[1:]:  # three find a slot, two wait
            engine.submit([5], GREEDY, listener)
        with pytest.raises(EngineBusy, match="2 requests are waiting already"):
            engine.submit([5], GREEDY, lambda _: None)
        counters = engine.counters()
        assert (counters.running, counters.waiting) == (1, 0)
        going_on.set()
        for listener in listeners:
            assert listener.finished()[0][-1].finish_reason == "length"
        engine.submit([5], GREEDY, listeners[0])
        assert listeners[0].finished()
    finally:
        going_on.set()
        engine.close()


def test_closing_ends_what_is_under_way() -> None:
    engine = Engine(transformer(context=128), tokenizer(), slots=1)
    listeners = [Listener() for _ in range(3)]
    for listener in listeners:
        engine.submit([5], Sampling(), listener)
    engine.close()
    assert all(listener.finished()[0][-1].finish_reason for listener in listeners)
    with pytest.raises(EngineClosed):
        engine.submit([5], Sampling(), lambda _: None)
    assert not engine.healthy


def test_a_failing_step_ends_every_request_with_an_error(monkeypatch) -> None:
    engine = Engine(transformer(), tokenizer())

    def broken(*_: object) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(engine._core.runner, "forward", broken)
    listener = Listener()
    engine.submit([5], GREEDY, listener)
    assert listener.finished()[0][-1].finish_reason == "error"
    assert not engine.healthy
    with pytest.raises(EngineClosed):
        engine.submit([5], GREEDY, listener)


def test_many_threads_may_submit_and_abort(engine: Engine) -> None:
    done: list[int] = []

    def client(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(10):
            listener = Listener()
            id = engine.submit([draw.randrange(20, 500)], GREEDY, listener)
            if draw.random() < 0.5:
                engine.abort(id)
            else:
                done.append(len(listener.finished()[0]))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done and engine.idle
    engine.check()


def test_a_directory_loads(tmp_path) -> None:
    config, model, names = load_model(model_directory(tmp_path / "model"))
    assert config.vocab_size == len(names) == VOCABULARY
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_family_it_does_not_generate_with_is_refused(tmp_path) -> None:
    directory = model_directory(tmp_path / "model", **BERT)
    with pytest.raises(FormatError, match="not those with causal, token_types, masked_head, norm_"):
        load_model(directory)


def test_a_gpu_that_is_not_there_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also where there is one
    with pytest.raises(ValueError, match="device cuda: no GPU is to be seen here; use cpu"):
        load_model(model_directory(tmp_path / "model"), device="cuda")


@pytest.mark.peer
@pytest.mark.parametrize("flags", VARIANTS)
def test_greedy_equals_transformers(tmp_path, flags: dict) -> None:
    from transformers import AutoModelForCausalLM

    directory = model_directory(tmp_path / "model", **flags)
    ours = load_model(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    asked = prompts(20)
    answers = generate_batch(ours.model, ours.tokenizer, asked, Sampling(max_tokens=60), slots=6)
    for prompt, answer in zip(asked, answers, strict=True):
        output = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=60, do_sample=False, pad_token_id=3
        )
        assert answer.tokens == output[0, len(prompt) :].tolist()
