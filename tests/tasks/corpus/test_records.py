"""Other people's WARC files: read where whole, counted where not."""

import gzip
import io
import tempfile
import zlib
from pathlib import Path

import pytest
from fastwarc.warc import ArchiveIterator, WarcRecordType
from hypothesis import given
from hypothesis import strategies as st
from shared_data import shared

from tasks.corpus.records import Ahead, DamagedRecord, Fetched, Place, read_record, scan

HTML = b"<html><body>" + b"hello " * 1000 + b"</body></html>"
LIMIT = 1 << 20


def plain(
    block: bytes,
    length: int | None = None,
    url: str = "http://example.org/",
    kind: str = "response",
    content_type: str = "application/http; msgtype=response",
) -> bytes:
    size = len(block) if length is None else length
    head = (
        f"WARC/1.1\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
        f"WARC-Target-URI: {url}\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {size}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def response(http: bytes, length: int | None = None, url: str = "http://example.org/") -> bytes:
    return gzip.compress(plain(http, length, url))


def found_in(data: bytes, tmp_path: Path) -> tuple[list[str], list[int]]:
    """The addresses of the records that can be read, and where damage was told."""
    path = tmp_path / "found.warc"
    path.write_bytes(data)
    urls, damaged = [], []
    for found in scan(path):
        if isinstance(found, int):
            damaged.append(found)
            continue
        try:
            read_record(data[found.offset : found.offset + found.length], LIMIT)
            urls.append(found.url)
        except DamagedRecord:
            damaged.append(found.offset)
    return urls, damaged


def five(pack: bool) -> list[bytes]:
    """Five responses, u:0 to u:4, each packed as a member of its own or not at all."""
    make = response if pack else plain
    return [make(http(HTML + bytes([65 + n])), None, f"u:{n}") for n in range(5)]


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


def test_a_damaged_head_costs_its_own_record_alone(tmp_path: Path) -> None:
    records = five(pack=True)
    offset = len(records[0] + records[1])
    data = bytearray(b"".join(records))
    data[offset : offset + 8] = bytes(8)
    assert found_in(bytes(data), tmp_path) == (["u:0", "u:1", "u:3", "u:4"], [offset])


@pytest.mark.parametrize("left", [1, 5, 15, 100])
def test_a_last_member_that_is_only_begun_is_counted(left: int, tmp_path: Path) -> None:
    records = five(pack=True)
    whole = b"".join(records[:4])
    data = whole + records[4][:left]
    assert found_in(data, tmp_path) == (["u:0", "u:1", "u:2", "u:3"], [len(whole)])
    assert found_in(whole + bytes(50), tmp_path)[1] == []  # zeros are padding


@pytest.mark.parametrize("wrong", [-10, 10, 700, 1_000_000])
def test_a_wrong_length_without_gzip_costs_one_record(wrong: int, tmp_path: Path) -> None:
    records = five(pack=False)
    block = http(HTML)
    records[2] = plain(block, len(block) + wrong, "u:2")
    offset = len(records[0] + records[1])
    urls, damaged = found_in(b"".join(records), tmp_path)
    assert (urls, damaged) == (["u:0", "u:1", "u:3", "u:4"], [offset])


@pytest.mark.parametrize("pack", [False, True])
def test_junk_between_records_costs_none(pack: bool, tmp_path: Path) -> None:
    records = five(pack)
    data = records[0] + b"this is no record\r\n\r\n" + b"".join(records[1:])
    urls = [f"u:{n}" for n in range(5)]
    assert found_in(data, tmp_path) == (urls, [len(records[0])])


@given(st.integers(0, 2000), st.binary(min_size=1, max_size=30))
def test_whatever_is_damaged_records_are_found_or_counted(at: int, junk: bytes) -> None:
    data = bytearray(b"".join(five(pack=True)))
    place = at * len(data) // 2001
    data[place : place + len(junk)] = junk
    with tempfile.TemporaryDirectory() as directory:
        urls, damaged = found_in(bytes(data), Path(directory))
    lost = {f"u:{n}" for n in range(5)} - set(urls)
    assert len(lost) <= 2
    assert damaged or not lost


def test_a_member_with_several_records_gives_one_and_is_counted(tmp_path: Path) -> None:
    data = gzip.compress(b"".join(five(pack=False)))
    assert found_in(data, tmp_path) == (["u:0"], [0])


@pytest.mark.parametrize("kind", ["conversion", "resource"])
def test_texts_and_files_without_http_are_read(kind: str, tmp_path: Path) -> None:
    url = "http://e.org/"
    record = plain(b"Plain text of a page.", url=url, kind=kind, content_type="text/plain")
    about = plain(b"seen", url=f"urn:view:{url}", kind="resource", content_type="text/plain")
    info = plain(b"software: x", kind="warcinfo", content_type="application/warc-fields")
    path = tmp_path / "texts.warc.wet.gz"
    path.write_bytes(b"".join(map(gzip.compress, (info, record, about))))
    (place,) = scan(path)
    assert isinstance(place, Place) and place.url == url
    data = path.read_bytes()[place.offset : place.offset + place.length]
    assert read_record(data, LIMIT) == Fetched(
        200, {"content-type": "text/plain"}, b"Plain text of a page."
    )


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("length", ["9" * 5000, "9" * 19, "٧٦", "-1", "+5"])
def test_a_length_that_is_none_costs_its_own_record_alone(
    length: str, pack: bool, tmp_path: Path
) -> None:
    record = plain(http(HTML), url="u:2").replace(
        f"Content-Length: {len(http(HTML))}".encode(), f"Content-Length: {length}".encode()
    )
    records = five(pack)
    records[2] = gzip.compress(record) if pack else record
    offset = len(records[0] + records[1])
    assert found_in(b"".join(records), tmp_path) == (["u:0", "u:1", "u:3", "u:4"], [offset])


@pytest.mark.parametrize("pack", [True, False])
def test_a_record_whose_own_head_ends_in_bare_newlines_takes_no_other_address(
    pack: bool, tmp_path: Path
) -> None:
    record = plain(http(HTML), url="u:2").replace(b"\r\n", b"\n")
    records = five(pack)
    records[2] = gzip.compress(record) if pack else record
    offset = len(records[0] + records[1])
    assert found_in(b"".join(records), tmp_path) == (["u:0", "u:1", "u:3", "u:4"], [offset])


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\nContent-Type: text/html\n\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\n\n",
        b"HTTP/1.1 200 OK\nContent-Type: text/html\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\n",
    ],
)
def test_http_heads_that_end_in_bare_newlines_leave_the_body_whole(head: bytes) -> None:
    for body in (HTML, HTML + b"\r\n\r\nname: value", b"a: b\n\n" + HTML):
        found = read_record(response(head + body), LIMIT)
        assert (found.headers, found.body) == ({"content-type": "text/html"}, body)


def test_a_clipped_body_under_its_coding_is_damaged() -> None:
    packed = gzip.compress(HTML + bytes(range(256)) * 20)
    whole = read(response(http(packed, b"Content-Encoding: gzip")))
    assert whole.startswith(HTML)
    for coded in (packed[:-8], packed[: len(packed) // 2]):
        with pytest.raises(DamagedRecord, match="ends too early"):
            read(response(http(coded, b"Content-Encoding: gzip")))


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
