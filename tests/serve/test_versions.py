"""Several versions at once: by name, by share, swapped and rolled back without a failed request."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter

import pytest

from tests.serve.calls import CHAT, error, post
from tests.serve.conftest import Endpoint, eventually, spec

REQUEST = CHAT | {"temperature": 0, "max_tokens": 4}


def serve(endpoint: Endpoint, wanted: object) -> None:
    endpoint.host.want(wanted)
    assert eventually(lambda: endpoint.host.current and endpoint.host.current.spec == wanted)


@pytest.fixture(autouse=True)
def one_again(endpoint: Endpoint):
    yield
    serve(endpoint, spec())


def answered(endpoint: Endpoint, **more: object) -> str:
    return post(endpoint, "/v1/chat/completions", REQUEST | more)["system_fingerprint"]


def test_a_canary_gets_its_share_and_a_client_stays_where_it_is(endpoint: Endpoint) -> None:
    serve(endpoint, spec(share=0.75, beside=(spec("two", "2", share=0.25),)))
    names = [endpoint.host.find("tiny").spec.version for _ in range(4000)]
    assert 0.2 < names.count("2") / 4000 < 0.3
    sticky = {f"user {n}": endpoint.host.find("tiny", f"user {n}").spec.version for n in range(400)}
    assert 0.15 < list(sticky.values()).count("2") / 400 < 0.35
    for user in random.sample(sorted(sticky), 5):
        version = sticky[user]
        assert answered(endpoint, user=user) == {"1": "tiny-1-one", "2": "tiny-2-two"}[version]
        assert answered(endpoint, safety_identifier=user) == answered(endpoint, user=user)


def test_versions_answer_by_number_and_alias(endpoint: Endpoint) -> None:
    beside = (spec("two", "2", aliases=("challenger",), share=0.0),)
    serve(endpoint, spec(aliases=("champion",), beside=beside))
    for name, fingerprint in (
        ("tiny", "tiny-1-one"),
        ("tiny@1", "tiny-1-one"),
        ("tiny@champion", "tiny-1-one"),
        ("tiny@2", "tiny-2-two"),
        ("tiny@challenger", "tiny-2-two"),
    ):
        assert answered(endpoint, model=name) == fingerprint
        with endpoint.client() as client:
            card = client.get(f"/v1/models/{name}").json()
            assert (card["id"], card["system_fingerprint"]) == (name, fingerprint)
    status, problem = error(endpoint, "/v1/chat/completions", json=REQUEST | {"model": "tiny@9"})
    assert (status, problem["code"]) == (404, "model_not_found")
    with endpoint.client() as client:
        ids = [card["id"] for card in client.get("/v1/models").json()["data"]]
        text = client.get("/metrics").text
    assert ids == ["tiny", "tiny@1", "tiny@2"]
    assert (
        'gristmill_num_requests_running{model_name="tiny",version="2",replica="replica-1"} 0'
        in text
    )
    assert text.count("# TYPE gristmill_num_requests_running gauge") == 1


def test_several_models_answer_each_under_its_name(endpoint: Endpoint) -> None:
    other = spec("two", "2", aliases=("champion",)).model_copy(update={"name": "other"})
    spare = spec("one", "3", share=0.0).model_copy(update={"name": "other"})
    serve(endpoint, spec(beside=(other, spare)))
    for name, fingerprint in (
        ("tiny", "tiny-1-one"),
        ("other", "tiny-2-two"),
        ("other@champion", "tiny-2-two"),
        ("other@3", "tiny-3-one"),
    ):
        assert all(answered(endpoint, model=name) == fingerprint for _ in range(5))
    with endpoint.client() as client:
        ids = [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert ids == ["tiny", "other", "tiny@1", "other@2", "other@3"]
    status, problem = error(endpoint, "/v1/chat/completions", json=REQUEST | {"model": "third"})
    assert status == 404 and "'tiny', 'other'" in problem["message"]


def test_a_model_whose_engine_is_lost_is_not_ready_and_comes_back(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = spec("two", "4").model_copy(update={"name": "other"})
    serve(endpoint, spec(share=0.5, beside=(spec("two", "2", share=0.5), other)))
    allowed = threading.Event()
    warm = endpoint.host._warm
    monkeypatch.setattr(endpoint.host, "_warm", lambda spec: allowed.wait(60) and warm(spec))

    def lose(number: int) -> None:
        lost = endpoint.host.served[number]
        os.kill(lost.engine.pid, signal.SIGKILL)
        assert eventually(lambda: lost not in endpoint.host.served)

    lose(2)
    with endpoint.client() as client:
        for name in ("other", "other@4"):
            response = client.post("/v1/chat/completions", json=REQUEST | {"model": name})
            assert response.status_code == 503 and response.headers["Retry-After"]
            told = response.json()["error"]
            assert told["code"] == "model_not_ready" and f"{name} is being" in told["message"]
        response = client.post("/v1/chat/completions", json=REQUEST | {"model": "third"})
        assert response.status_code == 404
        assert client.post("/tokenize", json={"prompt": "x"}).status_code == 200
        lose(0)
        # The canary answers, but its tokens and vectors are not those of the version before it.
        assert answered(endpoint) == "tiny-2-two"
        for path, body in (
            ("/tokenize", {"prompt": "x"}),
            ("/tokenize", {"model": "tiny", "prompt": "x"}),
            ("/v1/embeddings", {"model": "tiny", "input": "x"}),
            ("/v1/chat/completions", REQUEST | {"model": "tiny@1"}),
        ):
            assert client.post(path, json=body).status_code == 503, path
    allowed.set()
    assert eventually(lambda: len(endpoint.host.served) == 3)
    assert answered(endpoint, model="other") == "tiny-4-two"
    assert answered(endpoint, model="tiny@1") == "tiny-1-one"


def test_vectors_and_tokens_of_a_bare_name_are_of_one_version(endpoint: Endpoint) -> None:
    other = spec("two", "4").model_copy(update={"name": "other"})
    spare = spec("one", "3", share=0.9).model_copy(update={"name": "other"})
    serve(endpoint, spec(share=0.1, beside=(spec("two", "2", share=0.9), other, spare)))

    def vectors(name: str) -> set[str]:
        request = {"model": name, "input": "x"}
        replies = [post(endpoint, "/v1/embeddings", request) for _ in range(12)]
        return {reply["system_fingerprint"] for reply in replies}

    assert vectors("tiny") == {"tiny-1-one"}
    assert vectors("tiny@2") == {"tiny-2-two"}
    assert vectors("other") == {"tiny-4-two"}
    assert {endpoint.host.first("other").spec.version for _ in range(40)} == {"4"}
    status, problem = error(endpoint, "/v1/embeddings", json={"model": "third", "input": "x"})
    assert (status, problem["code"]) == (404, "model_not_found")


def test_a_canary_comes_grows_and_goes_without_a_failed_request(endpoint: Endpoint) -> None:
    failures: list[BaseException] = []
    seen: Counter[str] = Counter()
    stopping = threading.Event()

    def client() -> None:
        while not stopping.is_set():
            try:
                seen[answered(endpoint)] += 1
            except BaseException as problem:
                failures.append(problem)

    clients = [threading.Thread(target=client) for _ in range(3)]
    for thread in clients:
        thread.start()
    try:
        for wanted in (
            spec(share=0.5, beside=(spec("two", "2", share=0.5),)),
            spec("two", "2", share=0.5, beside=(spec(share=0.5),)),
            spec("two", "2"),
            spec(),
        ):
            before = endpoint.host.served
            serve(endpoint, wanted)
            # A version that stays keeps its engine, and what its cache holds.
            kept = [
                one
                for one in before
                if any(one.spec.same_model(spec) for spec in wanted.everything)
            ]
            assert all(one in endpoint.host.served for one in kept)
            count = sum(seen.values())
            assert eventually(lambda count=count: sum(seen.values()) > count + 10)
    finally:
        stopping.set()
        for thread in clients:
            thread.join(60)
    assert not failures
    assert set(seen) == {"tiny-1-one", "tiny-2-two"}


def test_a_canary_that_cannot_be_loaded_changes_nothing(endpoint: Endpoint) -> None:
    endpoint.models.setdefault("missing", endpoint.models["one"].parent / "missing")
    endpoint.host.want(spec(share=0.5, beside=(spec("missing", "3", share=0.5),)))
    assert eventually(lambda: "tiny-3-missing" in endpoint.host.state()["failed"])
    assert endpoint.host.state()["shares"] == {"tiny-1-one": 1.0}
    assert answered(endpoint) == "tiny-1-one"


def test_a_version_twice_or_a_canary_of_a_canary_is_refused() -> None:
    with pytest.raises(ValueError, match="named twice"):
        spec(beside=(spec(share=0.5),))
    with pytest.raises(ValueError, match="cannot have versions beside it"):
        spec(beside=(spec("two", "2", beside=(spec("three", "3"),)),))
