"""What deduplication knows of a document: digest, rank, band keys and the set of its shingles.

A function of one document each, so they are made before any threshold is applied, and once: another
threshold picks others of them. A signatures artifact has four files for each shard of documents:
    digests-NNNNN   an ENTRY for each document, sorted by the digest of its normalised text
    keys-NNNNN      an ENTRY for each document and band, sorted by the band's key
    sets-NNNNN      a part for each document: its shingles of 32 bits, in the order of the text
    names-NNNNN     a part for each document: its id and address
That is 28 bytes for each band (0.9 KB a document at 32) and 4 bytes a word.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from tasks.corpus.arrays import write_array
from tasks.corpus.buckets import Parts, read_range, write_parts, write_sorted
from tasks.corpus.documents import document_shards, places_among
from tasks.corpus.minhash import Bands
from tasks.corpus.sharding import run_shards
from tasks.corpus.urls import address_key
from tasks.corpus.word_hashes import words_of
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Directory

# `row` is shard << 32 | place in the shard; `digest` the second half of the text's, whose first
# half is the key of the digests' file; `order` the rank, smaller is better.
ENTRY = np.dtype([("key", "<u8"), ("digest", "<u8"), ("row", "<u8"), ("order", "<u4")])
SHARD = np.uint64(32)
LENGTH_STEP = 1.1  # a few words more do not make a mirror the better copy
_COPY = re.compile(
    r"[/._-](?:latest|old|archive[sd]?|print|printable|amp|mobile|mirrors?|cop(?:y|ies)|backup)"
    r"(?:[/._-]|$)|\?",
    re.IGNORECASE,
)


class SignatureConfig(StageConfig):
    """How documents are compared."""

    shingle_words: int = Field(5, ge=1, le=20)
    """Words in a shingle."""
    bands: int = Field(32, ge=1, le=256)
    """Bands of a MinHash signature; more find more pairs."""
    rows: int = Field(4, ge=1, le=16)
    """Rows of a band; fewer find less similar pairs, and more that must be looked at in vain."""


@dataclass(frozen=True)
class Signed:
    """Signatures of one corpus: `shards` of them in a directory."""

    where: Directory
    shards: int
    picked: Directory | None = None  # has the entries of what is still there; None: all are
    label: str = ""  # of an earlier corpus, as people are told

    def open(self, kind: str, shard: int) -> Parts:
        """A reader of the sets or names of one shard."""
        return Parts(self.where, f"{kind}-{shard:05d}")

    def entries(self, kind: str, shard: int, number: int, count: int) -> NDArray[np.void]:
        """The digests or keys of one shard in range `number` of `count`."""
        if self.picked is not None:
            return read_range(self.picked, f"_{kind}-{shard:05d}", number, count, ENTRY)
        return read_range(self.where, f"{kind}-{shard:05d}", number, count, ENTRY)


@dataclass(frozen=True)
class Sources:
    """The corpus that is deduplicated, and earlier ones; their shards are counted through."""

    current: Signed
    earlier: tuple[Signed, ...] = ()

    @property
    def shards(self) -> int:
        return self.current.shards + sum(signed.shards for signed in self.earlier)

    def corpora(self) -> Iterator[tuple[Signed, int]]:
        """Every corpus, the current one first, and how many shards stand before it."""
        start = 0
        for signed in (self.current, *self.earlier):
            yield signed, start
            start += signed.shards

    def open(self, kind: str, shard: int) -> Parts:
        """A reader of the sets or names of one shard."""
        for signed, start in self.corpora():
            if shard < start + signed.shards:
                return signed.open(kind, shard - start)
        raise IndexError(f"shard {shard} is beyond the last corpus")

    def label(self, row: int) -> str:
        """What the earlier corpus of a document is called; empty for the current one."""
        shard = row >> int(SHARD)
        return next(s.label for s, start in self.corpora() if shard < start + s.shards)

    def names(self, rows: NDArray[np.uint64]) -> dict[int, tuple[str, str]]:
        """Row → (id, address) of these documents."""
        found: dict[int, tuple[str, str]] = {}
        rows = np.unique(rows)
        for shard in np.unique(shard_of(rows)).tolist():
            wanted = rows[shard_of(rows) == shard]
            with self.open("names", shard) as parts:
                for row, name in zip(wanted.tolist(), parts.read(place_of(wanted)), strict=True):
                    one, _, url = name.decode("utf-8", "surrogatepass").partition("\n")
                    found[row] = (one, url)
        return found


def shard_of(rows: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (rows >> SHARD).astype(np.int64)


def place_of(rows: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (rows & np.uint64(0xFFFFFFFF)).astype(np.int64)


@stage("signatures", version=2)
def signatures(config: SignatureConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    """What documents are compared by, made once for all of them."""
    names, where = document_shards(documents), work.store.of(documents)
    items = [(config, where, name) for name in names]
    signed = run_shards(work, "signed", sign_shard, items, label="Signatures")
    rows = [{"documents": sum(signed), "shards": len(names)}]
    report = Report("signatures", "table", rows, "Documents that can be compared")
    return Outcome(counts={"documents": sum(signed), "shards": len(names)}, reports=(report,))


def sign_shard(
    work: Workspace, number: int, config: SignatureConfig, where: Directory, name: str
) -> int:
    """Write the four files of one shard; returns how many documents it has."""
    table = where.read_table(name)
    words, plain = words_of(table["text"].to_pylist())
    runs, bounds = words.runs(config.shingle_words)
    shingles = (runs >> np.uint64(32)).astype(np.uint32)
    # An earlier corpus may be from before documents said it.
    known = "canonical" in table.column_names
    canonicals = table["canonical"].to_pylist() if known else [None] * table.num_rows
    halves = b"".join(hashlib.sha256(text).digest()[:16] for text in plain)
    digests = np.frombuffer(halves, "<u8").reshape(-1, 2)
    entries = np.zeros(len(plain), ENTRY)
    entries["key"], entries["digest"] = digests[:, 0], digests[:, 1]
    entries["order"] = order_of(table["url"].to_pylist(), canonicals, table["bytes"].to_numpy())
    entries["row"] = (np.uint64(number) << SHARD) + np.arange(len(plain), dtype=np.uint64)
    write_sorted(work, f"digests-{number:05d}", entries)
    banded = np.repeat(entries, config.bands)
    banded["key"] = Bands(config.bands, config.rows).keys(shingles, bounds).ravel()
    write_sorted(work, f"keys-{number:05d}", banded)
    shingled = memoryview(shingles.astype("<u4").tobytes())
    edges = itertools.pairwise((bounds * 4).tolist())
    write_parts(work, f"sets-{number:05d}", [shingled[a:b] for a, b in edges])
    write_parts(work, f"names-{number:05d}", _names(table))
    return len(plain)


def _is_copy(url: str, canonical: str | None) -> bool:
    if canonical and address_key(canonical) != address_key(url):
        return True
    return bool(_COPY.search(url))


def pick_shard(work: Workspace, number: int, signed: Signed, where: Directory, name: str) -> int:
    """Of the signatures of one shard those of the documents that are still there.

    `_digests-NNNNN` and `_keys-NNNNN` with the rows they had, `_places-NNNNN.npy` with the place
    that each document had among all. No text is read; sets and names stay where they are. Returns
    how many there are.
    """
    with signed.open("names", number) as parts:
        count = len(parts)
        known = parts.read(np.arange(count))
        places = places_among(known, _names(where.read_table(name, ["id", "url"])))
    kept = np.zeros(count, bool)
    kept[places] = True
    for kind in ("digests", "keys"):
        entries = signed.entries(kind, number, 0, 1)
        write_sorted(work, f"_{kind}-{number:05d}", entries[kept[place_of(entries["row"])]])
    write_array(work, f"_places-{number:05d}.npy", places)
    return len(places)


def _names(table: pa.Table) -> list[bytes]:
    named = zip(table["id"].to_pylist(), table["url"].to_pylist(), strict=True)
    return [f"{one}\n{url}".encode("utf-8", "surrogatepass") for one, url in named]


def order_of(
    urls: Sequence[str], canonicals: Sequence[str | None], sizes: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """Ranks by the rule of the best copy, smaller is better; equal ones go by the address.

    Longer text in steps of a tenth (9 bits); a page that neither names another address as its
    canonical one nor has one that looks like a copy's (1); a shorter address (12).
    """
    steps = (np.log(sizes.astype(np.float64) + 1) / np.log(LENGTH_STEP)).astype(np.uint32)
    copies = np.array([*map(_is_copy, urls, canonicals)], np.uint32)
    lengths = np.array([min(len(url), 0xFFF) for url in urls], np.uint32)
    return (np.uint32(511) - steps) << np.uint32(13) | copies << np.uint32(12) | lengths
