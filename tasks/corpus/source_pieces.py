"""Large source files cut into pieces, so that one file is the work of many.

Parquet is cut between row groups, JSON Lines that are not compressed at line ends. A row keeps the
number it has in the whole file. Files elsewhere are downloaded whole and stay so, as do compressed
ones: their middle cannot be read without what stands before.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.corpus.remote_source import SourceFile, is_remote
from tasks.corpus.source_config import SourceConfig

PIECE_BYTES = 256 * 2**20  # a piece has about as many of the file's bytes
PLAIN_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Piece:
    """Row groups [start, stop) of Parquet, or the lines that begin in bytes [start, stop) of JSON
    Lines; `rows` stand before it in the file."""

    start: int
    stop: int
    rows: int = 0


def cut(source: SourceConfig, file: SourceFile) -> list[Piece]:
    """The pieces of a file in order; none where it is read as a whole. Of JSON Lines nobody knows
    yet how many `rows` stand before each."""
    if file.size <= PIECE_BYTES or is_remote(file.location):
        return []
    if source.format == "parquet":
        return _row_groups(file)
    if source.format == "jsonl" and file.location.lower().endswith(PLAIN_LINES):
        starts = [*range(0, file.size, PIECE_BYTES), file.size]
        return [Piece(start, stop) for start, stop in pairwise(starts)]
    return []


def _row_groups(file: SourceFile) -> list[Piece]:
    try:
        metadata = pq.read_metadata(file.location)
    except (OSError, pa.ArrowException):
        return []  # whoever reads it says what is wrong with it
    pieces: list[Piece] = []
    start = size = rows = before = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size += sum(group.column(n).total_compressed_size for n in range(group.num_columns))
        rows += group.num_rows
        if size >= PIECE_BYTES or number == metadata.num_row_groups - 1:
            pieces.append(Piece(start, number + 1, before))
            start, size, before = number + 1, 0, rows
    return pieces


def lines(stream: BinaryIO, largest: int, piece: Piece | None = None) -> Iterator[bytes | None]:
    """The lines that are not blank, None for one of more than `largest` bytes."""
    position = 0
    if piece is not None and piece.start:
        stream.seek(piece.start - 1)
        position = piece.start - 1 + _rest(stream, largest)  # of a line that began before
    while piece is None or position < piece.stop:
        line = stream.readline(largest + 1)
        if not line:
            return
        position += len(line)
        if len(line) > largest:
            if not line.endswith(b"\n"):
                position += _rest(stream, largest)
            yield None
        elif line.strip():
            yield line


def _rest(stream: BinaryIO, largest: int) -> int:
    """Read on to the end of a line, a part at a time; returns how many bytes that was."""
    size = 0
    while part := stream.readline(largest):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def count_rows(path: Path, largest: int, piece: Piece) -> int:
    """How many rows of JSON Lines a piece has."""
    with open(path, "rb", buffering=io.DEFAULT_BUFFER_SIZE * 8) as stream:
        return sum(1 for _ in lines(stream, largest, piece))
