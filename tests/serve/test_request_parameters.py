"""The wider protocol over real HTTP: logprobs, echo, best_of, forms, embeddings, responses."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

from serve import grammar_check
from serve.grammar import Limits
from tests.serve.calls import CHAT, TEXT, error, post, stream
from tests.serve.conftest import Endpoint

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_chat_logprobs_stand_beside_every_token(endpoint: Endpoint) -> None:
    request = CHAT | {"temperature": 1.3, "seed": 5, "max_tokens": 30, "logprobs": True}
    (choice,) = post(endpoint, "/v1/chat/completions", request | {"top_logprobs": 3})["choices"]
    content = choice["logprobs"]["content"]
    told = b"".join(bytes(entry["bytes"]) for entry in content)
    assert told.decode("utf-8", "replace") == choice["message"]["content"]
    for entry in content:
        assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 3
        best = [top["logprob"] for top in entry["top_logprobs"]]
        assert best == sorted(best, reverse=True) and best[0] >= entry["logprob"]
    chunks = stream(endpoint, "/v1/chat/completions", request | {"stream": True})
    streamed = [
        entry
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert [entry["bytes"] for entry in streamed] == [entry["bytes"] for entry in content]
    assert not any(entry["top_logprobs"] for entry in streamed)


def test_echo_scores_a_text(endpoint: Endpoint) -> None:
    request = TEXT | {"echo": True, "max_tokens": 0, "logprobs": 2}
    (choice,) = post(endpoint, "/v1/completions", request)["choices"]
    assert choice["text"] == TEXT["prompt"] and choice["finish_reason"] == "length"
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == TEXT["prompt"]
    assert all(value < 0 for value in told["token_logprobs"])
    likely = zip(told["tokens"], told["top_logprobs"], strict=True)
    assert all(token in top and len(top) in (2, 3) for token, top in likely)
    starts = [TEXT["prompt"][at:] for at in told["text_offset"]]
    assert all(rest.startswith(t) for rest, t in zip(starts, told["tokens"], strict=True))
    more = post(endpoint, "/v1/completions", request | {"max_tokens": 4, "temperature": 0})
    (choice,) = more["choices"]
    assert choice["text"].startswith(TEXT["prompt"]) and len(choice["text"]) > len(TEXT["prompt"])
    assert len(choice["logprobs"]["tokens"]) == len(told["tokens"]) + 4
    chunks = stream(endpoint, "/v1/completions", TEXT | {"echo": True, "stream": True, "seed": 1})
    assert "".join(c["choices"][0]["text"] for c in chunks).startswith(TEXT["prompt"])


def test_offsets_count_characters_whatever_tokens_split(endpoint: Endpoint) -> None:
    scored = {"model": "tiny", "prompt": "a日b日c", "echo": True, "max_tokens": 0, "logprobs": 0}
    told = post(endpoint, "/v1/completions", scored)["choices"][0]["logprobs"]
    assert told["tokens"][0] == "a" and len(told["tokens"]) == 9  # 日 is three tokens
    assert told["text_offset"] == [0, 1, 1, 1, 2, 3, 3, 3, 4]
    # Random weights write many parts of characters; the prompt ends in the middle of one.
    prompt = post(endpoint, "/tokenize", {"prompt": "a日"})["tokens"][:-1]
    request = {"model": "tiny", "prompt": prompt, "temperature": 1.9, "max_tokens": 60}
    request |= {"logprobs": 1, "echo": True, "seed": 4, "stop": ["ab", "the", " s"], "n": 4}
    whole = post(endpoint, "/v1/completions", request)["choices"]
    chunks = stream(endpoint, "/v1/completions", request | {"stream": True})
    for choice in whole:
        told = choice["logprobs"]
        for token, at in zip(told["tokens"], told["text_offset"], strict=True):
            if not token.startswith(("bytes:", "<")):
                rest = choice["text"][at:].lstrip("\ufffd")
                assert rest.startswith(token) or token.startswith(rest)  # which a stop has cut
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        for key in ("tokens", "text_offset"):
            assert [value for part in parts for value in part["logprobs"][key]] == told[key]


def test_echo_scores_a_begin_token_of_the_caller(endpoint: Endpoint) -> None:
    ids = post(endpoint, "/tokenize", {"prompt": "import os"})["tokens"]
    request = {"model": "tiny", "echo": True, "max_tokens": 0, "logprobs": 0}
    for prompt, count in (("import os", len(ids) - 1), (ids, len(ids)), (ids[1:], len(ids) - 1)):
        (choice,) = post(endpoint, "/v1/completions", request | {"prompt": prompt})["choices"]
        assert len(choice["logprobs"]["tokens"]) == count
        assert choice["text"] == "import os"


def test_best_of_sends_the_likeliest(endpoint: Endpoint) -> None:
    request = TEXT | {"temperature": 1.0, "seed": 3, "max_tokens": 8, "logprobs": 0}
    everything = post(endpoint, "/v1/completions", request | {"n": 6})
    means = {
        choice["text"]: sum(choice["logprobs"]["token_logprobs"])
        / len(choice["logprobs"]["token_logprobs"])
        for choice in everything["choices"]
    }
    best = post(endpoint, "/v1/completions", request | {"n": 2, "best_of": 6})
    wanted = sorted(means, key=lambda text: -means[text])[:2]
    assert [choice["text"] for choice in best["choices"]] == wanted
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == everything["usage"]["completion_tokens"]
    for wrong, param in (
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
    ):
        status, problem = error(endpoint, "/v1/completions", json=TEXT | wrong)
        assert (status, problem["param"]) == (400, param), problem


def test_penalties_and_bias_reach_the_engine(endpoint: Endpoint) -> None:
    request = TEXT | {"temperature": 0, "max_tokens": 24}
    plain = post(endpoint, "/v1/completions", request)["choices"][0]["text"]
    for change in (
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"repetition_penalty": 5.0},
        {"logit_bias": {"40": 100}},
    ):
        changed = post(endpoint, "/v1/completions", request | change)["choices"][0]["text"]
        assert changed != plain, change
    (token,) = post(endpoint, "/detokenize", {"tokens": [40]}).values()
    only = post(endpoint, "/v1/completions", request | {"logit_bias": {"40": 100}})
    assert only["choices"][0]["text"] == token * 24
    stopped = post(
        endpoint,
        "/v1/completions",
        request | {"logit_bias": {"40": 100}, "stop_token_ids": [40], "min_tokens": 5},
    )
    assert stopped["choices"][0]["finish_reason"] in ("stop", "length")
    assert stopped["usage"]["completion_tokens"] >= 5


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_keeps_to_a_json_schema(endpoint: Endpoint, temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    request = CHAT | {"temperature": temperature, "seed": 2, "max_tokens": 100}
    (choice,) = post(endpoint, "/v1/chat/completions", request | {"response_format": form})[
        "choices"
    ]
    if choice["finish_reason"] == "stop":
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    else:  # random weights may write spaces for ever, where the schema allows them
        assert choice["message"]["content"].lstrip().startswith("{")
    (choice,) = post(
        endpoint,
        "/v1/chat/completions",
        request | {"structured_outputs": {"regex": r"[a-c]{3}-\d{2}"}, "n": 1},
    )["choices"]
    assert re.fullmatch(r"[a-c]{3}-\d{2}", choice["message"]["content"])
    assert choice["finish_reason"] == "stop"
    chunks = stream(
        endpoint,
        "/v1/completions",
        TEXT | {"structured_outputs": {"choice": ["yes (a)", "no [b]"]}, "stream": True, "seed": 1},
    )
    assert "".join(c["choices"][0]["text"] for c in chunks) in ("yes (a)", "no [b]")


@pytest.mark.parametrize(
    "bomb",
    [
        {"regex": "(" * 5000},
        {"regex": "(?=a)b"},
        {"regex": "x" * 100_000},
        {"json": {"$ref": "#"}},
        {"json": {"$ref": "http://127.0.0.1:1/x"}},
        {"json": {"type": ["nothing"]}},
        {"json": {"enum": ["x" * 10] * 20_000}},
        {"choice": []},
        {"choice": ["x"] * 257},
    ],
    ids=lambda bomb: json.dumps(bomb)[:30],
)
def test_grammars_that_are_none_or_bombs_are_refused_quickly(
    endpoint: Endpoint, bomb: dict
) -> None:
    status, problem = error(endpoint, "/v1/completions", json=TEXT | {"structured_outputs": bomb})
    assert status == 400 and problem["param"].startswith("structured_outputs"), problem
    assert endpoint.idle()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_form_that_grows_too_large_under_way_ends_with_an_error(
    endpoint: Endpoint, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_check, "LIMITS", Limits(states=60))
    form = {"structured_outputs": {"regex": "[ab]{40,}a[ab]{16}c"}}
    request = (CHAT if "chat" in path else TEXT) | form | {"temperature": 1, "max_tokens": 100}
    # Nothing but a and b, so that no answer is whole before the states are used up.
    request |= {"seed": 1, "logit_bias": letters(endpoint, "a", "b")}
    free = (CHAT if "chat" in path else TEXT) | {"temperature": 1, "seed": 2, "max_tokens": 60}
    expected = post(endpoint, path, free)["choices"]
    with ThreadPoolExecutor() as others:
        beside = others.submit(post, endpoint, path, free)
        status, problem = error(endpoint, path, json=request)
    assert (status, problem["param"]) == (400, "structured_outputs.regex"), problem
    assert "too many states" in problem["message"] and "tokens of the answer" in problem["message"]
    assert beside.result()["choices"] == expected
    with (
        endpoint.client() as client,
        client.stream("POST", path, json=request | {"stream": True}) as response,
    ):
        *chunks, last = "".join(response.iter_text()).strip().split("\n\n")
    assert response.status_code == 200 and "[DONE]" not in last
    assert json.loads(last.removeprefix("data: "))["error"]["param"] == "structured_outputs.regex"
    assert not any('"finish_reason":"' in chunk for chunk in chunks)
    assert endpoint.host.healthy and endpoint.idle()


def test_what_others_wrote_in_the_same_form_counts_against_nobody(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_check, "LIMITS", Limits(states=80))
    request = TEXT | {"structured_outputs": {"regex": "[ab]*a[ab]{14}c"}, "max_tokens": 100}
    request |= {"temperature": 1.5, "logit_bias": letters(endpoint, "c")}
    for seed in range(12):  # each by itself is small; together they meet far more states
        (choice,) = post(endpoint, "/v1/completions", request | {"seed": seed})["choices"]
        assert re.fullmatch("[ab]*a[ab]{14}c", choice["text"]) and choice["finish_reason"] == "stop"


def letters(endpoint: Endpoint, *texts: str) -> dict[str, float]:
    """A bias that leaves little but these texts, each one token."""
    tokens = [post(endpoint, "/tokenize", {"prompt": text})["tokens"][-1] for text in texts]
    return {str(token): 100 for token in tokens}


@pytest.mark.parametrize(
    "regex", ["a{1,100000}{1,100000}", "(a|a)*b{1,1000}", "(x+x+)+y", "(a*)*(a*)*c", "([a-z]+)*1"]
)
def test_catastrophic_regexes_stall_nobody(endpoint: Endpoint, regex: str) -> None:
    request = TEXT | {"structured_outputs": {"regex": regex}, "max_tokens": 60, "temperature": 1}
    started = time.monotonic()
    post(endpoint, "/v1/completions", request)
    assert time.monotonic() - started < 60


def test_deep_json_is_no_stack_overflow(endpoint: Endpoint) -> None:
    deep = '{"model":"tiny","prompt":"a","structured_outputs":{"json":'
    deep += '{"items":' * 5000 + "{}" + "}" * 5000 + "}}"
    headers = {"content-type": "application/json"}
    assert error(endpoint, "/v1/completions", content=deep.encode(), headers=headers)[0] == 400


def test_embeddings_are_unit_vectors_that_tell_texts_apart(endpoint: Endpoint) -> None:
    texts = ["import os", "import os.path", "class Nothing: pass"]
    body = post(endpoint, "/v1/embeddings", {"model": "tiny", "input": texts})
    vectors = [entry["embedding"] for entry in body["data"]]
    assert [entry["index"] for entry in body["data"]] == [0, 1, 2]
    assert all(math.isclose(sum(x * x for x in v), 1, abs_tol=1e-4) for v in vectors)
    one = {"model": "tiny", "input": texts[0], "encoding_format": "base64"}
    (entry,) = post(endpoint, "/v1/embeddings", one)["data"]
    raw = base64.b64decode(entry["embedding"])
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(vectors[0], abs=1e-5)
    tokens = post(endpoint, "/tokenize", {"prompt": texts[0]})["tokens"]
    by_id = post(endpoint, "/v1/embeddings", {"model": "tiny", "input": tokens})
    assert by_id["data"][0]["embedding"] == pytest.approx(vectors[0], abs=1e-5)
    assert by_id["usage"] == {"prompt_tokens": len(tokens), "total_tokens": len(tokens)}
    for wrong in ("", [], [[]], "x " * 900, 5, ["a"] * 129):
        request = {"model": "tiny", "input": wrong}
        if wrong == "":
            continue
        status, problem = error(endpoint, "/v1/embeddings", json=request)
        assert (status, problem["param"]) == (400, "input"), (wrong, problem)
    status, problem = error(endpoint, "/v1/embeddings", json=one | {"dimensions": 8})
    assert (status, problem["param"]) == (400, "dimensions")


def test_tokens_become_the_text_again(endpoint: Endpoint) -> None:
    text = "naïve 😀 import"
    tokens = post(endpoint, "/tokenize", {"prompt": text})["tokens"]
    assert post(endpoint, "/detokenize", {"tokens": tokens}) == {"prompt": text}
    status, problem = error(endpoint, "/detokenize", json={"tokens": [9999]})
    assert (status, problem["param"]) == (400, "tokens[0]")


def test_responses_answer_as_chat_does(endpoint: Endpoint) -> None:
    request = {"model": "tiny", "input": "def main():", "temperature": 0, "max_output_tokens": 20}
    body = post(endpoint, "/v1/responses", request)
    chat = post(endpoint, "/v1/chat/completions", CHAT | {"temperature": 0, "max_tokens": 20})
    (item,) = body["output"]
    (part,) = item["content"]
    assert part["text"] == chat["choices"][0]["message"]["content"]
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["usage"]["output_tokens"] == 20 and body["object"] == "response"
    again = [{"role": "user", "content": "def main():"}]
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "def main():"}]}]
    for messages in (again, parts):
        same = post(endpoint, "/v1/responses", request | {"input": messages})
        assert same["output"][0]["content"] == item["content"]
    longer = [*again, item, {"role": "user", "content": "more"}]
    assert post(endpoint, "/v1/responses", request | {"input": longer, "instructions": "be"})
    for wrong, param in (
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"seed": 1}, "seed"),
    ):
        status, problem = error(endpoint, "/v1/responses", json=request | wrong)
        assert (status, problem["param"]) == (400, param), problem


def test_a_response_streams_typed_events(endpoint: Endpoint) -> None:
    request = {"model": "tiny", "input": "def main():", "temperature": 0, "max_output_tokens": 20}
    whole = post(endpoint, "/v1/responses", request)
    with (
        endpoint.client() as client,
        client.stream("POST", "/v1/responses", json=request | {"stream": True}) as response,
    ):
        raw = "".join(response.iter_text()).strip().split("\n\n")
    events = [json.loads(event.split("\ndata: ")[1]) for event in raw]
    names = [event["type"] for event in events]
    assert [event.split("\n")[0] for event in raw] == [f"event: {name}" for name in names]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == "response.incomplete"
    deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == whole["output"][0]["content"][0]["text"]
    assert events[-1]["response"]["usage"]["output_tokens"] == 20


@pytest.mark.peer
def test_the_official_client_reads_it_all(endpoint: Endpoint) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0)
    response = client.responses.create(model="tiny", input="def main():", max_output_tokens=10)
    assert response.output_text and response.usage.output_tokens <= 10
    with client.responses.stream(model="tiny", input="a", max_output_tokens=10) as events:
        kinds = {event.type for event in events}
    assert "response.output_text.delta" in kinds
    vectors = client.embeddings.create(model="tiny", input=["a", "b"])
    assert len(vectors.data) == 2 and isinstance(vectors.data[0].embedding[0], float)
    chat = client.chat.completions.create(
        model="tiny",
        messages=CHAT["messages"],
        logprobs=True,
        top_logprobs=2,
        max_tokens=5,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    )
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2


def test_errors_of_responses_name_their_own_parameters(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"model": "tiny", "input": "a", "max_output_tokens": 20}

    def refused(**change: object) -> tuple[str, str]:
        status, problem = error(endpoint, "/v1/responses", json=request | change)
        assert status == 400, problem
        return problem["param"], problem["code"]

    assert refused(input="x " * 200) == ("input", "context_length_exceeded")
    assert refused(input="x " * 900) == ("input", "context_length_exceeded")
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "no"}}
    assert refused(text={"format": schema}) == ("text.format.schema", "invalid_value")
    for form, param, code in (
        ({"type": "json_schema", "name": "x"}, "schema", "missing_required_parameter"),
        ({"type": "json_schema", "schema": {}}, "name", "missing_required_parameter"),
        ({"type": "text", "schema": {}}, "schema", "invalid_value"),
        ({"type": "json_object", "name": "x"}, "name", "invalid_value"),
        ({"type": "text", "strict": True}, "strict", "invalid_value"),
    ):
        assert refused(text={"format": form}) == (f"text.format.{param}", code)


def test_a_response_has_the_shape_of_the_official_types(endpoint: Endpoint) -> None:
    form = {"type": "json_schema", "name": "person", "schema": SCHEMA}
    request = {"model": "tiny", "input": "a", "max_output_tokens": 30, "text": {"format": form}}
    request |= {"metadata": {"team": "web"}}
    whole = post(endpoint, "/v1/responses", request)
    assert whole["text"]["format"] == form | {"strict": True}
    assert whole["metadata"] == {"team": "web"}
    assert whole["output"][0]["content"][0]["logprobs"] == []
    plain = post(endpoint, "/v1/responses", request | {"text": {"format": {"type": "text"}}})
    assert plain["text"]["format"] == {"type": "text"}
    told = events(endpoint, request | {"stream": True})
    deltas = [one for one in told if "output_text" in one["type"]]
    assert deltas and all(one["logprobs"] == [] for one in deltas)


@pytest.mark.peer
def test_the_official_types_take_every_event_of_a_response(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typing import get_args

    from openai.types.responses import ResponseStreamEvent

    union, _ = get_args(ResponseStreamEvent)
    kinds = {get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(union)}
    request = {"model": "tiny", "input": "a", "max_output_tokens": 100, "stream": True}
    for one in events(endpoint, request):
        kinds[one["type"]].model_validate(one)
    monkeypatch.setattr(grammar_check, "LIMITS", Limits(states=60))
    wide = {"type": "string", "pattern": "^[ab]{40,}a[ab]{16}c$"}
    form = {"type": "json_schema", "name": "wide", "schema": wide}
    *_, last = events(endpoint, request | {"text": {"format": form}, "temperature": 2})
    kinds[last["type"]].model_validate(last)
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["code"] == "invalid_prompt"
    assert "'text.format.schema' could not be followed" in last["response"]["error"]["message"]


def events(endpoint: Endpoint, request: dict) -> list[dict]:
    """The typed events of a response."""
    with (
        endpoint.client() as client,
        client.stream("POST", "/v1/responses", json=request) as response,
    ):
        raw = "".join(response.iter_text()).strip().split("\n\n")
    return [json.loads(event.split("\ndata: ")[1]) for event in raw]
