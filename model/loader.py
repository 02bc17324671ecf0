"""Data order: which sequences make up the global batch of each step, and how they are read.

Order is a function of (seed, epoch); state is one number, the sequences consumed; slicing by rank
comes last. So a run resumes exactly, at any world size: the global batch of a step is the same set
of sequences, only dealt to other ranks. (The habit is OLMo-core's `data_loader.py`.)
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


class DataError(ValueError):
    """Token data that cannot be trained on. The message names it and the remedy."""


@dataclass(frozen=True)
class Batch:
    """Sequences (B, T) as the loss wants them.

    targets: the token after each token; mask: which targets count (None: all); positions and
    segments: for packed rows (see `Transformer.forward`).
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None
    segments: Tensor | None = None

    def micro_batches(self, size: int) -> list["Batch"]:
        """The batch cut into pieces of at most `size` rows."""
        rows = range(0, len(self.tokens), size)
        return [self._each(itemgetter(slice(row, row + size))) for row in rows]

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        optional = self.mask, self.positions, self.segments
        changed = (None if tensor is None else change(tensor) for tensor in optional)
        return Batch(change(self.tokens), change(self.targets), *changed)


@dataclass(frozen=True)
class Place:
    """What a sequence is read from. file: a shard of tokens or a table, by its name in the
    artifact; start, count: tokens of a shard, rows of a table.
    """

    file: str
    start: int
    count: int


def told(places: Iterable[Place]) -> str:
    """In words, file by file."""
    starts: dict[str, list[int]] = {}
    for place in places:
        starts.setdefault(place.file, []).append(place.start)
    return "; ".join(f"{file} from {', '.join(map(str, at))}" for file, at in starts.items())


class Loader(Protocol):
    """What the training loop asks of its data."""

    sequence: int  # tokens in a row

    def order(self, first: int, count: int) -> Ints:
        """Ids (count,) of the sequences number first..first+count-1 of the endless run."""
        ...

    def read(self, ids: Ints) -> Batch:
        """The sequences with these ids, in this order."""
        ...

    def targets(self, ids: Ints) -> int:
        """How many targets of these sequences count in the loss."""
        ...

    def places(self, number: int) -> list[Place]:
        """What the sequence with this id is read from."""
        ...


class KnownTokens:
    """The sequences of another loader; a batch with a token beyond the vocabulary is refused."""

    def __init__(self, source: Loader, vocab_size: int) -> None:
        self.source, self.vocab_size, self.sequence = source, vocab_size, source.sequence
        self.order, self.targets, self.places = source.order, source.targets, source.places

    def read(self, ids: Ints) -> Batch:
        batch = self.source.read(ids)
        for tokens in (batch.tokens, batch.targets):
            _require_known(tokens, ids, self, self.vocab_size)
        return batch


def _require_known(tokens: Tensor, ids: Ints, loader: "Loader", vocab_size: int) -> None:
    """tokens: a row for each of `ids`."""
    if tokens.numel() and tokens.max() >= vocab_size:
        sequence = int(ids[int((tokens >= vocab_size).any(1).int().argmax())])
        raise DataError(
            f"{told(loader.places(sequence))}: token {int(tokens.max())} is outside the model's "
            f"vocabulary of {vocab_size}; use the tokenizer the shards were written with"
        )


