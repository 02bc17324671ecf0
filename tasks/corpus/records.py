"""Records of WARC files from anywhere that hold a document: found, read, survived when damaged.

Our own crawls come with a table of their records. Other people's segments are scanned for one;
behind a damaged or clipped record the scan goes on at the next bytes that look like a head.
"""

from __future__ import annotations

import io
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backports import zstd
from fastwarc.warc import ArchiveIterator, WarcRecordType

from tasks.corpus.content_coding import CodingError, Decoder, UnknownCoding
from tasks.corpus.digests import canonical_digest
from tasks.corpus.frames import (
    GZIP_MEMBER,
    ZSTD_FRAME,
    DamagedFrame,
    Unpacked,
    behind_skippable,
    dictionary_of,
    is_packed,
)

PLAIN_HEAD = b"WARC/"
HEADS_OF_RECORDS = (GZIP_MEMBER, ZSTD_FRAME, PLAIN_HEAD)
MAX_HEAD = 64 * 1024
WINDOW = 1 << 20
HEADS = 1 << 20  # bytes of a record beside its body: heads, and what packing may add
WHOLE_ANSWERS = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
# A resource is a file without HTTP around it, a conversion the text of a response (WET files).
KINDS = ("response", "resource", "conversion")
ADDRESSED = ("http://", "https://", "ftp://", "file://")
_LENGTH = re.compile(r"[0-9]{1,18}")  # of a block; more digits are no length of anything
_CHUNKED = re.compile(rb"[0-9a-fA-F]{1,8}\s*(;[^\r\n]*)?\r\n")


class DamagedRecord(Exception):
    """A record that cannot be read as a whole; the message says what is wrong with it."""


@dataclass(frozen=True)
class Place:
    """Where such a record lies: bytes [offset, offset + length) of the file."""

    url: str
    date: str
    offset: int
    length: int
    record_id: str
    digest: str  # of the payload, as the record says it (`canonical_digest`), or empty


@dataclass(frozen=True)
class Fetched:
    """A response, or a resource or conversion as if it were one: lower-case names in `headers`,
    `body` free of transfer and content codings, `directives` the X-Robots-Tag headers one by one:
    each has an addressee of its own."""

    status: int
    headers: dict[str, str]
    body: bytes
    directives: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Record:
    """What stands at an offset: the fields of a head, where its bytes end, and whether all is well.

    `state` is whole, clipped (the file ends within it), damaged, or crowded (a gzip member that
    holds further records, which no offset can point at).
    """

    fields: dict[str, str]
    end: int
    state: str

    def place(self, offset: int, end: int) -> Place:
        url = self.fields.get("warc-target-uri", "").strip("<>")
        date, identifier = (self.fields.get(f"warc-{k}", "") for k in ("date", "record-id"))
        digest = canonical_digest(self.fields.get("warc-payload-digest", ""))
        return Place(url, date, offset, end - offset, identifier, digest)

    @property
    def is_document(self) -> bool:
        kind = self.fields.get("warc-type", "").lower()
        url = self.fields.get("warc-target-uri", "").strip("<>").lower()
        # Crawlers keep their own logs as resources, too: metadata://gnu.org/…/wget.log, urn:view:…
        return kind in KINDS and (kind != "resource" or url.startswith(ADDRESSED))


def scan(path: Path) -> Iterator[Place | int]:
    """The records of a segment that hold documents, in order; an int is the offset of a damaged
    stretch. A record clipped by the end of the file has a place: `read_record` says what is wrong.
    """
    size = path.stat().st_size
    if not size:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        dictionary = dictionary_of(data)
        offset: int | None = 0
        lost = False  # in a damaged stretch: bytes in it that look like a head are no new one
        while offset is not None and offset < size:
            if not lost and (behind := behind_skippable(data, offset)):
                if behind > size:  # clipped, or its length is wrong and hides records
                    yield offset
                    lost, behind = True, _next_head(data, offset + 1)
                offset = behind
                continue
            record = _record_at(data, offset, dictionary)
            if record is None:
                if _is_padding(data, offset):
                    return
                if not lost:
                    yield offset
                lost, offset = True, _next_head(data, offset + 1)
                continue
            usable = record.state != "damaged" and record.is_document
            if usable:
                yield record.place(offset, record.end)
            lost = record.state == "damaged" or (record.state == "clipped" and not usable)
            if lost or record.state == "crowded":
                yield offset
            offset = _next_head(data, offset + 1) if lost else record.end


def _record_at(data: mmap.mmap, offset: int, dictionary: zstd.ZstdDict | None) -> _Record | None:
    """None where no head of a record can be read."""
    if is_packed(data, offset):
        return _packed(Unpacked(data, offset, dictionary))
    return _plain(data, offset)


def _packed(unpacked: Unpacked) -> _Record | None:
    """The record in a gzip member or zstd frame."""
    size = 0
    head, rest = b"", b""  # `rest`: the first bytes behind the record's block
    fields: dict[str, str] | None = None
    block_end = 0
    try:
        for part in unpacked:
            if fields is None:
                head += part
                part, size = head, 0
                fields, block = _fields(head)
                if fields is None:
                    if len(head) > MAX_HEAD:
                        return None
                    continue
                block_end = block + _length(fields)
            if len(rest) < MAX_HEAD:
                rest += part[max(block_end - size, 0) :][:MAX_HEAD]
            size += len(part)
    except DamagedFrame:
        return _Record(fields, unpacked.end, "damaged") if fields else None
    if fields is None:
        return None
    if not unpacked.whole:
        return _Record(fields, unpacked.end, "clipped")
    behind = rest.lstrip(b"\r\n\x00 ")
    if behind.startswith(PLAIN_HEAD):
        return _Record(fields, unpacked.end, "crowded")
    # A block longer than was said; one that is shorter, `read_record` finds.
    return _Record(fields, unpacked.end, "damaged" if behind else "whole")


