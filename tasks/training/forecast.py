"""What a pretraining will cost and reach, before anything is spent.

Parameters, operations and memory follow from formulae. The time follows from operations and a rate:
measured here in a few steps when the run is for CPUs, assumed of a GPU. The loss comes from a
scaling law (Hoffmann et al., arXiv:2203.15556)

    loss = E + A / parameters^0.34 + B / tokens^0.28

whose three amounts are fitted to quick runs of small models on the corpus's own tokens; exponents
are the paper's, since a few minutes of small runs cannot tell them. Tokens of a repeated pass count
as less than new ones (`effective_tokens`). What was foreseen is kept in
the home (`tasks.training.foreseen`), and the run it was made for says how wrong it was.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from model.config import ModelConfig
from model.flops import count_parameters, training_flops_per_token
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import Store
from tasks.training.memory import memory_bytes
from tasks.training.pretrain import PretrainConfig
from tasks.training.shapes import LatentOptions

PARAMETER_EXPONENT, TOKEN_EXPONENT = 0.34, 0.28
# Width, layers and tokens of the quick runs: sizes and lengths vary apart, so that both amounts of
# the law can be told.
REPEATS = 15.39  # R*_D of Muennighoff et al.: after so many repeats they teach but 1/e of the first
QUICK_RUNS = ((64, 2, 60_000), (64, 2, 240_000), (128, 2, 60_000), (128, 4, 240_000))
TIMED_STEPS = 3
KEPT_TOGETHER = 0.85  # of each worker's speed, when it shares its gradients with others (measured)


@dataclass(frozen=True)
class Forecast:
    """memory_gb: of one worker; loss: nats per token of held-out text, None without a corpus and
    for a run that goes on from a checkpoint, of whose past no law is known.
    """

    parameters: int
    tokens: int
    flops: float
    memory_gb: float
    seconds: float
    device_hours: float
    rate: str  # where the time comes from, in words
    workers: int
    effective_tokens: float | None = None  # what they count for, as the corpus is met again
    loss: float | None = None
    bits_per_byte: float | None = None

    def rows(self) -> list[tuple[str, str]]:
        """For people."""
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("operations", f"{self.flops:.3g}"),
            ("memory of a worker", f"{self.memory_gb:.1f} GB"),
            ("time", f"{_span(self.seconds)}, {self.rate}"),
            ("device hours", f"{self.device_hours:,.2f}"),
        ]
        if self.effective_tokens is not None and self.effective_tokens < 0.995 * self.tokens:
            rows.append(("as if of new text", f"{self.effective_tokens:,.0f} tokens"))
        if self.loss is not None:
            rows.append(("loss on held-out text", f"{self.loss:.3f} nats per token"))
        if self.bits_per_byte is not None:
            rows.append(("bits per byte of it", f"{self.bits_per_byte:.3f}"))
        return rows


def _span(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


@dataclass(frozen=True)
class Law:
    """The three amounts of the scaling law."""

    floor: float
    per_parameters: float
    per_tokens: float

    def loss(self, parameters: float, tokens: float) -> float:
        return (
            self.floor
            + self.per_parameters / parameters**PARAMETER_EXPONENT
            + self.per_tokens / tokens**TOKEN_EXPONENT
        )

    @classmethod
    def fitted(cls, runs: Sequence[tuple[float, float, float]]) -> Law:
        """To (parameters, tokens, loss) of three runs or more: least squares, no amount below 0."""
        rows = [[1.0, n**-PARAMETER_EXPONENT, d**-TOKEN_EXPONENT] for n, d, _ in runs]
        terms, losses = np.array(rows), np.array([loss for _, _, loss in runs])
        used = [0, 1, 2]
        while True:
            found, *_ = np.linalg.lstsq(terms[:, used], losses, rcond=None)
            if (found >= 0).all():
                break
            used.pop(int(found.argmin()))
        amounts = np.zeros(3)
        amounts[used] = found
        return cls(*amounts.tolist())


def effective_tokens(tokens: float, unique: float) -> float:
    """What tokens count for that are drawn from `unique` ones in passes: U + U R* (1 - e^(-R / R*))
    with R = tokens / U - 1 repeats (D' of Muennighoff et al., arXiv:2305.16264). Up to four
    passes are nearly as good as new text; beyond some forty nothing is gained.
    """
    used = min(tokens, unique)
    if not used:
        return 0.0
    repeats = tokens / used - 1
    return used + used * REPEATS * (1 - math.exp(-repeats / REPEATS))


def effective_tokens_of(
    config: PretrainConfig, sizes: Mapping[str, int], new: Mapping[str, int]
) -> float:
    """Of a whole run, whose sources repeat each by itself. sizes: tokens by name; new: those of
    them that are not of copies, where there are any. Raises UserError for weights that a training
    would refuse."""
    weights: Mapping[str, float] = config.source_weights or sizes
    if weights.keys() != sizes.keys():
        raise UserError(
            f"source_weights are for {', '.join(sorted(weights))}, sources are "
            f"{', '.join(sorted(sizes))}; give every source one weight, 0 to leave it out"
        )
    total = sum(weights.values())
    return sum(
        effective_tokens(weight / total * config.tokens, new.get(name, sizes[name]))
        for name, weight in weights.items()
        if weight
    )


def forecast(
    config: PretrainConfig,
    vocabulary: int,
    shards: Manifest | None,
    *,
    device_flops: float,
    mfu: float,
    say: Callable[[str], None] = lambda line: None,
) -> Forecast:
    """`shards`: tokens of the corpus, for the quick runs; None: no loss is foreseen."""
    config = config.resolve()
    shape = config.shape(vocabulary)
    counted = 1.0 if shape.causal else config.mask_share
    operations = training_flops_per_token(shape, config.sequence, counted) * config.tokens
    gpu = config.run.gpu
    workers = config.run.workers or (1 if gpu else min(2, os.cpu_count() or 1, config.batch))
    if gpu:
        seconds = operations / (workers * device_flops * mfu)
        rate = f"at {mfu:.0%} of {device_flops / 1e12:.0f} TFLOP/s on {workers} GPU"
    else:
        needed = memory_bytes(shape, config.model_copy(update={"batch": 1}), 1)
        if needed > (machine := machine_memory()):
            raise UserError(
                f"a step of this model takes {needed / 1e9:.1f} GB and cannot be timed here, with "
                f"{machine / 1e9:.1f} GB; set pretrain.run.gpu=true to reckon with GPUs"
            )
        say("timing a few steps of the model")
        per_second = measured_rate(config, shape, workers)
        seconds = config.tokens / per_second
        rate = f"at {per_second:,.0f} tokens/s, measured here"
    found = Forecast(
        parameters=count_parameters(shape).total,
        tokens=config.tokens,
        flops=operations,
        memory_gb=memory_bytes(shape, config, workers) / 1e9,
        seconds=seconds,
        device_hours=seconds * workers / 3600,
        rate=rate,
        workers=workers,
    )
    if shards is None:
        return found
    if config.start_from:
        say("no loss is foreseen of a run that goes on from a checkpoint")
        return found
    sizes = _source_sizes(Store.open(), shards)
    effective = effective_tokens_of(config, sizes, _new_tokens(shards))
    runs = []
    for width, layers, tokens in QUICK_RUNS:
        say(f"a quick run: width {width}, {layers} layers, {tokens:,} tokens")
        runs.append(quick_run(config, width, layers, tokens, shards))
    loss = Law.fitted(runs).loss(_without_tables(shape), effective)
    per_token = shards.metrics.get("bytes_per_token")
    bits = loss / math.log(2) / float(per_token) if per_token else None
    return replace(found, effective_tokens=effective, loss=loss, bits_per_byte=bits)


def _source_sizes(store: Store, shards: Manifest) -> dict[str, int]:
    """Tokens of each source of the training split."""
    from tasks.tokenizer.shards import shard_sources

    return {
        source: sum(len(np.load(store.local(shards, name), mmap_mode="r")) for name in names)
        for source, names in shard_sources(shards.names(), "tokens").items()
    }


def _new_tokens(shards: Manifest) -> dict[str, int]:
    """Of the sources that a weight has copied, tokens that are not of copies."""
    mark = "new_tokens_"
    counts = shards.counts.items()
    return {name.removeprefix(mark): count for name, count in counts if name.startswith(mark)}


def machine_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _without_tables(shape: ModelConfig) -> float:
    """The law's parameters: without the embedding, as its authors and Kaplan's count them."""
    count = count_parameters(shape)
    return count.total - count.embedding - count.idle


def measured_rate(config: PretrainConfig, shape: ModelConfig, workers: int) -> float:
    """Tokens a second of so many workers on this machine: one worker's share of a few steps is
    timed here, with the threads it will have, on random tokens."""
    import torch

    from model.loader import WindowLoader
    from model.transformer import Transformer

    share = config.model_copy(update={"batch": -(-config.batch // workers)})
    before = torch.get_num_threads()
    torch.set_num_threads(config.run.threads or max((os.cpu_count() or 1) // workers, 1))
    try:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "tokens-00000.npy"
            count = max(400_000, 2 * config.sequence)
            ids = np.random.default_rng(0).integers(0, shape.vocab_size, count)
            np.save(path, ids.astype(np.uint32))
            torch.manual_seed(0)
            loader = _for_objective(WindowLoader([path], config.sequence, 0), shape)
            alone = _timed(share, Transformer(shape), loader)
    finally:
        torch.set_num_threads(before)
    return alone * workers * (KEPT_TOGETHER if workers > 1 else 1)


def _for_objective(loader: Any, shape: ModelConfig) -> Any:
    """With tokens hidden, for a model that looks both ways."""
    from model.masking import MaskedLoader

    if shape.causal:
        return loader
    return MaskedLoader(loader, mask=0, vocab_size=shape.vocab_size, seed=0)


def _timed(config: PretrainConfig, model: Any, loader: Any) -> float:
    from model.train import train

    ticks: list[float] = []
    settings = _train_config(config, (TIMED_STEPS + 2) * config.batch * config.sequence)
    train(
        model,
        loader,
        replace(settings, log_every=1),
        on_step=lambda record: ticks.append(time.perf_counter()),
    )
    # The quickest: what other work on the machine takes away now, it may not take later.
    return config.batch * config.sequence / float(np.diff(ticks)[1:].min())


def quick_run(
    config: PretrainConfig, width: int, layers: int, tokens: int, shards: Manifest
) -> tuple[float, float, float]:
    """(parameters, effective tokens, loss on held-out text) of a small model on the corpus.

    Raises UserError when the corpus or its held-out part has no sequence for it.
    """
    import torch

    from model.loader import DataError, WindowLoader
    from model.train import train
    from model.transformer import Transformer
    from tasks.tokenizer.shards import shard_sources

    store = Store.open()
    config = scaled_down(config, width, layers)
    shape = config.model.config(_vocabulary(store, shards))
    files = {
        split: [
            store.local(shards, name)
            for names in shard_sources(shards.names(), split).values()
            for name in names
        ]
        for split in ("tokens", "heldout-tokens")
    }
    try:
        windows = {split: WindowLoader(paths, 128, seed=0) for split, paths in files.items()}
    except DataError as error:
        raise UserError(f"no quick runs on this corpus: {error}; or pass --no-runs") from error
    loaders = {split: _for_objective(loader, shape) for split, loader in windows.items()}
    losses: list[float] = []
    settings = _train_config(config.model_copy(update={"batch": 16}), tokens)
    torch.manual_seed(0)
    train(
        Transformer(shape, config.optimizer.base_width),
        loaders["tokens"],
        replace(settings, micro_batch=16, heldout_every=10**9, heldout_sequences=64),
        heldout={"all": loaders["heldout-tokens"]},
        on_heldout=lambda step, found: losses.append(found["heldout_loss"]),
    )
    unique = windows["tokens"].tokens
    return _without_tables(shape), effective_tokens(tokens, unique), losses[-1]


def scaled_down(config: PretrainConfig, width: int, layers: int) -> PretrainConfig:
    """The same training of a narrower and shallower model: experts narrow with the width, one layer
    at least has them, and rates and initialisation differ from their base as the large model's do.
    """
    model, optimizer = config.model, config.optimizer
    share, full = width / model.width, model.config(vocab_size=1)
    experts = model.experts
    if full.experts:
        update = {
            "width": max(round(full.expert_width * share), 1),
            "dense_layers": min(experts.dense_layers, layers - 1),
        }
        experts = experts.model_copy(update=update)
    base = max(round(optimizer.base_width * share), 1) if optimizer.base_width else 0
    sizes: dict[str, Any] = {"width": width, "layers": layers, "heads": 2}
    sizes |= {"kv_heads": 0, "head_width": 0, "mlp_width": 0, "context": 128}
    sizes |= {"latent": LatentOptions(), "experts": experts}
    return config.model_copy(
        update={
            "model": model.model_copy(update=sizes),
            "optimizer": optimizer.model_copy(update={"base_width": base}),
        }
    )


def _vocabulary(store: Store, shards: Manifest) -> int:
    return store.get("tokenizer", shards.inputs["tokenizer"]).counts["vocabulary"]


def _train_config(config: PretrainConfig, tokens: int) -> Any:
    from model.optim import OptimConfig
    from model.schedule import Schedule
    from model.train_config import TrainConfig

    loop = config.loop()
    parts = {"optim": OptimConfig(**loop["optim"]), "schedule": Schedule(**loop["schedule"])}
    # One process on this machine, however many the run has.
    alone = {"sharded": False, "tensor": 1}
    return TrainConfig(**(loop | parts | alone | {"total_tokens": tokens}))
