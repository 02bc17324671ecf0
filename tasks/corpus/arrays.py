"""Numpy arrays as files of a directory of the store, never pickled."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.runtime.store import Directory


def write_array(directory: Directory, name: str, array: NDArray[Any]) -> None:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    directory.write_bytes(name, sink.getvalue())


def read_array(directory: Directory, name: str) -> NDArray[Any]:
    array: NDArray[Any] = np.load(io.BytesIO(directory.read_bytes(name)), allow_pickle=False)
    return array
