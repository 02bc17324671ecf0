"""How much of a GPU pretraining uses: the share of its peak, at 124 and 350 million parameters.

    python benchmarks/pretrain_gpu.py [--quick] [--device cuda|cpu] [--sizes 124m,350m]

It needs torch, numpy, safetensors and `model/` only, so it runs on a machine that has nothing else
of this repository. The loop is the one that trains: bf16 autocast, fp32 masters, Muon and AdamW,
sequences of 2,048 tokens, the blocks compiled where a compiler is found. Operations are counted as
6·N and attention, N without the embedding and with the output matrix (`model/flops.py`, which
counts attention's causal half only); the peak of an H100 is 989 TFLOP/s. `--quick --device cpu`
takes tiny models: it shows that the script runs, and its figures say nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.report import Targets, finish
from model.config import ModelConfig
from model.flops import count_parameters, training_flops_per_token
from model.loader import WindowLoader
from model.meter import device_peak
from model.train import StepRecord, train
from model.train_config import TrainConfig
from model.transformer import Transformer

SHAPES = {
    "124m": {"width": 768, "layers": 12, "heads": 12, "mlp_width": 2048, "vocab_size": 50_304},
    "350m": {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 2752, "vocab_size": 50_304},
}
TINY = {"width": 64, "layers": 2, "heads": 2, "mlp_width": 128, "vocab_size": 512}
MICRO_BATCH = {"124m": 32, "350m": 16}
SEQUENCE, WARM = 2048, 5
TARGET = 0.45


def measure(size: str, device: str, quick: bool, peak: float | None) -> dict[str, float | None]:
    """Tokens a second, share of the peak and memory of one size."""
    tiny = quick and device == "cpu"
    sequence, rows = (64, 2) if tiny else (SEQUENCE, MICRO_BATCH[size])
    steps = WARM + (5 if quick else 30)
    torch.manual_seed(0)
    shape = ModelConfig(**(TINY if tiny else SHAPES[size]), context=sequence)
    model = Transformer(shape).to(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens-00000.npy"
        ids = np.random.default_rng(0).integers(0, shape.vocab_size, 8_000_000, dtype=np.uint16)
        np.save(path, ids)
        config = TrainConfig(
            total_tokens=steps * rows * sequence,
            batch=rows,
            micro_batch=rows,
            precision="bf16",
            log_every=1,
            compiled=True,
            peak_flops=peak,
        )
        records: list[StepRecord] = train(model, WindowLoader([path], sequence, 0), config)
    rate = statistics.median(record.tokens_per_second for record in records[WARM:])
    known = device_peak(peak, torch.device(device))
    share = rate * training_flops_per_token(shape, sequence) / known if known else None
    return {
        f"parameters_{size}": count_parameters(shape).total,
        f"tokens_per_second_{size}": rate,
        f"mfu_{size}": share,
        f"memory_gb_{size}": max(record.memory_mb for record in records) / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps; on a CPU tiny models")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", default=",".join(SHAPES), metavar="NAME,…")
    parser.add_argument("--peak-tflops", type=float, metavar="N", help="of a GPU unknown here")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is here; to see whether the script runs: --quick --device cpu")
    sizes = arguments.sizes.split(",")
    peak = arguments.peak_tflops and arguments.peak_tflops * 1e12
    metrics: dict[str, float | None] = {}
    for size in sizes:
        metrics |= measure(size, arguments.device, arguments.quick, peak)
    on_gpu = arguments.device == "cuda"
    targets: Targets = {f"mfu_{size}": (">=", TARGET) for size in sizes} if on_gpu else {}
    finish("pretrain_gpu", metrics, targets)


if __name__ == "__main__":
    main()
