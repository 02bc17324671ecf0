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
from collections.abc import Callable, Iterator, Mapping
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
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from model.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    latest_checkpoint,
    load_checkpoint,
)
from model.compiling import compile_blocks
from model.config import ConfigError, ModelConfig
from model.flops import training_flops_per_token
from model.loader import Batch, Loader, rank_slice
from model.losses import cross_entropy_sum
from model.meter import Meter, StepRecord, device_peak
from model.moe import balance
from model.optim import OptimConfig, Optimizer
from model.precision import Precision, resolve_precision
from model.schedule import Schedule
from model.sharding import load_whole_state, shard, whole, whole_state
from model.spikes import SpikeGuard
from model.transformer import Transformer
from model.validation import OVERALL, heldout_losses


@dataclass(frozen=True)
class TrainConfig:
    """What a run is. total_tokens: tokens to train on, rounded up to whole steps; batch: sequences
    of one step over all ranks; micro_batch: sequences a rank holds at once (memory only: it does
    not change the result but for rounding); clip: global gradient norm; checkpoint_every,
    log_every: steps; spike: a step whose loss lies that many standard deviations above the steps
    before it is not taken (`model.spikes`), None: all are; balance_rate: how fast experts' biases
    follow their load (`model.moe`); activation_checkpointing: keep only what enters a block and
    compute the rest again, for less memory; peak_flops: what one device could do in a second, for
    the share of it that is used, None: known or not shown; sharded: divide weights and optimiser
    state among the ranks (FSDP2) instead of copying them to each; compiled: have torch.compile make
    kernels of the blocks, where it finds a compiler; heldout_every: steps between
    looks at the loss on held-out text; heldout_sequences: of each source; keep_best: checkpoints
    kept in `best/` because theirs was least, beside the newest.
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
    sharded: bool = False
    compiled: bool = False
    heldout_every: int = 50
    heldout_sequences: int = 32
    keep_best: int = 0

    def __post_init__(self) -> None:
        names = "total_tokens", "batch", "micro_batch", "checkpoint_every", "log_every"
        for name in (*names, "keep_checkpoints", "heldout_every", "heldout_sequences"):
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
    "sharded",
    "compiled",
    "heldout_every",
    "heldout_sequences",
    "keep_best",
)
BEST = "best"  # folder of the checkpoints with the least held-out loss


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
    heldout: Mapping[str, Loader] | None = None,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    on_heldout: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
    on_checkpoint: Callable[[Path, int], None] = lambda path, step: None,
) -> list[StepRecord]:
    """Train `model` in place to `config.total_tokens`; returns the curve from its first step on,
    also the part that an earlier, killed run took.

    checkpoints: directory, shared by all ranks; training resumes from the newest checkpoint in it.
    token_bytes: (V,) int, the UTF-8 bytes each token stands for, for bits per byte.
    on_step: called for every record of the curve, on every rank alike; after a restart first again
        for those before the checkpoint, which the killed run may not have got rid of.
    heldout: loaders of text that is not trained on, by the name of its source.
    on_heldout: called on every rank with the losses `model.validation` found after a step; the
        model is as that step left it.
    on_checkpoint: called on rank 0 when a checkpoint is whole, in the thread that wrote it; one is
        also made after the last step. When this function returns all are whole.

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
    bf16 = precision == "bf16"
    model.remat = config.activation_checkpointing
    if config.compiled:
        compile_blocks(model)
    bare: nn.Module = _Loss(model)
    if config.sharded and world > 1:
        bare = shard(bare, model)
    optimizer = Optimizer(model, config.optim, bf16=bf16)
    steps = config.steps(loader.sequence)
    identity = {
        "train": config.identity() | {"precision": precision, "sequence": loader.sequence},
        "model": model.config.to_dict(),
    }
    past = _History(SpikeGuard(config.spike))
    first = _resume(model, optimizer, past, checkpoints, identity)
    for record in past.curve:
        on_step(record)
    for step, losses in past.heldout:
        on_heldout(step, losses)
    module = bare
    if world > 1 and not config.sharded:
        # Every parameter is used in every step; the gradient is the sum over ranks, which DDP
        # averages.
        module = DistributedDataParallel(
            module, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    model.train()
    if token_bytes is not None:
        token_bytes = token_bytes.to(device)

    flops = training_flops_per_token(model.config, loader.sequence) / world
    peak = device_peak(config.peak_flops, device)
    meter = Meter(loader.sequence * config.batch, first, steps, flops, peak)
    writer = None if checkpoints is None else CheckpointWriter(checkpoints, on_checkpoint)

    def save(step: int, keep: int, folder: str = "") -> None:
        """What every rank does for a checkpoint; rank 0 writes it."""
        tensors = whole_state(model), {k: whole(t) for k, t in optimizer.state().items()}
        if rank == 0 and writer is not None:
            state = {"identity": identity} | past.state()
            writer.write(Checkpoint(step, *tensors, state), keep, folder)

    def settle() -> None:
        """Until every checkpoint is whole, for every rank."""
        if writer is not None:
            writer.wait()
        if world > 1:
            dist.barrier()

    with contextlib.ExitStack() as ending:
        if writer is not None:
            ending.callback(writer.finish)  # also when a step fails
        for step in range(first, steps):
            ids = loader.order(step * config.batch, config.batch)
            counted = loader.targets(ids)
            mine = loader.read(rank_slice(ids, rank, world))
            micro = mine.micro_batches(config.micro_batch)
            totals = torch.zeros(2, dtype=torch.float64)  # nats, bytes
            for number, piece in enumerate(micro):
                piece = piece.to(device)
                last = number == len(micro) - 1
                with _synchronised(module, last, world):
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
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
                    f"{', '.join(map(str, ids.tolist()))}; lower the learning rate or look at "
                    f"these sequences"
                )
            multiplier = config.schedule.multiplier(step, steps)
            if past.guard.takes(loss):
                optimizer.step(multiplier)
            elif past.guard.lost and checkpoints is not None:
                # Several in a row: the weights are at fault, not the batches. On with older weights
                # and the data that follows.
                settle()
                _restore(model, optimizer, latest_checkpoint(checkpoints))
                past.guard.reset()
            optimizer.zero_grad()
            imbalance = balance(model, config.balance_rate) if model.config.experts else None
            meter.add(float(totals[0]), counted, int(totals[1]))
            done = step + 1
            if done % config.log_every == 0 or done == steps:
                rate = multiplier * config.optim.matrix_rate
                record = meter.record(done, rate, grad_norm, device)
                record = replace(record, skipped=past.guard.skipped, imbalance=imbalance)
                past.curve.append(record)
                on_step(record)
            if heldout and (done % config.heldout_every == 0 or done == steps):
                model.eval()
                losses = heldout_losses(
                    bare, heldout, config.heldout_sequences, config.micro_batch, device, bf16=bf16
                )
                least = min((earlier[OVERALL] for _, earlier in past.heldout), default=math.inf)
                past.heldout.append((done, losses))
                on_heldout(done, losses)
                model.train()
                if losses[OVERALL] < least and config.keep_best:
                    save(done, config.keep_best, BEST)
            if checkpoints is not None and (done % config.checkpoint_every == 0 or done == steps):
                save(done, config.keep_checkpoints)
        settle()
    return past.curve