def rank_slice(ids: Ints, rank: int, world: int) -> Ints:
    """The part of a global batch that `rank` of `world` reads: contiguous, sizes differing by at
    most 1.
    """
    return ids[len(ids) * rank // world : len(ids) * (rank + 1) // world]


def shuffled(indices: Ints, size: int, seed: int, epoch: int) -> Ints:
    """Where a pseudo-random permutation of 0..size-1, chosen by (seed, epoch), sends `indices`.

    A six-round Feistel network with cycle walking: the order of a trillion windows costs no memory,
    and does not change with numpy's version as `Generator.permutation` may.
    """
    bits = max(2, (size - 1).bit_length())
    bits += bits % 2
    half, low = np.uint64(bits // 2), np.uint64((1 << (bits // 2)) - 1)
    base = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    values = indices.astype(np.uint64)
    pending = np.ones(len(values), dtype=bool)
    while pending.any():
        left, right = values[pending] >> half, values[pending] & low
        for key in base:
            left, right = right, left ^ (_mix(right ^ key) & low)
        values[pending] = left << half | right
        pending = values >= size  # the domain is a power of four: walk on until back inside
    return values.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class WindowLoader:
    """Fixed-length windows over the concatenated token stream, for pretraining.

    shards: paths of flat token arrays (`tokens-00000.npy`, uint16 or uint32), in order, each
        document ending in its end-of-document token; they are memory mapped.
    sequence: T; window i reads tokens i·T .. i·T + T, the last one only as a target.
    vocab_size: when given, a larger token is refused when read.
    document_masking: a token sees only its own document, and positions restart with it; needs the
        `.documents.npy` file of int64 document starts beside each shard.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        sequence: int,
        seed: int,
        *,
        document_masking: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        self.sequence = sequence
        self.seed = seed
        self.document_masking = document_masking
        self.vocab_size = vocab_size
        # Plain views of the mapped memory: cutting a `memmap` costs ten times as much.
        self._shards = [np.load(path, mmap_mode="r").view(np.ndarray) for path in shards]
        for path, shard in zip(shards, self._shards, strict=True):
            if shard.ndim != 1 or shard.dtype not in (np.uint16, np.uint32):
                raise DataError(
                    f"{path.name} is {shard.dtype} {shard.shape}, not flat uint16/uint32"
                )
        self._names = [path.name for path in shards]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        if document_masking:
            self._documents = np.concatenate(
                [
                    np.load(path.with_suffix(".documents.npy")) + start
                    for path, start in zip(shards, self._starts, strict=False)
                ]
            )
        self.tokens = int(self._starts[-1])
        self.windows = (self.tokens - 1) // sequence
        if self.windows < 1:
            raise DataError(
                f"the corpus has {self.tokens} tokens, fewer than one sequence of {sequence} + 1; "
                "lower the sequence length or add documents"
            )

    def order(self, first: int, count: int) -> Ints:
        numbers = np.arange(first, first + count, dtype=np.int64)
        epochs = numbers // self.windows
        ids = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            within = numbers[here] % self.windows
            ids[here] = shuffled(within, self.windows, self.seed, int(epoch))
        return ids

    def read(self, ids: Ints) -> Batch:
        length = self.sequence
        rows = np.empty((len(ids), length + 1), dtype=np.int64)
        starts = ids * length
        owners = np.searchsorted(self._starts, starts, side="right") - 1
        offsets = starts - self._starts[owners]
        for row, owner, offset in zip(rows, owners.tolist(), offsets.tolist(), strict=True):
            piece = self._shards[owner][offset : offset + length + 1]
            row[: len(piece)] = piece
            while len(piece) < len(row):  # the window goes on in the next shard
                owner, row = owner + 1, row[len(piece) :]
                piece = self._shards[owner][: len(row)]
                row[: len(piece)] = piece
        stream = torch.from_numpy(rows)
        if self.vocab_size is not None:
            _require_known(stream, ids, self, self.vocab_size)
        tokens, targets = stream[:, :-1], stream[:, 1:]
        if not self.document_masking:
            return Batch(tokens, targets)
        places = ids[:, None] * length + np.arange(length)
        segments = np.searchsorted(self._documents, places, side="right") - 1
        positions = places - np.maximum(self._documents[segments], places[:, :1])
        return Batch(
            tokens,
            targets,
            positions=torch.from_numpy(positions),
            segments=torch.from_numpy(segments),
        )

    def targets(self, ids: Ints) -> int:
        return len(ids) * self.sequence

    def places(self, number: int) -> list[Place]:
        start, left, found = number * self.sequence, self.sequence, []
        owner = int(np.searchsorted(self._starts, start, side="right")) - 1
        while left:
            count = min(left, int(self._starts[owner + 1]) - start)
            if count:
                found.append(Place(self._names[owner], start - int(self._starts[owner]), count))
            start, left, owner = start + count, left - count, owner + 1
        return found
