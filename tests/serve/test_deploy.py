"""What a deploy tells a replica, and where a replica finds a model's files."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from flows import deploy as flow
from flows.deploy import DeployConfig
from serve import deploy
from serve.about import about, choose_examples
from serve.fetch import fetch
from serve.specification import EngineOptions
from tasks.registry import models
from tasks.runtime.errors import Unavailable, UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.store import MANIFEST, Store
from tests.serve.conftest import spec


def commit(store: Store, stage: str, files: dict[str, bytes], **more: object) -> Manifest:
    """An artifact with these files."""
    fingerprint = hashlib.sha256(f"{stage}{sorted(files)}{more}".encode()).hexdigest()
    directory = store.directory(stage, fingerprint)
    manifest = Manifest(
        stage=stage,
        version=1,
        fingerprint=fingerprint,
        content=fingerprint,
        files=tuple(directory.write_bytes(name, data) for name, data in files.items()),
        **more,
    )
    directory.write_bytes(MANIFEST, manifest.model_dump_json().encode())
    return manifest


def of(store: Store, manifest: Manifest) -> object:
    return spec(f"{manifest.stage}/{manifest.fingerprint}").model_copy(update={"store": store.uri})


def test_a_local_artifact_is_served_from_where_it_lies(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), tmp_path / "cache")
    manifest = commit(store, "finetune", {"config.json": b"{}", "model.safetensors": b"w"})
    directory = fetch(of(store, manifest))
    assert directory == Path(store.of(manifest).path)
    (directory / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.safetensors differs from its manifest"):
        fetch(of(store, manifest))


def test_a_remote_artifact_is_copied_once_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    store = Store(f"file://{tmp_path}/store", tmp_path / "unused")
    manifest = commit(store, "finetune", {"config.json": b"{}", "model.safetensors": b"w"})
    directory = fetch(of(store, manifest))
    assert directory.is_relative_to(tmp_path / "home" / "cache")
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": b"w",
    }
    (directory / "model.safetensors").write_bytes(b"tampered")
    with pytest.raises(UserError, match="digest"):
        fetch(of(store, manifest))


def test_a_missing_artifact_is_named(tmp_path: Path) -> None:
    wanted = spec("finetune/0000").model_copy(update={"store": str(tmp_path)})
    with pytest.raises(UserError, match="has no artifact finetune/0000"):
        fetch(wanted)


def test_what_a_person_should_know_comes_from_the_chain(tmp_path: Path) -> None:
    store = Store(str(tmp_path), tmp_path / "cache")
    crawl = commit(store, "crawl", {}, config={"seeds": ["https://docs.example.org/a"]})
    split = commit(store, "split", {}, inputs={"pages": crawl.fingerprint})
    rows = [
        {"fact": "os.walk", "kind": "what", "question": "What does os.walk do?"},
        {"fact": "os.walk", "kind": "where", "question": "What module holds os.walk?"},
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    pairs = commit(
        store,
        "pairs",
        {"pairs-train.parquet": sink.getvalue().to_pybytes()},
        inputs={"corpus": split.fingerprint},
    )
    model = commit(store, "finetune", {}, inputs={"base": "gone", "pairs": pairs.fingerprint})
    known = about(store, model)
    assert known.corpus == "pages of docs.example.org"
    assert known.examples == ("What does os.walk do?",)
    digests = {"crawl": crawl.content, "split": split.content, "pairs": pairs.content}
    assert known.data == digests
    assert about(store, crawl).examples == ()


def test_examples_are_public_short_and_of_many_subjects() -> None:
    facts = ["json.dumps", "json.loads", "json.load", "zlib.crc32", "abc._private", "os.walk"]
    rows = [
        {"fact": fact, "kind": "what", "question": question}
        for fact in facts
        for question in (f"What does {fact} do?", f"what is {fact}", f"What is `{fact}`?")
    ]
    rows.append(
        {"fact": "os.getcwd", "kind": "what", "question": "What does os.getcwd " + "x" * 99}
    )
    chosen = choose_examples(rows)
    assert chosen[0] == "What does os.walk do?"
    assert len(chosen) == 4 and set(chosen) < {f"What does {fact} do?" for fact in facts}
    assert not any("_private" in question for question in chosen)
    assert choose_examples(rows[::-1]) == chosen
    assert choose_examples([]) == ()


class OtherServe(BaseHTTPRequestHandler):
    """Answers as Ray Serve and a replica do after another deploy."""

    answers: ClassVar[dict[str, dict[str, object]]] = {}

    def do_GET(self) -> None:
        body = json.dumps(self.answers[self.path]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def other_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """A Serve that was told to serve version 7 by somebody else."""
    monkeypatch.setattr(deploy, "FORGOTTEN_SECONDS", 0.3)
    config = {"deployments": [{"user_config": {"request": "theirs"}}]}
    running = {"status": "RUNNING", "message": "", "deployed_app_config": config}
    health = {"serving": "m-7", "loading": None, "request": "theirs", "failed": {}, "replica": "r"}
    health |= {"shares": {"m-7": 1.0}, "engines": {"m-7": spec().engine_state()}}
    health |= {"aliases": {"m-7": []}}
    OtherServe.answers = {
        "/health": health,
        "/api/serve/applications/": {"applications": {"gristmill": running}},
    }
    with ThreadingHTTPServer(("127.0.0.1", 0), OtherServe) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        yield Settings(home=tmp_path, serve_url=url, ray_dashboard_url=url)
        server.shutdown()


def test_a_deploy_that_serve_forgot_is_tried_again_instead_of_waited_for(
    other_wish: Settings,
) -> None:
    wanted = spec("finetune/0000").model_copy(update={"system_fingerprint": "m-8", "request": "us"})
    with pytest.raises(Unavailable, match="m-8 is not served: Ray Serve was started anew"):
        deploy.wait_until_served(other_wish, wanted, 1, timeout=20)


def test_a_version_that_is_served_already_is_not_waited_for(other_wish: Settings) -> None:
    wanted = spec("finetune/0000").model_copy(update={"system_fingerprint": "m-7", "request": "us"})
    deploy.wait_until_served(other_wish, wanted, 1, timeout=2)


def test_a_deploy_waits_for_every_replica_that_gets_requests(other_wish: Settings) -> None:
    running = OtherServe.answers["/api/serve/applications/"]["applications"]["gristmill"]
    added = [{"replica_id": "r", "state": "RUNNING"}, {"replica_id": "s", "state": "UPDATING"}]
    going = {"replica_id": "t", "state": "STOPPING"}
    coming = {"replica_id": "u", "state": "STARTING"}
    running["deployments"] = {"Endpoint": {"replicas": [*added, going, coming]}}
    running["deployed_app_config"] = {"deployments": [{"user_config": {"request": "us"}}]}
    wanted = spec("finetune/0000").model_copy(update={"system_fingerprint": "m-7", "request": "us"})
    said: list[str] = []
    with pytest.raises(UserError, match="was not served within 1 s"):
        deploy.wait_until_served(other_wish, wanted, 1, 1, said.append)
    assert said == ["1 of 2 replicas serve m-7 (running)"]
    added[1]["replica_id"] = "r"
    deploy.wait_until_served(other_wish, wanted, 1, timeout=2)


def test_going_back_in_replicas_or_names_is_not_what_is_served(
    other_wish: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow.Settings, "load", lambda: other_wish)
    running = OtherServe.answers["/api/serve/applications/"]["applications"]["gristmill"]
    health = OtherServe.answers["/health"]

    def told(**scale: object) -> None:
        config = {"name": "gristmill", "deployments": [{**scale, "user_config": {}}]}
        running["deployed_app_config"] = config

    store = Store.open(other_wish)

    def deployed() -> Manifest:
        served = json.dumps(deploy.served(other_wish), sort_keys=True)
        created = datetime.datetime.now(datetime.UTC).isoformat()
        return commit(store, "deploy", {}, metrics={"served": served}, created=created)

    told(num_replicas=1)
    one = deployed()
    assert flow.is_served(one)
    told(num_replicas="auto", autoscaling_config={"max_replicas": 4})
    assert not flow.is_served(one)
    told(num_replicas=1)
    assert flow.is_served(one)
    health["aliases"] = {"m-7": ["champion"]}
    assert not flow.is_served(one)
    health.pop("aliases")
    told(num_replicas=2)
    two = deployed()
    assert flow.is_served(two) and not flow.is_served(one)
    told(num_replicas=1)
    assert not flow.is_served(one)  # after a restart it would be the other one


def version(model: str, number: str, *aliases: str) -> models.Version:
    artifact = f"finetune/{model}{number}"
    return models.Version(model, number, "run", artifact, aliases, {}, 0.0, {})


def test_several_models_and_versions_are_chosen_for_one_deploy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {
        "a": [version("a", "1", "champion"), version("a", "2", "challenger")],
        "b": [version("b", "7", "champion"), version("b", "6")],
    }
    monkeypatch.setattr(models, "versions", lambda model: known[model])
    asked: list[flow.ServedConfig] = []
    monkeypatch.setattr(flow, "deploy_version", asked.append)

    def chosen(**values: object) -> list[tuple[str, str, float]]:
        config = DeployConfig.model_validate(values)
        flow.serve_version(config, known["a"][0])
        return [(one.model, one.version, one.share) for one in asked[-1].beside]

    assert chosen() == []
    assert asked[-1].version.aliases == ("champion",)
    assert asked[-1].version.asked == "a@champion"
    assert chosen(beside=["a@2", "b", "b@6"]) == [("a", "2", 0), ("b", "7", 1), ("b", "6", 0)]
    assert chosen(canary="challenger", beside=["a@2"]) == [("a", "2", 0.1)]
    assert [one.asked for one in asked[-1].beside] == ["a@challenger"]
    assert chosen(canary="1", beside=["a@1"]) == []  # became the main one
    assert asked[-1] == asked[0]
    known["a"][0] = version("a", "1")  # the alias went elsewhere
    assert chosen() == [] and asked[-1] != asked[0]


def test_a_replica_may_take_as_long_as_the_longest_answer(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, store=str(tmp_path))
    store = Store.open(settings)

    def seconds(context: int, megabytes: int, slots: int, max_waiting: int = 32) -> float:
        config = json.dumps({"max_position_embeddings": context, "dtype": "float32"}).encode()
        files = {"config.json": config, "model.safetensors": b"0" * (megabytes << 20)}
        engine = EngineOptions(slots=slots, max_waiting=max_waiting)
        return deploy.longest_answer(settings, commit(store, "finetune", files), engine)

    assert seconds(128, 1, 4) == deploy.LEAST_DRAIN_SECONDS
    # A full batch of 32 at 2 GFLOPS: 0.27 s a step, and four contexts of steps for 128 answers.
    assert 4000 < seconds(4096, 32, 32) < 4800
    four = seconds(4096, 32, 32)
    assert seconds(4096, 32, 32, max_waiting=288) == pytest.approx(2.5 * four, 1e-3)
    assert seconds(4096, 32, 1) == pytest.approx(four, 1e-3)
    assert deploy.longest_answer(settings, commit(store, "finetune", {}), EngineOptions()) == 120


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"engine": {"speculate": 3, "deterministic": True}}, "leave deterministic out"),
        ({"draft": "gristmill@2"}, "guesses engine.speculate tokens, which is 0; raise it"),
        ({"replicas": 3, "most_replicas": 2}, "most_replicas 2 is below replicas 3"),
        ({"engine": {"kind": "vllm", "weights": "int8"}}, "weights int8 is of our own engine"),
        ({"engine": {"kind": "vllm", "threads": 2}}, "threads 2 is of our own engine"),
        ({"engine": {"kind": "vllm", "deterministic": True}}, "deterministic is of our own"),
        ({"engine": {"kind": "vllm", "compiled": False}}, "compiled false is of our own engine"),
    ],
)
def test_what_would_have_no_effect_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DeployConfig.model_validate(values)
