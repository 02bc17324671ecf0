"""What was foreseen of a training, kept for the training to say how wrong it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.runtime.fingerprint import identity
from tasks.runtime.manifest import Scalar
from tasks.runtime.settings import Settings
from tasks.runtime.stage_config import StageConfig


def place_of(config: StageConfig, settings: Settings) -> Path:
    """Where the forecast for this training lies; places (workers, paths) do not change it."""
    told = json.dumps(identity(config.resolve()), sort_keys=True).encode()
    return settings.home / "forecasts" / f"{hashlib.sha256(told).hexdigest()[:32]}.json"


def keep(foreseen: Mapping[str, Any], config: StageConfig, settings: Settings) -> Path:
    path = place_of(config, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(foreseen, indent=1) + "\n")
    return path


def errors(
    config: StageConfig, settings: Settings, reached: Mapping[str, Scalar]
) -> dict[str, float]:
    """`forecast_NAME` and `forecast_NAME_error` (reached / foreseen - 1) of what was foreseen.

    Empty when nobody asked for a forecast of this training.
    """
    path = place_of(config, settings)
    if not path.is_file():
        return {}
    foreseen, told = json.loads(path.read_text()), {}
    for name, value in reached.items():
        if foreseen.get(name) and isinstance(value, int | float):
            told[f"forecast_{name}"] = float(foreseen[name])
            told[f"forecast_{name}_error"] = value / float(foreseen[name]) - 1
    return told
