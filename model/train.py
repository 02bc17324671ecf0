"""The training loop: one function for pretraining and supervised fine-tuning.

It runs bare, or on every rank of a `torch.distributed` process group that the caller has
initialised, with a backend for CPUs also where GPUs train ("cpu:gloo,cuda:nccl"): counts and
checkpoints' digests go between CPUs.
Each step takes the same global batch whatever the number of ranks: a rank reads its slice of it, in
micro-batches, and every loss is divided by the global count of targets. A run that resumes from a
checkpoint goes on with the same batches, and on one CPU with the same threads with the same bits.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported here, before there is a process group: its functions have the group of that moment as
# their default argument. DDP and the optimisers import it later, and the group with its threads
# then outlives `destroy_process_group`; when such a thread wants the interpreter as it shuts down,
# the process ends with "terminate called without an active exception". (Where weights are divided
# torch's caches keep the mesh and its group in any case: a script of its own that trains so on CPUs
# ends with `os._exit` once all is said.)
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
    step_of,
    verify_checkpoint,
)
from model.compiling import compile_blocks
from model.config import ModelConfig
from model.divided_checkpoint import Together, is_divided, load_divided
from model.initial_weights import InitialWeights
from model.loader import Batch, Ints, KnownTokens, Loader, Place, rank_slice, told
from model.losses import cross_entropy_sum
from model.meter import Meter, StepRecord, device_peak, seen_keys
from model.moe import balance, uncounted
from model.optim import OptimConfig, Optimizer
from model.precision import resolve_precision
from model.schedule import Schedule
from model.sharding import (
    Ranks,
    SummedGradients,
    gathered,
    load_whole_state,
    shard,
    synchronised,
    whole_tensors,
)
from model.spikes import SpikeGuard
from model.tensor_parallel import divide_blocks, join_gradients
from model.train_config import TrainConfig
from model.transformer import Transformer
from model.validation import OVERALL, heldout_losses
from model.width import width_ratio

logger = logging.getLogger("gristmill.training")
BEST = "best"  # folder of the checkpoints with the least held-out loss


class DivergedError(RuntimeError):
    """The loss or the gradient stopped being a number. The message names the step and what its
    sequences were read from; `places` has the same.
    """

    def __init__(self, message: str, places: Sequence[Place] = ()) -> None:  # () when unpickled
        super().__init__(message)
        self.places = places


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
    weights: InitialWeights | None = None,
    token_bytes: Tensor | None = None,
    heldout: Mapping[str, Loader] | None = None,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    on_heldout: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
    on_checkpoint: Callable[[Path, int], None] = lambda path, step: None,
    refresh: Callable[[], None] = lambda: None,
) -> list[StepRecord]:
    """Train `model` in place to `config.total_tokens`; returns the curve from its first step on,
    also the part that an earlier, killed run took.

    checkpoints: directory, of all ranks or (see `refresh`) of each; training resumes from the
        newest checkpoint in it.
    weights: what a `model` on the meta device begins with; it gets them when it is divided.
    token_bytes: (V,) int, the UTF-8 bytes each token stands for, for bits per byte.
    on_step: called for every record of the curve, on every rank alike; after a restart first again
        for those before the checkpoint, which the killed run may not have got rid of.
    heldout: loaders of text that is not trained on, by the name of its source.
    on_heldout: called on every rank with the losses `model.validation` found after a step; the
        model is as that step left it, and can be asked there, when it is divided by all together.
    on_checkpoint: called on rank 0 when a checkpoint is whole, in the thread that wrote it; one is
        also made after the last step. When this function returns all are whole.

    refresh: called on every rank before it goes back to a checkpoint, to bring all that are kept,
        and no others, into a `checkpoints` of its own.

    Raises `ConfigError` for settings that contradict each other or the checkpoint,
    `CheckpointError` for a damaged checkpoint, `DataError` for a token that the model lacks,
    `DivergedError` when loss or gradient is not finite.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    config.require_possible(model.config, loader, world)
    loader = KnownTokens(loader, model.config.vocab_size)
    heldout = {
        name: KnownTokens(each, model.config.vocab_size) for name, each in (heldout or {}).items()
    }
    device = model.output_weight.device if weights is None else weights.device
    ranks = Ranks.here(config.tensor, device)
    precision = resolve_precision(config.precision, device.type)
    bf16 = precision == "bf16"
    model.remat = config.activation_checkpointing
    if config.compiled:
        compile_blocks(model.model.layers, device)
    if ranks.mesh is not None:
        divide_blocks(model, ranks)
    bare: nn.Module = _Loss(model)
    if config.sharded and ranks.count > 1:
        bare = shard(bare, model, ranks, bf16=bf16)
    if weights is not None:
        weights.fill(model)
    ratio = width_ratio(model.config, config.optim.base_width)
    optimizer = Optimizer(model, config.optim, bf16=bf16, width_ratio=ratio)
    steps = config.steps(loader.sequence)
    identity = {
        "train": config.identity() | {"precision": precision, "sequence": loader.sequence},
        "model": model.config.to_dict(),
    }
    past = _History(SpikeGuard(config.spike))
    divided = config.sharded and ranks.count > 1 and config.divided_checkpoints
    together = Together.of_all() if divided and checkpoints is not None else None
    first = _resume(model, optimizer, past, checkpoints, identity, together)
    for record in past.curve:
        on_step(record)
    for step, losses in past.heldout:
        on_heldout(step, losses)
    module, summed = bare, None
    if ranks.count > 1 and not config.sharded and device.type == "cpu":
        summed = SummedGradients(model, ranks)
    elif ranks.count > 1 and not config.sharded:
        # Every parameter is used in every step.
        module = DistributedDataParallel(
            module, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    averaging = ranks.count if module is not bare or config.sharded else 1  # DDP and FSDP average
    model.train()
    if token_bytes is not None:
        token_bytes = token_bytes.to(device)

    peak = device_peak(config.peak_flops, device)
    peak = None if peak is None else peak * world
    meter = Meter(model.config, loader.sequence * config.batch, first, steps, peak)
    meter.load_state(past.meter)
    writer = None
    if checkpoints is not None:
        how = save_checkpoint if together is None else together.save
        writer = CheckpointWriter(checkpoints, on_checkpoint, how)

    def save(step: int, keep: int, folder: str = "") -> None:
        """What every rank does for a checkpoint; rank 0 writes it, or each its part."""
        tensors = model.state_dict(), optimizer.state()
        if together is None:
            mine = rank == 0
            tensors = whole_tensors(tensors[0], kept=mine), whole_tensors(tensors[1], kept=mine)
        if writer is not None and (rank == 0 or together is not None):
            state = {"identity": identity, "meter": meter.state()} | past.state()
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
        if summed is not None:
            ending.callback(summed.let_go)
        for step in range(first, steps):
            ids = loader.order(step * config.batch, config.batch)
            counted = loader.targets(ids)
            mine = loader.read(rank_slice(ids, ranks.index, ranks.count))
            micro = mine.micro_batches(config.micro_batch)
            totals = torch.zeros(3, dtype=torch.float64)  # nats, bytes, keys seen
            totals[2] = seen_keys(model.config, mine)
            pieces = config.most_micro_batches(ranks.count) if config.sharded else len(micro)
            for number in range(pieces):
                # Divided weights are gathered for each micro-batch, by all ranks together: one that
                # has no more takes part with a sequence that counts for nothing.
                idle = number >= len(micro)
                piece = (mine.micro_batches(1)[0] if idle else micro[number]).to(device)
                weight = 0.0 if idle else averaging / max(counted, 1)
                last = number == pieces - 1
                with synchronised(module, last), uncounted(model, idle):
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        nats = module(piece)
                    (nats * weight).backward()
                if not idle:
                    totals[0] += nats.detach().double().cpu()
                    totals[1] += _bytes(piece, token_bytes)
            ranks.add(totals)
            if summed is not None:
                summed.add()
            if ranks.mesh is not None:
                join_gradients(model, ranks)
            grad_norm = float(optimizer.clip(config.clip))
            loss = float(totals[0]) / max(counted, 1)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                places = _places(loader, ids)
                raise DivergedError(
                    f"loss {loss} and gradient norm {grad_norm} at step {step + 1} on "
                    f"{told(places)}; lower the learning rate or look at these sequences",
                    places,
                )
            multiplier = config.schedule.multiplier(step, steps)
            if past.guard.takes(loss, step + 1):
                optimizer.step(multiplier)
            elif rank == 0:
                logger.warning(
                    "step %d was not taken: its loss is %.3f, of %s",
                    step + 1,
                    loss,
                    told(_places(loader, ids)),
                )
            if past.guard.lost:
                # Several in a row: the weights are at fault, not the batches. On with older weights
                # and the data that follows; where there are none, with these and losses as they
                # have become, or no step would ever be taken again.
                settle()
                refresh()
                kept = [] if checkpoints is None else list_checkpoints(checkpoints)
                older = past.guard.older(kept)
                _require_agreement(older, ranks)
                _restore(model, optimizer, older, together)
                past.guard.go_back(older, step + 1)
                if world > 1:
                    dist.barrier()  # before rank 0 removes what another still reads
            optimizer.zero_grad()
            imbalance = balance(model, config.balance_rate) if model.config.experts else None
            meter.add(float(totals[0]), counted, int(totals[1]), float(totals[2]))
            done = step + 1
            if done % config.log_every == 0 or done == steps:
                rate = multiplier * config.optim.matrix_rate
                record = meter.record(done, rate, grad_norm, device)
                record = replace(record, imbalance=imbalance, **past.guard.told())
                past.curve.append(record)
                on_step(record)
            if heldout and (done % config.heldout_every == 0 or done == steps):
                with meter.paused(device):
                    model.eval()
                    shown = config.heldout_sequences, config.micro_batch
                    losses = heldout_losses(bare, heldout, *shown, device, ranks, bf16=bf16)
                    least = min((earlier[OVERALL] for _, earlier in past.heldout), default=math.inf)
                    past.heldout.append((done, losses))
                    cast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
                    with gathered(bare), cast:
                        on_heldout(done, losses)
                    model.train()
                    if losses[OVERALL] < least and config.keep_best:
                        save(done, config.keep_best, BEST)
            if checkpoints is not None and (done % config.checkpoint_every == 0 or done == steps):
                with meter.paused(device):
                    save(done, config.keep_checkpoints)
        settle()
    return past.curve


@dataclass
class _History:
    """What a run remembers of its steps; in its checkpoints, so that it goes on alike."""

    guard: SpikeGuard
    curve: list[StepRecord] = field(default_factory=list)
    heldout: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.0  # spent by earlier attempts until the checkpoint gone on from
    begun: float = field(default_factory=time.perf_counter)
    meter: dict[str, Any] | None = None  # of that checkpoint

    def state(self) -> dict[str, Any]:
        return {
            "curve": [asdict(record) for record in self.curve],
            "guard": self.guard.state(),
            "heldout": list(self.heldout),
            "seconds": self.seconds + time.perf_counter() - self.begun,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.guard.load_state(state.get("guard"))
        self.curve = [StepRecord(**record) for record in state["curve"]]
        self.heldout = [(step, losses) for step, losses in state.get("heldout", ())]
        self.seconds, self.meter = state.get("seconds", 0.0), state.get("meter")


def _places(loader: Loader, ids: Ints) -> list[Place]:
    """What a batch is read from."""
    return [place for number in ids.tolist() for place in loader.places(number)]


def _require_agreement(older: Path | None, ranks: Ranks) -> None:
    """Raises `CheckpointError` unless all ranks go back to the same step."""
    step = 0 if older is None else step_of(older)
    told = torch.zeros(ranks.count, dtype=torch.float64)
    told[ranks.index] = step
    ranks.add(told)
    if len(set(told.tolist())) > 1:
        raise CheckpointError(
            f"the workers' checkpoints to go back to are of steps {told.int().tolist()}; "
            "each would get another model"
        )


def _restore(
    model: Transformer, optimizer: Optimizer, path: Path | None, together: Together | None
) -> None:
    """Weights and optimiser state of a checkpoint, if there is one."""
    if path is None:
        return
    if is_divided(read_manifest(path)):
        tensors = {"model": model.state_dict(), "optimizer": optimizer.blank_state()}
        if together is not None:
            together.load(path, tensors)
        else:
            verify_checkpoint(path)
            load_divided(path, tensors)
        return
    checkpoint = load_checkpoint(path)
    load_whole_state(model, checkpoint.model)
    optimizer.load_state(checkpoint.optimizer)


def _resume(
    model: Transformer,
    optimizer: Optimizer,
    past: _History,
    checkpoints: Path | None,
    identity: dict[str, Any],
    together: Together | None,
) -> int:
    """Load the newest checkpoint, if there is one; returns its steps."""
    path = None if checkpoints is None else latest_checkpoint(checkpoints)
    if path is None:
        return 0
    manifest = read_manifest(path)
    # A setting that did not exist then had its default.
    kinds = TrainConfig, ModelConfig
    usual: dict[str, Any] = {each.name: each.default for kind in kinds for each in fields(kind)}
    usual |= {"optim": asdict(OptimConfig()), "schedule": asdict(Schedule())}
    # Through JSON and back, as the saved one went: tuples are lists there.
    for part, wanted in json.loads(json.dumps(identity)).items():
        for name, value in wanted.items():
            saved = manifest["state"]["identity"][part].get(name, usual.get(name))
            if isinstance(saved, dict):
                saved = (usual[name] or {}) | saved
            if saved != value:
                raise CheckpointError(
                    f"checkpoint {path.name} was made with {part} setting {name} = {saved}, "
                    f"not {value}; delete {checkpoints} to start anew"
                )
    _restore(model, optimizer, path, together)
    past.load_state(manifest["state"])
    return int(manifest["step"])


def _bytes(batch: Batch, token_bytes: Tensor | None) -> int:
    if token_bytes is None:
        return 0
    sizes = token_bytes[batch.targets]
    return int((sizes if batch.mask is None else sizes * batch.mask).sum())
