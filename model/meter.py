"""What a run says of itself: the records of its curve, and the sums they are made from."""

import contextlib
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model.config import ModelConfig
from model.flops import forward_flops, mean_keys
from model.loader import Batch
from model.losses import bits_per_byte

# Dense bf16 with float32 sums, by what the device's name holds, from NVIDIA's data sheets. Others
# are stated (`TrainConfig.peak_flops`): of a GPU in a home, and of any CPU, too little is known.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


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
    eta_seconds: float  # of steps, looks at held-out text and checkpoints apart
    mfu: float | None = None  # share of the devices' peak used for the model's own arithmetic
    skipped: int = 0  # steps not taken because of a loss spike, since the beginning
    rollbacks: int = 0  # times older weights were taken, several in a row having been skipped
    back_to: int | None = None  # step of the checkpoint that the last of these went back to
    refused: Sequence[int] = ()  # numbers of the skipped steps since the last record
    imbalance: float | None = None  # load of the busiest expert over the mean, of the last step


def device_peak(stated: float | None, device: torch.device) -> float | None:
    """What the device can do in a second: what is stated, else what is known of it."""
    if stated is not None or device.type != "cuda":
        return stated
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """By the name of a GPU, as the driver tells it."""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def seen_keys(config: ModelConfig, batch: Batch) -> float:
    """Keys that the tokens of a batch see in all layers together.

    Of packed rows those of its own document only: positions say how far a token is into it, and
    n tokens that all see each other see Σ (2·position + 1) = n² keys.
    """
    rows, length = batch.tokens.shape
    if batch.positions is None:
        return rows * length * sum(mean_keys(config, n, length) for n in range(config.layers))
    seen = batch.positions.double() + 1
    if not config.causal:
        return config.layers * float((2 * seen - 1).sum())
    windows = Counter(config.window(layer) or length for layer in range(config.layers))
    return sum(times * float(seen.clamp(max=width).sum()) for width, times in windows.items())


class Meter:
    """Sums between two records, and the time of the steps between them."""

    def __init__(
        self, config: ModelConfig, step_tokens: int, first: int, steps: int, peak: float | None
    ) -> None:
        self.config, self.step_tokens, self.steps = config, step_tokens, steps
        self.peak = peak  # operations a second of all ranks' devices
        self._reset(first)

    def _reset(self, step: int) -> None:
        self._since, self._started = step, time.perf_counter()
        self._nats, self._counted, self._bytes, self._keys = 0.0, 0, 0, 0.0

    @contextlib.contextmanager
    def paused(self, device: torch.device) -> Iterator[None]:
        """What happens meanwhile is no part of a step: its time is left out of the rate."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the step before is still being computed
        begun = time.perf_counter()
        yield
        self._started += time.perf_counter() - begun

    def state(self) -> dict[str, Any]:
        """JSON, for the checkpoint: the next record is of all steps since the last one."""
        sums = {"nats": self._nats, "counted": self._counted, "bytes": self._bytes}
        sums |= {"keys": self._keys}
        return sums | {"since": self._since, "seconds": time.perf_counter() - self._started}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """The inverse of `state`; None: from a checkpoint without it."""
        if state is not None:
            self._nats, self._counted = state["nats"], state["counted"]
            self._bytes, self._keys, self._since = state["bytes"], state["keys"], state["since"]
            self._started = time.perf_counter() - state["seconds"]

    def add(self, nats: float, counted: int, bytes_: int, keys: float) -> None:
        """A step's sums over all ranks."""
        self._nats += nats
        self._counted += counted
        self._bytes += bytes_
        self._keys += keys

    def record(self, step: int, rate: float, grad_norm: float, device: torch.device) -> StepRecord:
        taken = step - self._since
        seconds = (time.perf_counter() - self._started) / taken
        flops = 3 * forward_flops(
            self.config, taken * self.step_tokens, self._counted, self._keys
        )  # with the backward pass
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
            mfu=flops / (seconds * taken) / self.peak if self.peak else None,
        )
        self._reset(step)
        return record
