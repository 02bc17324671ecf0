"""Other people's WARC files: read where whole, counted where not."""

import gzip
import io
import zlib
from pathlib import Path

import pytest
from fastwarc.warc import ArchiveIterator, WarcRecordType
from hypothesis import given
from hypothesis import strategies as st
from shared_data import shared

from tasks.corpus.records import Ahead, DamagedRecord, Place, read_record, scan

HTML = b"<html><body>" + b"hello " * 1000 + b"</body></html>"
LIMIT = 1 << 20


def response(http: bytes, length: int | None = None, url: str = "http://example.org/") -> bytes:
    size = len(http) if length is None else length
    return gzip.compress(
        b"WARC/1.1\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
        b"WARC-Target-URI: " + url.encode() + b"\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
        b"Content-Type: application/http; msgtype=response\r\n"
        b"Content-Length: " + str(size).encode() + b"\r\n\r\n" + http + b"\r\n\r\n"
    )


def http(body: bytes, *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 200 OK", b"Content-Type: text/html", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def read(data: bytes) -> bytes:
    return read_record(data, LIMIT).body


def test_the_samples_are_read_as_fastwarc_reads_them() -> None:
    for name in ("sample-0000.warc.gz", "sample-0001.warc.gz"):
        path = shared(f"warc/{name}")
        with open(path, "rb") as stream:
            expected = [
                (entry.stream_pos, entry.http_headers.status_code, entry.reader.read())
                for entry in ArchiveIterator(stream, WarcRecordType.response, auto_decode="all")
            ]
        data = path.read_bytes()
        places = [place for place in scan(path) if isinstance(place, Place)]
        assert [place.offset for place in places] == [offset for offset, _, _ in expected]
        assert all(place.url.startswith("http") for place in places)
        for place, (_, status, body) in zip(places, expected, strict=True):
            found = read_record(data[place.offset : place.offset + place.length], LIMIT)
            assert (found.status, found.body) == (status, body)


def test_a_clipped_file_loses_only_its_last_record(tmp_path: Path) -> None:
    data = shared("warc/sample-0000.warc.gz").read_bytes()[:20_000]
    path = tmp_path / "clipped.warc.gz"
    path.write_bytes(data)
    places = [place for place in scan(path) if isinstance(place, Place)]
    assert [place.offset for place in places] == [865, 15904]
    read_record(data[865:15477], LIMIT)
    with pytest.raises(DamagedRecord, match=r"ends after \d+ of 27216 bytes"):
        read_record(data[15904:], LIMIT)


def test_behind_a_damaged_member_the_scan_goes_on(tmp_path: Path) -> None:
    whole = shared("warc/sample-0000.warc.gz")
    data = bytearray(whole.read_bytes())
    for position in range(20_000, 20_040):
        data[position] ^= 0xA5
    path = tmp_path / "damaged.warc.gz"
    path.write_bytes(data)
    expected = [place for place in scan(whole) if isinstance(place, Place)]
    found = list(scan(path))
    assert any(isinstance(place, int) for place in found)
    places = {place.offset: place for place in found if isinstance(place, Place)}
    missing = [place.offset for place in expected if place.offset not in places]
    assert missing == [15904]


def test_a_file_that_is_no_warc_is_one_damaged_stretch(tmp_path: Path) -> None:
    path = tmp_path / "odd.warc.gz"
    path.write_bytes(b"this is no archive at all")
    assert [found for found in scan(path) if isinstance(found, Place)] == []
    assert list(scan(path)) == [0]
    path.write_bytes(b"")
    assert list(scan(path)) == []


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (HTML, ()),
        (gzip.compress(HTML), (b"Content-Encoding: gzip",)),
        (zlib.compress(HTML), (b"Content-Encoding: deflate",)),
        (b"%x\r\n%s\r\n0\r\n\r\n" % (len(HTML), HTML), (b"Transfer-Encoding: chunked",)),
        (HTML, (b"Transfer-Encoding: chunked",)),  # decoded by the archiver, header left
        (HTML, (b"Content-Encoding: gzip",)),
        (HTML, (b"Content-Length: 3",)),
    ],
)
def test_codings_are_undone_also_where_the_header_lies(
    body: bytes, headers: tuple[bytes, ...]
) -> None:
    assert read(response(http(body, *headers))) == HTML


def test_what_cannot_be_read_is_named() -> None:
    with pytest.raises(DamagedRecord, match="no response"):
        read(b"")
    with pytest.raises(DamagedRecord):
        read(response(b""))
    with pytest.raises(DamagedRecord, match="ends after"):
        read(response(http(HTML), length=len(http(HTML)) + 500))
    with pytest.raises(OverflowError):
        read(response(http(b"x" * (LIMIT + 1))))
    with pytest.raises(OverflowError):  # a small record that unpacks into a large one
        read(response(http(gzip.compress(b"x" * (LIMIT + 1)), b"Content-Encoding: gzip")))


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)), max_size=20), st.integers(0, 100)
)
def test_ranges_read_ahead_are_those_asked_for(ranges: list[tuple[int, int]], ahead: int) -> None:
    data = bytes(range(256))
    end = max((offset + length for offset, length in ranges), default=0)
    file = Ahead(io.BytesIO(data), end, ahead)
    for offset, length in ranges:
        assert file.read(offset, length) == data[offset : offset + length]
