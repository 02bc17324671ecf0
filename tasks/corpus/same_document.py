"""Under which ids one document is known: stages that change a text change its id."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tasks.runtime.settings import Settings
from tasks.runtime.store import Store

PLACE = ("url", "warc", "offset", "record_id")
TABLES = ("documents-", "train-", "heldout-")


def known_ids(settings: Settings, digest: str) -> list[str]:
    """`digest`, and every id that a document with this id has in any artifact of the store.

    Masking personal data or cutting held-out lines makes another text and so another id; where a
    document came from (file, offset and record) stays.
    """
    if ":" in digest:  # of a payload, and no id
        return [digest]
    store = Store.open(settings)
    places = {place for id, place in _documents(store) if id == digest}
    same = {id for id, place in _documents(store) if place in places} if places else set()
    return [digest, *sorted(same - {digest})]


def _documents(store: Store) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for stage in store.stages():
        for manifest in store.all(stage):
            directory = store.of(manifest)
            for name in manifest.names(suffix=".parquet"):
                if not name.startswith(TABLES):
                    continue
                table = directory.read_present(name, ("id", *PLACE))
                if table.num_columns <= len(PLACE):
                    continue
                for row in table.to_pylist():
                    yield row["id"], tuple(row[name] for name in PLACE)
