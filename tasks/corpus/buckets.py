"""Files cut into parts that are read one at a time: what a shuffle between two rounds writes.

A task of one round writes one file, with a part for each task of the next; that one reads its part
of every file and nothing else, so it needs memory for its part of the whole and no more. Two forms:
 - numbered parts (`write_parts`), where the receivers are known: one for each shard;
 - sorted rows (`write_sorted`) with an index of `SLOTS` ranges of their 64-bit keys, where the
   number of receivers is chosen by the reader (`read_range`): an artifact keeps such files.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.runtime.store import Directory

SLOTS = 4096
_SHIFT = np.uint64(64 - SLOTS.bit_length() + 1)
_OFFSET = np.dtype("<u8")


def write_parts(directory: Directory, name: str, parts: Sequence[bytes]) -> None:
    """One file with these parts, in order; any of them may be empty."""
    offsets = np.cumsum([0, *(len(part) for part in parts)]).astype(_OFFSET)
    directory.write_bytes(name, b"".join([offsets.tobytes(), *parts]))


def read_part(directory: Directory, name: str, number: int, count: int) -> bytes:
    """Part `number` of a file of `count` parts."""
    return _read(directory, name, number, number + 1, count)


def write_sorted(directory: Directory, name: str, rows: NDArray[Any]) -> None:
    """Structured rows, sorted by their field `key` (uint64, spread evenly)."""
    rows = rows[np.argsort(rows["key"], kind="stable")]
    edges = np.searchsorted(rows["key"] >> _SHIFT, np.arange(SLOTS + 1, dtype=np.uint64))
    offsets = (edges * rows.dtype.itemsize).astype(_OFFSET)
    directory.write_bytes(name, offsets.tobytes() + rows.tobytes())


def read_range(
    directory: Directory, name: str, number: int, count: int, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Range `number` of `count` equal ranges of the keys of a sorted file."""
    first, last = (SLOTS * edge // count for edge in (number, number + 1))
    return np.frombuffer(_read(directory, name, first, last, SLOTS), dtype)


def ranges(wanted: int) -> int:
    """As many ranges as wanted, as far as the index can tell them apart."""
    return max(1, min(wanted, SLOTS))


def cut_by(rows: NDArray[Any], part: NDArray[Any], count: int) -> list[bytes]:
    """The bytes of the rows of each part; `part` (N,) says for each row which it belongs to."""
    by = np.argsort(part, kind="stable")
    edges = np.searchsorted(part[by], np.arange(count + 1))
    ordered = rows[by]
    return [ordered[a:b].tobytes() for a, b in itertools.pairwise(edges)]


def _read(directory: Directory, name: str, first: int, last: int, count: int) -> bytes:
    """The bytes of slots [first, last) of a file whose index has `count` of them."""
    size = _OFFSET.itemsize
    with directory.filesystem.open_input_file(directory.location(name)) as file:
        index = np.frombuffer(file.read_at((last - first + 1) * size, first * size), _OFFSET)
        begin, end = int(index[0]), int(index[-1])
        return bytes(file.read_at(end - begin, (count + 1) * size + begin)) if end > begin else b""
