"""Files of sorted rows: every row is in one range, however many ranges there are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.buckets import SLOTS, Parts, edge_of, read_range, write_parts, write_sorted
from tasks.corpus.dedup import partitions_of
from tasks.runtime.store import Directory

ROW = np.dtype([("key", "<u8"), ("row", "<u8")])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    path = str(tmp_path_factory.mktemp("buckets"))
    return Directory(path, path)


def rows_of(keys: list[int]) -> np.ndarray:
    rows = np.zeros(len(keys), ROW)
    rows["key"], rows["row"] = keys, np.arange(len(keys))
    return rows


# Keys near the edges of slots and ranges, not only anywhere.
SLOT = 2**64 // SLOTS
keys = st.one_of(
    st.integers(0, 2**64 - 1),
    st.builds(
        lambda slot, by: (slot * SLOT + by) % 2**64, st.integers(0, SLOTS), st.integers(-2, 2)
    ),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(keys, max_size=40), st.integers(1, 3 * SLOTS), st.data())
def test_each_row_is_in_the_range_of_its_key(
    directory: Directory, found: list[int], count: int, data: st.DataObject
) -> None:
    write_sorted(directory, "sorted", rows_of(found))
    looked_at = {key * count >> 64 for key in found}
    looked_at |= {data.draw(st.integers(0, count - 1)), 0, count - 1}
    seen: list[int] = []
    for number in sorted(looked_at):
        part = read_range(directory, "sorted", number, count, ROW)
        assert all(
            edge_of(number, count) <= int(key) < edge_of(number + 1, count) for key in part["key"]
        )
        seen += part["row"].tolist()
    assert seen == np.argsort(np.array(found, np.uint64), kind="stable").tolist()


def test_more_ranges_than_slots_hold_everything_once(directory: Directory) -> None:
    drawn = np.random.default_rng(0).integers(0, 2**64, 60_000, np.uint64)
    write_sorted(directory, "many", rows_of(drawn.tolist()))
    count = SLOTS + 1234
    parts = [read_range(directory, "many", number, count, ROW) for number in range(count)]
    assert np.array_equal(np.concatenate(parts)["key"], np.sort(drawn))
    assert max(map(len, parts)) < 40  # 60,000 over 5,330


def test_parts_know_how_many_they_are(directory: Directory) -> None:
    write_parts(directory, "parts", [b"a", b"", b"cd"])
    with Parts(directory, "parts") as parts:
        assert len(parts) == 3
        assert list(parts.read(np.arange(3))) == [b"a", b"", b"cd"]


def test_a_match_task_holds_the_keys_of_few_shards_however_many_there_are() -> None:
    assert [partitions_of(shards) for shards in (1, 4, 5, 16_384)] == [1, 1, 2, 4096]
    for shards in (20_000, 524_288, 660_000, 10**7):
        assert shards / partitions_of(shards) <= 128
    assert partitions_of(660_000) == 5157
