"""Kills at random moments: one command continues, and nothing is lost but a checkpoint interval.

    python benchmarks/chaos.py [--quick] [--kills N] [--seed N]

The pipeline runs at the tiny preset, with more tokens so that there is time to kill. Killed with
SIGKILL: a training worker, the flow's process, the Prefect server, the MLflow server, the raylet,
Ray's head, the runner, the watcher. After each kill a person's two commands, `gristmill up` and,
where the watched run ended, the same `gristmill run pipeline`, must bring the work back.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Targets, finish, table
from benchmarks.runs import TINY, FlowRuns, chat, wait_for
from benchmarks.stack import Home, home
from flows.processes import Record
from tasks.runtime.store import MANIFEST, Store

TOKENS = 1_500_000
INTERVAL = 25
VICTIMS = (
    "training-worker",
    "flow",
    "prefect",
    "mlflow",
    "ray",
    "worker",
    "raylet",
    "watcher",
)
QUICK = ("training-worker", "flow", "prefect")
SECONDS_AT_WORK = 120.0
"""How long a killed stack may take until the pipeline is at work again."""
COMMANDS = 4
"""Runs in a row that may end badly without a kill before the benchmark gives up."""
TARGETS: Targets = {
    "kills": (">=", 3),
    "most_steps_repeated": ("<=", INTERVAL),
    "slowest_recovery_seconds": ("<=", SECONDS_AT_WORK),
    "damaged_artifacts": ("<=", 0),
    "half_written_artifacts": ("<=", 0),
    "steps_missing_from_curves": ("<=", 0),
    "steps_logged_twice": ("<=", 0),
    "rows_left_running": ("<=", 0),
    "stages_run_again_in_the_end": ("<=", 0),
    "answers": (">=", 1),
}


class Steps(threading.Thread):
    """Watches how far trainings say they are; `repeated` holds the steps each restart did again."""

    def __init__(self, store: Path) -> None:
        super().__init__(daemon=True)
        self.store = store
        self.repeated: list[int] = []
        self.furthest: dict[str, int] = {}
        self._resumed: dict[str, int] = {}
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(0.1):
            for path in self.store.glob("*/*/_progress.json"):
                with contextlib.suppress(OSError, ValueError):
                    self._look(path.parent.name, json.loads(path.read_text()))

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()

    def _look(self, training: str, record: dict[str, Any]) -> None:
        furthest = self.furthest.get(training, 0)
        begun_anew = self._resumed.get(training, record["resumed"]) != record["resumed"]
        if begun_anew or record["step"] < furthest:
            self.repeated.append(max(furthest - record["resumed"], 0))
            furthest = 0
        self._resumed[training] = record["resumed"]
        self.furthest[training] = max(furthest, record["step"])


class Chaos:
    """One home, its pipeline, and what is done to it."""

    def __init__(self, home: Home, seed: int) -> None:
        self.home, self.random = home, random.Random(seed)
        self.runs = FlowRuns(home)
        self.seed = 0
        self.watch: subprocess.Popen[str] | None = None
        self.commands = self.pipelines = 0
        self.rows: list[dict[str, object]] = []

    @property
    def command(self) -> list[str]:
        settings = {
            "pretrain.tokens": TOKENS,
            "pretrain.seed": self.seed,
            "pretrain.run.checkpoint_every": INTERVAL,
            "pretrain.run.log_every": 1,
            "finetune.seed": self.seed,
            "finetune.passes": 4,
            "finetune.run.checkpoint_every": INTERVAL,
            "finetune.run.log_every": 1,
        }
        pairs = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return ["run", "pipeline", "--config", TINY, *pairs, "--watch"]

    def keep_running(self) -> None:
        """What a person does: the same command again when it ended badly, another one when well."""
        if self.watch is not None and self.watch.poll() is None:
            return
        if self.watch is not None and self.watch.returncode == 0:
            self.seed += 1
            self.pipelines += 1
        self.commands += 1
        self.watch = self.home.start(*self.command)

    def current(self) -> str | None:
        """The id of a run that is at work, if one is."""
        query = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}, "limit": 5}
        with contextlib.suppress(Exception):
            for run in self.runs.api.ask("flow_runs/filter", query):
                if self.runs.processes(run["id"]):
                    return str(run["id"])
        return None

    def at_work(self) -> bool:
        self.keep_running()
        return self.current() is not None

    def victim(self, name: str) -> psutil.Process | None:
        """The process to kill now, if it exists."""
        if name == "training-worker":
            found = [p for p in self.named("ray::RayTrainWorker") if self.trains()]
            return self.random.choice(found) if found else None
        if name == "flow":
            run = self.current()
            found = self.runs.processes(run) if run else []
            return found[0] if found else None
        if name == "raylet":
            return next(iter(self.named("raylet")), None)
        record = Record.read(self.home.settings.home / "run" / f"{name}.json")
        return psutil.Process(record.pid) if record is not None and record.alive else None

    def trains(self) -> bool:
        """Whether a training has just said how far it is."""
        said = (self.home.settings.home / "store").glob("*/*/_progress.json")
        return any(time.time() - path.stat().st_mtime < 3 for path in said)

    def named(self, start: str) -> list[psutil.Process]:
        found = []
        for process in self.home.processes():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if words and (words[0].startswith(start) or Path(words[0]).name == start):
                    found.append(process)
        return found

    def kill(self, name: str) -> None:
        """Wait a random moment at work, kill, and see how long it takes until work goes on."""
        wait_for(self.at_work, 300, "a run at work")
        pause = self.random.uniform(1, 12)
        until = time.monotonic() + pause
        process: psutil.Process | None = None
        while time.monotonic() < until or process is None:
            if time.monotonic() > until + 300:
                raise SystemExit(f"no {name} to kill for 300 s")
            self.keep_running()
            time.sleep(0.2)
            if time.monotonic() >= until:
                process = self.victim(name)
        stages = [row["name"] for row in self.working_stages()]
        process.kill()
        killed, commands = time.monotonic(), self.commands
        print(f"== killed {name} (process {process.pid}) during {', '.join(stages)}", flush=True)
        process.wait(10)
        self.home.run("up")
        wait_for(self.at_work, SECONDS_AT_WORK * 2, f"work after the kill of {name}")
        # A run may end some seconds after the kill, when what died is missed.
        settle = time.monotonic() + 10
        recovered = time.monotonic()
        while time.monotonic() < settle:
            time.sleep(0.2)
            if not self.at_work():
                wait_for(self.at_work, SECONDS_AT_WORK * 2, f"work after the kill of {name}")
                recovered = time.monotonic()
        self.rows.append(
            {
                "killed": name,
                "during": ", ".join(stages),
                "seconds until work went on": round(recovered - killed, 1),
                "commands": self.commands - commands,
            }
        )

    def working_stages(self) -> list[dict[str, Any]]:
        run = self.current()
        rows: list[dict[str, Any]] = []
        with contextlib.suppress(Exception):
            rows = [r for r in self.runs.tasks(run or "") if r["state_type"] == "RUNNING"]
        return rows

    def to_the_end(self) -> None:
        """Go on with the same command until it completes."""
        for _ in range(COMMANDS):
            self.keep_running()
            assert self.watch is not None
            if self.watch.wait(timeout=600) == 0:
                return
            self.home.run("up")
        raise SystemExit(f"the pipeline failed {COMMANDS} times in a row without a kill")

    # What must be true in the end

    def again(self) -> dict[str, str]:
        """The same command once more; stage → state."""
        self.home.run(*self.command, quiet=True)
        runs = self.runs.api.ask(
            "flow_runs/filter",
            {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}, "sort": "END_TIME_DESC"},
        )
        return self.runs.states(runs[0]["id"])

    def rows_left(self) -> int:
        """Flow and task runs that claim to be at work although nothing is."""
        state = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
        flows = self.runs.api.ask("flow_runs/filter", {"flow_runs": state})
        tasks = self.runs.api.ask("task_runs/filter", {"task_runs": state})
        return len(flows) + len(tasks)

    def logged(self, run_id: str) -> list[int]:
        """The steps of a training's loss in MLflow."""
        steps: list[int] = []
        token: str | None = ""
        while token is not None:
            query = {"run_id": run_id, "metric_key": "loss", "max_results": 25000}
            query |= {"page_token": token} if token else {}
            url = f"{self.home.settings.mlflow}/api/2.0/mlflow/metrics/get-history?"
            with urllib.request.urlopen(url + urllib.parse.urlencode(query), timeout=60) as reply:
                body = json.loads(reply.read())
            steps += [int(point.get("step", 0)) for point in body.get("metrics", ())]
            token = body.get("next_page_token") or None
        return steps


