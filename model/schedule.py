"""Learning-rate schedules: a multiplier of the peak rate as a function of the step."""

import math
from dataclasses import dataclass
from typing import Literal

from model.config import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then one of three shapes; all lengths are shares of the run.

    wsd: flat, then linear down over the last `decay` of the run (MiniCPM, arXiv:2404.06395);
    cosine: half a cosine from the end of the warm-up to the end; linear: a straight line likewise.
    `floor` is the multiplier reached at the end.
    """

    kind: Literal["wsd", "cosine", "linear"] = "wsd"
    warmup: float = 0.02
    decay: float = 0.4
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("wsd", "cosine", "linear"):
            raise ConfigError(f"schedule kind {self.kind!r} is not one of wsd, cosine, linear")
        for name in ("warmup", "decay", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"schedule {name} {getattr(self, name)} must be between 0 and 1")
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            raise ConfigError(
                f"schedule warmup {self.warmup} + decay {self.decay} is more than the whole run"
            )

    def multiplier(self, step: int, steps: int) -> float:
        """The share of the peak rate for `step` in 0..steps-1."""
        warmup = self.warmup * steps
        if step < warmup:
            return (step + 1) / math.ceil(warmup)
        start = (1 - self.decay) * steps if self.kind == "wsd" else warmup
        if step < start:
            return 1.0
        # The last step is the last one with a non-zero rate: progress reaches 1 at `steps`.
        progress = (step - start) / (steps - start)
        shape = (1 + math.cos(math.pi * progress)) / 2 if self.kind == "cosine" else 1 - progress
        return self.floor + (1 - self.floor) * shape
