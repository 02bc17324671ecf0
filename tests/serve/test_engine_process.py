"""The engine in its own process does what the engine does, and its end is told."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import uvloop

from model.engine import (
    Engine,
    EngineBusy,
    EngineClosed,
    PromptError,
    Sampling,
    Update,
    generate_batch,
    load_model,
)
from serve.engine_process import EngineProcess
from serve.grammar import LIMITS, Grammar
from serve.mailbox import Mailbox
from serve.specification import EngineOptions
from tests.serve.conftest import eventually
from tests.tiny_models import model_directory

PROMPT = list(range(30, 60))
LONG = Sampling(max_tokens=90, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("models") / "one")


@pytest.fixture
def engine(directory: Path) -> Iterator[EngineProcess]:
    started = EngineProcess(directory, EngineOptions(slots=2, max_waiting=1))
    yield started
    started.close()


class Heard:
    """A listener and what it heard."""

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.ended = threading.Event()

    def __call__(self, updates: list[Update]) -> None:
        self.updates += updates
        if updates[-1].finish_reason is not None:
            self.ended.set()

    @property
    def reason(self) -> str | None:
        assert self.ended.wait(60)
        return self.updates[-1].finish_reason


def answer(engine: EngineProcess | Engine, sampling: Sampling, **options: bool) -> Heard:
    heard = Heard()
    engine.submit(PROMPT, sampling, heard, **options)
    assert heard.reason
    return heard


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=20),
        Sampling(max_tokens=20, temperature=1.0, seed=7, top_k=40, logprobs=3),
        Sampling(max_tokens=20, logit_bias=((40, 5.0),), frequency_penalty=1.0),
    ],
)
def test_answers_are_those_of_an_engine_here(
    engine: EngineProcess, directory: Path, sampling: Sampling
) -> None:
    loaded = load_model(directory)
    (expected,) = generate_batch(loaded.model, loaded.tokenizer, [PROMPT], [sampling])
    heard = answer(engine, sampling)
    assert [token for update in heard.updates for token in update.tokens] == expected.tokens
    assert "".join(update.text for update in heard.updates) == expected.text
    told = [entry.token for update in heard.updates for entry in update.logprobs]
    assert told == (expected.tokens if sampling.logprobs is not None else [])


def test_a_grammar_is_compiled_over_there(engine: EngineProcess) -> None:
    grammar = Grammar("regex", "[0-9]{3}-[a-f]{2}", "regex", LIMITS)
    heard = answer(engine, Sampling(max_tokens=30, temperature=1.0, seed=1, constraint=grammar))
    text = "".join(update.text for update in heard.updates)
    assert heard.reason == "stop"
    assert len(text) == 6 and text[:3].isdigit() and text[3] == "-" and set(text[4:]) <= {*"abcdef"}


def test_an_embedding_comes_across(engine: EngineProcess) -> None:
    (update,) = answer(engine, Sampling(), embed=True, streamed=False).updates
    assert update.embedding is not None and update.embedding.shape == (64,)


def test_what_cannot_be_read_is_refused_at_once(engine: EngineProcess) -> None:
    for prompt in ([], [10**6], list(range(20, 160))):
        with pytest.raises(PromptError):
            engine.submit(prompt, Sampling(), Heard())
    assert engine.idle


def test_more_than_slots_and_queue_hold_are_refused(engine: EngineProcess) -> None:
    heard = [Heard() for _ in range(3)]
    for listener in heard:
        engine.submit(PROMPT, LONG, listener)
    with pytest.raises(EngineBusy):
        engine.submit(PROMPT, LONG, Heard())
    assert {listener.reason for listener in heard} == {"length"}


def test_all_answers_of_a_request_find_room_or_none_does(engine: EngineProcess) -> None:
    mailbox = Mailbox()

    async def ask(answers: int) -> int:
        with mailbox.open(engine, [(PROMPT, LONG)] * answers, streamed=False) as mail:
            return len([update async for _, update in mail.updates()])

    async def beside(others: int, answers: int) -> int:
        running = asyncio.create_task(ask(others))
        await asyncio.sleep(0)
        try:
            return await ask(answers)
        finally:
            assert await running == others

    assert asyncio.run(beside(1, 2)) == 2
    for others, answers in ((1, 3), (2, 2), (5, 1)):
        with pytest.raises(EngineBusy, match=r"waiting already|do not fit beside the [125] under"):
            asyncio.run(beside(others, answers))
    assert asyncio.run(ask(5)) == 5  # more than ever fits: only while nobody else is here
    assert engine.idle


@pytest.mark.parametrize("loops", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_event_loops_hear_the_engine_one_after_the_other(
    engine: EngineProcess, loops: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Messages larger than a socket's buffer come whole, and loops may end."""
    prompt = [30 + number % 60 for number in range(100)]
    sampling = Sampling(max_tokens=20, logprobs=20, prompt_logprobs=True)
    mailbox = Mailbox()

    async def asked() -> int:
        heard = 0
        for _ in range(3):
            with mailbox.open(engine, [(prompt, sampling)] * 2, streamed=False) as mail:
                async for _, update in mail.updates():
                    heard += len(update.prompt_logprobs)
        return heard

    for _ in range(3):
        with asyncio.Runner(loop_factory=loops) as runner:
            assert runner.run(asked()) == 600
    assert answer(engine, Sampling(max_tokens=3)).reason == "length"
    assert engine.healthy


