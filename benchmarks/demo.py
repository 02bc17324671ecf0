"""The main job end to end: one command from an empty home to a served model that answers.

    python benchmarks/demo.py [--quick]

`--quick` runs the tiny preset, which checks the chain but not the scores. Measured: minutes of
`gristmill demo` (what `make run` does after installation), the peak of memory of every process of
the stack, seconds of the same pipeline again (everything Cached), the scores the run logged, and
how many of a stranger's fifty questions the endpoint answers rightly.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Targets, finish
from benchmarks.stack import MemorySampler, home
from benchmarks.stranger import share_right
from tasks.runtime.store import Store

TARGETS: Targets = {
    "minutes": ("<=", 12),
    "peak_memory_gb": ("<=", 6),
    "cached_again_seconds": ("<=", 20),
}
SCORES: Targets = {
    "bits_per_byte_over_ppmd5": ("<", 1),
    "recall_exact_low": (">=", 0.70),
    "stranger_right": (">", 0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the tiny preset, no scores demanded")
    quick = parser.parse_args().quick
    preset = ["--config", "configs/tiny.yaml"] if quick else []
    with home() as fresh, MemorySampler(fresh) as memory:
        seconds, _ = fresh.run("demo", *preset)
        again, _ = fresh.run("run", "pipeline", *preset, "--watch")
        report = Store.open(fresh.settings).latest("evaluate")
        assert report is not None, "the run succeeded, so it evaluated"
        answered = {} if quick else {"stranger_right": share_right(fresh.settings.serve)}
        scores = {k: float(v) for k, v in report.metrics.items() if isinstance(v, int | float)}
    print(f"memory at its peak, {memory.when / 60:.1f} min after the start, GB")
    for name, size in memory.largest[:12]:
        print(f"  {size:5.2f}  {name}")
    metrics = {
        "minutes": round(seconds / 60, 2),
        "peak_memory_gb": round(memory.peak, 2),
        "cached_again_seconds": round(again, 1),
        **answered,
        **scores,
    }
    for name in ("bits_per_byte", "base_bits_per_byte"):
        metrics[f"{name}_over_ppmd5"] = round(scores[name] / scores["ppmd5_bits_per_byte"], 4)
    finish("demo", metrics, TARGETS if quick else {**TARGETS, **SCORES})


if __name__ == "__main__":
    main()
