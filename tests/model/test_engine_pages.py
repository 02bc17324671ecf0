"""Pages: reserved, found again, moved, never leaked, and never with somebody else's content."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine import Core, Sampling, generate_batch
from model.engine.pages import PAGE, PageTable, Run, page_hashes
from model.engine.runner import Span
from model.engine.weights import usual_rows
from tests.tiny_models import DEEPSEEK2, DEEPSEEK3, VOCABULARY, transformer

GREEDY = Sampling(max_tokens=20)


def some_tokens(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(20, VOCABULARY) for _ in range(count)]


def finish(core: Core) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    while core.has_work:
        for update in core.step():
            answers.setdefault(update.id, []).extend(update.tokens)
        core.check()
    return answers


def ask(core: Core, prompt: list[int], sampling: Sampling = GREEDY) -> tuple[list[int], int]:
    """The answer and how many prompt tokens were found in the cache."""
    core.add(core.sequence("x", prompt, sampling))
    tokens: list[int] = []
    cached = 0
    while core.has_work:
        for update in core.step():
            tokens += update.tokens
            cached = update.cached_tokens
    core.check()
    return tokens, cached


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_table_keeps_its_invariants_and_its_contents_through_any_order(data) -> None:
    table = PageTable(12)
    memory: list[bytes | None] = [None] * 12  # what really lies in each page
    running: list[tuple[Run, list[bytes]]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        if running and data.draw(st.booleans()):
            run, _ = running.pop(data.draw(st.integers(0, len(running) - 1)))
            table.release(run)
        tokens = [data.draw(st.integers(0, 1)) for _ in range(data.draw(st.integers(0, 4)))]
        hashes = list(page_hashes(b"root", [t for token in tokens for t in [token] * PAGE]))
        count = len(hashes) + data.draw(st.integers(1, 4))
        hits = table.hits(hashes)
        assert [memory[page] for page in hits] == hashes[: len(hits)]
        found = table.allocate(count, hits)
        if found is None and table.free >= count:
            old = [run for run, _ in running]
            moved = table.compact(old)
            for source, target in sorted(
                zip(old, moved, strict=True), key=lambda pair: pair[0].first
            ):
                for page in range(source.count):
                    memory[target.first + page] = memory[source.first + page]
            running = [(run, known) for run, (_, known) in zip(moved, running, strict=True)]
            found = table.allocate(count, table.hits(hashes))
            assert found is not None
        if found is None:
            continue
        for copy in found.copies:
            memory[copy.target] = memory[copy.source]
        for page, hash in enumerate(hashes):
            place = found.run.first + page
            if page < found.hits:
                assert memory[place] == hash
            else:
                memory[place] = hash
                table.fill(place, hash)
        running.append((found.run, hashes))
        table.check([run for run, _ in running])
        for run, known in running:
            assert [memory[page] for page in run.pages][: len(known)] == known


def test_hashes_say_everything_that_came_before() -> None:
    tokens = list(range(3 * PAGE))
    one, two, three = page_hashes(b"a", tokens)
    assert list(page_hashes(b"a", tokens[: 2 * PAGE + 3])) == [one, two]
    other = list(page_hashes(b"a", [9, *tokens[1:]]))
    assert not {one, two, three} & set(other)
    assert one != next(page_hashes(b"b", tokens))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("flags", [{}, DEEPSEEK3])
def test_a_second_prompt_reads_only_what_is_new(flags: dict, deterministic: bool) -> None:
    model = transformer(context=512, **flags)
    shared, one, two = some_tokens(300, 1), some_tokens(30, 2), some_tokens(20, 3)
    core = Core(model, None, slots=2, deterministic=deterministic)
    first, cached = ask(core, shared + one)
    assert cached == 0
    second, cached = ask(core, shared + two)
    assert cached == (256 if deterministic else 300 // PAGE * PAGE)
    again, cached = ask(core, shared + one)
    assert cached >= 256 and again == first
    for prompt, answer in ((shared + one, first), (shared + two, second)):
        (alone,) = generate_batch(model, None, [prompt], GREEDY, reuse=False)
        assert alone.tokens == answer


def test_a_conversation_goes_on_where_it_lies() -> None:
    core = Core(transformer(context=512), None, slots=1)
    talk = some_tokens(100, 1)
    answer, _ = ask(core, talk)
    talk += [*answer, *some_tokens(10, 2)]
    assert ask(core, talk)[1] == (len(talk) - 10 - 1) // PAGE * PAGE  # answers are found too


def test_choices_of_one_prompt_read_it_once() -> None:
    core = Core(transformer(context=512), None, slots=8)
    prompt = some_tokens(200, 4)
    for choice in range(6):
        sampling = Sampling(temperature=1.0, seed=1, choice=choice, max_tokens=5)
        core.add(core.sequence(str(choice), prompt, sampling))
    assert len(finish(core)) == 6
    assert core.counters.cached_tokens == 5 * (200 // PAGE * PAGE)


def test_another_version_finds_nothing() -> None:
    hashes = [next(page_hashes(root, range(PAGE))) for root in (b"version 1", b"version 2")]
    assert hashes[0] != hashes[1]
    one, two = (Core(transformer(), None, version=name) for name in ("1", "2"))
    assert one.scheduler.root != two.scheduler.root


def test_a_small_cache_serves_everybody_in_turn() -> None:
    model, draw = transformer(), random.Random(3)
    core = Core(model, None, slots=16, kv_tokens=256, prefill_tokens=50)
    shared = some_tokens(40, 9)
    prompts = [
        shared[: draw.randint(1, 40)] + some_tokens(draw.randint(1, 60), n) for n in range(40)
    ]
    limits = [draw.randint(1, 27) for _ in prompts]
    for n, prompt in enumerate(prompts):
        core.add(core.sequence(str(n), prompt, Sampling(max_tokens=limits[n])))
    answers = finish(core)
    alone = generate_batch(model, None, prompts, [Sampling(max_tokens=n) for n in limits], slots=1)
    assert [answers[str(n)] for n in range(40)] == [a.tokens for a in alone]
    assert core.counters.cached_tokens > 0
    assert core.scheduler.pages.free == core.counters.pages == 16
    with pytest.raises(ValueError, match="not even one context"):
        Core(model, None, kv_tokens=64)


def test_compaction_moves_answers_under_way_without_a_trace() -> None:
    model = transformer()
    core = Core(model, None, slots=8, kv_tokens=128, prefill_tokens=300)
    prompts = [some_tokens(14, n) for n in range(7)]
    for n, prompt in enumerate(prompts):
        core.add(core.sequence(str(n), prompt, Sampling(max_tokens=2 if n % 2 else 3)))
    core.step()
    long = some_tokens(60, 99)
    core.add(core.sequence("long", long, Sampling(max_tokens=4)))
    answers: dict[str, list[int]] = {str(n): [] for n in range(7)} | {"long": []}
    moves = 0
    core.abort(["0", "2", "4", "6"])  # every other run is free: four pages, none beside another
    while core.has_work:
        for update in core.step():
            answers[update.id] += update.tokens
        moves += sum(source != target for source, target in core.scheduler.moved)
        core.check()
    assert moves
    (alone,) = generate_batch(model, None, [long], Sampling(max_tokens=4))
    assert answers["long"] == alone.tokens


def test_long_prompts_do_not_hold_up_answers() -> None:
    core = Core(transformer(context=512), None, slots=4, prefill_tokens=64)
    core.add(core.sequence("short", some_tokens(5, 1), Sampling(max_tokens=40)))
    core.step()
    core.add(core.sequence("long", some_tokens(400, 2), Sampling(max_tokens=2)))
    steps = 0
    while not steps or any(s.reading for s in core.scheduler.find(["long"])):
        updates = core.step()
        assert next(u.id for u in updates if u.tokens) == "short"
        steps += 1
    assert steps >= 400 // 64


@pytest.mark.parametrize(
    "flags",
    [{}, {"sliding_window": 24}, {"heads": 4, "kv_heads": 2}, DEEPSEEK2, DEEPSEEK3],
)
def test_deterministic_logits_are_bitwise_equal_in_any_batch(flags: dict) -> None:
    model = transformer(context=512, **flags)
    prompts = [some_tokens(150, 1) + some_tokens(40, n) for n in range(4)]
    sampling = Sampling(temperature=1.0, seed=3, max_tokens=12, logprobs=20)

    def ways() -> list[list]:
        alone = [Core(model, None, slots=1, deterministic=True) for _ in prompts]
        crowd = Core(model, None, slots=4, deterministic=True)
        after = Core(model, None, slots=1, deterministic=True)
        ask(after, some_tokens(150, 1) + some_tokens(9, 77))  # leaves something to be found
        results = []
        for cores in (alone, [crowd] * 4, [after] * 4):
            for n, (core, prompt) in enumerate(zip(cores, prompts, strict=True)):
                core.add(core.sequence(str(n), prompt, sampling))
            found: dict[str, list] = {}
            for core in dict.fromkeys(cores):
                while core.has_work:
                    for update in core.step():
                        found.setdefault(update.id, []).extend(update.logprobs)
            results.append([found[str(n)] for n in range(4)])
        assert after.counters.cached_tokens > 0
        return results

    alone, crowd, hit = ways()
    assert alone == crowd == hit  # floats, compared exactly


@pytest.mark.parametrize("flags", [{}, DEEPSEEK2, DEEPSEEK3])
def test_embeddings_are_the_mean_of_the_last_hidden_states(flags: dict) -> None:
    model = transformer(context=512, **flags)
    prompt = some_tokens(200, 5)
    core = Core(model, None, prefill_tokens=60)
    for _ in range(2):
        core.add(core.sequence("e", prompt, Sampling(), embed=True))
        updates = [update for _ in range(20) if core.has_work for update in core.step()]
        (update,) = updates
        assert update.embedding is not None and not update.tokens
        expected = model.hidden(torch.tensor([prompt]))[0].mean(0)
        torch.testing.assert_close(update.embedding, expected, atol=1e-4, rtol=1e-4)


def test_steps_have_one_of_few_numbers_of_rows() -> None:
    sizes = [usual_rows(count) for count in range(1, 2049)]
    assert all(size >= count for count, size in enumerate(sizes, 1))
    assert sizes[:16] == list(range(1, 17)) and len(set(sizes)) < 50
    assert max(size / count for count, size in enumerate(sizes, 1)) < 1.5
    core = Core(transformer(), None, slots=3, kv_tokens=256)
    rows = []
    output = core.runner.output
    core.runner.output = lambda x: rows.append(len(x)) or output(x)
    hidden = core.runner.forward([Span(0, 0, [30] * 37), Span(4, 0, [31] * 30)])
    assert hidden.shape[0] == 67 and core.runner.logits(hidden).shape[0] == 67
    assert rows == [96]
    alone = core.runner.forward([Span(0, 0, [30] * 16)])
    assert torch.allclose(alone, hidden[:16], atol=1e-4)


def test_of_latent_attention_one_row_is_kept_for_all_heads() -> None:
    caches = [Core(transformer(**flags), None).runner.cache for flags in (DEEPSEEK2, {})]
    kept, plain = (cache.data[0, :, :, 0].numel() for cache in caches)  # numbers a token and layer
    assert kept == DEEPSEEK2["kv_latent"] + DEEPSEEK2["rope_dim"]
    assert plain == 2 * 64
