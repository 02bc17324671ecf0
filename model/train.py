"""The training loop: one function for pretraining and supervised fine-tuning.

It runs bare, or on every rank of a `torch.distributed` process group that the caller has
initialised.
Each step takes the same global batch whatever the number of ranks: a rank reads its slice of it, in
micro-batches, and every loss is divided by the global count of targets. A run that resumes from a
checkpoint goes on with the same batches, and on one CPU with the same threads with the same bits.
"""

import contextlib
import json
import math
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported here, before there is a process group: its functions have the group of that moment as
# their default argument. DDP and the optimisers import it later, and the group with its threads
# then outlives `destroy_process_group`; when such a thread wants the interpreter as it shuts down,
# the process ends with "terminate called without an active exception".
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from model.config import ConfigError, ModelConfig
from model.flops import training_flops_per_token
from model.loader import Batch, Loader, rank_slice
from model.losses import bits_per_byte, cross_entropy_sum
from model.moe import balance
from model.optim import OptimConfig, Optimizer
from model.precision import Precision, resolve_precision
from model.schedule import Schedule
from model.spikes import SpikeGuard
from model.transformer import Transformer


@dataclass(frozen=True)
class TrainConfig:
    """What a run is. total_tokens: tokens to train on, rounded up to whole steps; batch: sequences
    of one step over all ranks; micro_batch: sequences a rank holds at once (memory only: it does
    not change the result but for rounding); clip: global gradient norm; checkpoint_every,
    log_every: steps; spike: a step whose loss lies that many standard deviations above the steps
    before it is not taken (`model.spikes`), None: all are; balance_rate: how fast experts' biases
    follow their load (`model.moe`); activation_checkpointing: keep only what enters a block and
    compute the rest again, for less memory; peak_flops: what one device could do in a second, for
    the share of it that is used, None: known or not shown.
    """

    total_tokens: int
    batch: int = 16
    micro_batch: int = 16
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: Schedule = field(default_factory=Schedule)
    clip: float | None = 1.0
    precision: Precision = "auto"
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    spike: float | None = None
    balance_rate: float = 1e-3
    activation_checkpointing: bool = False
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        names = "total_tokens", "batch", "micro_batch", "checkpoint_every", "log_every"
        for name in (*names, "keep_checkpoints"):
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
        return {name: value for name, value in asdict(self).items() if name not in PLACES}


PLACES = (
    "micro_batch",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "precision",
    "activation_checkpointing",
    "peak_flops",
)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, by device name


@dataclass(frozen=True)
class StepRecord:
    """One line of the curve. loss and bits_per_byte: means over the steps since the last."""

    step: int  # steps completed
    steps: int
    tokens: int  # consumed since the beginning, over all ranks
    loss: float  # nats per counted target
    bits_per_byte: float | None  # None when the bytes of each token are not known
    learning_rate: float  # of the matrices inside the blocks; the other rates move with it
    grad_norm: float  # before clipping, of the last step
    tokens_per_second: float  # since the last record, over all ranks
    memory_mb: float  # peak resident (CPU) or allocated (GPU) memory of this rank
    eta_seconds: float
    mfu: float | None = None  # share of the devices' peak used for the model's own arithmetic
    skipped: int = 0  # steps not taken because of a loss spike, since the beginning
    imbalance: float | None = None  # load of the busiest expert over the mean, of the last step


class DivergedError(RuntimeError):
    """The loss or the gradient stopped being a number. The message names step and sequences."""


