"""The endpoint as clients see it, over real HTTP with a real engine."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

from tests.serve.calls import CHAT, TEXT, post, stream
from tests.serve.conftest import Endpoint, eventually, spec
from tests.tiny_models import model_directory


def test_a_chat_answer_has_every_part(endpoint: Endpoint) -> None:
    body = post(endpoint, "/v1/chat/completions", CHAT | {"temperature": 0, "max_tokens": 20})
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert body["model"] == "tiny" and body["system_fingerprint"] == "tiny-1-one"
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]
    assert choice["finish_reason"] == "length"
    asked = post(endpoint, "/tokenize", {"messages": CHAT["messages"]})
    assert asked["count"] == len(asked["tokens"]) and asked["max_model_len"] == 128
    assert body["usage"] == {
        "prompt_tokens": asked["count"],
        "completion_tokens": 20,
        "total_tokens": asked["count"] + 20,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_stream_is_role_deltas_finish_usage_done(endpoint: Endpoint) -> None:
    request = CHAT | {"temperature": 1.5, "seed": 4, "max_tokens": 60}
    whole = post(endpoint, "/v1/chat/completions", request)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    first, *deltas, last, usage = stream(endpoint, "/v1/chat/completions", request | options)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in deltas)
    assert text == whole["choices"][0]["message"]["content"]
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    chunks = [first, *deltas, last, usage]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert "usage" not in stream(endpoint, "/v1/chat/completions", request | {"stream": True})[0]


def test_completions_answer_texts_token_ids_and_lists(endpoint: Endpoint) -> None:
    tokens = post(endpoint, "/tokenize", {"prompt": "import os"})["tokens"]
    request = TEXT | {"temperature": 0, "max_tokens": 8}
    alone = post(endpoint, "/v1/completions", request)
    assert alone["object"] == "text_completion"
    text = alone["choices"][0]["text"]
    for prompt in (tokens, [tokens], ["import os"]):
        body = post(endpoint, "/v1/completions", request | {"prompt": prompt})
        assert body["choices"][0]["text"] == text
    both = post(endpoint, "/v1/completions", request | {"prompt": ["import os"] * 2, "n": 2})
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in both["choices"]} == {text}
    assert both["usage"]["prompt_tokens"] == 2 * len(tokens)
    assert both["usage"]["completion_tokens"] == 4 * 8
    default = post(endpoint, "/v1/completions", TEXT | {"seed": 1})
    assert default["usage"]["completion_tokens"] <= 16
    chunks = stream(endpoint, "/v1/completions", request | {"stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


def test_choices_differ_and_a_seed_repeats_them(endpoint: Endpoint) -> None:
    request = CHAT | {"n": 3, "seed": 9, "temperature": 1.2, "max_tokens": 12}
    one, two = (post(endpoint, "/v1/chat/completions", request)["choices"] for _ in range(2))
    assert one == two
    assert len({choice["message"]["content"] for choice in one}) == 3
    chunks = stream(endpoint, "/v1/chat/completions", request | {"stream": True})
    for index in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        text = "".join(choice["delta"].get("content", "") for choice in mine)
        assert text == one[index]["message"]["content"]


def test_a_seed_answers_a_prompt_alike_wherever_it_stands(endpoint: Endpoint) -> None:
    request = TEXT | {"prompt": ["x", TEXT["prompt"]], "temperature": 1.5, "n": 2}
    *_, third, fourth = post(endpoint, "/v1/completions", request | {"seed": 7})["choices"]
    alone = post(endpoint, "/v1/completions", request | TEXT | {"seed": 7})["choices"]
    assert [third["text"], fourth["text"]] == [choice["text"] for choice in alone]
    twice = request | {"prompt": [TEXT["prompt"]] * 2, "n": 1}
    one, other = post(endpoint, "/v1/completions", twice)["choices"]
    assert one["text"] != other["text"]  # without a seed there is nothing to repeat


def test_stop_strings_are_left_out(endpoint: Endpoint) -> None:
    request = TEXT | {"temperature": 0, "max_tokens": 40}
    text = post(endpoint, "/v1/completions", request)["choices"][0]["text"]
    stop = text[10:13]
    for value in (stop, [stop], ["\0\0", stop]):
        (choice,) = post(endpoint, "/v1/completions", request | {"stop": value})["choices"]
        assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


def test_what_asks_for_nothing_is_accepted(endpoint: Endpoint) -> None:
    neutral = {
        "logit_bias": {},
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "tools": [],
        "response_format": {"type": "text"},
        "logprobs": False,
        "user": "somebody",
        "metadata": {"a": "b"},
        "n": None,
        "stop": None,
        "stream_options": None,
        "max_completion_tokens": 2,
        "messages": [
            {"role": "developer", "content": "short"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b", "refusal": None, "annotations": []},
            {"role": "user", "content": "😀 naïve"},
        ],
    }
    assert post(endpoint, "/v1/chat/completions", CHAT | neutral)["choices"]


def test_models_health_ready_and_metrics_tell_what_is_served(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        (card,) = client.get("/v1/models").json()["data"]
        assert card["id"] == "tiny" and card["object"] == "model" and card["max_model_len"] == 128
        assert client.get("/v1/models/tiny").json() == card
        health = client.get("/health").json()
        assert health["serving"] == "tiny-1-one" and health["replica"] == "replica-1"
        assert client.get("/ready").status_code == 200
        assert (
            """\
