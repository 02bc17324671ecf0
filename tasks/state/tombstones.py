"""What must not be in a corpus any more, and what was erased for it.

A tombstone names an address, a domain or a digest. The next corpus has nothing of it; erasing it
from what was made before is another step, and each artifact it touches is a row of `erasures`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from tasks.runtime.errors import UserError
from tasks.state.leases import is_dead
from tasks.state.schema import database, erasures, leases, tombstones

PURGE = "purge"  # the lease of an erasure; no stage begins while it is held


@dataclass(frozen=True)
class Tombstone:
    """`kind` is url, domain or digest; what `value` is, `tasks.corpus.tombstoned` says."""

    id: int
    kind: str
    value: str
    reason: str
    created: float
    withdrawn: float | None = None


@dataclass(frozen=True)
class Erasure:
    """One artifact that an erasure touched; without `finished` it was interrupted there."""

    id: int
    stage: str
    fingerprint: str
    action: str
    tombstones: tuple[int, ...]
    documents: int
    begun: float
    finished: float | None


def digest_of(standing: Iterable[Tombstone]) -> str:
    """SHA-256 over what a set of tombstones names; neither their order nor their reasons count."""
    named = sorted({(stone.kind, stone.value) for stone in standing})
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


class Tombstones:
    """The tombstones and erasures of one state database."""

    def __init__(self, url: str) -> None:
        self._engine = database(url)

    def add(self, kind: str, value: str, reason: str) -> Tombstone:
        """A new tombstone, or the one that already stands for this."""
        for stone in self.standing():
            if (stone.kind, stone.value) == (kind, value):
                return stone
        now = time.time()
        row = {"kind": kind, "value": value, "reason": reason, "created": now}
        with self._engine.begin() as connection:
            made = connection.execute(tombstones.insert().values(**row))
        key = made.inserted_primary_key
        assert key is not None
        return Tombstone(int(key[0]), kind, value, reason, now)

    def all(self) -> list[Tombstone]:
        """Every tombstone there ever was, oldest first."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(tombstones).order_by(tombstones.c.id))
            return [Tombstone(**row._mapping) for row in rows]

    def standing(self) -> list[Tombstone]:
        return [stone for stone in self.all() if stone.withdrawn is None]

    def withdraw(self, id: int) -> None:
        """It counts no longer; what was erased stays so. Raises UserError where there is none."""
        with self._engine.begin() as connection:
            changed = connection.execute(
                tombstones.update()
                .where(tombstones.c.id == id, tombstones.c.withdrawn.is_(None))
                .values(withdrawn=time.time())
            )
        if not changed.rowcount:
            raise UserError(f"no tombstone {id} stands; see them: gristmill forget --list")

    # --- erasures --------------------------------------------------------------------------------

    def begin(
        self, stage: str, fingerprint: str, action: str, stones: Iterable[int], documents: int
    ) -> int:
        """Note what is about to happen, so that a killed erasure is known and can be ended."""
        row = {
            "stage": stage,
            "fingerprint": fingerprint,
            "action": action,
            "tombstones": sorted(stones),
            "documents": documents,
            "begun": time.time(),
        }
        with self._engine.begin() as connection:
            key = connection.execute(erasures.insert().values(**row)).inserted_primary_key
        assert key is not None
        return int(key[0])

    def finish(self, id: int) -> None:
        with self._engine.begin() as connection:
            connection.execute(
                erasures.update().where(erasures.c.id == id).values(finished=time.time())
            )

    def erased(self) -> list[Erasure]:
        """Every artifact that was touched, oldest first."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(erasures).order_by(erasures.c.id))
            return [
                Erasure(**{**row._mapping, "tombstones": tuple(row.tombstones)}) for row in rows
            ]

    def at_work(self) -> list[str]:
        """What runs are making now, as `stage/fingerprint`."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(leases).where(leases.c.expires > time.time()))
            return [row.key for row in rows if row.key != PURGE and not is_dead(row.holder)]
