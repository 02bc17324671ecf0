"""WARC segments: readable by others, cut back to the last commit, read by offset."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fastwarc.warc import ArchiveIterator
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus import warc

INFO = {"software": "Gristmill"}


def exchange(body: bytes, status: int = 200, **headers: str) -> warc.Exchange:
    return warc.Exchange(
        "http://example.org/a",
        b"GET /a HTTP/1.1\r\nHost: example.org\r\n\r\n",
        status,
        "OK",
        tuple(headers.items()),
        body,
        "192.0.2.1",
        warc.warc_date(),
    )


def group(body: bytes, **headers: str) -> list[bytes]:
    identifier = warc.record_id()
    records = warc.response_records(
        exchange(body, **headers), warc.payload_digest(body), identifier
    )
    return [*records, warc.metadata_record("http://example.org/a", identifier, {"n": len(body)})]


def write(path: Path, bodies: list[bytes]) -> list[tuple[int, int]]:
    with warc.SegmentWriter(path, **INFO) as writer:
        return [writer.append(group(body))[1] for body in bodies]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=4))
def test_bodies_survive_and_digests_hold(
    tmp_path_factory: pytest.TempPathFactory, bodies: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("warc") / "a.warc.gz"
    places = write(path, bodies)
    data = path.read_bytes()
    for body, (offset, length) in zip(bodies, places, strict=True):
        response = warc.read_response(data[offset : offset + length])
        assert response.body == body
        assert response.digest == warc.payload_digest(body)
    assert [r.body for r in warc.read_responses(data)] == bodies
    with path.open("rb") as stream:
        kinds = [record.headers["WARC-Type"] for record in ArchiveIterator(stream)]
    assert kinds == ["warcinfo", *["request", "response", "metadata"] * len(bodies)]


def test_stored_bodies_are_decoded_and_say_so() -> None:
    records = warc.response_records(
        exchange(b"plain", **{"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"}),
        warc.payload_digest(b"plain"),
        warc.record_id(),
    )
    response = warc.read_response(records[1])
    assert response.body == b"plain"
    assert response.headers["x-crawler-content-encoding"] == "gzip"
    assert response.headers["content-length"] == "5"
    assert "content-encoding" not in response.headers


def test_a_segment_cut_anywhere_is_mended_to_whole_commits(tmp_path: Path) -> None:
    whole = tmp_path / "whole.warc.gz"
    bodies = [b"first" * 50, b"second" * 50, b"third" * 50]
    write(whole, bodies)
    data = whole.read_bytes()
    commits = [m.offset + m.length for m in warc.members(data) if m.kind in warc.COMMITS]
    for size in range(0, len(data), 7):
        torn = tmp_path / "torn.warc.gz"
        torn.write_bytes(data[:size])
        cut = warc.mend(torn)
        expected = max((end for end in commits if end <= size), default=0)
        assert torn.stat().st_size == expected == size - cut
    # A mended segment goes on as if nothing had happened.
    torn.write_bytes(data[: commits[2] + 9])
    with warc.SegmentWriter(torn, **INFO) as writer:
        writer.append(group(b"again"))
    found = [r.body for r in warc.read_responses(torn.read_bytes())]
    assert found == [*bodies[:2], b"again"]


def test_garbage_after_a_commit_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.warc.gz"
    write(path, [b"body"])
    size = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(b"\x00" * 100)
    assert warc.mend(path) == 100
    assert path.stat().st_size == size


def test_an_offset_without_a_response_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.warc.gz"
    (offset, _), *_ = write(path, [b"body"])
    data = path.read_bytes()
    with pytest.raises(ValueError, match="no WARC response"):
        warc.read_response(data[:offset])
    with pytest.raises(ValueError):
        warc.read_response(b"not gzip at all")


def test_header_values_cannot_break_out_of_their_line() -> None:
    data = warc.record("metadata", {"WARC-Target-URI": "http://e.org/\r\nWARC-Type: response"}, b"")
    (member,) = warc.members(data)
    assert member.kind == b"metadata"
    assert b"\r\nWARC-Type: response" not in member.data


@pytest.mark.peer
def test_warcio_finds_every_digest_right(tmp_path: Path) -> None:
    pytest.importorskip("warcio")
    from warcio.archiveiterator import ArchiveIterator as PeerIterator

    path = tmp_path / "a.warc.gz"
    write(path, [b"one", b"", b"\x00\xff" * 1000])
    with warc.SegmentWriter(path, **INFO) as writer:
        old = warc.Earlier(
            warc.record_id(), "http://example.org/a", warc.warc_date(), warc.payload_digest(b"one")
        )
        identifier = warc.record_id()
        records = warc.revisit_records(exchange(b"", status=304), old, identifier)
        writer.append([*records, warc.metadata_record("http://example.org/a", identifier, {})])
    with path.open("rb") as stream:
        for record in PeerIterator(stream, check_digests="raise"):
            record.content_stream().read()
    tool = Path(sys.executable).with_name("warcio")
    if shutil.which(tool):
        checked = subprocess.run([tool, "check", "-v", path], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


@given(st.integers(220, 300_000))
def test_padding_is_a_member_of_just_that_length(length: int) -> None:
    made = warc.padding(length, "gone")
    assert len(made) == length
    [member] = warc.members(made)
    assert member.length == length and member.kind == b"metadata"
    assert member.block.rstrip() == b"gone"
    assert len(member.block) == int(member.field(b"content-length"))
