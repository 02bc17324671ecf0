"""WARC 1.1 segments: written record by record, read by offset, mended after a kill.

Every record is a gzip member of its own (ISO 28500:2017, annex D), so a segment can be read from
any offset and concatenated with another. What one request brought (request, response, metadata) is
appended with a single write, and the metadata record comes last: it is the commit. A segment whose
writer was killed is cut back to its last commit.

Bodies are stored decoded, as Common Crawl does: a reader needs no knowledge of transfer or content
codings, and the original headers stand beside as `X-Crawler-…`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import struct
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fastwarc.warc import ArchiveIterator, WarcRecordType

COMPRESSION_LEVEL = 6
REVISIT_NOT_MODIFIED = "http://netpreserve.org/warc/1.1/revisit/server-not-modified"
REVISIT_IDENTICAL = "http://netpreserve.org/warc/1.1/revisit/identical-payload-digest"
COMMITS = (b"metadata", b"warcinfo")


def payload_digest(body: bytes) -> str:
    """`sha256:` and base32, the spelling WARC tools compare."""
    return "sha256:" + base64.b32encode(hashlib.sha256(body).digest()).decode()


def record_id() -> str:
    return f"<urn:uuid:{uuid.uuid4()}>"


def warc_date(moment: datetime | None = None) -> str:
    return (moment or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(frozen=True)
class Exchange:
    """One HTTP request and its answer as they stand in a segment."""

    url: str
    request_head: bytes
    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    address: str
    date: str


def record(kind: str, fields: Mapping[str, str], block: bytes) -> bytes:
    """One record as a gzip member. `fields` with an empty value are left out."""
    lines = ["WARC/1.1", f"WARC-Type: {kind}"]
    lines += [f"{name}: {value}" for name, value in fields.items() if value]
    lines += [f"WARC-Block-Digest: {payload_digest(block)}", f"Content-Length: {len(block)}"]
    head = "\r\n".join(line.replace("\r", " ").replace("\n", " ") for line in lines)
    packer = zlib.compressobj(COMPRESSION_LEVEL, zlib.DEFLATED, 31)
    data = packer.compress(head.encode("utf-8", "replace") + b"\r\n\r\n" + block + b"\r\n\r\n")
    return data + packer.flush()


def warcinfo(filename: str, **fields: str) -> bytes:
    """The record a segment starts with; `fields` describe the crawl and its software."""
    block = "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode()
    return record(
        "warcinfo",
        {
            "WARC-Record-ID": record_id(),
            "WARC-Date": warc_date(),
            "WARC-Filename": filename,
            "Content-Type": "application/warc-fields",
        },
        block,
    )


def response_records(exchange: Exchange, digest: str, identifier: str) -> tuple[bytes, bytes]:
    """The request and response records of one exchange, concurrent to each other."""
    response = record(
        "response",
        {
            "WARC-Record-ID": identifier,
            "WARC-Target-URI": exchange.url,
            "WARC-Date": exchange.date,
            "WARC-IP-Address": exchange.address,
            "WARC-Payload-Digest": digest,
            "Content-Type": "application/http; msgtype=response",
        },
        _http_head(exchange) + exchange.body,
    )
    return _request_record(exchange, identifier), response


@dataclass(frozen=True)
class Earlier:
    """The record that holds what has not changed."""

    record_id: str
    url: str
    date: str
    digest: str


def revisit_records(exchange: Exchange, earlier: Earlier, identifier: str) -> tuple[bytes, bytes]:
    """The records of an exchange that brought nothing new (WARC 1.1, section 6.7): it ended in 304
    Not Modified, or in the payload that `earlier` holds, of which the head alone is kept.
    """
    profile = REVISIT_NOT_MODIFIED if exchange.status == 304 else REVISIT_IDENTICAL
    revisit = record(
        "revisit",
        {
            "WARC-Record-ID": identifier,
            "WARC-Target-URI": exchange.url,
            "WARC-Date": exchange.date,
            "WARC-IP-Address": exchange.address,
            "WARC-Profile": profile,
            "WARC-Refers-To": earlier.record_id,
            "WARC-Refers-To-Target-URI": earlier.url,
            "WARC-Refers-To-Date": earlier.date,
            "WARC-Payload-Digest": earlier.digest,
            "Content-Type": "application/http; msgtype=response",
        },
        _http_head(exchange),
    )
    return _request_record(exchange, identifier), revisit


def metadata_record(url: str, concurrent_to: str, body: Mapping[str, Any]) -> bytes:
    """What the crawler concluded, as JSON; the commit of everything about `url` before it."""
    block = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return record(
        "metadata",
        {
            "WARC-Record-ID": record_id(),
            "WARC-Target-URI": url,
            "WARC-Date": warc_date(),
            "WARC-Concurrent-To": concurrent_to,
            "Content-Type": "application/json",
        },
        block,
    )


def _request_record(exchange: Exchange, concurrent_to: str) -> bytes:
    return record(
        "request",
        {
            "WARC-Record-ID": record_id(),
            "WARC-Target-URI": exchange.url,
            "WARC-Date": exchange.date,
            "WARC-Concurrent-To": concurrent_to,
            "Content-Type": "application/http; msgtype=request",
        },
        exchange.request_head,
    )


def _http_head(exchange: Exchange) -> bytes:
    coded = {"content-encoding", "transfer-encoding", "content-length"}
    lines = [f"HTTP/1.1 {exchange.status} {exchange.reason}"]
    lines += [
        f"{'X-Crawler-' if name.lower() in coded else ''}{name}: {value}"
        for name, value in exchange.headers
    ]
    if exchange.status != 304:
        lines.append(f"Content-Length: {len(exchange.body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape")


class SegmentWriter:
    """Appends groups of records to one file; each group is in the file as a whole or not at all.

    Opening a file a killed writer left cuts it back to its last commit first.
    """

    def __init__(self, path: Path, **info: str) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        mend(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close())
        self.size = self._file.tell()
        if self.size == 0:
            self.append([warcinfo(path.name, **info)])

    def append(self, records: Sequence[bytes]) -> list[tuple[int, int]]:
        """Write the records with one call; returns (offset, length) of each."""
        places = []
        for data in records:
            places.append((self.size, len(data)))
            self.size += len(data)
        block = b"".join(records)
        written = self._file.write(block)
        while written is not None and written < len(block):  # a disk that fills up writes in part
            block = block[written:]
            written = self._file.write(block)
        return places

    def close(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Member:
    """One record's place in a segment and its raw content (headers and block)."""

    offset: int
    length: int
    data: bytes

    @property
    def kind(self) -> bytes:
        return self.field(b"warc-type")

    def field(self, name: bytes) -> bytes:
        """A field of the record's head by its name in lower case, or empty."""
        head = self.data[: self.data.find(b"\r\n\r\n")]
        for line in head.split(b"\r\n"):
            found, _, value = line.partition(b":")
            if found.strip().lower() == name:
                return value.strip()
        return b""

    @property
    def block(self) -> bytes:
        start = self.data.find(b"\r\n\r\n") + 4
        return self.data[start : len(self.data) - 4]


