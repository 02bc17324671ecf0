"""The Prefect dashboard in headless Chromium, as a person uses it against the real stack."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from dashboard import Dashboard

from flows.processes import Record
from tasks.runtime import job_board
from tests.browser import browser, executable
from tests.conftest import Stack

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(900),
    pytest.mark.skipif(executable() is None, reason="no Chromium is installed"),
]

SMALL_CORPUS = {("corpus", "Crawl", "Max pages"): 120}
SMALL_MODEL = {
    ("tokenizer", "Vocab size"): 800,
    ("pretrain", "Tokens"): 32_768,
    ("pretrain", "Sequence"): 128,
    ("pretrain", "Model", "Width"): 64,
    ("pretrain", "Model", "Layers"): 2,
    ("pretrain", "Model", "Heads"): 2,
    ("pretrain", "Model", "Mlp width"): 128,
    ("pretrain", "Model", "Context"): 128,
}
SMALL_CHAT = {
    ("pairs", "Facts"): 60,
    ("pairs", "Phrasings per fact"): 2,
    ("pairs", "Phrasings per detail"): 1,
    ("pairs", "Questions per group"): 20,
    ("finetune", "Sequence"): 128,
}


@pytest.fixture(scope="module")
def dashboard(stack: Stack) -> Iterator[Dashboard]:
    with browser(1400, 1000) as page:
        yield Dashboard(page, stack)


def until(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.3)


def fill(dashboard: Dashboard, *values: dict[tuple[str, ...], int]) -> None:
    for part in values:
        for path, value in part.items():
            dashboard.fill(*path, value=value)


def finished(dashboard: Dashboard, run: str, seconds: float = 600) -> str:
    """The name of the state a run ends in."""
    final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    until(lambda: dashboard.run(run)["state_type"] in final, seconds)
    return str(dashboard.run(run)["state_name"])


def working_workers(stack: Stack) -> list[str]:
    """Shard functions of this stack's stages that Ray workers are running now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, IndexError):
            title = process.cmdline()[0]
            ours = title.startswith("ray::_") and "Actor" not in title
            if ours and process.environ().get("GRISTMILL_HOME") == str(stack.settings.home):
                found.append(title)
    return found


def test_a_pipeline_started_from_its_form_ends_with_a_served_model(
    dashboard: Dashboard, stack: Stack
) -> None:
    dashboard.custom_run("pipeline")
    fill(dashboard, SMALL_CORPUS, SMALL_MODEL, SMALL_CHAT)
    run = dashboard.submit("pipeline")
    sent = dashboard.run(run)["parameters"]
    assert sent["corpus"]["crawl"]["max_pages"] == 120
    assert sent["pretrain"]["model"]["width"] == 64
    assert sent["promotion"] == {"rule": "always"}
    dashboard.open_run(run)
    dashboard.see("Running")
    dashboard.page.open("about:blank")  # drawing the run's graph takes half a core
    assert finished(dashboard, run) == "Completed"
    dashboard.open_run(run)
    dashboard.see("Completed")
    assert set(dashboard.tasks(run).values()) <= {"Completed", "Cached"}
    dashboard.press("Artifacts")
    for key in ("crawl-hosts", "pretrain-loss", "finetune-loss", "promotion"):
        dashboard.see(key)
    address = dashboard.artifacts(run)["chat-page"]["data"]
    assert f"{stack.settings.serve}/" in address
    dashboard.page.open(f"{stack.settings.serve}/")
    dashboard.page.wait("document.querySelector('#model').textContent.includes('version')")


def test_a_run_cancelled_in_the_dashboard_ends_in_cancelled(
    dashboard: Dashboard, stack: Stack
) -> None:
    dashboard.custom_run("corpus")
    dashboard.fill("corpus", "Epoch", value=41)
    run = dashboard.submit("corpus")
    until(lambda: dashboard.tasks(run) and working_workers(stack))
    dashboard.cancel(run)
    until(lambda: not working_workers(stack))
    assert finished(dashboard, run) == "Cancelled"
    dashboard.see("Cancelled")
    until(lambda: "Cancelled" in dashboard.tasks(run).values())
    assert set(dashboard.tasks(run).values()) <= {"Completed", "Cached", "Cancelled"}