gristmill_num_requests_running{model_name="tiny",version="1",replica="replica-1"} 0
"""
            in client.get("/metrics").text
        )


def test_metrics_have_the_names_of_vllm_and_count_what_happened(endpoint: Endpoint) -> None:
    def count(name: str) -> float:
        with endpoint.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(float(one.split()[-1]) for one in lines if one.startswith(f"gristmill_{name}{{"))

    each = (
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_prompt_tokens"),
        *("request_time_per_output_token_seconds", "e2e_request_latency_seconds"),
        *("request_queue_time_seconds", "request_generation_tokens", "request_params_n"),
        *("request_prefill_time_seconds", "request_decode_time_seconds"),
        *("request_inference_time_seconds", "request_params_max_tokens"),
    )
    names = [f"{name}_count" for name in each]
    names += ["iteration_tokens_total_sum", "iteration_tokens_total_count"]
    names += ["request_success_total", "generation_tokens_total", "prompt_tokens_total"]
    before = {name: count(name) for name in names}
    post(endpoint, "/v1/chat/completions", CHAT | {"max_tokens": 5, "ignore_eos": True})
    stream(
        endpoint,
        "/v1/chat/completions",
        CHAT | {"max_tokens": 5, "ignore_eos": True, "stream": True},
    )
    more = {name: count(name) - before[name] for name in names}
    # The last token of an answer is never read; a cached prompt is read from its last page on.
    assert 8 < more.pop("iteration_tokens_total_sum") < 60
    assert more.pop("iteration_tokens_total_count") == 10
    assert more.pop("prompt_tokens_total") > 10 and more.pop("generation_tokens_total") == 10
    assert 0 < more.pop("inter_token_latency_seconds_count") <= 4
    ours = {"time_to_first_token_seconds_count", "request_time_per_output_token_seconds_count"}
    assert {name for name, grown in more.items() if grown == 1} == ours
    assert {name for name, grown in more.items() if grown == 2} == more.keys() - ours


def test_refusals_are_counted_by_their_status(endpoint: Endpoint) -> None:
    def counts() -> dict[str, float]:
        with endpoint.client() as client:
            lines = client.get("/metrics").text.splitlines()
        found = [line.rsplit(" ", 1) for line in lines if "http_requests_total{" in line]
        return {labels: float(value) for labels, value in found}

    before = counts()
    with endpoint.client() as client:
        client.post("/v1/chat/completions", json={"model": "tiny"})
        client.post("/v1/completions", json={"model": "none", "prompt": "a"})
        client.get("/v1/models/none")
        client.get("/what/ever")
        client.request("PROPFIND", "/v1/models")
    grown = {name for name, value in counts().items() if value == before.get(name, 0) + 1}
    for method, handler, status in (
        ("POST", "/v1/chat/completions", 400),
        ("POST", "/v1/completions", 404),
        ("GET", "/v1/models/{name}", 404),
        ("GET", "other", 404),
        ("other", "/v1/models", 405),
    ):
        labels = f'method="{method}",handler="{handler}",status="{status}",replica="replica-1"'
        assert f"gristmill_http_requests_total{{{labels}}}" in grown


def test_the_page_and_its_assets_are_ours_alone(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        page = client.get("/")
        assert (
            page.status_code == 200
            and "default-src 'self'" in (page.headers["content-security-policy"])
        )
        assert "http://" not in page.text and "https://" not in page.text
        for asset in ("chat.css", "chat.js"):
            assert f"/static/{asset}" in page.text
            assert client.get(f"/static/{asset}").status_code == 200
        script = client.get("/static/chat.js").text
        assert "innerHTML" not in script and "eval(" not in script
        assert client.get("/static/../app.py").status_code == 404


@pytest.mark.parametrize("streamed", [True, False])
def test_a_disconnect_ends_the_generation(endpoint: Endpoint, streamed: bool) -> None:
    served = endpoint.host.current
    assert served is not None
    before = served.engine.counters().aborted
    body = json.dumps(CHAT | {"n": 100, "stream": streamed, "temperature": 1.0}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    address = ("127.0.0.1", int(endpoint.url.rsplit(":", 1)[1]))
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode() + body)
        if streamed:
            assert connection.recv(100)
        else:
            assert eventually(lambda: served.engine.counters().running > 0)
    assert eventually(lambda: served.engine.counters().aborted > before)
    assert endpoint.idle()
    assert eventually(lambda: served.engine.counters().pages_used == 0)
    assert eventually(lambda: served.leases == 0)


def test_too_many_requests_are_told_to_come_back(endpoint: Endpoint) -> None:
    endpoint.host.want(spec(version="narrow", slots=1, max_waiting=1))
    assert eventually(lambda: endpoint.host.state()["serving"] == "tiny-narrow-one")
    try:
        many = CHAT | {"n": 100, "stream": True, "temperature": 1.0}
        with (
            endpoint.client() as client,
            client.stream("POST", "/v1/chat/completions", json=many) as busy,
        ):
            chunks = busy.iter_raw()  # kept: an iterator that is dropped ends the connection
            assert next(chunks)
            response = client.post("/v1/chat/completions", json=CHAT)
            text = client.get("/metrics").text
        assert response.status_code == 429 and response.headers["retry-after"] == "1"
        # Who was refused at once is no fast answer.
        name = "gristmill_e2e_request_latency_seconds_count"
        counts = [line.split()[-1] for line in text.splitlines() if line.startswith(name)]
        assert counts == ["0"]
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert endpoint.idle()
    finally:
        endpoint.host.want(spec())
        assert eventually(lambda: endpoint.host.state()["serving"] == "tiny-1-one")


def test_models_swap_under_load_without_a_failed_request(endpoint: Endpoint) -> None:
    failures: list[object] = []
    answers: dict[str, set[str]] = {}
    stopping = threading.Event()

    def client(streamed: bool) -> None:
        request = CHAT | {"temperature": 0, "max_tokens": 30}
        while not stopping.is_set():
            try:
                if streamed:
                    chunks = stream(endpoint, "/v1/chat/completions", request | {"stream": True})
                    assert len({chunk["system_fingerprint"] for chunk in chunks}) == 1
                    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
                    answers.setdefault(chunks[0]["system_fingerprint"], set()).add(text)
                else:
                    body = post(endpoint, "/v1/chat/completions", request)
                    text = body["choices"][0]["message"]["content"]
                    answers.setdefault(body["system_fingerprint"], set()).add(text)
            except BaseException as error:
                failures.append(error)

    clients = [threading.Thread(target=client, args=(n % 2 == 0,)) for n in range(4)]
    for thread in clients:
        thread.start()
    try:
        for artifact, version in (("two", "2"), ("one", "1")) * 2:
            endpoint.host.want(spec(artifact, version))
            wanted = f"tiny-{version}-{artifact}"
            assert eventually(lambda wanted=wanted: endpoint.host.state()["serving"] == wanted)
            time.sleep(0.3)
    finally:
        stopping.set()
        for thread in clients:
            thread.join(60)
    assert not failures
    # Each version gives its own answer, and never the other's.
    assert {name: len(texts) for name, texts in answers.items()} == {
        "tiny-1-one": 1,
        "tiny-2-two": 1,
    }


def test_a_version_that_cannot_be_loaded_changes_nothing(endpoint: Endpoint) -> None:
    endpoint.host.want(spec("broken", "9"))
    assert eventually(lambda: "tiny-9-broken" in endpoint.host.state()["failed"])
    state = endpoint.host.state()
    assert state["serving"] == "tiny-1-one" and state["status"] == "ok"
    assert "config.json" in state["failed"]["tiny-9-broken"]
    assert post(endpoint, "/v1/chat/completions", CHAT | {"max_tokens": 2})["choices"]
    # Mended and asked for again, it is tried again.
    model_directory(endpoint.models["broken"], 5)
    endpoint.host.want(spec("broken", "9", request="again"))
    assert eventually(lambda: endpoint.host.state()["serving"] == "tiny-9-broken")
    served = endpoint.host.current
    endpoint.host.want(spec("broken", "9", request="and again"))
    assert eventually(lambda: endpoint.host.state()["loading"] is None)
    assert endpoint.host.current is served and endpoint.host.state()["request"] == "and again"
    endpoint.host.want(spec())
    assert eventually(lambda: endpoint.host.state()["serving"] == "tiny-1-one")


@pytest.mark.peer
def test_the_official_client_works(endpoint: Endpoint) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    messages = CHAT["messages"]
    whole = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=20, stop=["\0"], seed=1
    )
    pieces = client.chat.completions.create(
        model="tiny",
        messages=messages,
        temperature=0,
        max_completion_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(pieces)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    plain = client.completions.create(model="tiny", prompt="import os", max_tokens=5)
    assert plain.usage.completion_tokens == 5
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4", messages=messages)
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model="tiny", messages=messages, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="tiny", prompt="x " * 500)
