"""Many small segments of rounds become few WARC files of the artifact.

Members of gzip files may be concatenated, so packing copies bytes and shifts offsets. Bodies of
pages that have not changed since the epoch before are copied the same way: an artifact then needs
no other to be read, and an older epoch may be deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tasks.corpus.warc import warcinfo
from tasks.runtime.stage import Workspace
from tasks.runtime.store import Directory


@dataclass(frozen=True)
class Source:
    """A file, or the named ranges (offset, length) of one."""

    directory: Directory
    name: str
    size: int
    ranges: tuple[tuple[int, int], ...] | None = None


def pack_segments(
    work: Workspace,
    run: Callable[[Callable[..., Any], list[tuple[Any, ...]]], Iterable[tuple[int, Any]]],
    segments: list[str],
    earlier: Directory | None,
    carried: list[tuple[str, int, int]],
    target_bytes: int,
) -> Callable[[str, int], tuple[str, int]]:
    """Write `warc/NNNNN.warc.gz`; returns a function from (file, offset) before to after.

    `segments` are files of `work`, taken whole; `carried` are (file, offset, length) of `earlier`.
    """
    sources = [
        Source(work, name, work.filesystem.get_file_info(work.location(name)).size)
        for name in segments
    ]
    ranges: dict[str, list[tuple[int, int]]] = {}
    for name, offset, length in carried:
        ranges.setdefault(name, []).append((offset, length))
    for name, found in sorted(ranges.items()):
        assert earlier is not None
        for start in range(0, len(found), 1000):
            some = tuple(sorted(found)[start : start + 1000])
            sources.append(Source(earlier, name, sum(length for _, length in some), some))
    batches: list[list[Source]] = []
    room = 0
    for source in sources:
        if not batches or room < source.size:
            batches.append([])
            room = target_bytes
        batches[-1].append(source)
        room -= source.size
    names = [f"warc/{number:05d}.warc.gz" for number in range(len(batches))]
    moved: dict[tuple[str, int], tuple[str, int]] = {}
    whole: dict[str, tuple[str, int]] = {}
    items: list[tuple[Any, ...]] = [
        (work, name, tuple(batch)) for name, batch in zip(names, batches, strict=True)
    ]
    for index, offsets in run(pack_one, items):
        for source, starts in zip(batches[index], offsets, strict=True):
            if source.ranges is None:
                whole[source.name] = (names[index], starts[0])
            else:
                for (old, _), new in zip(source.ranges, starts, strict=True):
                    moved[source.name, old] = (names[index], new)

    def place(name: str, offset: int) -> tuple[str, int]:
        if name in whole:
            file, base = whole[name]
            return file, base + offset
        return moved[name, offset]

    return place


def pack_one(work: Workspace, name: str, sources: tuple[Source, ...]) -> list[list[int]]:
    """Write one file; returns, per source, where its ranges (or its start) now are."""
    local = work.scratch("pack") / name.replace("/", "-")
    offsets: list[list[int]] = []
    with open(local, "wb") as out:
        if sources and sources[0].ranges is not None:
            out.write(warcinfo(local.name, software="Gristmill", format="WARC File Format 1.1"))
        for source in sources:
            with source.directory.filesystem.open_input_file(
                source.directory.location(source.name)
            ) as file:
                starts = []
                for offset, length in source.ranges or ((0, source.size),):
                    file.seek(offset)
                    starts.append(out.tell())
                    out.write(file.read(length))
                offsets.append(starts)
    work.put(local, name)
    local.unlink()
    return offsets
