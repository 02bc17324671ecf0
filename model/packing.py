"""Fine-tuning data: short examples packed into rows, each seeing only itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.loader import Batch, DataError, Ints, Place, shuffled

OPEN_ROWS = 32  # rows kept open while packing: with 32, rows of short examples are over 99% full


@dataclass(frozen=True)
class Example:
    """One conversation. ids: its tokens; learned: which of them the model is trained to say;
    place: what it is made of."""

    ids: Sequence[int]
    learned: Sequence[bool]
    place: Place | None = None


class PackedLoader:
    """Examples in an order that is a function of (seed, epoch), packed greedily into rows of
    `sequence`.

    Every example occurs once an epoch, whole. A row's examples are told apart by `segments` and
    positions that restart; the left-over is padding in a segment of its own that counts in no loss.
    An id is epoch * 2^32 + row.
    """

    def __init__(self, examples: Sequence[Example], sequence: int, seed: int, *, pad: int) -> None:
        if not examples:
            raise DataError("there are no examples to fine-tune on; check the pairs artifact")
        self.sequence = sequence
        self.seed = seed
        self.pad = pad
        self._ids = [np.asarray(example.ids, dtype=np.int64) for example in examples]
        self._places = [example.place for example in examples]
        self._learned = [np.asarray(example.learned, dtype=bool) for example in examples]
        for number, (ids, learned) in enumerate(zip(self._ids, self._learned, strict=True)):
            if len(ids) != len(learned):
                raise DataError(f"example {number} has {len(ids)} ids but {len(learned)} marks")
            if not 2 <= len(ids) <= sequence + 1:
                raise DataError(
                    f"example {number} has {len(ids)} tokens; between 2 and sequence + 1 = "
                    f"{sequence + 1} fit: leave it out or raise the sequence length"
                )
        # The first token of an example is never a target.
        self._slots = np.array([len(ids) - 1 for ids in self._ids])
        self._targets = np.array([int(learned[1:].sum()) for learned in self._learned])
        self._packed: dict[int, list[list[int]]] = {}

    def rows(self, epochs: int) -> int:
        """How many rows the first `epochs` passes over the examples fill."""
        return sum(len(self._pack(epoch)) for epoch in range(epochs))

    def order(self, first: int, count: int) -> Ints:
        ids: list[int] = []
        epoch, before = 0, 0
        while len(ids) < count:
            rows = len(self._pack(epoch))
            start = max(first - before, 0)
            stop = min(first + count - before, rows)
            ids.extend((epoch << 32) + row for row in range(start, stop))
            epoch, before = epoch + 1, before + rows
        return np.array(ids, dtype=np.int64)

    def read(self, ids: Ints) -> Batch:
        shape = (len(ids), self.sequence)
        tokens = np.full(shape, self.pad, dtype=np.int64)
        targets = np.full(shape, self.pad, dtype=np.int64)
        mask = np.zeros(shape, dtype=bool)
        positions = np.zeros(shape, dtype=np.int64)
        segments = np.full(shape, -1, dtype=np.int64)
        for row, number in enumerate(ids):
            column = 0
            for segment, example in enumerate(self._examples(int(number))):
                place = slice(column, column + int(self._slots[example]))
                tokens[row, place] = self._ids[example][:-1]
                targets[row, place] = self._ids[example][1:]
                mask[row, place] = self._learned[example][1:]
                positions[row, place] = np.arange(self._slots[example])
                segments[row, place] = segment
                column = place.stop
        arrays = (tokens, targets, mask, positions, segments)
        return Batch(*(torch.from_numpy(array) for array in arrays))

    def targets(self, ids: Ints) -> int:
        return sum(int(self._targets[self._examples(int(number))].sum()) for number in ids)

    def places(self, number: int) -> list[Place]:
        found = (self._places[example] for example in self._examples(number))
        return [place for place in found if place is not None]

    def _examples(self, number: int) -> list[int]:
        return self._pack(number >> 32)[number & 0xFFFFFFFF]

    def _pack(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, each a list of example numbers; made when first asked for."""
        if epoch not in self._packed:
            count = len(self._ids)
            order = shuffled(np.arange(count, dtype=np.int64), count, self.seed, epoch)
            self._packed[epoch] = pack(self._slots[order], order, self.sequence)
        return self._packed[epoch]


def pack(sizes: Ints, names: Ints, capacity: int) -> list[list[int]]:
    """First fit over the last `OPEN_ROWS` rows: every name once, no row above `capacity`.

    Rows come in the order in which they were opened, so that an epoch's rows keep its random order.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for size, name in zip(sizes.tolist(), names.tolist(), strict=True):
        for row in range(max(0, len(rows) - OPEN_ROWS), len(rows)):
            if free[row] >= size:
                break
        else:
            row = len(rows)
            rows.append([])
            free.append(capacity)
        rows[row].append(name)
        free[row] -= size
    return rows