def test_a_training_cancelled_in_the_dashboard_leaves_no_job(
    dashboard: Dashboard, stack: Stack
) -> None:
    dashboard.custom_run("pretrain")
    fill(dashboard, SMALL_CORPUS, SMALL_MODEL, {("pretrain", "Tokens"): 500_000_000})
    run = dashboard.submit("pretrain")
    until(lambda: "progress-pretrain" in dashboard.artifacts(run), 300)
    assert job_board.running_jobs(stack.settings)
    dashboard.cancel(run)
    until(lambda: not job_board.running_jobs(stack.settings))
    assert finished(dashboard, run) == "Cancelled"
    dashboard.see("Cancelled")
    until(lambda: dashboard.tasks(run)["pretrain"] == "Cancelled")
    assert "Crashed" not in dashboard.tasks(run).values()


def test_a_mistake_is_told_in_one_sentence_on_the_page_of_the_run(dashboard: Dashboard) -> None:
    dashboard.custom_run("tokenizer")
    fill(dashboard, SMALL_CORPUS, {("tokenizer", "Vocab size"): 900_000})
    run = dashboard.submit("tokenizer")
    assert finished(dashboard, run) == "Failed"
    dashboard.open_run(run)
    dashboard.press("Details")
    dashboard.see("vocab_size 900000")
    state = dashboard.run(run)["state"]
    assert "Traceback" not in state["message"]


def test_a_schedule_added_in_the_dashboard_starts_runs_one_at_a_time_and_outlives_the_runner(
    dashboard: Dashboard, stack: Stack
) -> None:
    deployment = dashboard.open_deployment("retrain")
    values = {"corpus": {"epoch": 7}, "register_as": {"model": "scheduled"}}
    dashboard.ask(f"deployments/{deployment}", {"parameters": values}, "PATCH")
    before = dashboard.newest("retrain")
    dashboard.press("Schedule")
    dashboard.press("Cron")
    dashboard.see("Timezone")

    def schedules() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = dashboard.ask(f"deployments/{deployment}")["schedules"]
        return found

    dashboard.press_until("Save", schedules)
    dashboard.see("Every minute")
    scheduled = dashboard.started_after(before, "retrain", 180)
    assert dashboard.run(scheduled)["auto_scheduled"]
    until(lambda: dashboard.tasks(scheduled) or dashboard.run(scheduled)["state_type"] == "FAILED")
    assert dashboard.tasks(scheduled), str(dashboard.run(scheduled)["state"])

    second = dashboard.quick_run("retrain")
    assert finished(dashboard, second) == "Skipped"
    dashboard.open_run(second)
    dashboard.see("Skipped")

    worker = Record.read(stack.settings.home / "run" / "worker.json")
    assert worker is not None
    psutil.Process(worker.pid).kill()

    def replaced() -> bool:
        record = Record.read(stack.settings.home / "run" / "worker.json")
        return record is not None and record.alive and record.pid != worker.pid

    until(replaced)
    stack.gristmill("up", timeout=240)
    kept = dashboard.ask(f"deployments/{deployment}")
    assert [schedule["active"] for schedule in kept["schedules"]] == [True]
    assert kept["parameters"] == values

    dashboard.open_deployment("retrain")
    dashboard.press_until("toggle Every minute", lambda: not schedules()[0]["active"])
    dashboard.cancel(scheduled)  # the runner that started it is gone
    until(lambda: dashboard.run(scheduled)["state_name"] == "Cancelled")


def test_the_dashboard_talks_to_nobody_else(dashboard: Dashboard) -> None:
    dashboard.page.errors.clear()
    dashboard.open_deployment("pipeline")
    addresses = "performance.getEntriesByType('resource').map(entry => new URL(entry.name).host)"
    hosts = set(dashboard.page.run(addresses))
    assert hosts == {dashboard.stack.settings.prefect_dashboard.removeprefix("http://")}
    assert not [error for error in dashboard.page.errors if "amplitude" in error]
