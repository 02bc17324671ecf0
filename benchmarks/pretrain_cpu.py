"""How fast we pretrain on a CPU, beside nanoGPT's loop and Hugging Face's Trainer.

    python benchmarks/pretrain_cpu.py [--quick] [--nanogpt DIR] [--part peers|workers]

All three train the same GPT-2 (LayerNorm, learned positions, biases, exact GELU, tied embeddings)
from the same tokens with AdamW, the same batch, bf16 autocast and a thread for each core, each in a
process of its own, in turns. Without a checkout of nanoGPT (`benchmarks/nanogpt.py` names the
commit) only Trainer is the peer. Last, our loop on two processes of a thread each is compared with
one process on one core, and with what the machine allows: two processes at the same time that know
nothing of each other, each with half the batch, as the two workers have. Two virtual cores need not
be two cores. Of the steps of a process the lower quartile counts: those that other work on the
machine held up say nothing of the loop.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import nanogpt
from benchmarks.report import Targets, finish
from tasks.training.job import ALLOCATOR

VOCABULARY, WIDTH, LAYERS, HEADS, SEQUENCE, BATCH = 4096, 384, 6, 6, 256, 16
WARM = 3  # steps left out
CHECKOUT = Path(__file__).resolve().parents[1]
CORES = len(os.sched_getaffinity(0))
TARGETS: Targets = {
    "vs_trainer": (">=", 1.3),
    "vs_nanogpt": (">=", 1.2),
    "two_workers_vs_one": (">=", 1.6),
}


ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": str(CORES),
    "PYTHONPATH": str(CHECKOUT),
    "GLIBC_TUNABLES": ALLOCATOR,  # as our workers have it
}


def ours(folder: Path, steps: int, batch: int = BATCH) -> list[float]:
    """Seconds of each step of our loop; of one rank, where there are several."""
    import torch
    import torch.distributed as dist

    from model.config import ModelConfig
    from model.loader import WindowLoader
    from model.optim import OptimConfig
    from model.train import StepRecord, train
    from model.train_config import TrainConfig
    from model.transformer import Transformer

    torch.set_flush_denormal(True)  # as tasks/training/worker.py does
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            vocab_size=VOCABULARY,
            width=WIDTH,
            layers=LAYERS,
            heads=HEADS,
            mlp_width=4 * WIDTH,
            context=SEQUENCE,
            positions="learned",
            norm="layer",
            activation="gelu",
            gated_mlp=False,
            qkv_bias=True,
            linear_bias=True,
        )
    )
    config = TrainConfig(
        total_tokens=steps * batch * SEQUENCE,
        batch=batch,
        micro_batch=batch,
        optim=OptimConfig(kind="adamw", learning_rate=1e-3, weight_decay=0.1),
        precision="bf16",
        log_every=1,
    )
    times: list[float] = []

    def on_step(record: StepRecord) -> None:
        times.append(time.perf_counter())

    train(model, WindowLoader([folder / "tokens.npy"], SEQUENCE, 0), config, on_step=on_step)
    return np.diff(times).tolist()


def trainer(folder: Path, steps: int) -> list[float]:
    import torch
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    tokens = np.load(folder / "tokens.npy").astype(np.int64)
    windows = tokens[: len(tokens) // SEQUENCE * SEQUENCE].reshape(-1, SEQUENCE)
    rows = [
        {"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)} for row in windows
    ]
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=SEQUENCE,
        activation_function="gelu",
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        weight_decay=0.1,
        use_cpu=True,
        bf16=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(
        model=GPT2LMHeadModel(config), args=arguments, train_dataset=rows, callbacks=[Clock()]
    ).train()
    return np.diff(times).tolist()


def worker(
    contender: str, folder: Path, steps: int, core: int | None = None, **more: str
) -> subprocess.Popen[str]:
    """Our loop or Trainer in a process of its own, which ends with the seconds as JSON."""
    command = [sys.executable, __file__, "--worker", contender, str(folder), str(steps)]
    return subprocess.Popen(
        ([] if core is None else ["taskset", "-c", str(core)]) + command,
        env=ENVIRONMENT | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> list[float]:
    out, err = process.communicate(timeout=900)
    if process.returncode:
        raise SystemExit(f"a contender failed:\n{err[-4000:]}")
    return list(json.loads(out.splitlines()[-1]))


def typical(steps: list[float]) -> float:
    """The lower quartile, without the first steps."""
    return statistics.quantiles(steps[WARM:], n=4)[0]


def seconds(contender: str, folder: Path, steps: int) -> float:
    """Of a typical step."""
    if contender != "nanogpt":
        return typical(finished(worker(contender, folder, steps)))
    options = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": SEQUENCE}
    options |= {"batch_size": BATCH, "gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    options |= {"bias": True, "compile": False, "max_iters": steps}
    options |= {"eval_interval": 10**6, "eval_iters": 1}
    return typical(nanogpt.train(folder / "nanogpt", ENVIRONMENT, options).step_seconds)


def half(folder: Path, steps: int) -> list[float]:
    """What one of two workers has to do, alone."""
    return ours(folder, steps, BATCH // 2)


def two_workers_vs_one(folder: Path, steps: int, rounds: int) -> dict[str, float | None]:
    """Two processes on two cores over one process on one of them, and the most that could be."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    one = {"OMP_NUM_THREADS": "1"}
    ratios, ceilings = [], []
    for turn in range(rounds):
        alone = typical(finished(worker("ours", folder, steps, first, **one)))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        meet = one | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        cores = list(enumerate((first, second)))
        ranks = [worker("ours", folder, steps, core, RANK=str(n), **meet) for n, core in cores]
        ratios.append(alone / max(typical(finished(rank)) for rank in ranks))
        strangers = [worker("half", folder, steps, core, **one) for _, core in cores]
        ceilings.append(alone / max(typical(finished(each)) for each in strangers))
        print(
            f"two workers, round {turn + 1}: {ratios}, strangers {ceilings}",
            file=sys.stderr,
            flush=True,
        )
    workers, strangers_ratio = statistics.median(ratios), statistics.median(ceilings)
    return {
        "two_workers_vs_one": workers,
        "two_strangers_vs_one": strangers_ratio,
        "two_workers_of_what_the_machine_allows": workers / strangers_ratio,
    }


