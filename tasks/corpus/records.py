"""Response records of WARC files from anywhere: found, read, and survived when damaged.

Our own crawls come with a table of their records. Other people's segments are scanned for one;
behind a damaged or clipped gzip member the scan goes on at the next member.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastwarc.warc import ArchiveIterator, WarcRecordType

GZIP_MEMBER = b"\x1f\x8b\x08"
_CHUNKED = re.compile(rb"[0-9a-fA-F]{1,8}\s*(;[^\r\n]*)?\r\n")


class DamagedRecord(Exception):
    """A record that cannot be read as a whole; the message says what is wrong with it."""


@dataclass(frozen=True)
class Place:
    """Where a response record lies: bytes [offset, offset + length) of the file."""

    url: str
    date: str
    offset: int
    length: int
    record_id: str


@dataclass(frozen=True)
class Fetched:
    """A response: lower-case names in `headers`, `body` free of transfer and content codings."""

    status: int
    headers: dict[str, str]
    body: bytes


def scan(path: Path) -> Iterator[Place | int]:
    """The response records of a segment in order; an int is the offset of a damaged stretch."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        start: int | None = 0
        lost = False  # in a damaged stretch: bytes in it that look like a head are no new one
        while start is not None and start < size:
            stream.seek(start)
            open_place: dict[str, Any] | None = None
            last = start
            try:
                for entry in ArchiveIterator(stream, WarcRecordType.any_type, parse_http=False):
                    last, lost = entry.stream_pos, False
                    if open_place is not None:
                        yield Place(length=last - open_place["offset"], **open_place)
                    open_place = _described(entry, last)
            except (OSError, EOFError, UnicodeError, ValueError):
                start = _next_member(stream, last + 1)
                if not lost:
                    yield last
                lost = True
                continue
            if open_place is not None:
                yield Place(length=size - open_place["offset"], **open_place)
            elif not lost and last == start and size - start > 0 and _is_not_warc(stream, start):
                yield start
            return


def _described(entry: Any, offset: int) -> dict[str, Any] | None:
    if entry.record_type != WarcRecordType.response:
        return None
    return {
        "url": (entry.headers.get("WARC-Target-URI") or "").strip("<>"),
        "date": entry.headers.get("WARC-Date") or "",
        "offset": offset,
        "record_id": entry.headers.get("WARC-Record-ID") or "",
    }


def _is_not_warc(stream: io.BufferedReader, start: int) -> bool:
    stream.seek(start)
    return next(iter(ArchiveIterator(stream)), None) is None


def _next_member(stream: io.BufferedReader, start: int) -> int | None:
    """Offset of the next bytes that look like the head of a gzip member."""
    stream.seek(start)
    base, tail = start, b""
    while block := stream.read(1 << 20):
        found = (tail + block).find(GZIP_MEMBER)
        if found >= 0:
            return base - len(tail) + found
        base += len(block)
        tail = block[-2:]
    return None


class Ahead:
    """Ranges of a file that follow each other, up to `end`; `ahead` bytes come with one request."""

    def __init__(self, file: Any, end: int, ahead: int) -> None:
        self._file, self._end, self._ahead = file, end, ahead
        self._start, self._held = 0, b""

    def read(self, offset: int, length: int) -> bytes:
        inside = offset - self._start
        if inside < 0 or inside + length > len(self._held):
            self._file.seek(offset)
            size = max(length, min(self._ahead, self._end - offset))
            self._held, self._start, inside = self._file.read(size), offset, 0
        return self._held[inside : inside + length]


def read_record(data: bytes, largest: int) -> Fetched:
    """The response in `data` (one record as it lies in the file), at most `largest` bytes of body.

    Raises DamagedRecord; OverflowError for a larger body.
    """
    entry, body = _first_response(data, "none", largest)
    expected = entry.content_length
    if len(body) < expected:
        raise DamagedRecord(f"record ends after {len(body)} of {expected} bytes")
    http = entry.http_headers
    if http is None or http.status_code is None:
        raise DamagedRecord("the record holds no HTTP response")
    headers = {name.lower(): value for name, value in http.asdict().items()}
    chunked = "chunked" in headers.get("transfer-encoding", "") and _CHUNKED.match(body)
    coded = headers.get("content-encoding", "identity") not in ("identity", "")
    if chunked or coded:
        # Many archives store the body decoded under the headers as they were sent.
        decoding = "all" if chunked else "content"
        try:
            body = _first_response(data, decoding, largest)[1]
        except DamagedRecord:
            if not body.lstrip()[:1] == b"<":
                raise
    return Fetched(http.status_code, headers, body)


def _first_response(data: bytes, decoding: Any, largest: int) -> tuple[Any, bytes]:
    try:
        for entry in ArchiveIterator(
            io.BytesIO(data), WarcRecordType.response, parse_http=True, auto_decode=decoding
        ):
            body = entry.reader.read(largest + 1)
            if len(body) > largest:
                raise OverflowError
            return entry, body
    except (OSError, EOFError, UnicodeError, ValueError) as error:
        raise DamagedRecord(str(error)[:200]) from error
    raise DamagedRecord("no response record at this place")
