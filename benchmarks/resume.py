"""A training whose workers are killed again and again: is the model the same, to the bit?

    python benchmarks/resume.py [--quick] [--workers N …]

For each number of workers (1 and 2) the pretrain stage runs twice on a stack of its own, with the
same settings and threads: once unbroken, once with `kill -9` of any of its workers at random steps
(five times; `--quick`: twice). Compared are the weights, bit by bit, and the curves.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import finish
from benchmarks.training_stack import Trainings, trainings
from tasks.runtime.manifest import Manifest
from tasks.training.options import ModelOptions, RunOptions
from tasks.training.pretrain import PretrainConfig

STEPS, CHECKPOINT, BATCH, SEQUENCE = 900, 50, 16, 128


def settings(workers: int) -> PretrainConfig:
    return PretrainConfig(
        tokens=STEPS * BATCH * SEQUENCE,
        sequence=SEQUENCE,
        batch=BATCH,
        model=ModelOptions(width=128, layers=2, heads=2, context=SEQUENCE),
        run=RunOptions(
            workers=workers, threads=1, checkpoint_every=CHECKPOINT, log_every=5, restarts=20
        ),
    )


def killed(runs: Trainings, config: PretrainConfig, kills: int) -> tuple[Manifest, list[int]]:
    """The artifact of a training of which a worker was killed so often, and at which steps."""
    draw = random.Random(config.run.workers)
    process = runs.start(config)
    told: list[int] = []
    victims: set[int] = set()
    for number in range(kills):
        # Anywhere in its share of the steps, so that all kills find a training under way.
        target = draw.randrange(number * STEPS // kills + 20, (number + 1) * STEPS // kills - 60)
        while process.poll() is None:
            step = _step(runs)
            alive = [worker for worker in runs.workers() if worker.pid not in victims]
            if step >= target and alive:
                victim = draw.choice(alive)
                victims.add(victim.pid)
                with contextlib.suppress(Exception):
                    victim.send_signal(signal.SIGKILL)
                    told.append(step)
                    print(f"killed one of {len(alive)} at step {step}", file=sys.stderr, flush=True)
                break
            time.sleep(0.02)
    return runs.ended(process), told


def _step(runs: Trainings) -> int:
    """How far the training under way says it is."""
    folders = Path(runs.store.directory("pretrain", "").path)
    for file in folders.glob("*/_progress.json"):
        with contextlib.suppress(ValueError, OSError):
            return int(json.loads(file.read_text())["step"])
    return 0


def taken(runs: Trainings, made: Manifest) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(weights, curve) of an artifact, which is removed: the next training has its fingerprint, and
    would find it instead of making it again."""
    from safetensors.numpy import load

    directory = runs.store.of(made)
    weights = load(directory.read_bytes("model.safetensors"))
    curve = directory.read_table("curve.parquet").select(["step", "loss", "grad_norm"])
    directory.remove()
    return weights, curve.to_pylist()


def compared(runs: Trainings, workers: int, kills: int) -> dict[str, float | None]:
    """What a training with so many workers came to, unbroken and killed so often."""
    import numpy as np

    config = settings(workers)
    unbroken = runs.ended(runs.start(config))
    weights, curve = taken(runs, unbroken)
    begun = time.monotonic()
    broken, told = killed(runs, config, kills)
    seconds = time.monotonic() - begun
    again, theirs = taken(runs, broken)
    names = weights.keys() | again.keys()
    return {
        "kills": len(told),
        "tensors": len(weights),
        "tensors_that_differ": sum(not np.array_equal(weights[n], again[n]) for n in names),
        "steps_that_differ": sum(a != b for a, b in zip_longest(curve, theirs)),
        "seconds_unbroken": unbroken.cost["wall_seconds"],
        "seconds_killed": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two kills instead of five")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N")
    arguments = parser.parse_args()
    kills = 2 if arguments.quick else 5
    metrics: dict[str, float | None] = {}
    targets: dict[str, tuple[str, float]] = {}
    wanted = {
        "tensors_that_differ": ("<=", 0),
        "steps_that_differ": ("<=", 0),
        "kills": (">=", kills),
    }
    with trainings() as runs:
        for workers in arguments.workers:
            found = compared(runs, workers, kills)
            metrics |= {f"{name}_with_{workers}": value for name, value in found.items()}
            targets |= {f"{name}_with_{workers}": each for name, each in wanted.items()}
    finish("resume", metrics, targets)


if __name__ == "__main__":
    main()