def members(data: bytes) -> Iterator[Member]:
    """The whole members of a segment; ends before the first half or damaged one."""
    view, offset = memoryview(data), 0
    while offset < len(data):
        unpacker = zlib.decompressobj(31)
        parts, position = [], offset
        try:
            while not unpacker.eof and position < len(data):
                chunk = view[position : position + 65536]
                parts.append(unpacker.decompress(chunk))
                position += len(chunk)
        except zlib.error:
            return
        if not unpacker.eof:
            return
        end = position - len(unpacker.unused_data)
        yield Member(offset, end - offset, b"".join(parts))
        offset = end


def padding(length: int, text: str) -> bytes:
    """A gzip member of exactly `length` bytes that holds one metadata record saying `text`.

    It takes the place of erased records, so that the offsets of all others stay as they are. Its
    data are stored, not compressed. Raises ValueError when there is no room for a record.
    """
    blocks = max(1, -(-(length - 18) // (5 + 0xFFFF)))
    size = length - 18 - 5 * blocks
    head = (
        f"WARC/1.1\r\nWARC-Type: metadata\r\nWARC-Record-ID: {record_id()}\r\n"
        f"WARC-Date: {warc_date()}\r\nContent-Length: {{:>10}}\r\n\r\n"
    )
    room = size - len(head.format(0)) - 4
    if room < 0:
        raise ValueError(f"{length} bytes are too few for a record")
    block = text.encode()[:room].ljust(room)
    record = head.format(room).encode() + block + b"\r\n\r\n"
    data = bytearray(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff")
    for number in range(blocks):
        part = record[number * 0xFFFF : (number + 1) * 0xFFFF]
        data += struct.pack("<BHH", number == blocks - 1, len(part), len(part) ^ 0xFFFF) + part
    return bytes(data + struct.pack("<II", zlib.crc32(record), len(record) & 0xFFFFFFFF))


def mend(path: Path) -> int:
    """Cut a segment back to its last commit; returns the number of bytes cut."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    committed = 0
    for member in members(data):
        if member.kind in COMMITS:
            committed = member.offset + member.length
    if committed < len(data):
        os.truncate(path, committed)
    return len(data) - committed


def commits(data: bytes) -> Iterator[tuple[dict[str, Any], Member | None]]:
    """The metadata of each committed group with the response or revisit record it belongs to."""
    answer: Member | None = None
    for member in members(data):
        kind = member.kind
        if kind in (b"response", b"revisit"):
            answer = member
        elif kind == b"metadata":
            yield json.loads(member.block), answer
            answer = None


@dataclass(frozen=True)
class Response:
    """A response record, read back."""

    record_id: str
    url: str
    date: str
    digest: str
    status: int
    headers: dict[str, str]
    body: bytes


def read_response(data: bytes) -> Response:
    """The response in one gzip member (bytes at a known offset).

    Raises ValueError when there is none: the offset or the file is wrong.
    """
    for found in read_responses(data):
        return found
    raise ValueError(f"these {len(data)} bytes hold no WARC response record")


def read_responses(data: bytes) -> Iterator[Response]:
    """All response records of a whole segment, through FastWARC."""
    try:
        iterator: Iterable[Any] = ArchiveIterator(
            io.BytesIO(data), record_types=WarcRecordType.response, parse_http=True
        )
        for entry in iterator:
            yield Response(
                entry.headers.get("WARC-Record-ID", ""),
                entry.headers.get("WARC-Target-URI", ""),
                entry.headers.get("WARC-Date", ""),
                entry.headers.get("WARC-Payload-Digest", ""),
                entry.http_headers.status_code,
                {name.lower(): value for name, value in entry.http_headers.asdict().items()},
                entry.reader.read(),
            )
    except (OSError, EOFError, UnicodeError) as error:
        raise ValueError(f"these {len(data)} bytes are not a WARC segment: {error}") from error
