"""nanoGPT as a peer: its own train.py from a checkout, on data we lay out as it expects.

It is not on the package index: `--nanogpt DIR` names a checkout at `COMMIT`. With
`autocast` one line is replaced: on a CPU it would leave autocast out, and be compared at fp32 with
a run in bf16. Its own recipes run as they are.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COMMIT = "3adf61e154c3fe3fca428ad6bc3818b27a3b8291"
DIGESTS = {
    "train.py": "413bd97b40bb400a2a0d01230e2946f056c263ebac1b7281c2367d964a123085",
    "model.py": "7c01703240dbec5d554527dc666e35b3df8391d0b117fddc07afcf325a21d11c",
    "configurator.py": "5cc23aca26b4ab3c0d9e5f82740f4781f9444f42718c15abcee70d93c5aabe8f",
}
OPTION: dict[str, Any] = {
    "type": Path,
    "metavar": "DIR",
    "default": os.environ.get("NANOGPT"),
    "help": "a checkout of nanoGPT (default: $NANOGPT)",
}
WITHOUT_AUTOCAST = "nullcontext() if device_type == 'cpu' else "
STEP = re.compile(r"^iter (\d+): loss ([\d.]+), time ([\d.]+)ms", re.MULTILINE)


@dataclass(frozen=True)
class NanoRun:
    """What a run printed: seconds of each step but the first, and of the process."""

    step_seconds: list[float]
    seconds: float
    output: str


def verified(checkout: Path) -> Path:
    """The checkout, if it is the pinned one."""
    for name, digest in DIGESTS.items():
        file = checkout / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise SystemExit(f"{file} is not nanoGPT's at commit {COMMIT}; check that commit out")
    return checkout


def prepare(
    checkout: Path,
    folder: Path,
    splits: Mapping[str, NDArray[np.uint16]],
    vocabulary: int,
    *,
    autocast: bool,
) -> None:
    """Lay out a folder to run it in: its files, and the data set `bench` of `train` and `val`."""
    for name in DIGESTS:
        shutil.copy(checkout / name, folder / name)
    script = folder / "train.py"
    text = script.read_text()
    assert text.count(WITHOUT_AUTOCAST) == 1
    if autocast:
        script.write_text(text.replace(WITHOUT_AUTOCAST, ""))
    data = folder / "data" / "bench"
    data.mkdir(parents=True)
    for name, ids in splits.items():
        ids.tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocabulary}))


def train(folder: Path, environment: Mapping[str, str], options: Mapping[str, object]) -> NanoRun:
    """Run its training to `max_iters`; options as its configurator takes them."""
    fixed = {"device": "cpu", "dtype": "bfloat16", "dataset": "bench", "log_interval": 1}
    arguments = [f"--{key}={value}" for key, value in {**fixed, **options}.items()]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=folder,
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"nanoGPT failed:\n{done.stderr[-4000:]}")
    seconds = [float(found[2]) / 1000 for found in STEP.findall(done.stdout)]
    return NanoRun(seconds[1:], time.monotonic() - begun, done.stdout)
