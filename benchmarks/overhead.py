"""What the stack costs: waiting before and between the work, processor and memory while idle.

    python benchmarks/overhead.py [--quick]

Measured on a home with the tiny pipeline made: seconds from a trigger to the flow's body, seconds
of a pipeline that is cached throughout, seconds from a training job's start to its first step, how
much longer stages take than their work, and what an idle stack uses.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Targets, finish
from benchmarks.runs import TINY, FlowRuns, moment, wait_for
from benchmarks.stack import Home, home
from tasks.runtime.rest import call
from tasks.runtime.store import Store

TARGETS: Targets = {
    "cached_pipeline_seconds": ("<=", 20),
    "idle_cores": ("<=", 0.5),
    "idle_memory_gb": ("<=", 5),
}


def cached_runs(runs: FlowRuns, times: int) -> dict[str, float]:
    """Medians over runs in which nothing has to be done."""
    to_body, whole, spent, stages = [], [], [], 0
    for _ in range(times):
        begun, triggered = time.monotonic(), time.time()
        run_id = runs.trigger("pipeline")
        run = runs.finish(run_id, 300)
        whole.append(time.monotonic() - begun)
        to_body.append(moment(run["start_time"]) - triggered)
        spent.append(float(run["total_run_time"]))
        stages = len(runs.tasks(run_id))
        assert set(runs.states(run_id).values()) == {"Cached"}, "this home holds the pipeline"
    return {
        "trigger_to_flow_seconds": round(median(to_body), 2),
        "cached_pipeline_seconds": round(median(whole), 2),
        "cached_stage_seconds": round(median(spent) / stages, 3),
    }


def training(fresh: Home, runs: FlowRuns, seed: int) -> dict[str, float]:
    """One small pretraining: when its job begins, when its first step is done, when it is over."""
    store = Path(fresh.settings.store_uri)
    present = {path.parent for path in store.glob("pretrain/*/manifest.json")}
    run_id = runs.trigger("pretrain", f"pretrain.seed={seed}", "pretrain.run.log_every=1")
    first: list[float] = []

    def stepped() -> bool:
        for path in store.glob("pretrain/*/_progress.json"):
            if path.parent not in present:
                first.append(path.stat().st_mtime)
        return bool(first)

    wait_for(stepped, 180, "the first step")
    job = newest_job(fresh)
    runs.finish(run_id)
    row = next(row for row in runs.tasks(run_id) if row["name"] == "pretrain")
    manifest = Store.open(fresh.settings).latest("pretrain")
    assert manifest is not None
    curve = Store.open(fresh.settings).of(manifest).read_table("curve.parquet").to_pylist()
    tokens = manifest.counts["tokens"] / manifest.counts["steps"]
    trained = sum(tokens / point["tokens_per_second"] for point in curve)
    return {
        "train_task_to_job_seconds": round(job["start_time"] / 1000 - moment(row["start_time"]), 2),
        "train_job_to_first_step_seconds": round(first[0] - job["start_time"] / 1000, 2),
        "train_task_seconds": round(float(row["total_run_time"]), 2),
        "train_steps_seconds": round(trained, 2),
    }


def newest_job(fresh: Home) -> dict[str, float]:
    token = fresh.settings.ray_token_path.read_text().strip()
    jobs = call(f"{fresh.settings.ray_dashboard}/api/jobs/", token=token)
    return max((j for j in jobs if j.get("submission_id")), key=lambda job: job["start_time"])


def first_run(fresh: Home, runs: FlowRuns, run_id: str) -> dict[str, float]:
    """How much longer the stages of a first run took than the work their manifests tell of."""
    run = runs.run(run_id)
    store = Store.open(fresh.settings)
    worked = spent = 0.0
    made = [row for row in runs.tasks(run_id) if row["state_name"] == "Completed"]
    for row in made:
        manifest = store.latest(row["name"])
        assert manifest is not None, "a completed stage has an artifact"
        worked += manifest.cost["wall_seconds"]
        spent += float(row["total_run_time"])
    if not made:  # a home that is used again has everything
        return {}
    return {
        "first_pipeline_seconds": round(float(run["total_run_time"]), 1),
        "stage_overhead_seconds": round((spent - worked) / len(made), 3),
    }


def idle(fresh: Home, seconds: float) -> dict[str, float]:
    """Cores used and memory held while nothing is to be done."""
    before = processor_seconds(fresh)
    begun = time.monotonic()
    time.sleep(seconds)
    after = processor_seconds(fresh)
    passed = time.monotonic() - begun
    used = sum(after[pid] - before.get(pid, 0.0) for pid in after)
    by_kind = {
        "prefect": lambda line: "prefect server" in line or "prefect.server" in line,
        "mlflow": lambda line: "mlflow" in line,
        "runner": lambda line: "flows.deployments" in line,
        "watcher": lambda line: "flows.watcher" in line,
    }
    held = {
        f"idle_{kind}_mb": round(memory(fresh, matches) / 1e6) for kind, matches in by_kind.items()
    }
    whole = fresh.memory()
    return {
        "idle_cores": round(used / passed, 3),
        "idle_memory_gb": round(whole, 2),
        **held,
        "idle_ray_and_serve_mb": round(whole * 1000 - sum(held.values())),
    }


def processor_seconds(fresh: Home) -> dict[int, float]:
    found = {}
    for process in fresh.processes():
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found


def memory(fresh: Home, matches: Callable[[str], bool]) -> float:
    total = 0.0
    for process in fresh.processes():
        with contextlib.suppress(psutil.Error):
            if matches(" ".join(process.cmdline())):
                total += process.memory_full_info().pss
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    quick = parser.parse_args().quick
    with home() as fresh:
        up, _ = fresh.run("up")
        runs = FlowRuns(fresh)
        made = runs.trigger("pipeline")
        runs.finish(made)
        metrics: dict[str, float | None] = {"up_seconds": round(up, 1)}
        metrics |= first_run(fresh, runs, made)
        metrics |= cached_runs(runs, 2 if quick else 5)
        trainings = [
            training(fresh, runs, int(time.time()) % 10**6) for _ in range(1 if quick else 3)
        ]
        metrics |= {key: median(t[key] for t in trainings) for key in trainings[0]}
        time.sleep(15)  # workers that are not needed any more go
        metrics |= idle(fresh, 20 if quick else 60)
        again, _ = fresh.run("run", "pipeline", "--config", TINY, "--watch", quiet=True)
        metrics["cached_command_seconds"] = round(again, 2)
    finish("overhead", metrics, {**TARGETS, "cached_command_seconds": ("<=", 20)})


if __name__ == "__main__":
    main()
