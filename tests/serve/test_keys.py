"""API keys: hashed at rest, with scopes and limits, revoked within seconds."""

from __future__ import annotations

import functools
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from flows import ask as command_line
from flows import cli
from model.engine import Update
from serve import keys as serving
from serve.app import create_app
from serve.keys import Bucket, KeyRing
from serve.responses import Usage
from tasks.runtime.errors import UserError
from tasks.runtime.settings import Settings
from tasks.state.api_keys import ApiKey, ApiKeys, digest
from tests.serve.calls import CHAT
from tests.serve.conftest import Endpoint, eventually, listening


@pytest.fixture
def store(tmp_path: Path) -> ApiKeys:
    return ApiKeys(f"sqlite:///{tmp_path / 'state.db'}")


@pytest.fixture
def client(
    endpoint: Endpoint, store: ApiKeys, monkeypatch: pytest.MonkeyPatch
) -> Iterator[httpx.Client]:
    monkeypatch.setattr(serving, "REFRESH_SECONDS", 0.0)
    with (
        listening(create_app(endpoint.host, "guarded", KeyRing(store))) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as http,
    ):
        yield http


def ask(client: httpx.Client, key: str | None, path: str = "/v1/chat/completions", **more):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    body = CHAT | {"max_tokens": 5, "temperature": 0} | more
    return client.post(path, json=body, headers=headers)


def test_without_a_key_in_the_database_everybody_may_ask(client: httpx.Client) -> None:
    assert ask(client, None).status_code == 200


def test_the_first_key_closes_the_door(client: httpx.Client, store: ApiKeys) -> None:
    key = store.create("somebody")
    for wrong in (None, "gm-0-0", key[:-1], key + "x", "é"):
        header = {} if wrong is None else {"Authorization": f"Bearer {wrong}".encode()}
        response = client.post("/v1/chat/completions", json=CHAT, headers=header)
        assert response.status_code == 401, wrong
        assert response.json()["error"]["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
    assert ask(client, key).status_code == 200
    assert client.get("/v1/models").status_code == 401
    for path in ("/", "/health", "/ready", "/metrics", "/static/chat.js"):
        assert client.get(path).status_code == 200, path
    store.revoke(key.split("-")[1])
    assert ask(client, key).status_code == 401
    assert ask(client, None).status_code == 401  # the last key's end does not open the door


def test_the_command_line_asks_with_the_key_of_its_environment(
    client: httpx.Client, store: ApiKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=tmp_path, serve_url=str(client.base_url).rstrip("/"))
    key = store.create("somebody")
    monkeypatch.delenv("GRISTMILL_API_KEY", raising=False)
    with pytest.raises(UserError, match="asks for an API key; put yours into GRISTMILL_API_KEY"):
        list(command_line.ask(settings, "why?"))
    monkeypatch.setenv("GRISTMILL_API_KEY", key[:-1])
    with pytest.raises(UserError, match="refuses the key in GRISTMILL_API_KEY"):
        list(command_line.ask(settings, "why?"))
    monkeypatch.setenv("GRISTMILL_API_KEY", key)
    assert list(command_line.ask(settings, "why?"))


def test_a_key_is_nowhere_in_the_database(store: ApiKeys, tmp_path: Path) -> None:
    key = store.create("somebody")
    raw = (tmp_path / "state.db").read_bytes()
    assert key.encode() not in raw and key.split("-", 2)[2].encode() not in raw


def test_scopes_are_kept(client: httpx.Client, store: ApiKeys) -> None:
    reader = store.create("reader", ("read",))
    headers = {"Authorization": f"Bearer {reader}"}
    assert client.get("/v1/models", headers=headers).status_code == 200
    response = ask(client, reader)
    assert response.status_code == 403
    assert response.json()["error"]["type"] == "permission_error"
    with pytest.raises(UserError, match="scope 'everything' is unknown"):
        store.create("x", ("everything",))


def test_an_expired_key_is_refused(client: httpx.Client, store: ApiKeys) -> None:
    key = store.create("short", days=1e-9)
    assert ask(client, key).status_code == 401


def test_limits_answer_429_and_say_when(
    client: httpx.Client, store: ApiKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "Bucket", functools.partial(Bucket, now=lambda: 0.0))
    few = store.create("few", requests_per_minute=2)
    assert [ask(client, few).status_code for _ in range(3)] == [200, 200, 429]
    refused = ask(client, few)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert "2 requests a minute" in refused.json()["error"]["message"]
    assert ask(client, store.create("free")).status_code == 200


def test_asking_for_models_is_a_request_too(
    client: httpx.Client, store: ApiKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "Bucket", functools.partial(Bucket, now=lambda: 0.0))
    headers = {"Authorization": f"Bearer {store.create('few', requests_per_minute=2)}"}
    got = [client.get("/v1/models", headers=headers).status_code for _ in range(3)]
    assert got == [200, 200, 429]


PATH = "/v1/completions"
FULL = {"model": "tiny", "prompt": [30, 31, 32, 33], "ignore_eos": True}  # answers to their limit


@dataclass
class Purse:
    """A key with a limit of tokens whose minute never passes, and what is left of it."""

    http: httpx.Client
    ring: KeyRing
    key: str

    def ask(self, path: str = PATH, **more: object) -> httpx.Response:
        return self.http.post(path, json=FULL | more)

    @property
    def left(self) -> float:
        bucket = self.ring._accounts[digest(self.key)].tokens
        assert bucket is not None
        return bucket._left


@pytest.fixture
def purse(
    endpoint: Endpoint,
    store: ApiKeys,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Purse]:
    """Of 1,000 tokens, or as many as the test names."""
    monkeypatch.setattr(serving, "Bucket", functools.partial(Bucket, now=lambda: 0.0))
    limit = getattr(request, "param", 1000)
    key, ring = store.create("limited", tokens_per_minute=limit), KeyRing(store)
    headers = {"Authorization": f"Bearer {key}"}
    with (
        listening(create_app(endpoint.host, "guarded", ring)) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False, headers=headers) as http,
    ):
        yield Purse(http, ring, key)


