"""What both trainings have in common: the forms people fill in, what they mean to `model/`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from model.config import ConfigError
from model.precision import resolve_precision
from model.schedule import Schedule
from tasks.runtime.fingerprint import place
from tasks.runtime.stage_config import StageConfig
from tasks.training.shapes import ModelOptions


class OptimizerOptions(StageConfig):
    """How parameters are updated."""

    kind: Literal["muon", "adamw"] = "muon"
    """Muon for the matrices inside the blocks and AdamW for the rest, or AdamW for all."""
    muon_learning_rate: float = Field(0.02, gt=0)
    """Muon's peak learning rate."""
    learning_rate: float = Field(4e-3, gt=0)
    """AdamW's peak learning rate."""
    embedding_learning_rate: float = Field(4e-3, gt=0)
    """AdamW's peak learning rate for the embedding matrix."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's momentum."""
    weight_decay: float = Field(0.2, ge=0)
    """Decoupled weight decay of the matrices: what keeps several passes over the same text from
    being learned by heart."""
    base_width: int = Field(0, ge=0)
    """Width of a smaller model that these rates were found with: initialisation and rates then
    follow the width from there (µP), so that they stay near the best. 0: they are of this model."""


class ScheduleOptions(StageConfig):
    """How the learning rate changes over the run; all lengths are shares of it."""

    kind: Literal["wsd", "cosine", "linear"] = "wsd"
    """Flat with a linear decay at the end (wsd), half a cosine, or a straight line down."""
    warmup: float = Field(0.03, ge=0, le=1)
    """Share of the run in which the rate rises."""
    decay: float = Field(0.4, ge=0, le=1)
    """Share of the run in which it falls (wsd only)."""
    floor: float = Field(0.0, ge=0, le=1)
    """Share of the peak rate reached at the end."""

    @model_validator(mode="after")
    def fits(self) -> Self:
        try:
            Schedule(**self.model_dump())
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self


class RunOptions(StageConfig):
    """Where and how a training runs. Nothing here changes what is trained, but for rounding."""

    workers: int = Field(0, ge=0)
    """Processes that share every batch; 0: two where the cluster has two CPUs (and
    with gpu, two GPUs), else one."""
    least_workers: int = Field(0, ge=0)
    """Begin, and go on after a loss, with as few workers as this where the cluster has not room for
    all; the batch stays as it is. 0: wait for all."""
    threads: int = Field(0, ge=0)
    """Threads of each worker; 0: the machine's cores divided by the workers."""
    gpu: bool = False
    """Give every worker a GPU."""
    peak_tflops: float = Field(0.0, ge=0, lt=1e6)
    """What a worker's device can do in a second in the precision used, in 10^12 operations, for the
    share of it that the training uses (MFU); 0: as known of H100, H200, B200, A100 and L40S in
    bf16; of other devices there is then no MFU."""
    micro_batch: int = Field(8, ge=1)
    """Sequences a worker holds in memory at once."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints: what a crash can lose."""
    log_every: int = Field(5, ge=1)
    """Steps between points of the curve."""
    activation_checkpointing: bool = False
    """Keep only what enters each block and compute the rest again: less memory, a third slower."""
    sharded: bool = False
    """Divide weights and optimiser state among the workers (FSDP2) instead of copying them."""
    tensor: int = Field(1, ge=1)
    """Workers that share the matrices of every layer (tensor parallelism); they need a fast
    connection. The number of workers must be a multiple; more than one such group needs sharded."""
    compiled: bool = False
    """Compile the layers with torch.compile; without a compiler they run as they are."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept while the training goes on."""
    restarts: int = Field(3, ge=0)
    """How often workers that die are started again, from the last checkpoint."""


__all__ = ["ModelOptions", "OptimizerOptions", "RunOptions", "ScheduleOptions", "TrainingConfig"]


def shown_first(*names: str) -> Callable[[dict[str, Any]], None]:
    """Put fields of a subclass before inherited ones in its form."""

    def reorder(schema: dict[str, Any]) -> None:
        properties = schema["properties"]
        schema["properties"] = {name: properties[name] for name in [*names, *properties]}

    return reorder


class TrainingConfig(StageConfig):
    """What pretraining and fine-tuning have in common."""

    batch: int = Field(16, ge=1)
    """Sequences of one optimiser step, over all workers."""
    optimizer: OptimizerOptions = OptimizerOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    clip: float = Field(1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0: never."""
    spike: float = Field(0.0, ge=0)
    """Leave out steps whose loss lies so many standard deviations above those before; 0: never."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of the computation; auto: bf16 where the machine multiplies it in hardware."""
    seed: int = Field(0, ge=0)
    """Chooses initial weights and the order of the data."""
    heldout_every: int = place(50, ge=1)
    """Steps between looks at the loss on what is held out, and at samples of what it writes."""
    heldout_sequences: int = place(32, ge=0)
    """Held-out sequences of each source that are looked at; 0: none."""
    run: RunOptions = place(RunOptions())

    @field_validator("spike")
    @classmethod
    def above_the_noise(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError(f"spike {value} must be above 1 standard deviation, 6 is usual")
        return value

    @model_validator(mode="after")
    def everyone_has_work(self) -> Self:
        run = self.run
        if run.tensor > 1 and not run.workers:
            raise ValueError(f"run.tensor {run.tensor} needs run.workers, a multiple of it")
        slices = run.workers // run.tensor
        if run.workers % run.tensor:
            raise ValueError(f"{run.workers} workers are no groups of run.tensor {run.tensor}")
        if slices > 1 and run.tensor > 1 and not run.sharded:
            raise ValueError(
                f"{slices} groups of run.tensor {run.tensor} workers need run.sharded, which keeps "
                f"them equal"
            )
        if run.least_workers > run.workers or (run.least_workers and run.tensor > 1):
            raise ValueError(
                f"run.least_workers {run.least_workers} must be at most run.workers {run.workers}, "
                f"which it needs, and goes with run.tensor 1"
            )
        if slices > self.batch:
            raise ValueError(
                f"{slices} workers cannot share a batch of {self.batch} sequences; "
                "use fewer workers or a larger batch"
            )
        return self

    def resolve(self) -> Self:
        device = "cuda" if self.run.gpu else "cpu"
        return self.model_copy(update={"precision": resolve_precision(self.precision, device)})

    def loop(self) -> dict[str, Any]:
        """`model.train.TrainConfig` but for `total_tokens`, as JSON."""
        return {
            "batch": self.batch,
            "micro_batch": self.run.micro_batch,
            "optim": self.optimizer.model_dump(),
            "schedule": asdict(Schedule(**self.schedule.model_dump())),
            "clip": self.clip or None,
            "spike": self.spike or None,
            "precision": self.precision,
            "heldout_every": self.heldout_every,
            "heldout_sequences": max(self.heldout_sequences, 1),
            "peak_flops": self.run.peak_tflops * 1e12 or None,
            "checkpoint_every": self.run.checkpoint_every,
            "log_every": self.run.log_every,
            "activation_checkpointing": self.run.activation_checkpointing,
            "sharded": self.run.sharded,
            "tensor": self.run.tensor,
            "compiled": self.run.compiled,
            "keep_checkpoints": self.run.keep_checkpoints,
        }
