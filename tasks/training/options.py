"""What both trainings have in common: the forms people fill in, what they mean to `model/`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from model.config import ConfigError, ModelConfig
from model.precision import resolve_precision
from model.schedule import Schedule
from tasks.runtime.fingerprint import place
from tasks.runtime.stage import StageConfig


class ModelOptions(StageConfig):
    """The shape of the model."""

    width: int = Field(256, ge=2)
    """Channels of the residual stream."""
    layers: int = Field(4, ge=1)
    """Transformer blocks."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    kv_heads: int = Field(0, ge=0)
    """Key-value heads (grouped-query attention); 0: as many as heads."""
    mlp_width: int = Field(1024, ge=0)
    """Channels of the feed-forward blocks; 0: 8/3 of the width, rounded up to 64s."""
    context: int = Field(256, ge=2)
    """Longest text the model can read, in tokens; more than it was trained on is guesswork."""
    sliding_window: int = Field(0, ge=0)
    """Tokens each token can look back on, itself included (Mistral); 0: all."""
    qk_norm: bool = False
    """Normalise queries and keys of each head (Qwen3)."""
    rope_theta: float = Field(10_000.0, gt=1)
    """Base of the rotary positions."""
    tied_embeddings: bool = True
    """Use the embedding matrix as the output matrix, too."""

    @model_validator(mode="after")
    def exists(self) -> Self:
        try:
            self.config(vocab_size=1)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    def config(self, vocab_size: int) -> ModelConfig:
        return ModelConfig(
            vocab_size=vocab_size,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads or None,
            mlp_width=self.mlp_width or None,
            context=self.context,
            sliding_window=self.sliding_window or None,
            qk_norm=self.qk_norm,
            rope_theta=self.rope_theta,
            tied_embeddings=self.tied_embeddings,
        )


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
    """Processes that share every batch; 0: two where the cluster has two free CPUs, else one."""
    threads: int = Field(0, ge=0)
    """Threads of each worker; 0: the machine's cores divided by the workers."""
    gpu: bool = False
    """Give every worker a GPU."""
    micro_batch: int = Field(8, ge=1)
    """Sequences a worker holds in memory at once."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints: what a crash can lose."""
    log_every: int = Field(5, ge=1)
    """Steps between points of the curve."""
    restarts: int = Field(3, ge=0)
    """How often workers that die are started again, from the last checkpoint."""


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
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of the computation; auto: bf16 where the machine multiplies it in hardware."""
    seed: int = Field(0, ge=0)
    """Chooses initial weights and the order of the data."""
    run: RunOptions = place(RunOptions())

    @model_validator(mode="after")
    def everyone_has_work(self) -> Self:
        if self.run.workers > self.batch:
            raise ValueError(
                f"{self.run.workers} workers cannot share a batch of {self.batch} sequences; "
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
            "precision": self.precision,
            "checkpoint_every": self.run.checkpoint_every,
            "log_every": self.run.log_every,
        }
