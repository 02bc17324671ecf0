"""Grammars that take too long or too much cost their own request an answer, and nobody else."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from model.chat import Tokenizer
from serve import grammar_check
from serve.errors import ApiError
from serve.grammar import LIMITS, Compiled, Grammar, GrammarError, Limits, vocabulary
from serve.grammar_check import GrammarCheck
from serve.token_mask import ConstraintError, GrammarCompiler
from tests.serve.calls import TEXT, bomb, error, post
from tests.serve.conftest import Endpoint, eventually
from tests.tiny_models import model_directory

NUMBERS = ("regex", "[0-9]{3}", "form")


def of_names(count: int, schema: object) -> str:
    return json.dumps({"type": "object", "properties": {str(n): schema for n in range(count)}})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("models") / "one")


@pytest.fixture
def check(directory: Path) -> Iterator[GrammarCheck]:
    started = GrammarCheck(directory)
    yield started
    started.close()


def asked(check: GrammarCheck, *grammar: str) -> Grammar:
    return asyncio.run(check.check(*grammar))


def children() -> list[psutil.Process]:
    own = psutil.Process().children()
    return [child for child in own if "serve.grammar" in child.cmdline()]


def test_a_bomb_is_refused_in_time_and_others_go_on(check: GrammarCheck) -> None:
    assert not children()  # before somebody asks
    assert asked(check, *NUMBERS) == Grammar(*NUMBERS, LIMITS)
    begun = time.monotonic()
    with pytest.raises(
        ApiError, match="takes more than 1 s or 1024 MB; make it simpler"
    ) as refusal:
        asked(check, "json_schema", bomb(), "form")
    assert time.monotonic() - begun < 20  # a minute without the limit, on an idle machine
    assert (refusal.value.status, refusal.value.param) == (400, "form")
    assert asked(check, "regex", "[0-9]{4}", "form")
    assert len(children()) == 1
    check.close()
    assert not children()


def test_memory_is_limited(check: GrammarCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "SECONDS", 120.0)
    monkeypatch.setattr(grammar_check, "MEGABYTES", 60)
    with pytest.raises(ApiError, match="takes more than"):
        asked(check, "json_schema", of_names(5000, {}), "form")
    assert asked(check, *NUMBERS)


def test_a_process_that_somebody_else_kills_is_replaced(check: GrammarCheck) -> None:
    asked(check, *NUMBERS)
    (before,) = children()
    before.kill()
    assert asked(check, "regex", "[0-9]{4}", "form")
    (after,) = children()
    assert after != before


def test_a_process_that_cannot_begin_is_no_fault_of_the_form(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = GrammarCheck(tmp_path / "nowhere")
    with pytest.raises(ApiError, match="forms cannot be compiled now") as refusal:
        asked(lost, *NUMBERS)
    assert refusal.value.status == 503
    assert "the compiler of forms ends at once, with status 1" in caplog.text
    lost.close()


def test_closing_ends_what_is_being_compiled(check: GrammarCheck) -> None:
    async def closed_meanwhile() -> object:
        asking = asyncio.create_task(check.check("json_schema", bomb("0"), "form"))
        while not children():
            await asyncio.sleep(0.01)
        await asyncio.to_thread(check.close)
        assert not children()
        return await asyncio.gather(asking, return_exceptions=True)

    (refusal,) = asyncio.run(closed_meanwhile())
    assert isinstance(refusal, ApiError) and refusal.status == 503


def test_what_is_known_needs_no_process(
    check: GrammarCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(check, *NUMBERS)
    with pytest.raises(ApiError, match="not a usable regex") as first:
        asked(check, "regex", "(", "form")
    monkeypatch.setattr(check, "_threads", None)
    assert asked(check, *NUMBERS)
    with pytest.raises(ApiError) as second:
        asked(check, "regex", "(", "form")
    assert str(first.value) == str(second.value)


def test_who_waits_too_long_for_others_is_told_to_come_back(
    check: GrammarCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_check, "PATIENCE", 0.5)

    async def together() -> list[object]:
        bombs = [check.check("json_schema", bomb(str(n)), "form") for n in range(12)]
        return await asyncio.gather(*bombs, return_exceptions=True)

    begun = time.monotonic()
    refusals = asyncio.run(together())
    assert {refusal.status for refusal in refusals} == {400, 429}
    assert time.monotonic() - begun < 20  # one after the other they would take longer
    assert asked(check, *NUMBERS)


def test_the_process_ends_with_whoever_started_it(directory: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "import psutil\n"
        "from serve.grammar_check import GrammarCheck\n"
        "check = GrammarCheck(Path(sys.argv[1]))\n"
        "asyncio.run(check.check('regex', 'a', 'form'))\n"
        "(child,) = psutil.Process().children()\n"
        "print(child.pid, flush=True)\n"
        "asyncio.run(check.check('json_schema', sys.argv[2], 'form'))\n"
    )
    for last in (bomb(), "{}"):
        starter = subprocess.Popen(
            [sys.executable, "-c", program, str(directory), last], stdout=subprocess.PIPE, text=True
        )
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        time.sleep(0.3)  # the bomb is on its way
        starter.send_signal(signal.SIGKILL)
        starter.wait()
        assert eventually(lambda pid=pid: not psutil.pid_exists(pid))


def test_the_process_does_without_torch() -> None:
    program = "import serve.grammar, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    "schema",
    [
        of_names(1500, {"type": "integer"}),
        json.dumps({"anyOf": [{"type": "array", "items": {"const": n}} for n in range(400)]}),
        json.dumps(
            {"type": "array", "minItems": 1, "items": json.loads(of_names(1500, {"const": 1}))}
        ),
    ],
    ids=["names", "arrays", "names in an array"],
)
def test_a_form_too_large_from_its_first_bytes_is_refused_at_once(
    check: GrammarCheck, schema: str
) -> None:
    with pytest.raises(ApiError, match=r"Current row has \d+ items") as refusal:
        asked(check, "json_schema", schema, "form")
    assert (refusal.value.status, refusal.value.param) == (400, "form")
    assert asked(check, "json_schema", of_names(300, {"type": "integer"}), "form")


def test_bombs_hold_up_neither_plain_requests_nor_forms(endpoint: Endpoint) -> None:
    stopping = threading.Event()
    statuses: set[int] = set()

    def throw(number: int) -> None:
        while not stopping.is_set():
            schema = json.loads(bomb(f"{number} {time.monotonic()}"))
            form = {"structured_outputs": {"json": schema}}
            statuses.add(error(endpoint, "/v1/completions", json=TEXT | form)[0])

    with ThreadPoolExecutor() as throwers:
        for number in range(2):
            throwers.submit(throw, number)
        try:
            time.sleep(1)
            begun = time.monotonic()
            post(endpoint, "/v1/completions", TEXT | {"max_tokens": 2})
            plain = time.monotonic() - begun
            form = {"structured_outputs": {"choice": ["yes", f"no {begun}"]}, "max_tokens": 2}
            begun = time.monotonic()
            post(endpoint, "/v1/completions", TEXT | form)
            constrained = time.monotonic() - begun
        finally:
            stopping.set()
    assert statuses <= {400, 429} and statuses
    assert plain < 5 and constrained < 15  # the two bombs alone would take a minute
    assert endpoint.idle()


def test_a_grammar_that_was_slow_to_compile_is_not_compiled_between_steps(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was quick is, where the states that others met are in the way."""
    tokenizer = Tokenizer.load(directory)
    grammar = Grammar("regex", "[ab]{40,}a[ab]{16}c", "form", Limits(states=60))

    def made(seconds: float) -> int:
        compiler = GrammarCompiler(tokenizer)
        mask = compiler.compile(grammar)()
        compiled = mask._compiled
        compiled.seconds = seconds
        count = []
        monkeypatch.setattr(
            compiled, "_make", lambda make=compiled._make: count.append(1) or make()
        )
        letters = random.Random(1)
        with pytest.raises(ConstraintError, match="too many states"):
            for _ in range(200):
                mask.allowed()
                mask.push(tokenizer.encode(letters.choice("ab"))[-1])
        return len(count)

    assert (made(0.001), made(1.0)) == (1, 0)


def test_why_there_is_no_grammar_is_told(directory: Path) -> None:
    known = vocabulary(Tokenizer.load(directory))
    for kind, text, told in (
        ("regex", "(", "unclosed group"),
        ("json_schema", "{", "EOF|expected"),
        ("json_schema", '{"allOf":[{"type":"string"},{"type":"number"}]}', "satisf|no text"),
        ("regex", "\ud800", "surrogate"),
    ):
        with pytest.raises(GrammarError, match=told):
            Compiled(known, kind, text, LIMITS)
