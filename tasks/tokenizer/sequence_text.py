"""What a stretch of training data says: the documents, or questions and answers, behind it.

A training that stops names its last batch by places (`model.loader.Place`); `gristmill sequence`
shows them. Token shards know no documents but where each begins; which they are follows from the
corpus, whose rows were written in a known order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from model.loader import Place
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import Store
from tasks.tokenizer.shards import CRAWLED, SPLITS, written_rows
from tasks.tokenizer.stored import load_tokenizer

PAIRS, CONVERSATIONS, SHARDS = "pairs", "conversations", "token-shards"


@dataclass(frozen=True)
class Passage:
    """Text of one document or example. document: its id, and address: its URL; both empty where the
    corpus is not in the store any more."""

    document: str
    address: str
    text: str


def passages(store: Store, artifact: Manifest, place: Place) -> Iterator[Passage]:
    """What lies at a place of token shards, of question pairs or of conversations.

    Raises UserError when the artifact has no such file or place.
    """
    readable = [name for name in artifact.names() if _is_data(artifact.stage, name)]
    if place.file not in readable:
        raise UserError(
            f"{artifact.stage}/{artifact.fingerprint[:12]} has no training data {place.file!r}; it "
            f"has {', '.join(readable[:6])}"
        )
    if artifact.stage == PAIRS:
        yield from _examples(store, artifact, place)
    elif artifact.stage == CONVERSATIONS:
        yield from _conversations(store, artifact, place)
    else:
        yield from _documents(store, artifact, place)


def _is_data(stage: str, name: str) -> bool:
    """Whether a file holds what is learned, and not where documents begin or how it was made."""
    if stage == PAIRS:
        return name.startswith(("pairs-", "questions-")) and name.endswith(".parquet")
    if stage == CONVERSATIONS:
        return name.endswith(".parquet")
    return name.endswith(".npy") and not name.endswith(".documents.npy")


def _examples(store: Store, pairs: Manifest, place: Place) -> Iterator[Passage]:
    table = store.of(pairs).read_table(place.file)
    _require(place, table.num_rows, "rows")
    for row in table.slice(place.start, place.count).to_pylist():
        yield Passage(row.get("fact", ""), "", f"{row['question']} ▶ {row['answer']}")


def _conversations(store: Store, conversations: Manifest, place: Place) -> Iterator[Passage]:
    table = store.of(conversations).read_table(place.file)
    _require(place, table.num_rows, "rows")
    for row in table.slice(place.start, place.count).to_pylist():
        yield Passage(row["id"], row["url"], f"{row['messages']} {row['tools']}")


def _documents(store: Store, shards: Manifest, place: Place) -> Iterator[Passage]:
    tokens = np.load(store.local(shards, place.file), mmap_mode="r")
    _require(place, len(tokens), "tokens")
    beginnings = PurePath(place.file).with_suffix(".documents.npy").name
    starts = np.load(store.local(shards, beginnings))
    tokenizer = load_tokenizer(store, store.get("tokenizer", shards.inputs["tokenizer"]))
    end = min(place.start + place.count, len(tokens))
    names = _names(store, shards, place.file)
    for number in range(int(np.searchsorted(starts, place.start, "right")) - 1, len(starts)):
        if starts[number] >= end:
            break
        following = starts[number + 1] if number + 1 < len(starts) else len(tokens)
        piece = tokens[max(place.start, starts[number]) : min(end, following)]
        yield Passage(*(names[number] if names else ("", "")), tokenizer.decode(piece.tolist()))


def _names(store: Store, shards: Manifest, file: str) -> list[tuple[str, str]] | None:
    """(id, address) of the documents of a shard, in the order in which they were written."""
    corpus = store.find("split", shards.inputs["corpus"])
    if corpus is None:
        return None
    stem, _, number = PurePath(file).stem.rpartition("-")
    split, output = next(
        (split, output)
        for split, output in SPLITS.items()
        if stem == output or stem.startswith(f"{output}-")
    )
    source = stem.removeprefix(output).removeprefix("-") or CRAWLED
    name = corpus.names(f"{split}-", ".parquet")[int(number)]
    table = store.of(corpus).read_table(name)
    ids, addresses = table["id"].to_pylist(), table["url"].to_pylist()
    rows = written_rows(table, training=split == "train")[source]
    return [(ids[row], addresses[row]) for row in rows]


def _require(place: Place, size: int, unit: str) -> None:
    if not 0 <= place.start < size or place.count < 1:
        raise UserError(
            f"{place.file} has {size} {unit}, none at {place.start} (of {place.count}); count from "
            f"0"
        )
