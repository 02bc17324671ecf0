"""WARC files of zstd frames, with and without a dictionary, are read as those of gzip members."""

import gzip
import struct
import tempfile
from pathlib import Path

import pytest
from backports import zstd
from documents_of import rows
from hypothesis import given
from hypothesis import strategies as st
from inline_shards import stages_inline
from shared_data import shared
from test_gather import PARAGRAPH
from test_records import plain

from tasks.corpus.frames import STEP, dictionary_of
from tasks.corpus.gather import GatherConfig, gather
from tasks.corpus.records import DamagedRecord, read_record, scan
from tasks.corpus.source_config import SourceConfig
from tasks.corpus.warc import members

LIMIT = 10 << 20


def http(words: str) -> bytes:
    page = f"<html><body><article><p>{words} {PARAGRAPH}</p></article></body></html>"
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page.encode()


RECORDS = [plain(http(f"Page {n}."), url=f"http://example.org/{n}") for n in range(40)]
DICTIONARY = zstd.train_dict(RECORDS, 4000)


def skippable(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A50 + kind, len(content)) + content


def frames(records: list[bytes], dictionary: zstd.ZstdDict | None = None) -> list[bytes]:
    return [zstd.compress(record, zstd_dict=dictionary) for record in records]


def with_dictionary(packed: bool) -> bytes:
    content = bytes(DICTIONARY.dict_content)
    first = skippable(0xD, zstd.compress(content) if packed else content)
    return first + b"".join(frames(RECORDS, DICTIONARY))


FILES = {
    "plain": b"".join(frames(RECORDS)),
    "dictionary": with_dictionary(False),
    "packed-dictionary": with_dictionary(True),
    "extensions": skippable(3, b"x" * 10).join(frames(RECORDS)) + skippable(0xF, b"index"),
}


def read(path: Path) -> list[tuple[str, bytes]]:
    data = path.read_bytes()
    found = []
    for place in scan(path):
        assert not isinstance(place, int), place
        record = data[place.offset : place.offset + place.length]
        fetched = read_record(record, LIMIT, dictionary_of(data))
        found.append((place.url, fetched.body))
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.warc.zst"


@pytest.mark.parametrize("name", FILES)
def test_every_record_is_found_and_read(file: Path, name: str) -> None:
    file.write_bytes(FILES[name])
    members = file.with_suffix(".gz")
    members.write_bytes(b"".join(map(gzip.compress, RECORDS)))
    assert read(file) == read(members)
    assert len(read(file)) == len(RECORDS)


def test_real_responses_say_the_same_packed_otherwise(file: Path) -> None:
    source = shared("warc/sample-0000.warc.gz")
    file.write_bytes(b"".join(frames([m.data for m in members(source.read_bytes())])))
    assert read(file) == read(source) != []


@pytest.mark.parametrize("name", ["plain", "dictionary"])
def test_what_is_damaged_costs_that_record_alone(file: Path, name: str) -> None:
    data = bytearray(FILES[name])
    file.write_bytes(data)
    third = [place for place in scan(file) if not isinstance(place, int)][2]
    data[third.offset + 4 : third.offset + 24] = bytes(20)
    file.write_bytes(data)
    found = list(scan(file))
    assert [place for place in found if isinstance(place, int)] == [third.offset]
    assert len(found) == len(RECORDS)
    file.write_bytes(FILES[name][:-20])
    *others, last = scan(file)
    assert len(others) == len(RECORDS) - 1
    assert isinstance(last, int)  # of a block that is not whole, zstd gives nothing at all
    clipped = file.read_bytes()[last:]
    with pytest.raises(DamagedRecord):
        read_record(clipped, LIMIT, dictionary_of(FILES[name]))


def test_without_its_dictionary_nothing_is_read_and_all_is_counted(file: Path) -> None:
    file.write_bytes(skippable(0xD, b"no dictionary") + b"".join(frames(RECORDS, DICTIONARY)))
    found = list(scan(file))
    assert found and all(isinstance(place, int) for place in found)


@pytest.mark.parametrize("name", ["dictionary", "packed-dictionary"])
def test_a_file_that_ends_in_its_dictionary_is_damaged_and_not_empty(file: Path, name: str) -> None:
    file.write_bytes(FILES[name][:500])
    assert list(scan(file)) == [0]


def test_a_frame_of_a_wrong_length_hides_no_records(file: Path) -> None:
    frame = struct.pack("<II", 0x184D2A53, 1 << 31) + b"x" * 10
    first, *others = frames(RECORDS)
    file.write_bytes(b"".join([first, frame, *others]))
    found = list(scan(file))
    assert [place for place in found if isinstance(place, int)] == [len(first)]
    assert len(found) == 1 + len(RECORDS)


def test_a_bomb_is_not_unpacked(file: Path) -> None:
    bomb = zstd.compress(plain(http("zeros") + bytes(300 << 20)))
    assert len(bomb) < STEP
    with pytest.raises(OverflowError):
        read_record(bomb, 1 << 20)


@given(st.data())
def test_any_bytes_are_records_or_damage(data: st.DataObject) -> None:
    content = bytearray(FILES[data.draw(st.sampled_from(sorted(FILES)))][:6000])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.warc.zst"
        path.write_bytes(content)
        for place in scan(path):
            offset = place if isinstance(place, int) else place.offset
            assert 0 <= offset < len(content)


def test_a_source_of_such_files_becomes_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stages_inline(monkeypatch, tmp_path / "home"):
        inbox = tmp_path / "home" / "sources"
        inbox.mkdir(parents=True)
        for name, data in FILES.items():
            (inbox / f"{name}.warc.zst").write_bytes(data)
        source = SourceConfig(name="w", path=str(inbox), format="warc")
        made = gather(GatherConfig(sources=(source,)))
        assert made.counts["documents"] == len(FILES) * len(RECORDS)
        texts = {row["text"] for row in rows(made)}
    assert texts == {f"Page {n}. {PARAGRAPH.strip()}" for n in range(len(RECORDS))}
