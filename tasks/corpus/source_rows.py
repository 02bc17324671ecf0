"""Rows of a source file, whatever its format: each a document, or the reason why it is none."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.corpus.documents import Removal
from tasks.corpus.frames import read_dictionary
from tasks.corpus.records import DamagedRecord, Fetched, needed, read_record, scan
from tasks.corpus.source_config import SourceConfig
from tasks.corpus.source_pieces import Piece, lines
from tasks.runtime.errors import UserError

# What stands in a documents artifact of a row, and the row's text or page.
Row = tuple[dict[str, Any], str | Fetched | Removal]

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
BATCH = 256  # rows of Parquet at a time, or fewer:
BATCH_BYTES = 64_000_000  # as many as come to this on average
# ValueError: a date out of range, no UTF-8. LookupError: a time zone.
_NO_VALUE = (ValueError, OverflowError, LookupError)
TYPES = {
    ".html": "text/html",
    ".htm": "text/html",
    ".xhtml": "application/xhtml+xml",
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".pdf": "application/pdf",
}


def rows_of(
    source: SourceConfig, path: Path, name: str, largest: int, piece: Piece | None = None
) -> Iterator[Row]:
    """The rows of one file, or of a piece of one. `name` is what documents call it; texts have at
    most `largest` bytes.

    A file that ends in the middle gives what stands before, and a row with rule damaged-file.
    """
    place = {"warc": f"{source.name}:{name}", "url": f"file://{source.name}/{name}"}
    reader = {"folder": _file, "jsonl": _lines, "parquet": _table}.get(source.format, _records)
    before = number = piece.rows if piece else 0
    try:
        for number, (about, content) in enumerate(reader(source, path, largest, piece), before + 1):
            # A row without an address of its own is known by its number in the file.
            own = {} if "url" in about else {"url": f"{place['url']}#{number}"}
            if source.format == "folder":
                own = {}
            yield place | {"offset": number - 1} | own | about, content
    except (OSError, EOFError, ValueError, OverflowError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        yield place | {"offset": number}, Removal("damaged-file", f"{name}: {reason}")


def text_lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, each with its number, of whatever compression its
    ending says. Raises UserError, which begins with `what`, where the file cannot be read.
    """
    try:
        with pa.input_stream(str(path), compression=CODECS.get(path.suffix.lower())) as packed:
            lines = io.TextIOWrapper(io.BufferedReader(packed), "utf-8", errors="replace")
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{what}: {path.name} cannot be read to its end ({error}); check that it is whole and "
            "is what its ending says"
        ) from error


def _file(_: SourceConfig, path: Path, largest: int, piece: Piece | None) -> Iterator[Row]:
    if path.stat().st_size > largest:
        yield {}, Removal("too-large", f"larger than {largest:,} bytes")
        return
    kind = TYPES.get(path.suffix.lower(), "text/plain")
    yield {}, Fetched(200, {"content-type": kind}, path.read_bytes())


def _lines(source: SourceConfig, path: Path, largest: int, piece: Piece | None) -> Iterator[Row]:
    codec = CODECS.get(path.suffix.lower())
    with contextlib.ExitStack() as held:
        if codec:
            packed = held.enter_context(pa.input_stream(str(path), compression=codec))
            stream: BinaryIO = io.BufferedReader(packed, 1 << 16)
        else:
            stream = held.enter_context(open(path, "rb", buffering=1 << 16))
        for line in lines(stream, largest, piece):
            if line is None:
                yield {}, Removal("too-large", f"a line larger than {largest:,} bytes")
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # the latter: nested too deep
                yield {}, Removal("not-json", str(error)[:200])
                continue
            if isinstance(row, dict):
                yield _row(source, row)
            else:
                yield {}, Removal("not-json", f"a line holds {type(row).__name__}, not an object")


def _table(source: SourceConfig, path: Path, largest: int, piece: Piece | None) -> Iterator[Row]:
    file = pq.ParquetFile(path)
    fields = (source.text_field, source.url_field, source.title_field, source.date_field)
    columns = [name for name in dict.fromkeys(fields) if name in file.schema_arrow.names]
    groups = range(piece.start, piece.stop) if piece else None
    rows = _rows_at_a_time(file.metadata)
    for batch in file.iter_batches(rows, row_groups=groups, columns=columns):
        batch, too_large = _bounded(batch, source.text_field, largest)
        for row, large in zip(plain_rows(batch), too_large, strict=True):
            about, content = _row(source, row)
            if large:
                content = Removal("too-large", f"larger than {largest:,} bytes")
            yield about, content


def _rows_at_a_time(metadata: pq.FileMetaData) -> int:
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    average = max((g.total_byte_size / max(g.num_rows, 1) for g in groups), default=0.0)
    return max(1, min(BATCH, int(BATCH_BYTES / max(average, 1))))


def _bounded(batch: pa.RecordBatch, field: str, largest: int) -> tuple[pa.RecordBatch, list[bool]]:
    """The batch without texts of more than `largest` bytes, and which rows had one."""
    place = batch.schema.get_field_index(field)
    if place < 0 or not _is_text(batch.column(place)):
        return batch, [False] * batch.num_rows
    column = batch.column(place)
    large = pc.fill_null(pc.greater(pc.binary_length(column), largest), False)
    rest = pc.if_else(large, pa.scalar(None, column.type), column)
    return batch.set_column(place, field, rest), large.to_pylist()


def plain_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows as Python has them, whatever a writer put into them unchecked.

    Bytes in a column of text that are no UTF-8 are replaced. What Python has no value for is None:
    a date beyond the year 9999, a moment in a time zone that nobody knows.
    """
    try:
        return batch.to_pylist()
    except _NO_VALUE:
        rows = zip(*map(_values, batch.columns), strict=True)
        return [dict(zip(batch.schema.names, row, strict=True)) for row in rows]


def _values(column: pa.Array) -> list[Any]:
    if _is_text(column):
        values = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "replace") for value in values]
    return list(map(_value, column))


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except _NO_VALUE:
        return None


def _is_text(column: pa.Array) -> bool:
    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def _row(source: SourceConfig, row: dict[str, Any]) -> Row:
    about: dict[str, Any] = {}
    for name, field in (
        ("url", source.url_field),
        ("title", source.title_field),
        ("date", source.date_field),
    ):
        if row.get(field) not in (None, ""):
            about[name] = str(row[field])
    text = row.get(source.text_field)
    if not isinstance(text, str) or not text.strip():
        found = ", ".join(map(str, row)) or "nothing"
        return about, Removal("no-text", f"no text in field {source.text_field!r}; found {found}")
    return about, text


def _records(_: SourceConfig, path: Path, largest: int, piece: Piece | None) -> Iterator[Row]:
    with open(path, "rb") as stream:
        dictionary = read_dictionary(stream)
        for found in scan(path):
            if isinstance(found, int):
                yield {"offset": found}, Removal("damaged-record", f"damaged at byte {found:,}")
                continue
            about = {
                "url": found.url,
                "fetched_at": found.date,
                "offset": found.offset,
                "record_id": found.record_id,
                "digest": found.digest,
            }
            stream.seek(found.offset)
            content: Fetched | Removal
            try:
                data = stream.read(needed(found.length, largest))
                content = read_record(data, largest, dictionary)
            except DamagedRecord as damage:
                content = Removal("damaged-record", str(damage))
            except OverflowError:
                content = Removal("too-large", f"body larger than {largest:,} bytes")
            yield about, content
