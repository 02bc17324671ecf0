"""What deduplication knows of a document: digest, rank, band keys and the set of its shingles.

For each shard of documents three files, whoever writes them (the deduplicate stage as scratch, the
signatures stage as an artifact of an earlier corpus):
    digests-NNNNN   an ENTRY for each document, sorted by the digest of its normalised text
    keys-NNNNN      an ENTRY for each document and band, sorted by the band's key
    sets-NNNNN      its shingles of 32 bits, in the order of the text, and where each set begins
That is 32 bytes for each band (1 KB a document at 32) and 4 bytes a word.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tasks.corpus.buckets import write_sorted
from tasks.corpus.documents import document_shards
from tasks.corpus.minhash import Bands, Folded
from tasks.corpus.sharding import run_shards
from tasks.corpus.word_hashes import words_of
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, StageConfig, Workspace, stage
from tasks.runtime.store import Directory

# `row` is shard << 32 | place in the shard; `digest` the second half of the text's, whose first
# half is the key of the digests' file; `order` the rank, smaller is better.
ENTRY = np.dtype([("key", "<u8"), ("digest", "<u8"), ("order", "<u8"), ("row", "<u8")])
SHARD = np.uint64(32)
LENGTH_STEP = 1.1  # a few words more do not make a mirror the better copy
_COPY = re.compile(
    r"[/._-](?:latest|old|archive[sd]?|print|printable|amp|mobile|mirrors?|cop(?:y|ies)|backup)"
    r"(?:[/._-]|$)|\?",
    re.IGNORECASE,
)
_COUNT = np.dtype("<u8")


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
    prefix: str = ""  # "_" where they are scratch

    def name(self, kind: str, number: int) -> str:
        return f"{self.prefix}{kind}-{number:05d}"


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

    def sets(self, shard: int) -> ShingleSets:
        """A reader of the sets of one shard."""
        for signed, start in self.corpora():
            if shard < start + signed.shards:
                return ShingleSets(signed.where, signed.name("sets", shard - start))
        raise IndexError(f"shard {shard} is beyond the last corpus")


@stage("signatures", version=1)
def signatures(config: SignatureConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    """What later corpora are compared with: the signatures of an earlier one, made once."""
    names = document_shards(documents)
    items = [(config, "", documents, name) for name in names]
    signed = run_shards(work, "signed", sign_shard, items, label="Signatures of earlier documents")
    return Outcome(counts={"documents": sum(signed), "shards": len(names)})


def sign_shard(
    work: Workspace,
    number: int,
    config: SignatureConfig,
    prefix: str,
    documents: Manifest,
    name: str,
) -> int:
    """Write the three files of one shard; returns how many documents it has."""
    table = work.store.of(documents).read_table(name, ["url", "text", "bytes"])
    words, plain = words_of(table["text"].to_pylist())
    shingles, bounds = words.runs(config.shingle_words)
    halves = b"".join(hashlib.sha256(text).digest()[:16] for text in plain)
    digests = np.frombuffer(halves, "<u8").reshape(-1, 2)
    entries = np.zeros(len(plain), ENTRY)
    entries["key"], entries["digest"] = digests[:, 0], digests[:, 1]
    entries["order"] = order_of(table["url"].to_pylist(), table["bytes"].to_numpy())
    entries["row"] = (np.uint64(number) << SHARD) + np.arange(len(plain), dtype=np.uint64)
    signed = Signed(work, 0, prefix)
    write_sorted(work, signed.name("digests", number), entries)
    banded = np.repeat(entries, config.bands)
    banded["key"] = Bands(config.bands, config.rows).keys(shingles, bounds).ravel()
    write_sorted(work, signed.name("keys", number), banded)
    write_sets(work, signed.name("sets", number), shingles, bounds)
    return len(plain)


def order_of(urls: Sequence[str], sizes: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Ranks by the rule of the best copy, smaller is better.

    Longer text in steps of a tenth (9 bits); an address that does not look like a copy's (1); a
    shorter one (12); the digest of the address (42), so that ranks need no look at other documents.
    """
    steps = (np.log(sizes.astype(np.float64) + 1) / np.log(LENGTH_STEP)).astype(np.uint64)
    copies = np.array([bool(_COPY.search(url)) for url in urls], np.uint64)
    lengths = np.array([min(len(url), 0xFFF) for url in urls], np.uint64)
    digests = b"".join(hashlib.sha256(url.encode("utf-8", "replace")).digest()[:8] for url in urls)
    last = np.frombuffer(digests, "<u8") >> np.uint64(22)
    first = (np.uint64(511) - steps) << np.uint64(55)
    return first | copies << np.uint64(54) | lengths << np.uint64(42) | last


def write_sets(
    directory: Directory, name: str, shingles: Folded, bounds: NDArray[np.int64]
) -> None:
    """How many sets there are, their bounds (D + 1,) and all shingles."""
    head = np.array([len(bounds) - 1, *bounds], _COUNT)
    directory.write_bytes(name, head.tobytes() + shingles.astype("<u4").tobytes())


class ShingleSets:
    """The sets of one shard, as a reader of the few that are asked for."""

    def __init__(self, directory: Directory, name: str) -> None:
        self._file = directory.filesystem.open_input_file(directory.location(name))
        size = _COUNT.itemsize
        count = int(np.frombuffer(self._file.read_at(size, 0), _COUNT)[0])
        self._bounds = np.frombuffer(self._file.read_at((count + 1) * size, size), _COUNT)
        self._start = (count + 2) * size

    def read(self, places: NDArray[np.int64]) -> list[Folded]:
        """Sorted sets of the documents at these places (sorted), one after another.

        Where more than an eighth is wanted the file is read whole, else set by set.
        """
        edges = np.column_stack([self._bounds[places], self._bounds[places + 1]]).astype(np.int64)
        wanted = int((edges[:, 1] - edges[:, 0]).sum())
        if wanted * 8 > int(self._bounds[-1]):
            data = self._file.read_at(int(self._bounds[-1]) * 4, self._start)
            whole = np.frombuffer(data, "<u4")
            return [np.unique(whole[a:b]) for a, b in edges.tolist()]
        return [
            np.unique(np.frombuffer(self._file.read_at((b - a) * 4, self._start + a * 4), "<u4"))
            for a, b in edges.tolist()
        ]

    def close(self) -> None:
        self._file.close()
