"""The endpoint on a real HTTP server with a tiny model, without Ray."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import uvicorn

from serve.app import create_app
from serve.host import ModelHost
from serve.specification import ModelSpec
from tests.tiny_models import model_directory


@dataclass
class Endpoint:
    """A running endpoint. `models`: artifact name → directory, for specs to name."""

    url: str
    host: ModelHost
    models: dict[str, Path]

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def idle(self) -> bool:
        """Whether the engine holds nothing, once it had time to notice."""
        served = self.host.current
        assert served is not None
        return eventually(lambda: served.engine.idle and not served.engine.counters().running)


def spec(artifact: str = "one", version: str = "1", **more: object) -> ModelSpec:
    return ModelSpec(
        name="tiny",
        version=version,
        system_fingerprint=f"tiny-{version}-{artifact}",
        store="unused",
        artifact=artifact,
        **more,
    )


def eventually(condition: Callable[[], bool], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    root = tmp_path_factory.mktemp("models")
    models = {name: model_directory(root / name, seed) for seed, name in enumerate(("one", "two"))}
    models["broken"] = root / "broken"
    host = ModelHost(lambda wanted: models[wanted.artifact])
    host.want(spec())
    assert eventually(lambda: host.current is not None), host.state()
    with listening(create_app(host, "replica-1")) as url:
        yield Endpoint(url, host, models)
    host.close()


class listening:  # noqa: N801
    """`with listening(app) as url`: the app on a free loopback port."""

    def __init__(self, app: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        config = uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="warning")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        assert eventually(lambda: self.server.started)
        return f"http://127.0.0.1:{self.port}"

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(30)


__all__ = ["Endpoint", "eventually", "listening", "replace", "spec"]
