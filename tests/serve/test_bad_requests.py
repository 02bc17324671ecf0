"""What no client should send is refused in OpenAI's shape, names the field and stalls nobody."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from urllib.parse import urlsplit

import pytest

from serve import app, transport
from tests.serve.calls import CHAT, TEXT, error, post
from tests.serve.conftest import Endpoint, eventually


@pytest.mark.parametrize(
    ("change", "param", "status"),
    [
        ({"temperature": -0.5}, "temperature", 400),
        ({"temperature": "0.5"}, "temperature", 400),
        ({"temperature": True}, "temperature", 400),
        ({"top_p": 0}, "top_p", 400),
        ({"top_p": 1.5}, "top_p", 400),
        ({"top_k": 2**31}, "top_k", 400),
        ({"top_k": 2**70}, "top_k", 400),
        ({"min_tokens": 2**70}, "min_tokens", 400),
        ({"stop_token_ids": [2**70]}, "stop_token_ids[0]", 400),
        ({"n": 0}, "n", 400),
        ({"n": 129}, "n", 400),
        ({"seed": 1.5}, "seed", 400),
        ({"seed": 2**70}, "seed", 400),
        ({"max_tokens": 0}, "max_tokens", 400),
        ({"max_tokens": 2**70}, "max_tokens", 400),
        ({"max_tokens": "many"}, "max_tokens", 400),
        ({"stop": [1]}, "stop", 400),
        ({"stop": ["x"] * 17}, "stop", 400),
        ({"stream": "yes"}, "stream", 400),
        ({"stream_options": {"include_usage": True}}, "stream_options", 400),
        ({"stream": True, "stream_options": {"bad": 1}}, "stream_options.bad", 400),
        ({"model": "other"}, "model", 404),
        ({"model": None}, "model", 400),
        ({"messages": []}, "messages", 400),
        ({"messages": "hello"}, "messages", 400),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", 400),
        ({"messages": [{"role": "user"}]}, "messages[0].content", 400),
        ({"messages": [{"role": "user", "content": "long " * 400}]}, "messages", 400),
        ({"logprobs": 3}, "logprobs", 400),
        ({"top_logprobs": 3}, "top_logprobs", 400),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", 400),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", 400),
        ({"logit_bias": {"five": 1}}, "logit_bias.five", 400),
        ({"logit_bias": {"5": 100, "05": 100}}, "logit_bias.05", 400),
        ({"logit_bias": {"13": 1, "1\u0663": 2}}, "logit_bias.1\u0663", 400),  # Arabic
        ({"logit_bias": {"99999": 1}}, "logit_bias", 400),
        ({"stop_token_ids": [99999]}, "stop_token_ids", 400),
        ({"frequency_penalty": 2.5}, "frequency_penalty", 400),
        ({"presence_penalty": False}, "presence_penalty", 400),
        ({"repetition_penalty": 0}, "repetition_penalty", 400),
        ({"repetition_penalty": 5e-324}, "repetition_penalty", 400),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", 400),
        ({"best_of": 2}, "best_of", 400),
        ({"echo": True}, "echo", 400),
        ({"tools": [{"type": "function"}]}, "tools[0].function", 400),
        ({"response_format": {"type": "xml"}}, "response_format.type", 400),
        ({"response_format": {"type": "json_schema"}}, "response_format", 400),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", 400),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", 400),
        ({"structured_outputs": {}}, "structured_outputs", 400),
        ({"structured_outputs": {"json": {"type": "no"}}}, "structured_outputs.json", 400),
        ({"temprature": 1}, "temprature", 400),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("streamed", [False, True])
def test_wrong_requests_name_the_parameter(
    endpoint: Endpoint, change: dict, param: str | None, status: int, streamed: bool
) -> None:
    body = ({"stream": True} if streamed and "stream_options" not in change else {}) | change
    got, problem = error(endpoint, "/v1/chat/completions", json=CHAT | body)
    assert (got, problem["param"]) == (status, param), problem
    assert problem["type"] == "invalid_request_error"
    assert endpoint.idle()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"[1]", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b'{"a": NaN}', "headers": {"content-type": "application/json"}}, 400),
        ({"content": b'{"a": "\xff"}', "headers": {"content-type": "application/json"}}, 400),
        ({"content": rb'{"a": "\ud800"}', "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
        ({"json": {"model": "tiny", "prompt": "x" * 10_000_000}}, 413),
    ],
)
def test_bodies_that_are_no_request_are_refused_at_once(
    endpoint: Endpoint, request_: dict, status: int
) -> None:
    started = time.monotonic()
    assert error(endpoint, "/v1/completions", **request_)[0] == status
    assert time.monotonic() - started < 20


def test_a_wrong_method_is_told_the_right_one(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        for method, path, allowed in (
            ("GET", "/v1/completions", {"POST"}),
            ("POST", "/v1/models", {"GET", "HEAD"}),
            ("POST", "/static/chat.js", {"GET", "HEAD"}),
        ):
            response = client.request(method, path)
            assert response.status_code == 405, path
            assert {*response.headers["allow"].split(", ")} == allowed, path


def test_a_body_beyond_the_limit_is_not_read_to_its_end(endpoint: Endpoint) -> None:
    def endless():
        for _ in range(1000):
            yield b"x" * 65536

    headers = {"content-type": "application/json"}
    assert error(endpoint, "/v1/completions", content=endless(), headers=headers)[0] == 413


def test_clients_that_drip_their_bodies_end_by_themselves_and_hold_up_nobody(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "BODY_SECONDS", 1.0)
    address = urlsplit(endpoint.url)
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n{"
    )
    with contextlib.ExitStack() as opened, endpoint.client() as client:
        slow = [
            opened.enter_context(socket.create_connection((address.hostname, address.port), 30))
            for _ in range(50)
        ]
        for connection in slow:
            connection.sendall(head)
        assert client.post("/v1/completions", json=TEXT | {"max_tokens": 3}).status_code == 200
        for connection in slow:
            with contextlib.suppress(OSError):  # refused already
                connection.sendall(b'"')
            answer = connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive within 1 s" in answer
    assert endpoint.idle()


def test_prompts_that_no_model_reads_are_refused(endpoint: Endpoint) -> None:
    for prompt in ([], [[]], [9999], [1] * 128, ["a", 1], ["a"] * 129, {"a": 1}):
        status, problem = error(endpoint, "/v1/completions", json=TEXT | {"prompt": prompt})
        assert status == 400 and problem["param"], (prompt, problem)
    status, problem = error(endpoint, "/v1/completions", json=TEXT | {"prompt": "x " * 500})
    assert problem["code"] == "context_length_exceeded" and "128 tokens" in problem["message"]
    status, problem = error(endpoint, "/v1/completions", json={"model": "tiny"})
    assert (status, problem["param"]) == (400, "prompt")


def test_conversations_without_a_layout_are_refused_everywhere(endpoint: Endpoint) -> None:
    status, problem = error(endpoint, "/tokenize", json={"messages": []})
    assert (status, problem["param"]) == (400, "messages")


def test_what_nobody_foresaw_is_an_error_with_an_id_in_the_log(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a secret of ours")

    monkeypatch.setattr(app, "cards", broken)
    with caplog.at_level("INFO", logger="gristmill.access"), endpoint.client() as client:
        response = client.get("/v1/models", headers={"X-Request-Id": "an-id"})
        assert eventually(lambda: any(r.name == "gristmill.access" for r in caplog.records))
    assert response.status_code == 500 and response.headers["x-request-id"] == "an-id"
    assert response.json()["error"]["type"] == "server_error" and "secret" not in response.text
    (logged,) = [json.loads(r.message) for r in caplog.records if r.name == "gristmill.access"]
    assert (logged["request"], logged["status"]) == ("an-id", 500)
    assert any("request an-id failed" in record.message for record in caplog.records)


def test_unknown_paths_and_methods_have_openai_errors(endpoint: Endpoint) -> None:
    assert error(endpoint, "/v1/nothing", json={})[0] == 404
    assert error(endpoint, "/v1/models", json={})[0] == 405
    with endpoint.client() as client:
        assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_the_largest_numbers_that_are_taken_are_only_large(endpoint: Endpoint) -> None:
    large = {"top_k": 2**31 - 1, "seed": 2**63 - 1, "repetition_penalty": 10, "min_p": 1e-300}
    large |= {"temperature": 2, "top_p": 5e-324, "min_tokens": 0, "logit_bias": {"5": 100}}
    for change in ({}, large, {"seed": -(2**63), "repetition_penalty": 0.01, "temperature": 1e-5}):
        body = CHAT | change | {"max_tokens": 5, "ignore_eos": True}
        assert post(endpoint, "/v1/chat/completions", body)["usage"]["completion_tokens"] == 5
    huge = CHAT | {"max_tokens": 2**31 - 1}
    assert post(endpoint, "/v1/chat/completions", huge)["usage"]["completion_tokens"] > 0
    assert endpoint.host.healthy and endpoint.idle()