WORKERS = {"ours": ours, "half": half, "trainer": trainer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
    parser.add_argument("--nanogpt", **nanogpt.OPTION)
    parser.add_argument("--part", choices=("peers", "workers"), help="only the one comparison")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        contender, folder, steps = arguments.worker
        print(json.dumps(WORKERS[contender](Path(folder), int(steps))))
        return
    steps, rounds = (12, 2) if arguments.quick else (16, 3)
    metrics: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids = np.random.default_rng(0).integers(0, VOCABULARY, 400_000, dtype=np.uint16)
        np.save(folder / "tokens.npy", ids)
        if arguments.part != "workers":
            metrics |= beside_peers(folder, ids, arguments.nanogpt, steps, rounds)
        if arguments.part != "peers" and CORES > 1:
            metrics |= two_workers_vs_one(folder, steps, rounds)
    unasked = {"vs_nanogpt"} if not arguments.nanogpt else set()
    unasked |= {"workers": {"vs_trainer", "vs_nanogpt"}, "peers": {"two_workers_vs_one"}}.get(
        arguments.part, set()
    )
    finish("pretrain_cpu", metrics, {k: v for k, v in TARGETS.items() if k not in unasked})


def beside_peers(
    folder: Path, ids: np.ndarray, checkout: Path | None, steps: int, rounds: int
) -> dict[str, float | None]:
    """Tokens a second of each, and ours over theirs, of runs in turns."""
    contenders = ["ours", "trainer"]
    if checkout:
        contenders.append("nanogpt")
        (folder / "nanogpt").mkdir()
        splits = {"train": ids, "val": ids}
        verified = nanogpt.verified(checkout)
        nanogpt.prepare(verified, folder / "nanogpt", splits, VOCABULARY, autocast=True)
    medians: dict[str, list[float]] = {contender: [] for contender in contenders}
    for turn in range(rounds):
        for contender in contenders:
            medians[contender].append(seconds(contender, folder, steps))
        print(f"round {turn + 1} of {rounds}: {medians}", file=sys.stderr, flush=True)
    metrics: dict[str, float | None] = {
        f"{contender}_tokens_per_second": BATCH * SEQUENCE / statistics.median(medians[contender])
        for contender in contenders
    }
    for peer in contenders[1:]:
        pairs = zip(medians[peer], medians["ours"], strict=True)
        metrics[f"vs_{peer}"] = statistics.median(theirs / own for theirs, own in pairs)
    return metrics


if __name__ == "__main__":
    main()
