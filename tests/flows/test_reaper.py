"""Work that lost its owner: runs without a process, processes without a runner, jobs of no run."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from killable_stack import KillableStack, is_over, until

from flows import processes
from flows.processes import Record
from flows.reaper import Reaper
from flows.runs import Runs
from tasks.runtime import job_board
from tasks.runtime.rest import call
from tasks.runtime.settings import Settings


def test_a_run_outlives_its_runner(killable: KillableStack) -> None:
    runs = Runs(killable.settings)
    run = runs.trigger("sleeper", {"nap": {"seconds": 6}})

    def state() -> str:
        return str(runs.ask(f"flow_runs/{run['id']}")["state_type"])

    until(lambda: state() == "RUNNING")
    killable.kill("worker")
    until(lambda: state() != "RUNNING")
    assert state() == "COMPLETED"


def test_a_run_without_a_runner_can_still_be_cancelled(killable: KillableStack) -> None:
    runs = Runs(killable.settings)
    until(lambda: killable.states()["worker"] == "healthy")
    run = runs.trigger("sleeper", {"nap": {"seconds": 300}})
    rows = {"flow_runs": {"id": {"any_": [run["id"]]}}}
    until(lambda: [t["state_type"] for t in runs.ask("task_runs/filter", rows)] == ["RUNNING"])
    (process,) = processes.flow_processes()[run["id"]]
    killable.kill("worker")
    ended = runs.cancel(runs.find(run["id"]))
    until(lambda: runs.ask(f"flow_runs/{run['id']}")["state_type"] == "CANCELLED")
    assert ended["state_type"] in ("CANCELLED", "CRASHED")
    until(lambda: is_over(process))
    until(lambda: {t["state_type"] for t in runs.ask("task_runs/filter", rows)} == {"CANCELLED"})


def test_a_cancelled_run_that_hears_no_signal_is_killed_after_its_grace(tmp_path: Path) -> None:
    """Its runner lives, told it to end, and would wait for half a minute."""
    settings = Settings(home=tmp_path)
    own = processes.start_time(os.getpid())
    runner = Record(os.getpid(), own or "", processes.boot_id(), time.time(), (), ())
    runner.write(tmp_path / "run" / "worker.json")
    said: list[str] = []
    reaper = Reaper(settings, said.append)
    program = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(300)"
    with subprocess.Popen([sys.executable, "-c", program]) as deaf:
        process = psutil.Process(deaf.pid)
        assert not reaper._have_ended(cancelling(seconds=0), [process])
        assert not is_over(process)
        assert reaper._have_ended(cancelling(seconds=60), [process])
        assert is_over(process)
    assert said == [f"killing process {deaf.pid} of the cancelled some-run"]


@pytest.mark.slow
def test_a_run_can_be_cancelled_after_prefects_server_was_killed(killable: KillableStack) -> None:
    """Its runner has lost the server's events and hears of cancels only now and then."""
    runs = Runs(killable.settings)
    until(lambda: killable.states()["worker"] == "healthy")
    run = runs.trigger("sleeper", {"nap": {"seconds": 300}})
    until(lambda: runs.ask(f"flow_runs/{run['id']}")["state_type"] == "RUNNING")
    (process,) = processes.flow_processes()[run["id"]]
    killable.kill("prefect")
    until(lambda: killable.states()["prefect"] == "healthy")
    runs.cancel(runs.find(run["id"]))
    until(lambda: runs.ask(f"flow_runs/{run['id']}")["state_type"] == "CANCELLED")
    until(lambda: is_over(process))


def cancelling(seconds: float) -> dict[str, Any]:
    since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
    state = {"timestamp": since.isoformat()}
    return {"id": "0", "name": "some-run", "state_type": "CANCELLING", "state": state}


def test_a_run_killed_together_with_its_runner_does_not_stay_running(
    killable: KillableStack,
) -> None:
    runs = Runs(killable.settings)
    until(lambda: killable.states()["worker"] == "healthy")
    run = runs.trigger("sleeper", {"nap": {"seconds": 300}})
    rows = {"flow_runs": {"id": {"any_": [run["id"]]}}}
    until(lambda: [t["state_type"] for t in runs.ask("task_runs/filter", rows)] == ["RUNNING"])
    (process,) = processes.flow_processes()[run["id"]]
    killable.kill("worker")
    process.kill()
    until(lambda: runs.ask(f"flow_runs/{run['id']}")["state_type"] == "CRASHED")
    until(lambda: {t["state_type"] for t in runs.ask("task_runs/filter", rows)} == {"CRASHED"})


def test_the_ray_job_of_a_cancelled_run_is_stopped_and_that_of_a_live_run_is_not(
    killable: KillableStack,
) -> None:
    settings = killable.settings
    runs = Runs(settings)
    until(lambda: killable.states()["worker"] == "healthy")
    live = runs.trigger("sleeper", {"nap": {"seconds": 300}})
    over = runs.trigger("sleeper", {"nap": {"seconds": 0}})
    until(lambda: runs.ask(f"flow_runs/{live['id']}")["state_type"] == "RUNNING")
    until(lambda: runs.ask(f"flow_runs/{over['id']}")["state_type"] == "COMPLETED")
    token = settings.ray_token_path.read_text()
    submitted = {}
    for run in (live, over):
        job = {"entrypoint": "sleep 300", "metadata": {"gristmill_flow_run": run["id"]}}
        answer = call(f"{settings.ray_dashboard}/api/jobs/", job, token=token, timeout=60)
        submitted[run["id"]] = answer["submission_id"]
    until(lambda: len(job_board.running_jobs(settings)) == 2)
    state = {"type": "CANCELLED", "name": "Cancelled"}
    runs.ask(f"flow_runs/{over['id']}/set_state", {"state": state, "force": True})
    left = [job_board.RunningJob(submitted[live["id"]], live["id"])]
    until(lambda: job_board.running_jobs(settings) == left)
    runs.cancel(runs.find(live["id"]))
    until(lambda: job_board.running_jobs(settings) == [])


@pytest.mark.slow
def test_a_run_taken_by_a_runner_that_died_is_scheduled_again(killable: KillableStack) -> None:
    runs = Runs(killable.settings)
    until(lambda: killable.states()["worker"] == "healthy")
    deployment = runs.ask("deployments/name/sleeper/local")
    later = {
        "type": "SCHEDULED",
        "name": "Scheduled",
        "state_details": {"scheduled_time": "2999-01-01T00:00:00Z"},
    }
    run = runs.ask(f"deployments/{deployment['id']}/create_flow_run", {"state": later})
    taken = {"state": {"type": "PENDING", "name": "Pending"}, "force": True}
    runs.ask(f"flow_runs/{run['id']}/set_state", taken)
    killable.kill("worker")
    until(lambda: runs.ask(f"flow_runs/{run['id']}")["state_type"] == "COMPLETED", 120)
