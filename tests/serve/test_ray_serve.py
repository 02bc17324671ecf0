"""The endpoint inside Ray Serve, behind its proxy: deploying, swapping, failing, coming back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.served import stored
from serve import deploy as serving
from serve.specification import EngineOptions
from tasks.registry.models import Version
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import Store
from tests.conftest import Stack
from tests.serve.conftest import eventually
from tests.tiny_models import model_directory

REQUEST = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "def main():"}],
    "temperature": 0,
    "max_tokens": 60,
}


LONG = 9  # a version with a context long enough for answers of many seconds


class Registered:
    """Versions of a tiny model, their artifacts in the stack's own store."""

    def __init__(self, stack: Stack, scratch: Path) -> None:
        self.settings, self.scratch = stack.settings, scratch
        self.store = Store.open(stack.settings)
        self.client = httpx.Client(base_url=stack.settings.serve, timeout=60, trust_env=False)

    def version(self, seed: int) -> tuple[Version, Manifest]:
        context = 4096 if seed == LONG else 128
        return stored(
            self.store,
            "tiny",
            seed,
            lambda: model_directory(self.scratch / str(seed), seed, context),
            scores={"recall": 0.5},
            lineage={"report": "evaluate/abc"},
        )

    def deploy(self, seed: int, **options: Any) -> str:
        return serving.deploy(self.settings, *self.version(seed), **options)

    def health(self) -> dict:
        return self.client.get("/health").json()

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return float(
            next(line for line in lines if line.startswith(f"gristmill_{name}")).split()[-1]
        )


