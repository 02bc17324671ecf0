"""What a training run is, in one frozen dataclass, and what of it cannot be."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from model.config import ConfigError, ModelConfig
from model.loader import Loader
from model.optim import OptimConfig
from model.precision import Precision
from model.schedule import Schedule


@dataclass(frozen=True)
class TrainConfig:
    """Lengths are in steps unless they say tokens or sequences. Raises `ConfigError`."""

    # What is trained
    total_tokens: int  # rounded up to whole steps
    batch: int = 16  # sequences of one step, over all ranks
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: Schedule = field(default_factory=Schedule)
    clip: float | None = 1.0  # global gradient norm
    spike: float | None = None  # standard deviations of a step not taken (`model.spikes`)
    balance_rate: float = 1e-3  # how fast experts' biases follow their load (`model.moe`)

    # Where and how: these change the result but for rounding, and may be others after a restart
    precision: Precision = "auto"  # what it came to stands in the identity of a run, too
    micro_batch: int = 16  # sequences a rank holds at once
    activation_checkpointing: bool = False  # keep only what enters a block, compute the rest again
    compiled: bool = False  # blocks by torch.compile, where it finds a compiler
    sharded: bool = False  # weights and optimiser state divided among the ranks (FSDP2)
    tensor: int = 1  # ranks that share each block's matrices (`model.tensor_parallel`)
    peak_flops: float | None = None  # of one device in a second; None: known, or no MFU

    # What is told and kept
    log_every: int = 10
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    keep_best: int = 0  # checkpoints in `best/`, because theirs was the least held-out loss
    divided_checkpoints: bool = True  # with sharded: each rank writes its own part
    heldout_every: int = 50
    heldout_sequences: int = 32  # of each source

    def __post_init__(self) -> None:
        names = "total_tokens", "batch", "micro_batch", "checkpoint_every", "log_every"
        for name in (*names, "tensor", "keep_checkpoints", "heldout_every", "heldout_sequences"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if self.clip is not None and self.clip <= 0:
            raise ConfigError(f"clip {self.clip} must be above 0; use None for no clipping")
        if self.spike is not None and self.spike <= 1:
            raise ConfigError(f"spike {self.spike} must be above 1 standard deviation, 6 is usual")

    def steps(self, sequence: int) -> int:
        """Steps of the run at `sequence` tokens a row."""
        return math.ceil(self.total_tokens / (self.batch * sequence))

    def identity(self) -> dict[str, Any]:
        """The settings that change the result, for comparison with a checkpoint's."""
        return {name: value for name, value in asdict(self).items() if name in IDENTITY}

    def require_possible(self, shape: ModelConfig, loader: Loader, world: int) -> None:
        """Raises `ConfigError` where model, data, settings and ranks contradict each other."""
        if loader.sequence > shape.context:
            raise ConfigError(
                f"sequence {loader.sequence} is longer than the model's context {shape.context}; "
                f"lower one or raise the other"
            )
        if shape.causal == getattr(loader, "masked", False):
            raise ConfigError(
                "a model that looks both ways sees the next token: give it a MaskedLoader, and "
                "causal models any other"
            )
        shape.require_tensor(self.tensor)
        self.require_world(world)

    def require_world(self, world: int) -> None:
        """Raises `ConfigError` where so many ranks cannot share the batch."""
        if world % self.tensor:
            raise ConfigError(
                f"{world} workers cannot be divided into groups of tensor {self.tensor}; choose a "
                f"multiple"
            )
        slices = world // self.tensor
        if slices > self.batch:
            raise ConfigError(
                f"{slices} workers for a batch of {self.batch} sequences; use fewer workers"
            )
        if slices > 1 and self.tensor > 1 and not self.sharded:
            raise ConfigError(
                f"{world} workers in groups of tensor {self.tensor} need sharded, which keeps the "
                f"{slices} groups equal"
            )

    def most_micro_batches(self, slices: int) -> int:
        """Of the rank with most work among those that share a batch in so many slices."""
        return math.ceil(math.ceil(self.batch / slices) / self.micro_batch)


IDENTITY = ("total_tokens", "batch", "optim", "schedule", "clip", "spike", "balance_rate")
