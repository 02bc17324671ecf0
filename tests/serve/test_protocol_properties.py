"""Whatever arrives is a request or an error that names what is wrong: never anything else."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.checking import NEUTRAL, WITHOUT_EFFECT, decode_json, parse
from serve.errors import ApiError
from serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from serve.responses_api import ResponsesRequest
from tests.serve.conftest import Endpoint

PATHS = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}

GENERATING = [ChatRequest, CompletionRequest, EmbeddingRequest, ResponsesRequest]
KINDS = [*GENERATING, DetokenizeRequest, TokenizeRequest]
NAMES = sorted(
    {n for kind in KINDS for n in kind.model_fields}
    | set(NEUTRAL)
    | set(WITHOUT_EFFECT)
    | {"nonsense"}
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["user", "text", "json_schema", "message", "1", "tiny"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "schema", "json", "regex", "5"])
            | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
VALID = {
    ChatRequest: {"model": "m", "messages": [{"role": "user", "content": "a"}]},
    CompletionRequest: {"model": "m", "prompt": "a"},
    EmbeddingRequest: {"model": "m", "input": "a"},
    DetokenizeRequest: {"tokens": [1]},
    TokenizeRequest: {"prompt": "a"},
    ResponsesRequest: {"model": "m", "input": "a"},
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
def test_any_values_make_a_request_or_a_named_refusal(kind, changes: dict) -> None:
    try:
        asked = parse(kind, VALID[kind] | changes)
        if isinstance(asked, ResponsesRequest):
            asked = asked.chat()
        if isinstance(asked, ChatRequest | CompletionRequest):
            asked.sampling()
            asked.grammar()
    except ApiError as error:
        assert error.status == 400 and error.code
        assert json.dumps(error.body(), ensure_ascii=True)
        if error.param is not None:
            assert any(error.param.startswith(name) for name in [*NAMES, *VALID[kind]]), error.param


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes_are_an_object_or_a_refusal(raw: bytes) -> None:
    try:
        assert isinstance(decode_json(raw), dict)
    except ApiError as error:
        assert error.status == 400 and error.code == "invalid_json"


@pytest.mark.parametrize("kind", GENERATING, ids=lambda kind: kind.__name__)
def test_nothing_is_accepted_and_ignored(kind) -> None:
    """What is no field passes only with a value that asks for nothing, or is listed."""
    for name in set(NAMES) - set(kind.model_fields) - set(WITHOUT_EFFECT):
        with pytest.raises(ApiError) as caught:
            parse(kind, VALID[kind] | {name: {"asks": "for something"}})
        assert caught.value.param == name


@pytest.mark.parametrize("kind", GENERATING, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", sorted({*NEUTRAL, *WITHOUT_EFFECT}))
def test_null_is_as_good_as_nothing(kind, name: str) -> None:
    if name in VALID[kind]:
        return
    parse(kind, VALID[kind] | {name: None})


@pytest.mark.parametrize("kind", GENERATING, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("name", "value", "param"),
    [
        ("user", 5, "user"),
        ("safety_identifier", ["a"], "safety_identifier"),
        ("store", "maybe", "store"),
        ("store", 1, "store"),
        ("metadata", 5, "metadata"),
        ("metadata", {"a": 1}, "metadata.a"),
        ("metadata", {str(n): "" for n in range(17)}, "metadata"),
        ("metadata", {"a": "x" * 513}, "metadata.a"),
        ("service_tier", "fastest", "service_tier"),
    ],
)
def test_what_has_no_effect_is_checked_like_the_rest(kind, name, value, param) -> None:
    with pytest.raises(ApiError) as caught:
        parse(kind, VALID[kind] | {name: value})
    assert (caught.value.param, caught.value.code) == (param, "invalid_value")


def test_what_is_not_implemented_is_told_from_what_is_unknown() -> None:
    for kind, name, value in (
        (EmbeddingRequest, "dimensions", 8),
        (ResponsesRequest, "context_management", [{"type": "compaction"}]),
        (ResponsesRequest, "prompt_cache_options", {"mode": "explicit"}),
        (ChatRequest, "functions", [{"name": "f"}]),
    ):
        with pytest.raises(ApiError) as caught:
            parse(kind, VALID[kind] | {name: value})
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")
    for kind in (ChatRequest, CompletionRequest, ResponsesRequest):
        plain = {"stream": True, "stream_options": {"include_obfuscation": False}}
        assert parse(kind, VALID[kind] | plain).stream
        plain["stream_options"] = {"include_obfuscation": True}
        with pytest.raises(ApiError) as caught:
            parse(kind, VALID[kind] | plain)
        assert caught.value.param == "stream_options.include_obfuscation"


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
def test_no_body_makes_the_server_fail(endpoint: Endpoint, path: str, changes: dict) -> None:
    body = VALID[PATHS[path]] | {"model": "tiny"} | changes
    with endpoint.client() as client:
        response = client.post(path, json=body)
    assert response.status_code in (200, 400, 404), (body, response.text)
    assert endpoint.host.healthy
