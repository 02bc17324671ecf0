"""Numpy arrays as sorted sets, and as files of a directory of the store, never pickled."""

from __future__ import annotations

import io
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tasks.runtime.store import Directory

T = TypeVar("T", np.uint32, np.uint64, np.int64)


def write_array(directory: Directory, name: str, array: NDArray[Any]) -> None:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    directory.write_bytes(name, sink.getvalue())


def read_array(directory: Directory, name: str) -> NDArray[Any]:
    array: NDArray[Any] = np.load(io.BytesIO(directory.read_bytes(name)), allow_pickle=False)
    return array


def distinct(values: NDArray[T]) -> NDArray[T]:
    """The set of `values`, sorted. `np.unique` hashes them since numpy 2.3: nine times the time."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]]


def is_among(values: NDArray[T], ordered: NDArray[T]) -> NDArray[np.bool_]:
    """Which of `values` are in the sorted set: (len(values),). Its size hardly matters."""
    if len(ordered) == 0:
        return np.zeros(len(values), np.bool_)
    places = np.searchsorted(ordered, values)
    found: NDArray[np.bool_] = ordered[np.minimum(places, len(ordered) - 1)] == values
    return found
