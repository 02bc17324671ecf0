"""When a replica begins, and what becomes of one that cannot: `serve.deployment` without Ray."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.engine import Sampling
from serve.deployment import Endpoint
from serve.host import ModelHost
from serve.keys import KeyRing
from serve.specification import ModelSpec
from tests.serve.conftest import eventually, spec
from tests.tiny_models import model_directory


class Files:
    """Models on a disk that answers when it is told to."""

    def __init__(self, root: Path) -> None:
        self.there = {"one": model_directory(root / "one", 0), "broken": root / "broken"}
        self.open = threading.Event()
        self.asked = threading.Event()

    def __call__(self, wanted: ModelSpec) -> Path:
        self.asked.set()
        assert self.open.wait(60)
        return self.there[wanted.artifact]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def replica(files: Files) -> Iterator[Any]:
    """A replica's object, without the servers that Ray starts around it."""
    own = Endpoint.func_or_class.__bases__[0]
    made = object.__new__(own)
    made.host, made.keys = ModelHost(files), KeyRing(None)
    yield made
    made.host.close()


def told(replica: Any, wanted: ModelSpec) -> None:
    asyncio.run(replica.reconfigure(wanted.model_dump(mode="json")))


def test_a_replica_begins_when_its_first_model_is_loaded(replica: Any, files: Files) -> None:
    beginning = threading.Thread(target=told, args=(replica, spec()))
    beginning.start()
    assert files.asked.wait(60)
    beginning.join(0.2)
    assert beginning.is_alive() and replica.host.current is None
    files.open.set()
    beginning.join(60)
    assert replica.host.current.spec == spec()


def test_a_replica_that_serves_something_takes_a_wish_at_once(replica: Any, files: Files) -> None:
    files.open.set()
    told(replica, spec())
    files.open.clear()
    told(replica, spec(version="2"))  # returns while its files are waited for
    assert replica.host.state()["loading"] == "tiny-2-one"
    files.open.set()
    assert eventually(lambda: replica.host.state()["serving"] == "tiny-2-one")


def test_the_only_replica_stays_to_say_why_it_serves_nothing(replica: Any, files: Files) -> None:
    files.open.set()
    told(replica, spec("broken"))
    assert "config.json" in replica.host.state()["failed"]["tiny-1-broken"]
    replica.check_health()


def test_one_of_several_that_cannot_load_is_no_replica(replica: Any, files: Files) -> None:
    files.open.set()
    with pytest.raises(RuntimeError, match=r"tiny-1-broken cannot be served: .*config\.json"):
        told(replica, spec("broken", copies=2))


def test_a_lost_engine_is_started_anew_where_it_was(replica: Any, files: Files) -> None:
    files.open.set()
    told(replica, spec(beside=[spec(version="2")]))
    host: ModelHost = replica.host
    lost, other = (served.engine for served in host.served)
    os.kill(lost.pid, signal.SIGKILL)
    assert eventually(lambda: len(host.served) == 2 and host.served[0].engine is not lost)
    assert host.served[0].spec.version == "1" and host.served[1].engine is other
    ended = threading.Event()
    host.served[0].engine.submit([30, 31], Sampling(max_tokens=2), lambda _: ended.set())
    assert ended.wait(60)
    replica.check_health()
    assert host.state()["status"] == "ok"


def test_an_engine_that_cannot_be_started_anew_ends_the_replica(replica: Any, files: Files) -> None:
    files.open.set()
    told(replica, spec())
    files.there["one"] = files.there["broken"]
    os.kill(replica.host.current.engine.pid, signal.SIGKILL)
    assert eventually(lambda: not replica.host.healthy)
    with pytest.raises(RuntimeError, match="engine"):
        replica.check_health()
