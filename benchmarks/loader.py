"""How fast sequences leave the loader: tokens per second of one core, shards in the page cache.

    python benchmarks/loader.py [--quick]

Plain windows, document-masked windows and two weighted corpora, in batches of 64 sequences of
2,048 tokens, as a run of some size reads them: order, read, and the int64 tensors that training
takes. The target is for plain windows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.report import finish
from model.loader import Loader, WindowLoader
from model.mixing import WeightedLoader

SEQUENCE, BATCH = 2048, 64
TARGETS = {"windows_mtokens_per_second": (">=", 50.0)}


def shard(folder: Path, tokens: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    path = folder / "tokens-00000.npy"
    np.save(path, rng.integers(0, 50_000, tokens, dtype=np.uint16))
    starts = np.unique(np.concatenate(([0], rng.integers(0, tokens, tokens // 700))))
    np.save(path.with_suffix(".documents.npy"), starts.astype(np.int64))
    return path


def rate(loader: Loader, seconds: float) -> float:
    """Median of the million tokens per CPU second of single batches."""
    rates: list[float] = []
    begun, first = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds or len(rates) < 5:
        started = time.thread_time()
        batch = loader.read(loader.order(first, BATCH))
        rates.append(batch.tokens.numel() / (time.thread_time() - started) / 1e6)
        first += BATCH
    return round(statistics.median(rates[1:]), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a second of each")
    seconds = 1.0 if parser.parse_args().quick else 10.0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = [shard(Path(folder) / name, 8_000_000) for name in ("a", "b")]
        plain = [WindowLoader([path], SEQUENCE, seed=0, vocab_size=50_000) for path in paths]
        masked = WindowLoader(paths[:1], SEQUENCE, seed=0, document_masking=True)
        mixed = WeightedLoader(dict(zip("ab", plain, strict=True)), {"a": 3, "b": 1})
        loaders = {"windows": plain[0], "document_masked": masked, "weighted": mixed}
        metrics = {
            f"{name}_mtokens_per_second": rate(loader, seconds) for name, loader in loaders.items()
        }
    finish("loader", metrics, TARGETS)


if __name__ == "__main__":
    main()
