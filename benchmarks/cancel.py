"""Cancelling from the dashboard: how soon the Ray work is gone and the run is Cancelled.

    python benchmarks/cancel.py [--quick] [--times N] [--stages crawl,extract,…]

A run is cancelled, as the dashboard does it, at a random moment of the crawl, of a shard stage, of
pretraining and of fine-tuning. Measured: seconds until the last process of its work has ended,
seconds until its state is Cancelled, and what its task rows say in the end.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from pathlib import Path
from statistics import median

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Targets, finish, table
from benchmarks.runs import FlowRuns, wait_for
from benchmarks.stack import Home, home
from tasks.runtime.job_board import running_jobs

# The whole documentation, so that crawl and shard stages last; the rest as small as the preset.
CORPUS = ("corpus.crawl.include=[]", "corpus.crawl.max_pages=2000")
TIMES, QUICK_TIMES = 5, 1
ATTEMPTS = 4
SETTLED_SECONDS = 20.0
"""How long task rows may take to say what became of them."""
TARGETS: Targets = {
    "slowest_work_gone_seconds": ("<=", 5),
    "slowest_cancelled_seconds": ("<=", 5),
    "runs_not_cancelled": ("<=", 0),
    "rows_not_cancelled": ("<=", 0),
    "jobs_left": ("<=", 0),
}


def case(stage: str, number: int) -> tuple[str, list[str], tuple[float, float]]:
    """(flow, settings that nothing was made with yet, seconds into the stage)."""
    match stage:
        case "crawl":
            return "corpus", [f"corpus.crawl.max_depth={100 + number}"], (0.5, 4)
        case "extract":
            return "corpus", [f"corpus.extract.seconds_per_document={30 + number}"], (0.3, 3)
        case "signatures":
            return "corpus", [f"corpus.deduplicate.bands={60 + number % 190}"], (0.3, 2)
        case "pretrain":
            return "pretrain", ["pretrain.tokens=500000000", f"pretrain.seed={number}"], (1, 16)
        case "finetune":
            return "finetune", ["finetune.passes=100000", f"finetune.seed={number}"], (1, 16)
    raise SystemExit(f"no case {stage!r}")


STAGES = ("crawl", "extract", "signatures", "pretrain", "finetune")


def work_of(fresh: Home, present: set[int]) -> list[psutil.Process]:
    """Processes that work for a run: its own, its training's driver, and busy Ray workers.

    `present` were there before; an idle worker holds no work.
    """
    found = []
    for process in fresh.processes():
        if process.pid in present:
            continue
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            busy = command.startswith("ray::") and not command.startswith("ray::IDLE")
            if busy or "prefect.engine" in command or "tasks.training.job" in command:
                found.append(process)
    return found


def cancel_once(
    fresh: Home, runs: FlowRuns, stage: str, number: int, chosen: random.Random
) -> dict[str, object] | None:
    """Cancel one run in a stage; None when the stage was over before."""
    flow, settings, (soonest, latest) = case(stage, number)
    present = {process.pid for process in fresh.processes()}
    run = runs.trigger(flow, *CORPUS, *settings)
    wait_for(lambda: runs.states(run).get(stage) == "Running", 240, f"{stage} to run")
    into = chosen.uniform(soonest, latest)
    time.sleep(into)
    if runs.states(run).get(stage) != "Running":
        runs.finish(run)
        return None
    busy = len(work_of(fresh, present))
    begun = time.monotonic()
    state = {"type": "CANCELLING", "name": "Cancelling"}
    runs.api.ask(f"flow_runs/{run}/set_state", {"state": state})
    gone: float | None = None
    ended: float | None = None
    while gone is None or ended is None:
        passed = time.monotonic() - begun
        if passed > 90:
            break
        if work_of(fresh, present):
            gone = None
        elif gone is None:
            gone = passed
        if ended is None and runs.run(run)["state_type"] in ("CANCELLED", "CRASHED", "FAILED"):
            ended = time.monotonic() - begun
        time.sleep(0.05)
    wrong = wrong_rows(runs, run)
    with contextlib.suppress(SystemExit):
        wait_for(lambda: not wrong_rows(runs, run), SETTLED_SECONDS)
        wrong = []
    row: dict[str, object] = {
        "stage": stage,
        "seconds into it": round(into, 1),
        "processes": busy,
        "work gone after": round(gone if gone is not None else 90, 2),
        "state after": round(ended if ended is not None else 90, 2),
        "state": runs.run(run)["state_name"],
        "wrong rows": len(wrong),
        "jobs left": len(running_jobs(fresh.settings)),
    }
    print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    return row


def wrong_rows(runs: FlowRuns, run: str) -> list[str]:
    return [
        row["name"]
        for row in runs.tasks(run)
        if row["state_type"] not in ("COMPLETED", "CANCELLED")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="once in each stage")
    parser.add_argument("--times", type=int, default=TIMES, help="in each stage (default 5)")
    parser.add_argument("--stages", default=",".join(STAGES), help="in which stages")
    arguments = parser.parse_args()
    times = QUICK_TIMES if arguments.quick else arguments.times
    chosen = random.Random(12)
    rows: list[dict[str, object]] = []
    with home() as fresh:
        fresh.run("up")
        runs = FlowRuns(fresh)
        runs.finish(runs.trigger("finetune", *CORPUS))  # what comes before each stage is made
        number = int(time.time()) % 1000  # of a home that is used again nothing is cached
        for stage in arguments.stages.split(","):
            done = attempts = 0
            while done < times:
                attempts += 1
                number += 1
                if attempts > times * ATTEMPTS:
                    raise SystemExit(f"{stage} was over before it could be cancelled")
                row = cancel_once(fresh, runs, stage, number, chosen)
                if row is not None:
                    rows.append(row)
                    done += 1
    print(table(rows))
    gone = [float(str(row["work gone after"])) for row in rows]
    ended = [float(str(row["state after"])) for row in rows]
    metrics = {
        "cancels": len(rows),
        "median_work_gone_seconds": median(gone),
        "slowest_work_gone_seconds": max(gone),
        "median_cancelled_seconds": median(ended),
        "slowest_cancelled_seconds": max(ended),
        "runs_not_cancelled": sum(row["state"] != "Cancelled" for row in rows),
        "rows_not_cancelled": sum(int(str(row["wrong rows"])) for row in rows),
        "jobs_left": sum(int(str(row["jobs left"])) for row in rows),
    }
    finish("cancel", metrics, TARGETS)


if __name__ == "__main__":
    main()
