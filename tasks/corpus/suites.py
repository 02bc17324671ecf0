"""Evaluation suites that training must not have seen: their items, an index of their n-grams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from tasks.corpus.arrays import read_array, write_array
from tasks.corpus.shingles import Hashes
from tasks.corpus.source_config import SourceConfig, content_digest, files_of
from tasks.corpus.source_rows import plain_rows, text_lines
from tasks.corpus.word_hashes import words_of
from tasks.runtime.errors import UserError
from tasks.runtime.fingerprint import place
from tasks.runtime.settings import Settings
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Directory

TEMPLATE_ITEMS = 50  # an n-gram of so many items is the suite's own wording, not an item's
_EXCERPT = 300  # characters of an item that reports show


class SuiteConfig(StageConfig):
    """A file, or a directory of files, with the items of an evaluation."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,40}$")
    """What reports call it."""
    path: str = place(..., min_length=1)
    """A file or directory below one of the configured roots (GRISTMILL_SOURCE_ROOTS)."""
    format: Literal["jsonl", "parquet", "text"] = "jsonl"
    """jsonl and parquet: an item a row. text: an item a line."""
    fields: tuple[str, ...] = Field(("text",), min_length=1)
    """Fields of a row that hold text, or lists of texts; each is looked for by itself."""

    def source(self) -> SourceConfig:
        format: Literal["folder", "jsonl", "parquet"]
        format = "folder" if self.format == "text" else self.format
        return SourceConfig(name="suite", path=self.path, format=format)

    def digest(self, settings: Settings) -> str:
        """Of the content of its files."""
        return content_digest(self.source(), settings)


@dataclass(frozen=True)
class Item:
    """One text of an evaluation item: what it is called and what it says."""

    suite: str
    item: str  # row and field, as `12.question`
    text: str


def items_of(suite: SuiteConfig, settings: Settings) -> Iterator[Item]:
    """All texts of a suite. Raises UserError naming suite, file and line where it can't be read."""
    found, seen = 0, set[str]()
    rows = (row for path in files_of(suite.source(), settings) for row in _rows(suite, path))
    number = 0
    for number, row in enumerate(rows, 1):
        seen |= row.keys()
        for field in suite.fields:
            value = row.get(field)
            for part, text in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(text, str) and text.strip():
                    found += 1
                    within = f"[{part}]" if isinstance(value, list) else ""
                    named = f"{number}" if suite.format == "text" else f"{number}.{field}{within}"
                    yield Item(suite.name, named, text)
    if not found:
        raise UserError(
            f"suite {suite.name!r}: no text in fields {', '.join(suite.fields)} of {number} items; "
            f"its fields are: {', '.join(sorted(seen)) or 'none'}"
        )


def _rows(suite: SuiteConfig, path: Path) -> Iterator[dict[str, Any]]:
    if suite.format == "parquet":
        try:
            for batch in pq.ParquetFile(path).iter_batches():
                yield from plain_rows(batch)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"suite {suite.name!r}: {path.name} is no whole Parquet file: {error}; check format"
            ) from error
        return
    for number, line in text_lines(path, f"suite {suite.name!r}"):
        if suite.format == "text":
            yield dict.fromkeys(suite.fields[:1], line)
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"suite {suite.name!r}: line {number} of {path.name} is no JSON ({error}); "
                "set its format, or mend the file"
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"suite {suite.name!r}: line {number} of {path.name} holds "
                f"{type(row).__name__}, not an object with fields"
            )
        yield row


@dataclass(frozen=True)
class Index:
    """Where each n-gram of the items stands: G distinct ones, in O places.

    Those of gram g are `item` and `place` (word of the item's text) from `bounds[g]` to
    `bounds[g + 1]`. 12 bytes for each place, 16 for each gram.
    """

    grams: Hashes  # (G,), sorted
    bounds: NDArray[np.int64]  # (G + 1,)
    item: NDArray[np.uint32]  # (O,)
    place: NDArray[np.uint32]  # (O,)
    words: NDArray[np.uint32]  # (I,) of each item's text

    @classmethod
    def of(cls, items: list[Item], n: int) -> tuple[Index, int]:
        """An index of the items of `n` words or more; returns how many are shorter, too."""
        words, _ = words_of([item.text for item in items])
        grams, bounds = words.runs(n)
        sizes = np.diff(words.bounds)
        owners = np.repeat(np.arange(len(items)), np.diff(bounds))
        long = sizes[owners] >= n
        places = np.arange(len(grams)) - bounds[owners]
        grams, owners, places = grams[long], owners[long], places[long]
        by = np.lexsort((places, owners, grams))
        grams, owners, places = grams[by], owners[by], places[by]
        distinct, group = np.unique(grams, return_inverse=True)
        new = np.ones(len(grams), bool)
        new[1:] = (grams[1:] != grams[:-1]) | (owners[1:] != owners[:-1])
        kept = np.bincount(group[new], minlength=len(distinct)) < TEMPLATE_ITEMS
        stays = kept[group]
        counts = np.bincount(group, minlength=len(distinct))[kept]
        index = cls(
            distinct[kept],
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            owners[stays].astype(np.uint32),
            places[stays].astype(np.uint32),
            sizes.astype(np.uint32),
        )
        return index, int((sizes < n).sum())

    def write(self, directory: Directory, prefix: str) -> None:
        for name, array in vars(self).items():
            write_array(directory, f"{prefix}{name}.npy", array)

    @classmethod
    def read(cls, directory: Directory, prefix: str) -> Index:
        return cls(
            **{name: read_array(directory, f"{prefix}{name}.npy") for name in cls.__annotations__}
        )

    def items_of(self, grams: NDArray[np.bool_]) -> list[int]:
        """Items that have one of the chosen n-grams, (G,), at least."""
        chosen = np.repeat(grams, np.diff(self.bounds))
        return sorted(set(self.item[chosen].tolist()))

    def find(self, grams: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(places in `grams`, numbers of the gram there) of those that items have too."""
        if len(self.grams) == 0:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        # A look into a table of bits first: most n-grams of a text are in no suite.
        bits = min(len(self.grams).bit_length() + 5, 27)
        shift = np.uint64(64 - bits)
        known = np.zeros(1 << bits, np.bool_)
        known[self.grams >> shift] = True
        maybe = np.flatnonzero(known[grams >> shift])
        at = np.minimum(np.searchsorted(self.grams, grams[maybe]), len(self.grams) - 1)
        hits = self.grams[at] == grams[maybe]
        return maybe[hits], at[hits]


def excerpt(text: str) -> str:
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"
