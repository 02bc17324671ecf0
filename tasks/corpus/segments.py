"""The WARC files of one partition, and what they remember after a kill."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Iterator

from tasks.corpus import warc
from tasks.corpus.fetch_plan import SEGMENTS, Outcome, Plan
from tasks.runtime.stage import Workspace


class Segments:
    """The partition's WARC files: the open one on this machine, full ones in the work directory.

    One process has them at a time: a worker whose driver was killed fetches on for a moment, and
    the next attempt waits for its end. The system lets go of a killed process's lock.
    """

    def __init__(self, plan: Plan, work: Workspace) -> None:
        self._plan, self._work = plan, work
        self._local = work.scratch("open")
        self._lock = os.open(self._local / f"{plan.name}.lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._number = 0
        self._writer: warc.SegmentWriter | None = None

    def _name(self, number: int) -> str:
        return f"{self._plan.name}-{number:04d}.warc.gz"

    def replay(self) -> Iterator[Outcome]:
        """What earlier attempts committed; an open segment is cut back to its last commit."""
        while True:
            name = self._name(self._number)
            if self._work.has(f"{SEGMENTS}/{name}"):
                data = self._work.read_bytes(f"{SEGMENTS}/{name}")
                (self._local / name).unlink(missing_ok=True)
                self._number += 1
            elif (self._local / name).exists():
                warc.mend(self._local / name)
                data = (self._local / name).read_bytes()
                self._number += 1
            else:
                break
            for values, member in warc.commits(data):
                yield Outcome.of_commit(values, name, member)

    def append(self, outcome: Outcome, records: tuple[bytes, ...], url: str) -> Outcome:
        """Write an outcome with its request and response records; returns it with its place."""
        if self._writer is not None and self._writer.size >= self._plan.segment_bytes:
            self._writer.close()
            self._writer = None
            self._number += 1
        if self._writer is None:
            self._writer = warc.SegmentWriter(
                self._local / self._name(self._number),
                software="Gristmill",
                robots="RFC 9309",
                format="WARC File Format 1.1",
                **{"http-header-user-agent": self._plan.limits.user_agent},
            )
        commit = warc.metadata_record(url, outcome.record_id, outcome.commit())
        places = self._writer.append([*records, commit])
        if len(records) < 2:
            return outcome
        return dataclasses.replace(
            outcome,
            segment=self._name(self._number),
            offset=places[1][0],
            length=places[1][1],
        )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        os.close(self._lock)

    def commit(self) -> list[str]:
        """Copy the segments into the work directory, where the next step finds them."""
        if self._writer is not None:
            self._writer.close()
        names = []
        for number in range(self._number + 1):
            name = self._name(number)
            if (self._local / name).exists():
                if not self._work.has(f"{SEGMENTS}/{name}"):
                    self._work.put(self._local / name, f"{SEGMENTS}/{name}")
                (self._local / name).unlink()
            if self._work.has(f"{SEGMENTS}/{name}"):
                names.append(name)
        return names