def _plain(data: mmap.mmap, offset: int) -> _Record | None:
    """The record at `offset` of a file that is not compressed."""
    fields, block = _fields(data[offset : offset + MAX_HEAD])
    if fields is None:
        return None
    start = offset + block
    end = start + _length(fields)
    if end > len(data):
        further = _next_head(data, start)
        return _Record(fields, len(data), "clipped" if further is None else "damaged")
    behind = data[end : end + WINDOW]
    bare = behind.lstrip(b"\r\n")
    if not bare or bare.startswith(HEADS_OF_RECORDS) or behind.startswith(b"\r\n\r\n"):
        return _Record(fields, end + len(behind) - len(bare), "whole")
    return _Record(fields, end, "damaged")  # its Content-Length is wrong


def _fields(data: bytes) -> tuple[dict[str, str] | None, int]:
    """The fields of a head by their names in lower case, and where its block begins."""
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD)
    if end < 0 or not data.startswith(PLAIN_HEAD):
        return None, 0
    lines = data[:end].decode("utf-8", "replace").split("\r\n")
    if any("\n" in line for line in lines):  # with bare newlines, it ends in a head further on
        return None, 0
    pairs = (line.partition(":") for line in lines[1:])
    fields = {name.strip().lower(): value.strip() for name, _, value in pairs}
    return (fields, end + 4) if _LENGTH.fullmatch(fields.get("content-length", "")) else (None, 0)


def _length(fields: dict[str, str]) -> int:
    return int(fields["content-length"])


def _is_padding(data: mmap.mmap, offset: int) -> bool:
    """Whether nothing but blanks and zeros follows."""
    for start in range(offset, len(data), WINDOW):
        if data[start : start + WINDOW].strip(b"\x00\r\n "):
            return False
    return True


def _next_head(data: mmap.mmap, start: int) -> int | None:
    """Offset of the next bytes that look like the head of a packed or of a plain record."""
    for base in range(start, len(data), WINDOW):
        end = base + WINDOW + len(PLAIN_HEAD) - 1
        found = [at for head in HEADS_OF_RECORDS if (at := data.find(head, base, end)) >= 0]
        if found:
            return min(found)
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


def needed(length: int, largest: int) -> int:
    """How many bytes of a record of `length` bytes `read_record` must be given: of one whose body
    is too large, so many that it sees that."""
    return min(length, largest + HEADS)


def read_record(data: bytes, largest: int, dictionary: zstd.ZstdDict | None = None) -> Fetched:
    """The document in `data` (one record as it lies in the file), at most `largest` bytes of body.

    `dictionary` is that of a file of zstd frames (`dictionary_of`). Raises DamagedRecord;
    OverflowError for a larger body.
    """
    if data.startswith(ZSTD_FRAME):
        data = _plain_record(data, largest + HEADS, dictionary)
    entry, body = _first_document(data, "none", largest)
    expected = entry.content_length
    if len(body) < expected:
        raise DamagedRecord(f"record ends after {len(body)} of {expected} bytes")
    if entry.record_type != WarcRecordType.response:
        return Fetched(200, {"content-type": entry.headers.get("Content-Type") or ""}, body)
    http = entry.http_headers
    if http is None or http.status_code is None:
        raise DamagedRecord("the record holds no HTTP response")
    headers = {name.lower(): value for name, value in http.asdict().items()}
    if "chunked" in headers.get("transfer-encoding", "") and _CHUNKED.match(body):
        body = _first_document(data, "transfer", largest)[1]
    directives = tuple(value for name, value in http if name.lower() == "x-robots-tag")
    return Fetched(http.status_code, headers, _decoded(headers, body, largest), directives)


def _plain_record(data: bytes, most: int, dictionary: zstd.ZstdDict | None) -> bytes:
    """The first `most` bytes of a zstd frame, or what there is of one that is clipped."""
    record = bytearray()
    try:
        for part in Unpacked(data, 0, dictionary):
            record += part
            if len(record) > most:
                break
    except DamagedFrame as error:
        raise DamagedRecord(f"damaged zstd frame: {error}") from error
    return bytes(record)


def _decoded(headers: dict[str, str], body: bytes, largest: int) -> bytes:
    """The body without its content codings; many archives store it decoded under the headers as
    they were sent. Raises DamagedRecord, OverflowError."""
    try:
        decoder = Decoder(headers.get("content-encoding", ""), largest)
        decoded = decoder.feed(body)
        if decoder.overflown:
            raise OverflowError
        decoder.finish()
    except UnknownCoding:
        return body
    except CodingError as error:
        if body.lstrip()[:1] == b"<":
            return body
        raise DamagedRecord(str(error)) from error
    return decoded


def _first_document(data: bytes, decoding: Any, largest: int) -> tuple[Any, bytes]:
    try:
        for entry in ArchiveIterator(
            io.BytesIO(data),
            WHOLE_ANSWERS,
            parse_http=True,
            auto_decode=decoding,
            quirks_mode=True,  # heads whose lines end in LF alone; the body would else be lost
        ):
            body = entry.reader.read(largest + 1)
            if len(body) > largest:
                raise OverflowError
            return entry, body
    except (OSError, EOFError, UnicodeError, ValueError) as error:
        raise DamagedRecord(str(error)[:200]) from error
    raise DamagedRecord("no response record at this place")
