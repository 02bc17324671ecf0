"""What Ray Train, progress and MLflow add to a training step: the stage beside the bare loop.

    python benchmarks/ray_share.py [--quick]

The same model, data, thread and steps: in the pretrain stage, on a stack of its own with one
worker, and in a plain process that calls `model.train.train`. In turns; compared are the lower
quartiles of the steps, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Targets, finish
from benchmarks.training_stack import CHECKOUT, VOCABULARY, trainings
from tasks.runtime.manifest import Manifest
from tasks.training.job import ALLOCATOR
from tasks.training.options import ModelOptions, RunOptions
from tasks.training.pretrain import PretrainConfig

TARGETS: Targets = {"share_of_a_step": ("<=", 0.03)}
LOG_EVERY = 5  # steps, the default of the form; a record is their mean
WARM = 2  # records


def settings(seed: int, steps: int) -> PretrainConfig:
    """The demo's shapes; another seed makes another artifact."""
    return PretrainConfig(
        tokens=steps * 16 * 256,
        seed=seed,
        model=ModelOptions(),
        run=RunOptions(workers=1, threads=1, log_every=LOG_EVERY, checkpoint_every=10**6),
    )


def bare(config: PretrainConfig, shards: Path) -> list[float]:
    """Tokens a second, record by record."""
    import torch

    from model.loader import WindowLoader
    from model.optim import OptimConfig
    from model.schedule import Schedule
    from model.train import train
    from model.train_config import TrainConfig
    from model.transformer import Transformer

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    loop = config.loop() | {
        "optim": OptimConfig(**config.optimizer.model_dump()),
        "schedule": Schedule(**config.schedule.model_dump()),
        "total_tokens": config.tokens,
    }
    loader = WindowLoader([shards], config.sequence, config.seed)
    model = Transformer(config.model.config(VOCABULARY))
    return [record.tokens_per_second for record in train(model, loader, TrainConfig(**loop))]


def typical(rates: list[float]) -> float:
    """Milliseconds of a step that nothing disturbed."""
    steps = [16 * 256 / rate * 1000 for rate in rates[WARM:]]
    return statistics.quantiles(steps, n=4)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        config, shards = arguments.worker
        print(json.dumps(bare(PretrainConfig.model_validate_json(config), Path(shards))))
        return
    steps, rounds = (40, 2) if arguments.quick else (80, 4)
    ours: list[float] = []
    plain: list[float] = []
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(CHECKOUT),
        "GLIBC_TUNABLES": ALLOCATOR,
    }
    with trainings() as runs:
        for turn in range(rounds):
            config = settings(turn, steps).resolve()
            manifest: Manifest = runs.ended(runs.start(config))
            curve = runs.store.of(manifest).read_table("curve.parquet")
            ours.append(typical(curve["tokens_per_second"].to_pylist()))
            shards = runs.store.local(runs.inputs["shards"], "tokens-00000.npy")
            command = [sys.executable, __file__, "--worker", config.model_dump_json(), str(shards)]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=900, check=False
            )
            if done.returncode:
                raise SystemExit(f"the bare loop failed:\n{done.stderr[-4000:]}")
            plain.append(typical(json.loads(done.stdout.splitlines()[-1])))
            print(f"round {turn + 1}: {ours[-1]:.1f} and {plain[-1]:.1f} ms", file=sys.stderr)
    metrics: dict[str, float | None] = {
        "stage_ms_per_step": statistics.median(ours),
        "bare_ms_per_step": statistics.median(plain),
        "share_of_a_step": 1 - min(plain) / min(ours),
    }
    finish("ray_share", metrics, TARGETS)


if __name__ == "__main__":
    main()
