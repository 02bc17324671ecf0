"""Files whose parts are read one at a time: what a shuffle between two rounds writes.

A task of one round writes one file, with a part for each task of the next; that one reads its part
of every file and nothing else, so it needs memory for its part of the whole and no more. Two forms:
 - numbered parts (`write_parts`), where the receivers are known: one for each shard, or for each
   document of a shard;
 - sorted rows (`write_sorted`) with an index of `SLOTS` slots of their 64-bit keys, where the
   number of receivers is chosen by the reader (`read_range`): an artifact keeps such files. There
   may be more ranges than slots: a reader leaves out what is not its own of the slots at its ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tasks.runtime.store import Directory

SLOTS = 4096
_SLOT = 2**64 // SLOTS  # keys in one
_OFFSET = np.dtype("<u8")
_WHOLE = 8  # a file is read whole where more than an eighth of it is wanted


def write_parts(directory: Directory, name: str, parts: Sequence[bytes | memoryview]) -> None:
    """One file with these parts, in order; any of them may be empty.

    It begins with an index: how many parts there are, and where each begins.
    """
    offsets = np.cumsum([0, *(len(part) for part in parts)])
    index = np.array([len(parts), *offsets], _OFFSET)
    directory.write_bytes(name, b"".join([index.tobytes(), *parts]))


class Parts:
    """A reader of some parts of a file, open until `close` or the end of a `with`."""

    def __init__(self, directory: Directory, name: str) -> None:
        self._file = directory.filesystem.open_input_file(directory.location(name))
        count = int(np.frombuffer(self._file.read_at(_OFFSET.itemsize, 0), _OFFSET)[0])
        index = self._file.read_at((count + 1) * _OFFSET.itemsize, _OFFSET.itemsize)
        self._offsets = np.frombuffer(index, _OFFSET).astype(np.int64)
        self._start = (count + 2) * _OFFSET.itemsize

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, numbers: NDArray[np.int64]) -> Iterator[bytes]:
        """The parts of these numbers, in their order."""
        edges = np.column_stack([self._offsets[numbers], self._offsets[numbers + 1]])
        if int((edges[:, 1] - edges[:, 0]).sum()) * _WHOLE > int(self._offsets[-1]):
            data = self._file.read_at(int(self._offsets[-1]), self._start)
            yield from (data[a:b] for a, b in edges.tolist())
        else:
            yield from (self._file.read_at(b - a, self._start + a) for a, b in edges.tolist())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_part(directory: Directory, name: str, number: int) -> bytes:
    """One part of a file of parts."""
    size = _OFFSET.itemsize
    with directory.filesystem.open_input_file(directory.location(name)) as file:
        count = int(np.frombuffer(file.read_at(size, 0), _OFFSET)[0])
        begin, end = np.frombuffer(file.read_at(2 * size, (number + 1) * size), _OFFSET).tolist()
        return bytes(file.read_at(end - begin, (count + 2) * size + begin))


def read_all(directory: Directory, name: str) -> bytes:
    """All parts of a file of parts, one after another."""
    data = directory.read_bytes(name)
    count = int(np.frombuffer(data[: _OFFSET.itemsize], _OFFSET)[0])
    return data[(count + 2) * _OFFSET.itemsize :]


def write_sorted(directory: Directory, name: str, rows: NDArray[Any]) -> None:
    """Structured rows, sorted by their field `key` (uint64, spread evenly)."""
    rows = rows[np.argsort(rows["key"], kind="stable")]
    firsts = np.arange(SLOTS, dtype=np.uint64) * np.uint64(_SLOT)
    edges = np.append(np.searchsorted(rows["key"], firsts), len(rows))
    offsets = (edges * rows.dtype.itemsize).astype(_OFFSET)
    directory.write_bytes(name, offsets.tobytes() + rows.tobytes())


def read_range(
    directory: Directory, name: str, number: int, count: int, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Range `number` of `count` equal ranges of the keys of a sorted file."""
    size = _OFFSET.itemsize
    low, high = (edge_of(edge, count) for edge in (number, number + 1))
    first, last = low // _SLOT, -(-high // _SLOT)
    with directory.filesystem.open_input_file(directory.location(name)) as file:
        index = np.frombuffer(file.read_at((last - first + 1) * size, first * size), _OFFSET)
        begin, end = int(index[0]), int(index[-1])
        rows = np.frombuffer(file.read_at(end - begin, (SLOTS + 1) * size + begin), dtype)
    return rows[keys_within(rows["key"], low, high)]


def edge_of(number: int, count: int) -> int:
    """The first key of range `number` of `count`; of the one after the last 2^64."""
    return -(-(number << 64) // count)


def keys_within(keys: NDArray[np.uint64], low: int, high: int) -> slice:
    """Where the sorted keys from `low` on and below `high` stand."""
    first = np.searchsorted(keys, np.uint64(low)) if low < 2**64 else len(keys)
    last = np.searchsorted(keys, np.uint64(high)) if high < 2**64 else len(keys)
    return slice(int(first), int(last))


def ranges(whole: int, each: int) -> int:
    """How many ranges of about `each` there are in `whole`; one at least."""
    return max(1, -(-whole // each))


def cut_by(rows: NDArray[Any], part: NDArray[Any], count: int) -> list[bytes]:
    """The bytes of the rows of each part; `part` (N,) says for each row which it belongs to."""
    by = np.argsort(part, kind="stable")
    edges = np.searchsorted(part[by], np.arange(count + 1))
    ordered = rows[by]
    return [ordered[a:b].tobytes() for a, b in itertools.pairwise(edges)]
