"""What was foreseen of a training, kept for the training to say how wrong it was.

A forecast is of one training on one corpus with one tokenizer, so it lies under the settings and
the content of the token shards; one made without a corpus says nothing of the loss and is for any.
What depends on where the training runs (time, memory, device hours) is judged only where it ran as
the forecast supposed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.runtime.fingerprint import identity
from tasks.runtime.manifest import Manifest, Scalar
from tasks.runtime.settings import Settings
from tasks.training.options import RunOptions, TrainingConfig

PLACED = ("seconds", "memory_gb", "device_hours")
PLACEMENT = (
    "threads",
    "gpu",
    "micro_batch",
    "activation_checkpointing",
    "sharded",
    "tensor",
    "compiled",
)


def place_of(config: TrainingConfig, settings: Settings, shards: Manifest | None) -> Path:
    """Where the forecast for this training lies. Shards bear the tokenizer they were made with."""
    told = {"config": identity(config.resolve()), "shards": shards.content if shards else ""}
    mark = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return settings.home / "forecasts" / f"{mark[:32]}.json"


def placement(run: RunOptions, workers: Any) -> dict[str, Any]:
    """What of a run decides its time and memory; workers: as it was settled."""
    return {"workers": workers} | {name: getattr(run, name) for name in PLACEMENT}


def keep(
    foreseen: Mapping[str, Any],
    config: TrainingConfig,
    settings: Settings,
    shards: Manifest | None = None,
) -> Path:
    path = place_of(config, settings, shards)
    path.parent.mkdir(parents=True, exist_ok=True)
    where = {"placement": placement(config.run, foreseen["workers"])}
    path.write_text(json.dumps({**foreseen, **where}, indent=1) + "\n")
    return path


def errors(
    config: TrainingConfig,
    settings: Settings,
    shards: Manifest,
    reached: Mapping[str, Scalar],
) -> dict[str, float]:
    """`forecast_NAME` and `forecast_NAME_error` (reached / foreseen - 1) of what was foreseen.

    reached: by the names of the forecast, with `parameters` and the `workers` it had. Empty when
    nobody asked for a forecast of this training.
    """
    paths = [place_of(config, settings, of) for of in (shards, None)]
    kept = [json.loads(path.read_text()) for path in paths if path.is_file()]
    if not kept or kept[0]["parameters"] != reached["parameters"]:  # of another vocabulary
        return {}
    foreseen, told = kept[0], {}
    as_supposed = foreseen["placement"] == placement(config.run, reached["workers"])
    for name in ("loss", *(PLACED if as_supposed else ())):
        value = reached.get(name)
        if foreseen.get(name) and isinstance(value, int | float):
            told[f"forecast_{name}"] = float(foreseen[name])
            told[f"forecast_{name}_error"] = value / float(foreseen[name]) - 1
    return told