class _Loss(nn.Module):
    """Model and loss as one module, so that DDP sees a forward pass that returns a scalar."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.model.hidden(batch.tokens, batch.positions, segments=batch.segments)
        return cross_entropy_sum(
            hidden,
            self.model.output_weight,
            batch.targets,
            batch.mask,
            output_bias=self.model.output_bias,
            softcap=self.model.config.logit_softcap,
        )


def train(
    model: Transformer,
    loader: Loader,
    config: TrainConfig,
    *,
    checkpoints: Path | None = None,
    token_bytes: Tensor | None = None,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    on_checkpoint: Callable[[Path | None, int], None] = lambda path, step: None,
) -> list[StepRecord]:
    """Train `model` in place to `config.total_tokens`; returns the curve from its first step on,
    also the part that an earlier, killed run took.

    checkpoints: directory, shared by all ranks; training resumes from the newest checkpoint in it.
    token_bytes: (V,) int, the UTF-8 bytes each token stands for, for bits per byte.
    on_step: called for every record of the curve, on every rank alike; after a restart first again
        for those before the checkpoint, which the killed run may not have got rid of.
    on_checkpoint: called on every rank after a checkpoint is whole, with its path (None on ranks
        other than 0) and the step; a checkpoint is also made after the last step.

    Raises `ConfigError` for settings that contradict each other or the checkpoint,
    `CheckpointError` for a damaged checkpoint, `DivergedError` when loss or gradient is not finite.
    """
    if loader.sequence > model.config.context:
        raise ConfigError(
            f"sequence {loader.sequence} is longer than the model's context "
            f"{model.config.context}; "
            "lower one or raise the other"
        )
    if model.config.causal == getattr(loader, "masked", False):
        raise ConfigError(
            "a model that looks both ways sees the next token: give it a MaskedLoader, and causal "
            "models any other"
        )
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world > config.batch:
        raise ConfigError(
            f"{world} workers for a batch of {config.batch} sequences; use fewer workers"
        )
    device = model.output_weight.device
    precision = resolve_precision(config.precision, device.type)
    optimizer = Optimizer(model, config.optim, bf16=precision == "bf16")
    model.remat = config.activation_checkpointing
    guard = SpikeGuard(config.spike)
    steps = config.steps(loader.sequence)
    identity = {
        "train": config.identity() | {"precision": precision, "sequence": loader.sequence},
        "model": model.config.to_dict(),
    }
    first, records = _resume(model, optimizer, guard, checkpoints, identity)
    for record in records:
        on_step(record)
    module: nn.Module = _Loss(model)
    if world > 1:
        # Every parameter is used in every step; the gradient is the sum over ranks, which DDP
        # averages.
        module = DistributedDataParallel(module, broadcast_buffers=False)
    model.train()
    if token_bytes is not None:
        token_bytes = token_bytes.to(device)

    flops = training_flops_per_token(model.config, loader.sequence) / world
    meter = _Meter(loader.sequence * config.batch, first, steps, flops, _peak(config, device))
    for step in range(first, steps):
        ids = loader.order(step * config.batch, config.batch)
        counted = loader.targets(ids)
        mine = loader.read(rank_slice(ids, rank, world))
        micro = mine.micro_batches(config.micro_batch)
        totals = torch.zeros(2, dtype=torch.float64)  # nats, bytes
        for number, piece in enumerate(micro):
            piece = piece.to(device)
            last = number == len(micro) - 1
            sync = contextlib.nullcontext() if last or world == 1 else module.no_sync()  # type: ignore[operator]
            with sync:
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    nats = module(piece)
                (nats * (world / max(counted, 1))).backward()
            totals[0] += nats.detach().double().cpu()
            totals[1] += _bytes(piece, token_bytes)
        if world > 1:
            dist.all_reduce(totals)
        grad_norm = float(optimizer.clip(config.clip))
        loss = float(totals[0]) / max(counted, 1)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergedError(
                f"loss {loss} and gradient norm {grad_norm} at step {step + 1} on sequences "
                f"{', '.join(map(str, ids.tolist()))}; lower the learning rate or look at these "
                f"sequences"
            )
        multiplier = config.schedule.multiplier(step, steps)
        if guard.takes(loss):
            optimizer.step(multiplier)
        elif guard.lost and checkpoints is not None:
            # Several in a row: the weights are at fault, not the batches. On with older weights and
            # the data that follows.
            _restore(model, optimizer, latest_checkpoint(checkpoints))
            guard.reset()
        optimizer.zero_grad()
        imbalance = balance(model, config.balance_rate) if model.config.experts else None
        meter.add(float(totals[0]), counted, int(totals[1]))
        done = step + 1
        if done % config.log_every == 0 or done == steps:
            rate = multiplier * config.optim.matrix_rate
            record = meter.record(done, rate, grad_norm, device)
            records.append(replace(record, skipped=guard.skipped, imbalance=imbalance))
            on_step(records[-1])
        if checkpoints is not None and (done % config.checkpoint_every == 0 or done == steps):
            path = None
            if rank == 0:
                state = {
                    "identity": identity,
                    "curve": [asdict(record) for record in records],
                    "guard": guard.state(),
                }
                saved = Checkpoint(done, model.state_dict(), optimizer.state(), state)
                path = save_checkpoint(checkpoints, saved, keep=config.keep_checkpoints)
            if world > 1:
                dist.barrier()
            on_checkpoint(path, done)
    return records


def _peak(config: TrainConfig, device: torch.device) -> float | None:
    """What the device can do in a second, if that is known."""
    if config.peak_flops is not None or device.type != "cuda":
        return config.peak_flops
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def _restore(model: Transformer, optimizer: Optimizer, path: Path | None) -> None:
    """Weights and optimiser state of a checkpoint, if there is one."""
    if path is not None:
        checkpoint = load_checkpoint(path)
        model.load_state_dict(dict(checkpoint.model))
        optimizer.load_state(dict(checkpoint.optimizer))


def _resume(
    model: Transformer,
    optimizer: Optimizer,
    guard: SpikeGuard,
    checkpoints: Path | None,
    identity: dict[str, Any],
) -> tuple[int, list[StepRecord]]:
    """Load the newest checkpoint, if there is one; returns its steps and the curve up to there."""
    path = None if checkpoints is None else latest_checkpoint(checkpoints)
    if path is None:
        return 0, []
    checkpoint = load_checkpoint(path)
    # A setting that did not exist then had its default.
    unsaid = {f.name: f.default for kind in (TrainConfig, ModelConfig) for f in fields(kind)}
    # Through JSON and back, as the saved one went: tuples are lists there.
    for part, wanted in json.loads(json.dumps(identity)).items():
        for name, value in wanted.items():
            saved = checkpoint.state["identity"][part].get(name, unsaid.get(name))
            if saved != value:
                raise CheckpointError(
                    f"checkpoint {path.name} was made with {part} setting {name} = {saved}, "
                    f"not {value}; delete {checkpoints} to start anew"
                )
    model.load_state_dict(dict(checkpoint.model))
    optimizer.load_state(dict(checkpoint.optimizer))
    guard.load_state(checkpoint.state.get("guard"))
    return checkpoint.step, [StepRecord(**record) for record in checkpoint.state["curve"]]


def _bytes(batch: Batch, token_bytes: Tensor | None) -> int:
    if token_bytes is None:
        return 0
    sizes = token_bytes[batch.targets]
    return int((sizes if batch.mask is None else sizes * batch.mask).sum())


class _Meter:
    """Sums between two records."""

    def __init__(
        self, step_tokens: int, first: int, steps: int, flops: float, peak: float | None
    ) -> None:
        self.step_tokens, self.steps = step_tokens, steps
        self.flops, self.peak = flops, peak  # of a token on each rank; of a rank's device
        self._reset(first)

    def _reset(self, step: int) -> None:
        self._since, self._started = step, time.perf_counter()
        self._nats, self._counted, self._bytes = 0.0, 0, 0

    def add(self, nats: float, counted: int, bytes_: int) -> None:
        self._nats += nats
        self._counted += counted
        self._bytes += bytes_

    def record(self, step: int, rate: float, grad_norm: float, device: torch.device) -> StepRecord:
        seconds = (time.perf_counter() - self._started) / (step - self._since)
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device) / 2**20
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        record = StepRecord(
            step=step,
            steps=self.steps,
            tokens=step * self.step_tokens,
            loss=self._nats / max(self._counted, 1),
            bits_per_byte=bits_per_byte(self._nats, self._bytes) if self._bytes else None,
            learning_rate=rate,
            grad_norm=grad_norm,
            tokens_per_second=self.step_tokens / seconds,
            memory_mb=memory,
            eta_seconds=seconds * (self.steps - step),
            mfu=self.flops * self.step_tokens / seconds / self.peak if self.peak else None,
        )
        self._reset(step)
        return record
