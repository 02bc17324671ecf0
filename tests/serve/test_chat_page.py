"""The chat page as a person uses it, in headless Chromium against a real endpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.app import create_app
from serve.keys import KeyRing
from tasks.state.api_keys import ApiKeys
from tests.browser import Page, browser
from tests.serve.conftest import Endpoint, eventually, listening, spec
from tests.tiny_models import model_directory

pytestmark = pytest.mark.browser

IDLE = "document.querySelector('#send').textContent === 'Send'"
ANSWERS = "[...document.querySelectorAll('.turn.theirs .text')].map(e => e.textContent)"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.fixture
def page(chromium: Page, endpoint: Endpoint) -> Page:
    """The page as on a first visit."""
    serve(endpoint, spec(examples=("What does `one` do?", "Two?")))
    chromium.size(1100, 800)
    chromium.open(endpoint.url)
    chromium.run("localStorage.clear()")
    chromium.open(endpoint.url)
    chromium.wait("document.querySelector('#model').textContent.includes('version 1')")
    chromium.errors.clear()
    return chromium


def serve(endpoint: Endpoint, wanted: object) -> None:
    endpoint.host.want(wanted)
    assert eventually(lambda: endpoint.host.current and endpoint.host.current.spec == wanted)


def ask(page: Page, question: str, *, wait: bool = True) -> None:
    count = page.run("document.querySelectorAll('.turn.theirs').length")
    page.run("document.querySelector('#question').focus()")
    page.type(question)
    page.press("Enter")
    page.wait(f"document.querySelectorAll('.turn.theirs').length === {count + 1}")
    if wait:
        page.wait(IDLE)


def greedy(endpoint: Endpoint, question: str) -> str:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 160,
    }
    with endpoint.client() as client:
        reply = client.post("/v1/chat/completions", json=body).json()
    return reply["choices"][0]["message"]["content"]


def choose(page: Page, setting: str, value: float | str) -> None:
    """Change a setting as its control does."""
    control = f"document.querySelector('#{setting}')"
    page.run(f"{control}.value = {json.dumps(value)}")
    page.run(f"{control}.dispatchEvent(new Event('input', {{bubbles: true}}))")


def test_a_question_is_answered_and_the_conversation_is_kept(
    page: Page, endpoint: Endpoint
) -> None:
    ask(page, "def main():")
    expected = greedy(endpoint, "def main():").replace("`", "")
    (text,) = page.run(ANSWERS)
    assert text.replace("`", "") == expected
    foot = page.run("document.querySelector('.foot').textContent")
    assert "tokens" in foot and "ms" in foot and "version 1" in foot
    page.open(endpoint.url)
    page.wait("document.querySelectorAll('.turn.theirs').length === 1")
    assert page.run(ANSWERS) == [text]
    page.press("n", "KeyN", modifiers=1)
    page.wait("document.querySelectorAll('.turn').length === 0")
    assert page.run("!document.querySelector('#welcome').hidden")
    assert not page.errors


def test_an_example_is_one_click(page: Page) -> None:
    assert page.run("document.querySelectorAll('#examples button').length") == 2
    page.run(
        "[...document.querySelectorAll('#examples button')].find(b => b.firstElementChild).click()"
    )
    page.wait(f"document.querySelectorAll('.turn').length === 2 && {IDLE}")
    assert page.run("document.querySelector('.turn.mine').textContent") == "What does `one` do?"
    assert not page.errors


def test_regenerating_asks_the_same_again(page: Page) -> None:
    ask(page, "def main():")
    before = page.run(ANSWERS)
    page.run("[...document.querySelectorAll('.foot button')].at(-1).click()")
    page.wait(f"document.querySelector('.foot span') && {IDLE}")
    assert page.run(ANSWERS) == before


def test_escape_stops_an_answer_and_frees_the_engine(
    page: Page, endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory
) -> None:
    slow = {"context": 4096, "width": 384, "heads": 6, "layers": 8, "mlp_width": 1024}
    endpoint.models["slow"] = model_directory(tmp_path_factory.mktemp("slow") / "m", 0, **slow)
    serve(endpoint, spec("slow", "slow"))
    choose(page, "max_tokens", 4000)
    ask(page, "import os", wait=False)
    page.wait("document.querySelector('#send').textContent === 'Stop'")
    page.wait("document.querySelector('.turn.theirs .text').textContent.length > 20")
    page.press("Escape")
    page.wait(IDLE)
    foot = page.run("document.querySelector('.foot').textContent")
    assert re.search(r"stopped · at least \d+ tokens · first after \d+ ms · \d+ tokens/s", foot)
    assert "version slow" in foot
    assert endpoint.idle()


def test_text_is_never_markup(page: Page) -> None:
    attack = "<img src=x onerror=window.hit=1><script>window.hit=1</script>`<b>`"
    ask(page, attack)
    assert page.run("document.querySelector('.turn.mine').textContent") == attack
    page.run(
        "localStorage.setItem('gristmill.turns', JSON.stringify([{question: 'q', meta: '<i>m</i>',"
        " answer: '<img src=x onerror=window.hit=1>\\n```html\\n<b>bold</b>\\n``` `<u>`',"
        " problem: '<img src=x onerror=window.hit=1>'}]))"
    )
    page.open(page.run("location.href"))
    page.wait("document.querySelectorAll('.turn').length === 2")
    assert page.run("document.querySelectorAll('#log :is(img, script, b, u, i)').length") == 0
    assert page.run("document.querySelector('#log pre').textContent") == "<b>bold</b>\n"
    assert page.run("window.hit ?? 0") == 0


def test_the_oldest_turns_are_left_out_visibly_when_the_context_is_full(page: Page) -> None:
    page.run("document.querySelector('#tune').click()")
    page.run("document.querySelector('#history').click()")
    choose(page, "max_tokens", 12)
    choose(page, "temperature", 2)  # so that every answer has some text
    for number in range(6):
        ask(page, f"import os, number {number}")
        assert not page.run("document.querySelector('.problem')?.textContent")
    assert "left out: the context is full" in page.run(
        "document.querySelector('.note').textContent"
    )
    unsent = page.run("document.querySelectorAll('.turn.unsent').length")
    assert 0 < unsent < 10
    assert not page.errors


def test_a_conversation_beyond_any_context_goes_on(page: Page, endpoint: Endpoint) -> None:
    long = [{"question": f"{n} " + "w" * 60, "answer": "x" * 60} for n in range(190)]
    page.run(f"localStorage.setItem('gristmill.turns', JSON.stringify({json.dumps(long)}))")
    page.open(endpoint.url)
    page.wait("document.querySelector('#model').textContent.includes('version 1')")
    page.run("document.querySelector('#tune').click()")
    page.run("document.querySelector('#history').click()")
    choose(page, "max_tokens", 12)
    page.run("performance.clearResourceTimings()")
    ask(page, "import os")
    assert not page.run("document.querySelector('.problem')?.textContent")
    assert page.run("document.querySelectorAll('.turn.unsent').length") >= 2 * 188
    asked = "performance.getEntriesByType('resource').filter(e => e.name.endsWith('/tokenize'))"
    assert 1 < page.run(f"{asked}.length") <= 9
    assert page.run(ANSWERS)[-1] or page.run("document.querySelector('.turn:last-child .nothing')")


def test_every_sampling_control_reaches_the_request(page: Page) -> None:
    page.run("document.querySelector('#tune').click()")
    page.run(
        "window.bodies = []; const before = window.fetch; window.fetch = (path, options) => {"
        " if (options?.body) window.bodies.push(JSON.parse(options.body));"
        " return before(path, options); }"
    )
    ask(page, "import os")
    chosen = {"temperature": 1.5, "top_p": 0.5, "top_k": 9, "min_p": 0.1, "max_tokens": 5}
    chosen |= {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": -0.5}
    for setting, value in chosen.items():
        choose(page, setting, value)
    ask(page, "import os")
    plain, sampled = page.run("window.bodies")
    assert {name: sampled[name] for name in chosen} == chosen
    assert not any("penalty" in name or name == "min_p" for name in plain)
    assert not page.run("document.querySelector('.problem')?.textContent")
    page.run("document.querySelector('#reset').click()")
    assert page.run("document.querySelector('#repetition_penalty').value") == "1"


def test_a_refusal_is_said_in_the_conversation(page: Page) -> None:
    ask(page, "very long " * 200)
    assert "maximum context length" in page.run("document.querySelector('.problem').textContent")


def test_a_new_version_shows_itself(page: Page, endpoint: Endpoint) -> None:
    serve(endpoint, spec("two", "2"))
    ask(page, "def main():")
    page.wait("document.querySelector('#model').textContent.includes('version 2')")
    assert "version 2" in page.run("document.querySelector('.foot').textContent")


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_is_readable(page: Page, dark: bool) -> None:
    page.size(360, 700, mobile=True, dark=dark)
    ask(page, "w" * 60)
    for opened in ("#tune", "#tune", "#model"):
        page.run(f"document.querySelector('{opened}').click()")
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth")
    ink, paper = page.run(
        "['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name]"
        ".match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 765)"
    )
    assert abs(ink - paper) > 0.7
    assert (paper < 0.5) == dark


def test_a_version_can_be_picked_and_told_who_it_is(page: Page, endpoint: Endpoint) -> None:
    other = spec("two", "2", share=0.0)
    serve(endpoint, spec(beside=(other,)))
    page.open(page.run("location.href"))
    page.wait("document.querySelectorAll('#served option').length === 3")
    page.run("document.querySelector('#tune').click()")
    names = "[...document.querySelectorAll('#served option')].map(e => e.value)"
    assert page.run(names) == ["tiny", "tiny@1", "tiny@2"]
    choose(page, "served", "tiny@2")
    page.wait("document.querySelector('#model').textContent === 'tiny@2 · version 2'")
    choose(page, "system", "You are brief.")
    ask(page, "def main():")
    body = {
        "model": "tiny@2",
        "messages": [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "def main():"},
        ],
        "temperature": 0,
        "max_tokens": 160,
    }
    with endpoint.client() as client:
        wanted = client.post("/v1/chat/completions", json=body).json()
    assert page.run(ANSWERS)[-1] == wanted["choices"][0]["message"]["content"]
    assert wanted["system_fingerprint"] == "tiny-2-two"
    assert "version 2" in page.run("document.querySelector('.foot').textContent")
    page.open(page.run("location.href"))  # both are kept
    page.wait("document.querySelector('#model').textContent === 'tiny@2 · version 2'")
    assert page.run("document.querySelector('#system').value") == "You are brief."
    page.run("document.querySelector('#reset').click()")
    assert page.run("document.querySelector('#model').textContent") == "tiny · version 1"
    assert page.run("document.querySelector('#served').value") == "tiny"
    assert page.run("document.querySelector('#system').value") == ""
    assert not page.errors


def test_an_endpoint_with_keys_asks_for_one(
    chromium: Page, endpoint: Endpoint, tmp_path: Path
) -> None:
    store = ApiKeys(f"sqlite:///{tmp_path / 'state.db'}")
    key, program = store.create("a person"), store.create("a program", ("generate",))
    serve(endpoint, spec())
    with listening(create_app(endpoint.host, "guarded", KeyRing(store))) as url:
        chromium.open(url)
        pill = "document.querySelector('#model').textContent"
        chromium.wait(f"{pill} === 'an API key is needed: Settings'")
        choose(chromium, "key", key)
        chromium.wait(f"{pill}.includes('version 1')")
        chromium.wait("!document.querySelector('#send').disabled")
        ask(chromium, "def main():")
        assert chromium.run(ANSWERS)[-1] == greedy(endpoint, "def main():")
        chromium.run("document.querySelector('#reset').click()")
        assert chromium.run("document.querySelector('#key').value") == key
        ask(chromium, "import os")
        assert chromium.run(ANSWERS)[-1] == greedy(endpoint, "import os")
        choose(chromium, "key", program)
        chromium.wait(f"{pill} === 'this API key lacks the scope read: Settings'")
