"""A node of the cluster dies and does not come back: the training goes on with what is left."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tasks.runtime.rest import Refused, call
from tasks.runtime.settings import Settings
from tasks.training.job import PROGRESS
from tasks.training.pretrain import pretrain
from tests.conftest import Stack, free_ports
from tests.tasks.training.stage_runs import (
    RUN,
    bare_losses,
    changed,
    first_checkpoint,
    losses,
    small_corpus,
    trained,
    training,
    workers,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 400
ATTEMPTS = 3


@contextlib.contextmanager
def node(settings: Settings, number: int, *arguments: str) -> Iterator[psutil.Popen]:
    """The first or second node of the cluster, with room for one training worker. One that does not
    come up, as somebody else took a port that Ray had chosen, is started again.
    """
    started: list[psutil.Popen] = []
    try:
        for attempt in range(ATTEMPTS):
            log = settings.home / f"node-{number}-{attempt}.log"
            started.append(start(settings, log, *arguments))
            if joined(settings, number, started[-1]):
                break
            end(started[-1])
        else:
            pytest.fail(f"node {number} does not come up: {log.read_text()[-2000:]}")
        yield started[-1]
    finally:
        for process in started:
            end(process)


def start(settings: Settings, log: Path, *arguments: str) -> psutil.Popen:
    with log.open("wb") as told:
        return psutil.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
                *("--num-cpus", "1", "--dashboard-agent-listen-port", str(free_ports(1)[0])),
                *("--object-store-memory", str(80 * 2**20), *arguments),
            ],
            env=os.environ | settings.environment() | {"RAY_JOB_STOP_WAIT_TIME_S": "2"},
            stdout=told,
            stderr=subprocess.STDOUT,
        )


def own_address() -> str:
    """The machine's own, as Ray finds it where nothing was said of loopback in this process."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        return str(probe.getsockname()[0])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """A cluster of one node, on the machine's own address as another node could not join one on
    loopback; MLflow is a file."""
    with tempfile.TemporaryDirectory(prefix="gristmill-test-") as name:
        home = Path(name)
        monkeypatch.setenv("GRISTMILL_HOME", name)
        gcs, dashboard, client = free_ports(3)
        (home / "ray.token").write_text(secrets.token_hex(32))
        settings = Settings(
            home=home,
            ray_address=f"{own_address()}:{gcs}",
            ray_dashboard_url=f"http://127.0.0.1:{dashboard}",
            mlflow_url=f"sqlite:///{home}/mlflow.db",
        )
        settings.save()
        head = ("--head", "--port", str(gcs), "--dashboard-port", str(dashboard))
        others = ("--ray-client-server-port", str(client), "--temp-dir", f"{name}/r")
        with node(settings, 1, *head, *others):
            yield Stack(settings)


def joined(settings: Settings, count: int, node: psutil.Popen) -> bool:
    """Whether the cluster has so many nodes before the latest one ends, or a minute."""
    token = settings.ray_token_path.read_text()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and node.poll() is None:
        time.sleep(0.2)
        with contextlib.suppress(OSError, Refused):
            told = call(f"{settings.ray_dashboard}/nodes?view=summary", token=token)
            states = [each["raylet"].get("state") for each in told["data"]["summary"]]
            if states.count("ALIVE") >= count:
                return True
    return False


def end(node: psutil.Popen) -> list[int]:
    """`kill -9` of a node: its raylet, its workers and all else of it; returns their pids."""
    processes: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        processes = [node, *node.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()
    return [process.pid for process in processes]


def wait_for_step(step: int, workspace: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError, ValueError):
            if json.loads((workspace / PROGRESS).read_text())["step"] >= step:
                return
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"step {step} was not reached in 120 s"
        time.sleep(0.02)


def test_a_training_outlives_a_node_with_fewer_workers_on_the_same_batches(
    cluster: Stack,
) -> None:
    home = cluster.settings.home
    corpus = small_corpus(cluster)
    inputs = {name: corpus[name] for name in ("shards", "tokenizer")}
    run = RUN.model_copy(update={"workers": 2, "least_workers": 1})
    # Low rates, at which what two ranks round otherwise than one does not grow.
    rates = ("muon_learning_rate", "learning_rate", "embedding_learning_rate")
    config = changed(
        seed=8,
        run=run.model_dump(),
        tokens=STEPS * 8 * 64,
        optimizer=dict.fromkeys(rates, 5e-4),
    )
    mark = pretrain.fingerprint(config, inputs)
    joins = ("--address", cluster.settings.ray)
    with node(cluster.settings, 2, *joins) as second, training(config, cluster, inputs) as process:
        first_checkpoint(process, mark, home)
        step = random.randrange(20, STEPS // 2)
        wait_for_step(step, home / "store" / "pretrain" / mark, process)
        before = {worker.pid for worker in workers(home)}
        gone = end(second)
        assert len(before) == 2 and len(before & set(gone)) == 1, (before, gone)
        manifest = trained(process)
    assert manifest.world["workers"] == 1
    assert manifest.counts["tokens"] == config.tokens
    expected, curve = bare_losses(config, inputs["shards"], 320), losses(manifest)
    assert list(curve) == list(expected)
    assert min(expected.values()) < 0.8 * max(expected.values())
    # The same batches in the same order, but for a while added up by two.
    assert curve == pytest.approx(expected, rel=5e-3)