def test_tokens_are_taken_before_they_are_made(purse: Purse) -> None:
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(purse.ask, n=8, max_tokens=100) for _ in range(6)]
    answers = [one.result() for one in asked]
    assert sorted(answer.status_code for answer in answers) == [200] + [429] * 5
    assert purse.left == 1000 - 4 - 800
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "37"  # 608 are missing, of 1,000 a minute
    assert "no room for 804 more" in refused.json()["error"]["message"]


def test_what_was_not_used_is_given_back(purse: Purse) -> None:
    assert purse.ask(max_tokens=100, stop_token_ids=[*range(60)], logit_bias={"5": 100}).is_success
    left = 1000 - 4 - 1
    assert purse.left == left
    for refused in ({"prompt": [1] * 200}, {"prompt": [10**6]}, {"n": 129}):
        assert purse.ask(**refused).status_code == 400
        assert purse.left == left
    assert purse.ask(stream=True, max_tokens=7).is_success
    assert eventually(lambda: purse.left == left - 4 - 7, 10)


def test_more_than_a_limit_ever_allows_is_no_matter_of_waiting(purse: Purse) -> None:
    refused = purse.ask(n=10, max_tokens=100)
    assert refused.status_code == 400 and "retry-after" not in refused.headers
    assert refused.json()["error"]["message"] == (
        "this request may take 1004 tokens, more than this key's limit of 1000 tokens a minute; "
        "ask for fewer or shorter answers, or send less"
    )
    assert purse.left == 1000 and purse.ask(max_tokens=100).is_success


@pytest.mark.parametrize("purse", [60], indirect=True)
def test_who_names_no_limit_needs_only_something_left(purse: Purse) -> None:
    """Of a context of 128, which is more than the key ever has."""
    path, body = "/v1/chat/completions", CHAT | {"ignore_eos": True}
    with purse.http.stream("POST", path, json=body | {"stream": True}) as first:
        assert first.status_code == 200
        assert purse.http.post(path, json=body).status_code == 429  # the first may need it all
        first.read()
    assert eventually(lambda: purse.left < 0, 10)  # and it did
    assert purse.http.post(path, json=body).status_code == 429
    assert purse.http.get("/v1/models").status_code == 200  # which takes none


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("purse", [100_000], indirect=True)
def test_who_leaves_pays_for_what_was_made(
    endpoint: Endpoint, purse: Purse, streamed: bool
) -> None:
    served = endpoint.host.current
    assert served is not None
    before = served.engine.counters().generation_tokens
    body = json.dumps(FULL | {"n": 100, "max_tokens": 120, "stream": streamed}).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {purse.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    url = purse.http.base_url
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode() + body)
        assert eventually(lambda: served.engine.counters().generation_tokens > before)
    assert eventually(lambda: served.leases == 0 and served.engine.idle)
    assert endpoint.idle()
    made = served.engine.counters().generation_tokens - before
    assert 0 < made < 12_000
    assert eventually(lambda: purse.left == 100_000 - 4 - made, 5), (purse.left, made)


def test_embeddings_take_what_they_read(purse: Purse) -> None:
    body = {"model": "tiny", "input": [[30] * 100] * 6}
    for expected in (200, 429):
        assert purse.http.post("/v1/embeddings", json=body).status_code == expected
        assert purse.left == 1000 - 600


