"""What every rank of a training does: a Ray Train function around `model.train`."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from model import train as training
from model.chat import Tokenizer
from model.checkpoint import CheckpointError, latest_checkpoint, read_manifest, step_of
from model.config import ConfigError, ModelConfig
from model.divided_checkpoint import load_whole_model
from model.foreign_vocabulary import parameters_for
from model.huggingface import FormatError, load_config, read_parameters
from model.initial_weights import InitialWeights, Values, fresh, without_values
from model.loader import DataError
from model.optim import OptimConfig
from model.precision import cpu_flags
from model.schedule import Schedule
from model.sharding import whole_model
from model.train_config import TrainConfig
from tasks.registry.tracking import MetricLogger
from tasks.runtime.settings import Settings
from tasks.runtime.store import Directory, Store
from tasks.tokenizer.stored import load_tokenizer
from tasks.training.checkpoints import best_checkpoint, checkpoint_folder
from tasks.training.data import heldout_data, training_data
from tasks.training.job import FAILURE, PROGRESS, RESULT, TrainingJob
from tasks.training.made import save_model
from tasks.training.samples import openings, questions, samples

SECONDS_BETWEEN_REPORTS = 1.0
# Starting the workers again would end the same way.
HOPELESS = (ConfigError, DataError, FormatError, CheckpointError, training.DivergedError)

logger = logging.getLogger("gristmill.training")
TRIM_EVERY = 50  # steps


def return_free_memory() -> None:
    """Give the heap's holes back to the system; steps of changing shapes leave half of it as holes.

    The allocator settings that make steps fast (`tasks.training.job.ALLOCATOR`) never do it.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def train_worker(place: dict[str, str]) -> None:
    """One rank's work. A hopeless error is written down where the stage looks for it."""
    directory = Directory(**place)
    if directory.has(FAILURE) or directory.has(RESULT):
        return
    try:
        _train(TrainingJob.load(directory), directory)
    except HOPELESS as error:
        directory.write_json(FAILURE, {"message": _explained(error, directory)})
        raise


def _explained(error: Exception, directory: Directory) -> str:
    """The message; with how to see what the batch that ended a run says."""
    if not isinstance(error, training.DivergedError) or not error.places:
        return str(error)
    job, place = TrainingJob.load(directory), error.places[0]
    data = job.shards
    if job.pairs is not None and not place.file.endswith(".npy"):
        data = job.pairs.artifact_of(place.file)
    assert data is not None
    return (
        f"{error}: gristmill sequence {data.stage}/{data.fingerprint[:12]} {place.file} "
        f"{place.start} --count {place.count}"
    )