def artifacts(store: Store, root: Path) -> tuple[int, int, int]:
    """(whole, damaged, half-written) artifacts of a store.

    Half-written are files that no manifest names beside those it does, and directories without one.
    """
    whole = damaged = half = 0
    for directory in root.glob("*/*"):
        manifest = store.find(directory.parent.name, directory.name)
        if manifest is None:
            half += 1
            continue
        files = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
        half += files != {entry.name for entry in manifest.files} | {MANIFEST}
        try:
            store.verify(manifest)
        except Exception as error:
            print(f"damaged: {error}")
            damaged += 1
        else:
            whole += 1
    return whole, damaged, half


def run_chaos(fresh: Home, victims: list[str], seed: int) -> dict[str, float | None]:
    fresh.run("up")
    root = Path(fresh.settings.store_uri)
    steps = Steps(root)
    steps.start()
    chaos = Chaos(fresh, seed)
    for name in victims:
        chaos.kill(name)
    chaos.to_the_end()
    steps.stop()
    print(table(chaos.rows))
    fresh.run("up")
    states = chaos.again()
    wait_for(lambda: chaos.rows_left() == 0, 60, "rows that show Running")
    store = Store.open(fresh.settings)
    whole, damaged, half = artifacts(store, root)
    missing = twice = 0
    for stage in ("pretrain", "finetune"):
        for manifest in store.all(stage):
            curve = store.of(manifest).read_table("curve.parquet")["step"].to_pylist()
            missing += len(set(range(1, manifest.counts["steps"] + 1)) - set(curve))
            logged = chaos.logged(str(manifest.metrics["mlflow_run_id"]))
            twice += len(logged) - len(set(logged)) + len(curve) - len(set(curve))
            missing += len(set(curve) - set(logged))
    wait_for(lambda: answers(fresh), 120, "an answer")
    return {
        "kills": len(chaos.rows),
        "commands": chaos.commands,
        "pipelines_completed": chaos.pipelines + 1,
        "trainings_resumed": len(steps.repeated),
        "most_steps_repeated": max(steps.repeated, default=0),
        "slowest_recovery_seconds": max(
            float(str(row["seconds until work went on"])) for row in chaos.rows
        ),
        "whole_artifacts": whole,
        "damaged_artifacts": damaged,
        "half_written_artifacts": half,
        "steps_missing_from_curves": missing,
        "steps_logged_twice": twice,
        "rows_left_running": chaos.rows_left(),
        "stages_run_again_in_the_end": sum(state != "Cached" for state in states.values()),
        "answers": int(answers(fresh)),
    }


def answers(fresh: Home) -> bool:
    """Whether the endpoint answers; a model this small may answer with nothing."""
    with contextlib.suppress(OSError):
        chat(fresh, "What does abs do?")
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three kills")
    parser.add_argument("--kills", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--victims", default="", help="whom, by name, separated by commas")
    parser.add_argument("--seed", type=int, default=12, help="chooses whom and when")
    arguments = parser.parse_args()
    chosen = random.Random(arguments.seed)
    order = list(VICTIMS) + chosen.choices(VICTIMS, k=max(arguments.kills - len(VICTIMS), 0))
    chosen.shuffle(order)
    victims = list(QUICK) if arguments.quick else order[: arguments.kills]
    if arguments.victims:
        victims = [name.strip() for name in arguments.victims.split(",")]
    with home() as fresh:
        metrics = run_chaos(fresh, victims, arguments.seed)
    finish("chaos", metrics, TARGETS)


if __name__ == "__main__":
    main()