@dataclass
class _History:
    """What a run remembers of its steps; in its checkpoints, so that it goes on alike."""

    guard: SpikeGuard
    curve: list[StepRecord] = field(default_factory=list)
    heldout: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        curve = [asdict(record) for record in self.curve]
        return {"curve": curve, "guard": self.guard.state(), "heldout": list(self.heldout)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.guard.load_state(state.get("guard"))
        self.curve = [StepRecord(**record) for record in state["curve"]]
        self.heldout = [(step, losses) for step, losses in state.get("heldout", ())]


@contextlib.contextmanager
def _synchronised(module: nn.Module, last: bool, world: int) -> Iterator[None]:
    """Gradients go between ranks with the last micro-batch of a step only."""
    if world == 1:
        yield
    elif isinstance(module, DistributedDataParallel):
        with contextlib.nullcontext() if last else module.no_sync():
            yield
    else:
        assert isinstance(module, FSDPModule)  # what `shard` made of it
        module.set_requires_gradient_sync(last)
        yield


def _restore(model: Transformer, optimizer: Optimizer, path: Path | None) -> None:
    """Weights and optimiser state of a checkpoint, if there is one."""
    if path is not None:
        checkpoint = load_checkpoint(path)
        load_whole_state(model, checkpoint.model)
        optimizer.load_state(dict(checkpoint.optimizer))


def _resume(
    model: Transformer,
    optimizer: Optimizer,
    past: _History,
    checkpoints: Path | None,
    identity: dict[str, Any],
) -> int:
    """Load the newest checkpoint, if there is one; returns its steps."""
    path = None if checkpoints is None else latest_checkpoint(checkpoints)
    if path is None:
        return 0
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
    load_whole_state(model, checkpoint.model)
    optimizer.load_state(dict(checkpoint.optimizer))
    past.load_state(checkpoint.state)
    return checkpoint.step


def _bytes(batch: Batch, token_bytes: Tensor | None) -> int:
    if token_bytes is None:
        return 0
    sizes = token_bytes[batch.targets]
    return int((sizes if batch.mask is None else sizes * batch.mask).sum())