@pytest.fixture(scope="module")
def registered(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Registered:
    models = Registered(stack, tmp_path_factory.mktemp("models"))
    models.deploy(1)
    return models


def test_a_deployed_version_answers_under_its_name(registered: Registered) -> None:
    served = registered.deploy(1)
    assert served == serving.served_version(registered.settings)
    body = registered.client.post("/v1/chat/completions", json=REQUEST).json()
    assert body["system_fingerprint"] == served and served.startswith("tiny-1-")
    (card,) = registered.client.get("/v1/models").json()["data"]
    assert card["version"] == "1" and card["scores"] == {"recall": 0.5}
    assert card["lineage"] == {
        "run": "a-run",
        "artifact": registered.version(1)[0].artifact,
        "report": "evaluate/abc",
    }
    assert registered.client.get("/").status_code == 200
    assert registered.client.post("/v1/chat/completions", json={}).status_code == 400


def test_versions_swap_under_load_without_a_failed_request(registered: Registered) -> None:
    failures: list[BaseException] = []
    answers: dict[str, set[str]] = defaultdict(set)
    stopping = threading.Event()

    def client(streamed: bool) -> None:
        url = f"{registered.settings.serve}/v1/chat/completions"
        with httpx.Client(timeout=60, trust_env=False) as http:
            while not stopping.is_set():
                try:
                    if streamed:
                        body = REQUEST | {"stream": True}
                        with http.stream("POST", url, json=body) as response:
                            lines = [line for line in response.iter_lines() if line]
                        assert lines[-1] == "data: [DONE]"
                        chunks = [json.loads(line[6:]) for line in lines[:-1]]
                        (name,) = {chunk["system_fingerprint"] for chunk in chunks}
                        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
                        answers[name].add("".join(delta.get("content", "") for delta in deltas))
                    else:
                        body = http.post(url, json=REQUEST).json()
                        text = body["choices"][0]["message"]["content"]
                        answers[body["system_fingerprint"]].add(text)
                except BaseException as error:
                    failures.append(error)

    clients = [threading.Thread(target=client, args=(number % 2 == 0,)) for number in range(4)]
    for thread in clients:
        thread.start()
    try:
        names = {registered.deploy(seed) for seed in (2, 1, 2, 1)}
    finally:
        stopping.set()
        for thread in clients:
            thread.join(60)
    assert not failures
    assert set(answers) == names and all(len(texts) == 1 for texts in answers.values())


def test_the_engine_of_a_served_version_can_be_changed(registered: Registered) -> None:
    plain = registered.deploy(1)
    options = EngineOptions(weights="int8", slots=4, speculate=2)
    small = registered.deploy(1, engine=options, draft=registered.version(2)[0])
    assert plain == small  # the same version
    told = serving.served(registered.settings)["engines"][small]
    assert (told["weights"], told["slots"], told["speculate"]) == ("int8", 4, 2)
    assert told["draft"] == registered.version(2)[0].artifact
    assert registered.client.post("/v1/chat/completions", json=REQUEST).status_code == 200
    assert registered.metric("spec_decode_num_draft_tokens_total") > 0
    registered.deploy(1)
    assert serving.served(registered.settings)["engines"][plain]["weights"] == "float32"


def test_several_models_answer_each_under_its_name(registered: Registered) -> None:
    version, artifact = registered.version(2)
    other = dataclasses.replace(version, model="other", aliases=("champion",))
    served = registered.deploy(1, beside=[serving.Beside(other, artifact, 1.0)])
    names = {"tiny": served, "other": serving.fingerprint_of(other)}
    names["other@champion"] = names["other"]
    for name, fingerprint in names.items():
        reply = registered.client.post("/v1/chat/completions", json=REQUEST | {"model": name})
        assert reply.json()["system_fingerprint"] == fingerprint
    cards = registered.client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["tiny", "other", "tiny@1", "other@2"]
    told = serving.served(registered.settings)
    assert told["aliases"][names["other"]] == ["champion"]
    assert told["scale"]["num_replicas"] == 1
    # The longest answer of so small a model takes less than what every replica gets.
    assert told["scale"]["graceful_shutdown_timeout_s"] == serving.LEAST_DRAIN_SECONDS
    registered.deploy(1)


@pytest.mark.slow
def test_replicas_are_added_while_requests_outnumber_slots(registered: Registered) -> None:
    registered.deploy(1, most_replicas=2, engine=EngineOptions(slots=1, max_waiting=1000))
    body = REQUEST | {"max_tokens": 100, "ignore_eos": True, "n": 8}
    with asked(registered, body, clients=12) as statuses:
        assert eventually(lambda: len(replicas(registered)) == 2, 180)
        # The second answers when it can, and until then the first alone does.
        assert eventually(lambda: len(answering(registered)) == 2, 180)
    assert set(statuses) == {200}
    registered.deploy(1)
    assert eventually(lambda: len(replicas(registered)) == 1, 180)


@pytest.mark.slow
def test_copies_come_and_go_without_a_failed_request(registered: Registered) -> None:
    registered.deploy(1)
    with asked(registered, REQUEST | {"max_tokens": 20}, clients=3) as statuses:
        registered.deploy(1, replicas=2)
        assert eventually(lambda: len(answering(registered)) == 2, 60)
        registered.deploy(1)
        assert eventually(lambda: len(replicas(registered)) == 1, 180)
    assert set(statuses) <= {200, 429}


@contextlib.contextmanager
def asked(registered: Registered, body: dict, clients: int) -> Iterator[Counter[int]]:
    """So many clients that ask on and on; how often each status came, complete afterwards."""
    statuses: Counter[int] = Counter()
    stopping = threading.Event()

    def client() -> None:
        with httpx.Client(base_url=registered.settings.serve, timeout=120, trust_env=False) as http:
            while not stopping.is_set():
                statuses[http.post("/v1/chat/completions", json=body).status_code] += 1

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stopping.set()
        for thread in threads:
            thread.join(120)


def answering(registered: Registered) -> set[str]:
    """The replicas that a few questions meet; all of them serve a version."""
    health = f"{registered.settings.serve}/health"
    told = [httpx.get(health, trust_env=False).json() for _ in range(20)]  # a connection each
    assert all(one["serving"] for one in told), told
    return {one["replica"] for one in told}


def test_a_version_that_cannot_be_loaded_leaves_the_old_one(registered: Registered) -> None:
    served = registered.deploy(1)
    version, manifest = registered.version(3)
    weights = Path(registered.store.of(manifest).location("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors differs from its manifest"):
        serving.deploy(registered.settings, version, manifest)
    gone = dataclasses.replace(version, version="4", artifact="finetune/0000")
    with pytest.raises(UserError, match="deploy the version's own artifact"):
        serving.deploy(registered.settings, gone, manifest)
    assert registered.health()["serving"] == served
    assert registered.client.post("/v1/chat/completions", json=REQUEST).status_code == 200


@pytest.mark.parametrize("streamed", [True, False])
def test_a_disconnect_behind_the_proxy_frees_the_engine(
    registered: Registered, streamed: bool
) -> None:
    before = registered.metric("requests_aborted_total")
    many = REQUEST | {"n": 128, "stream": streamed, "temperature": 1}
    body = json.dumps(many | {"max_tokens": 110}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    address = (registered.settings.host, registered.settings.ports.serve)
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode() + body)
        if streamed:
            assert connection.recv(100)
        else:
            assert eventually(lambda: registered.metric("num_requests_running") > 0)
    assert eventually(lambda: registered.metric("requests_aborted_total") > before)
    assert eventually(lambda: registered.metric("num_requests_running") == 0)


def test_nothing_of_the_endpoint_listens_outside(registered: Registered) -> None:
    for process in replicas(registered):
        listening = [c for c in process.net_connections("inet") if c.status == "LISTEN"]
        assert listening
        addresses = {c.laddr.ip.removeprefix("::ffff:") for c in listening}
        assert addresses == {"127.0.0.1"}


@pytest.mark.slow
def test_an_answer_under_way_outlives_the_end_of_its_replica(registered: Registered) -> None:
    registered.deploy(LONG)
    body = REQUEST | {"stream": True, "max_tokens": 4000, "ignore_eos": True}
    url = f"{registered.settings.serve}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=120, trust_env=False) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        serving.undeploy(registered.settings)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    finish = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
    assert finish[-1] == "length" and len(rest) > 100
    registered.deploy(1)


@pytest.mark.slow
def test_a_killed_replica_comes_back_with_the_same_version(registered: Registered) -> None:
    served = registered.deploy(2)
    for process in replicas(registered):
        os.kill(process.pid, signal.SIGKILL)
    assert eventually(lambda: serving.served_version(registered.settings) is None, 60)
    assert eventually(lambda: serving.served_version(registered.settings) == served, 120)


def replicas(registered: Registered) -> list[psutil.Process]:
    """The processes of this stack's replicas."""
    home = str(registered.settings.home)
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if "ServeReplica" not in " ".join(process.info["cmdline"] or ()):
            continue
        if process.environ().get("GRISTMILL_HOME") == home:
            found.append(process)
    assert found
    return found