class Outage:
    """A store whose database can go away, by failing or by saying nothing."""

    def __init__(self, store: ApiKeys) -> None:
        self.store, self.asked = store, 0
        self.fails, self.answers = False, threading.Event()
        self.answers.set()

    def all(self) -> list[ApiKey]:
        self.asked += 1
        assert self.answers.wait(60)
        if self.fails:
            raise OSError("no route to the database")
        return self.store.all()


@pytest.mark.parametrize("kind", ["fails", "says nothing"])
def test_an_outage_of_the_key_store_holds_up_nobody(
    endpoint: Endpoint, store: ApiKeys, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(serving, "REFRESH_SECONDS", 0.2)
    key = store.create("somebody")
    outage = Outage(store)
    with (
        listening(create_app(endpoint.host, "guarded", KeyRing(outage))) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as http,
    ):
        assert ask(http, key).status_code == 200
        outage.fails, asked = kind == "fails", outage.asked
        if kind != "fails":
            outage.answers.clear()
        time.sleep(0.3)
        started = time.monotonic()
        assert [ask(http, key).status_code for _ in range(20)] == [200] * 20
        took = time.monotonic() - started
        assert took < 10 and outage.asked - asked <= 1 + took / 0.2
        assert ask(http, None).status_code == 401
        outage.fails = False
        outage.answers.set()
        store.revoke(key.split("-")[1])
        assert eventually(lambda: ask(http, key).status_code == 401, 10)


def test_keys_that_were_never_read_let_nobody_in(endpoint: Endpoint, store: ApiKeys) -> None:
    outage = Outage(store)
    outage.fails = True
    with (
        listening(create_app(endpoint.host, "guarded", KeyRing(outage))) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as http,
    ):
        assert [ask(http, None).status_code for _ in range(3)] == [503] * 3
        assert http.get("/health").status_code == 200


def test_a_bucket_fills_again() -> None:
    now = [0.0]
    bucket = Bucket(60, lambda: now[0])
    bucket.take(61)
    assert bucket.wait() == pytest.approx(2)
    now[0] = 2.5
    assert bucket.wait() == 0
    now[0] = 1e6
    assert bucket.wait() == 0
    bucket.take(60)
    assert bucket.wait() > 0  # never more than a minute's worth


def test_the_access_log_tells_everything_but_the_words(
    client: httpx.Client, store: ApiKeys, caplog: pytest.LogCaptureFixture
) -> None:
    key = store.create("somebody")
    with caplog.at_level(logging.INFO, logger="gristmill.access"):
        headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "my-id-1"}
        secret = {"role": "user", "content": "a secret question"}
        body = CHAT | {"messages": [secret], "max_tokens": 5}
        assert (
            client.post("/v1/chat/completions", json=body, headers=headers).headers["x-request-id"]
            == "my-id-1"
        )
        response = client.get("/v1/nothing", headers=headers | {"X-Request-Id": "bad id!"})
        assert response.headers["x-request-id"] not in ("bad id!", "my-id-1")
        assert eventually(lambda: len(caplog.records) >= 2)
    first, second = (json.loads(record.message) for record in caplog.records[:2])
    assert first["request"] == "my-id-1" and first["status"] == 200
    assert first["key"] == key.split("-")[1] and first["model"] == "tiny-1-one"
    assert first["prompt_tokens"] > 5 and 1 <= first["completion_tokens"] <= 5
    assert second["status"] == 404
    assert "secret" not in caplog.text and key not in caplog.text


def test_answers_that_never_began_or_lost_their_engine_leave_what_was_counted() -> None:
    usage = Usage()
    usage.add(0, 0, Update("a", "words", [5], None, 100, 7, cached_tokens=16))
    usage.add(1, 0, Update("b", "", [], "abort", 0, 0))
    usage.add(0, 0, Update("a", "", [], "error", 0, 0))
    assert (usage.prompt_tokens, usage.completion_tokens) == (100, 7)
    assert usage.body()["prompt_tokens_details"] == {"cached_tokens": 16}
    assert usage.reasons == {0: "error"}


def test_the_command_line_makes_lists_and_revokes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path))
    arguments = ["keys", "create", "a tester", "--scope", "generate", "--requests-per-minute", "9"]
    assert cli.main(arguments) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("gm-")
    assert cli.main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert "a tester" in listed and "generate" in listed and key not in listed
    assert cli.main(["keys", "revoke", key.split("-")[1]]) == 0
    assert cli.main(["keys", "revoke", key.split("-")[1]]) == 1
    assert "no valid key" in capsys.readouterr().err