def _train(job: TrainingJob, directory: Directory) -> None:
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    threads = job.run.threads or max((os.cpu_count() or 1) // context.get_local_world_size(), 1)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    store = Store.open(Settings.load())
    tokenizer = load_tokenizer(store, job.tokenizer)
    torch.manual_seed(job.seed)
    shape, values = _beginning(job, store, tokenizer)
    model = without_values(shape)
    device = ray.train.torch.get_device() if job.run.gpu else torch.device("cpu")
    loader, tokens, counts = training_data(job, store, tokenizer, model.config)
    heldout = heldout_data(job, store, tokenizer, model.config)
    if job.loop.get("keep_best") and not heldout:
        raise ConfigError(
            "weights 'best' are found by held-out documents, and the corpus has none of a "
            "sequence's length; take the last, or hold out more"
        )
    # Parts are written by all ranks into one directory; a store elsewhere gets whole ones.
    config = replace(_config(job, tokens), divided_checkpoints=directory.is_local)
    sizes = torch.zeros(model.config.vocab_size, dtype=torch.int64)
    sizes[: len(tokenizer)] = torch.tensor([len(piece) for piece in tokenizer.token_bytes])
    losses: list[dict[str, float]] = []
    prompts: list[list[int]] = []
    if job.pairs is not None:
        longest = model.config.context * 2 // 3  # room for an answer
        prompts = questions(store, job.pairs.pairs, tokenizer, longest)
    elif heldout and model.config.causal:
        prompts = openings(heldout)
    with checkpoint_folder(directory, rank) as folder, _reporter(job, rank) as report:
        checkpoints, push, refresh = folder
        if world > 1:
            dist.barrier()  # rank 0 may have just removed a damaged checkpoint
        begun = time.monotonic()
        newest = latest_checkpoint(checkpoints)
        resumed = step_of(newest) if newest else 0
        earlier = read_manifest(newest)["state"].get("seconds", 0.0) if newest else 0.0
        progress = _Progress(directory, resumed)

        def on_step(record: training.StepRecord) -> None:
            report.curve(record)
            if record.step % TRIM_EVERY == 0:
                return_free_memory()
            if rank == 0:
                progress.write(record)

        def on_heldout(step: int, found: dict[str, float]) -> None:
            losses.append({"step": step, **found})
            report.heldout(step, found)
            # Ranks that divide weights write together.
            writes = rank == 0 or job.run.sharded or job.run.tensor > 1
            if writes and step > resumed and prompts:
                said = samples(model, tokenizer, prompts, compiled=job.run.compiled)
                report.samples(step, said)

        curve = training.train(
            model,
            loader,
            config,
            checkpoints=checkpoints,
            weights=InitialWeights(device, values),
            token_bytes=sizes,
            heldout=heldout,
            on_step=on_step,
            on_heldout=on_heldout,
            on_checkpoint=push,
            refresh=refresh,
        )
        seconds = earlier + time.monotonic() - begun
        model = whole_model(model, kept=rank == 0)
        if rank == 0 and config.keep_best:
            best = best_checkpoint(checkpoints)
            model.load_state_dict(load_whole_model(best))
            counts |= {"best_step": step_of(best)}
    if rank == 0:
        learned_calls = counts.get("conversations_with_calls", 0) > 0
        counts |= save_model(model, tokenizer, directory, tools=learned_calls)
        result = {
            "curve": [asdict(record) for record in curve],
            "heldout": losses,
            "counts": counts,
            "seconds": seconds,
            "world": {
                "workers": world,
                "threads": threads,
                "device": "gpu" if job.run.gpu else "cpu",
                "micro_batch": config.micro_batch,
                "instructions": " ".join(sorted(cpu_flags() & {"avx2", "avx512f", "amx_bf16"})),
            },
        }
        directory.write_json(RESULT, result)


def _config(job: TrainingJob, tokens: int) -> TrainConfig:
    parts = {
        "optim": OptimConfig(**job.loop["optim"]),
        "schedule": Schedule(**job.loop["schedule"]),
    }
    return TrainConfig(**(job.loop | parts | {"total_tokens": tokens}))


def _beginning(
    job: TrainingJob, store: Store, tokenizer: Tokenizer
) -> tuple[ModelConfig, Callable[[], Values]]:
    """The model's shape, and what it begins with: values of a checkpoint of others, of our base
    model, or new ones."""
    if job.start_from is not None:
        shape, values = parameters_for(Path(job.start_from), tokenizer)
        return shape, lambda: values
    if job.base is not None:
        files = [store.local(job.base, name) for name in ("config.json", "model.safetensors")]
        return load_config(files[0].parent), partial(read_parameters, files[0].parent)
    shape = ModelConfig.from_dict(job.shape)
    base_width = int(job.loop["optim"].get("base_width", 0))
    return shape, partial(fresh, shape, base_width, job.seed)


class _Reporter:
    """Sends to MLflow what rank 0 sees; that of other ranks has no logger and sends nothing."""

    def __init__(self, metrics: MetricLogger | None) -> None:
        self.metrics = metrics

    def curve(self, record: training.StepRecord) -> None:
        values = asdict(record)
        left_out = "step", "steps", "refused"  # MLflow keeps plain numbers
        values = {k: v for k, v in values.items() if k not in left_out and v is not None}
        self.heldout(record.step, values)

    def heldout(self, step: int, values: Mapping[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.log(step, values)

    def samples(self, step: int, text: str) -> None:
        if self.metrics is not None:
            self.metrics.text(f"samples/step-{step:08d}.txt", text)


@contextmanager
def _reporter(job: TrainingJob, rank: int) -> Iterator[_Reporter]:
    if rank != 0:
        yield _Reporter(None)
        return
    metrics = MetricLogger(job.tracking_uri, job.run_id)
    try:
        yield _Reporter(metrics)
    finally:
        metrics.close()


class _Progress:
    """How far the run is, for the stage that waits; at most once a second.

    Records of steps before `resumed`, the step of the checkpoint it goes on from, are no news.
    """

    def __init__(self, directory: Directory, resumed: int) -> None:
        self.directory, self.resumed = directory, resumed
        self._next = 0.0

    def write(self, record: training.StepRecord) -> None:
        now = time.monotonic()
        if record.step > self.resumed and (now >= self._next or record.step == record.steps):
            self._next = now + SECONDS_BETWEEN_REPORTS
            self.directory.write_json(PROGRESS, asdict(record) | {"resumed": self.resumed})
