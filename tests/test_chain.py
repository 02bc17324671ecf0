"""The whole chain at a tiny scale on the real stack, driven from the command line."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tasks.runtime.store import Store
from tests.conftest import Stack

STAGES = [
    "crawl",
    "extract",
    "measure",
    "signatures",
    "language",
    "quality",
    "deduplicate",
    "split",
    "tokenizer",
    "token-shards",
    "corpus-report",
    "pretrain",
    "pairs",
    "finetune",
    "compression-baseline",
    "evaluate",
    "register",
    "register-base",
    "deploy",
]
TINY = ("--config", "configs/tiny.yaml")

pytestmark = pytest.mark.timeout(600)


def post(stack: Stack, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{stack.settings.serve}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def prefect(stack: Stack, path: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        f"{stack.settings.prefect_api}{path}",
        json.dumps(body or {}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read() or "null")


def task_states(stack: Stack, flow: str) -> dict[str, str]:
    """Stage → name of the state of its task, of the newest run of a flow."""
    runs = prefect(
        stack,
        "/flow_runs/filter",
        {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC", "limit": 1},
    )
    tasks = prefect(
        stack, "/task_runs/filter", {"flow_runs": {"id": {"any_": [runs[0]["id"]]}}, "limit": 100}
    )
    return {task["name"]: task["state"]["name"] for task in tasks}


@pytest.fixture(scope="module")
def trained(stack: Stack) -> Stack:
    """The stack after one tiny pipeline run."""
    stack.gristmill("run", "pipeline", *TINY, "--watch", timeout=560)
    return stack


def test_the_pipeline_leaves_a_served_model(trained: Stack) -> None:
    assert "champion" in trained.gristmill("models")
    answer = post(
        trained,
        "/v1/chat/completions",
        {
            "model": "gristmill",
            "messages": [{"role": "user", "content": "What does abs do?"}],
            "max_tokens": 8,
        },
    )
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] <= 8
    assert trained.gristmill("ask", "What does abs do?").strip()


def test_the_base_model_is_a_version_that_can_be_exported(trained: Stack, tmp_path: Path) -> None:
    told = trained.gristmill("models")
    assert "gristmill-base\n  version 1    - " in told
    trained.gristmill("export", "gristmill-base", "--out", str(tmp_path / "base"))
    card = (tmp_path / "base" / "README.md").read_text()
    assert "This is a base model" in card and "| pretrain |" in card and "| crawl |" in card
    assert "| finetune |" not in card


def test_every_artifact_is_whole_and_leads_back_to_the_crawl(trained: Stack) -> None:
    store = Store.open(trained.settings)
    manifest = store.latest("finetune")
    assert manifest is not None
    seen = set()
    todo = [manifest]
    while todo:
        current = todo.pop()
        if current.fingerprint not in seen:
            seen.add(current.fingerprint)
            store.verify(current)
            for mark in current.inputs.values():
                todo.append(next(m for s in STAGES if (m := store.find(s, mark))))
    assert {m.stage for s in STAGES for m in store.all(s) if m.fingerprint in seen} >= {
        "crawl",
        "split",
        "tokenizer",
        "pretrain",
        "pairs",
        "finetune",
    }


def test_no_training_saw_a_held_out_document(trained: Stack) -> None:
    store = Store.open(trained.settings)
    split = store.latest("split")
    assert split is not None
    ids = {
        part: {i for t in store.tables(split, part, ["id"]) for i in t["id"].to_pylist()}
        for part in ("train-", "heldout-")
    }
    assert ids["train-"] and ids["heldout-"]
    assert not ids["train-"] & ids["heldout-"]


def test_running_again_without_a_change_is_cached_throughout(trained: Stack) -> None:
    trained.gristmill("run", "pipeline", *TINY, "--watch", timeout=120)
    states = task_states(trained, "pipeline")
    assert states == dict.fromkeys(STAGES, "Cached")


def test_a_tokenizer_setting_reruns_the_tokenizer_and_what_depends_on_it(trained: Stack) -> None:
    plan = trained.gristmill("plan", "pipeline", *TINY, "--set", "tokenizer.vocab_size=1200")
    assert "tokenizer.vocab_size" in plan
    lines = {line.split()[0]: line for line in plan.splitlines() if line.split()[:1]}
    assert "cached" in lines["crawl"].lower() and "cached" in lines["split"].lower()
    assert "cached" not in lines["tokenizer"].lower()
    assert "cached" not in lines["finetune"].lower()


def test_a_retrain_that_finds_nothing_new_keeps_the_champion(trained: Stack) -> None:
    trained.gristmill("run", "retrain", *TINY, "--watch", timeout=300)
    states = task_states(trained, "retrain")
    assert states["crawl"] == "Completed"
    assert states["pretrain"] == states["finetune"] == "Cached"
    assert len(Store.open(trained.settings).all("crawl")) == 2


def test_cancelling_a_training_ends_in_cancelled_and_leaves_no_job(trained: Stack) -> None:
    deployment = prefect(
        trained, "/deployments/filter", {"flows": {"name": {"any_": ["pretrain"]}}}
    )[0]
    import yaml

    from tests.conftest import CHECKOUT

    tiny = yaml.safe_load((CHECKOUT / "configs" / "tiny.yaml").read_text())
    wanted = {
        key: tiny[key] for key in ("corpus", "tokenizer", "shards", "pretrain") if key in tiny
    }
    wanted["pretrain"] = {**wanted["pretrain"], "tokens": 500_000_000}
    run = prefect(
        trained,
        f"/deployments/{deployment['id']}/create_flow_run",
        {"parameters": wanted, "state": {"type": "SCHEDULED"}},
    )
    wait_for(lambda: running_jobs(trained) == 1, 90)
    time.sleep(5)
    prefect(
        trained,
        f"/flow_runs/{run['id']}/set_state",
        {"state": {"type": "CANCELLING", "name": "Cancelling"}},
    )
    wait_for(lambda: flow_run_state(trained, run["id"]) == "CANCELLED", 30)
    wait_for(lambda: running_jobs(trained) == 0, 30)


def flow_run_state(stack: Stack, run: str) -> str:
    with urllib.request.urlopen(f"{stack.settings.prefect_api}/flow_runs/{run}", timeout=30) as r:
        return str(json.loads(r.read())["state"]["type"])


def running_jobs(stack: Stack) -> int:
    from tasks.runtime.job_board import running_jobs

    return len(running_jobs(stack.settings))


def wait_for(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.3)


def test_a_form_with_an_unknown_key_is_refused(trained: Stack) -> None:
    done = trained.command("run", "pipeline", "--set", "tokenizer.vocab=1200")
    assert done.returncode != 0
    assert "vocab" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_alias_names_those_there_are_and_leaves_the_served_model(trained: Stack) -> None:
    before = trained.gristmill("models")
    done = trained.command("run", "deploy", "--set", "version=staging", "--watch")
    assert done.returncode == 1
    told = done.stdout + done.stderr
    assert "model 'gristmill' has no version or alias 'staging'; " in told
    assert "Traceback" not in told
    assert trained.gristmill("models") == before
    assert trained.gristmill("ask", "What is abc?").strip()