def test_more_than_the_sockets_hold_both_ways_stalls_nobody(directory: Path) -> None:
    """A loop that sends reads nothing meanwhile, and what the engine has to tell is large."""
    engine = EngineProcess(directory, EngineOptions(slots=8, max_waiting=2000))
    prompt = [30 + number % 60 for number in range(100)]
    sampling = Sampling(max_tokens=1, logprobs=20, prompt_logprobs=True)
    mailbox = Mailbox()

    async def asked(count: int) -> int:
        with mailbox.open(engine, [(prompt, sampling)] * count, streamed=False) as mail:
            return len([update async for _, update in mail.updates()])

    async def in_time(count: int) -> int:
        return await asyncio.wait_for(asked(count), 100)

    async def both() -> list[int]:
        return [await in_time(1), await in_time(1500)]  # from the first on the loop hears

    try:
        watch = threading.Timer(150, os.kill, (engine.pid, signal.SIGKILL))
        watch.start()
        assert asyncio.run(both()) == [1, 1500]
        assert engine.healthy
    finally:
        watch.cancel()
        engine.close()


def test_an_aborted_sequence_tells_its_end_and_holds_nothing(engine: EngineProcess) -> None:
    heard = Heard()

    def abort_at_once(updates: list[Update]) -> None:
        heard(updates)
        engine.abort("x")

    engine.submit(PROMPT, LONG, abort_at_once, id="x")
    assert heard.reason == "abort"
    assert eventually(lambda: engine.counters().pages_used == 0 and engine.idle)
    counters, last = engine.counters(), heard.updates[-1]
    assert counters.aborted == 1
    assert 0 < last.completion_tokens == counters.generation_tokens < 90
    grammar = Grammar("regex", "a{50}", "regex", LIMITS)
    engine.submit(PROMPT, replace(LONG, constraint=grammar), waiting := Heard(), id="y")
    engine.abort("y")  # while its grammar is compiled over there
    assert waiting.reason == "abort" and engine.idle


def test_a_killed_process_ends_every_request_with_an_error(engine: EngineProcess) -> None:
    heard = Heard()
    engine.submit(PROMPT, LONG, heard)
    os.kill(engine.pid, signal.SIGKILL)
    assert heard.reason in ("error", "length")
    assert eventually(lambda: not engine.healthy)
    with pytest.raises(EngineClosed):
        engine.submit(PROMPT, LONG, Heard())


def test_closing_ends_what_is_under_way_and_the_process(directory: Path) -> None:
    engine = EngineProcess(directory, EngineOptions(slots=1, max_waiting=9))
    heard = [Heard() for _ in range(8)]
    for listener in heard:
        engine.submit(PROMPT, LONG, listener)
    engine.close()
    assert heard[-1].reason == "abort"
    assert not psutil.pid_exists(engine.pid)
    with pytest.raises(EngineClosed):
        engine.submit(PROMPT, LONG, Heard())


def test_the_process_does_not_outlive_who_started_it(directory: Path) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from serve.engine_process import EngineProcess\n"
        "from serve.specification import EngineOptions\n"
        "print(EngineProcess(Path(sys.argv[1]), EngineOptions(slots=1)).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", program, str(directory)], stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    assert psutil.pid_exists(pid)
    starter.kill()
    starter.wait()
    assert eventually(lambda: not psutil.pid_exists(pid))


def test_why_a_model_cannot_be_loaded_is_told(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((directory / "tokenizer.model").read_bytes())
    with pytest.raises(RuntimeError, match=r"config\.json"):
        EngineProcess(tmp_path, EngineOptions())
