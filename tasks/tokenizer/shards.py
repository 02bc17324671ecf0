"""The token shards stage: documents as flat arrays of token ids, ready to be memory mapped.

One output shard for each input shard: `tokens-00000.npy`, uint16 (uint32 from a vocabulary of
65,536 on), documents one after another, each `<s> text </s>`; and `tokens-00000.documents.npy`,
int64, where each document starts. A document of a weighted source stands there as often as its
weight says (`tasks.corpus.weights`). The training split gives `tokens-*`, the held-out split
`heldout-tokens-*`. Documents of a source other than the crawl go to shards of their own,
`tokens-SOURCE-00000.npy`, so that a training can weigh and judge them apart.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from model.chat import Tokenizer
from tasks.corpus.weights import copies_of, rounds
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.ray_session import ray_session
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.tokenizer.stored import load_tokenizer

CRAWLED = "seeds"  # the source of what was crawled
SPLITS = {"train": "tokens", "heldout": "heldout-tokens"}


class ShardsConfig(StageConfig):
    """Token shards follow from the corpus and the tokenizer; there is nothing to choose yet."""


@stage("token-shards", version=2)
def write_token_shards(
    config: ShardsConfig, work: Workspace, *, corpus: Manifest, tokenizer: Manifest
) -> Outcome:
    """Write both splits of the corpus as token ids, shard by shard."""
    items = [
        (work, corpus, tokenizer, name, output, f"{number:05d}")
        for split, output in SPLITS.items()
        for number, name in enumerate(corpus.names(f"{split}-", ".parquet"))
    ]
    counts = {
        f"{prefix}{unit}": 0
        for prefix in ("", "heldout_")
        for unit in ("documents", "bytes", "tokens")
    }
    by_source: dict[tuple[str, str], list[int]] = {}
    new: Counter[str] = Counter()
    with ray_session() as session:
        for index, report in session.map(_write_shard, items, label="Tokens"):
            prefix = "heldout_" if items[index][4].startswith("heldout") else ""
            for source, (*amounts, first) in report.items():
                if not prefix:
                    new[source] += first
                row = by_source.setdefault((prefix, source), [0, 0, 0])
                for place, (unit, amount) in enumerate(
                    zip(("documents", "bytes", "tokens"), amounts, strict=True)
                ):
                    counts[f"{prefix}{unit}"] += amount
                    row[place] += amount
    if counts["tokens"] == 0:
        raise UserError("the training split holds no text to write as tokens; crawl more documents")
    rate = counts["bytes"] / counts["tokens"]
    table = [
        {
            "split": "held out" if prefix else "train",
            "source": source,
            "documents": documents,
            "bytes": size,
            "tokens": tokens,
        }
        for (prefix, source), (documents, size, tokens) in sorted(by_source.items())
    ]
    if len({source for _, source in by_source}) > 1:
        counts |= {f"{p}tokens_{source}": row[2] for (p, source), row in by_source.items()}
    # Where a weight has written copies; forecasts ask for it.
    copied = [source for source in new if new[source] < by_source["", source][2]]
    counts |= {f"new_tokens_{source}": new[source] for source in copied}
    return Outcome(
        counts=counts,
        metrics={"bytes_per_token": round(rate, 4)},
        reports=(Report("token-shards", "table", table, "Documents, bytes and tokens"),),
    )


def encode_documents(
    tokenizer: Tokenizer, texts: list[str]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """(all ids in one array, where each document starts in it)."""
    ids: list[int] = []
    starts = []
    for text in texts:
        starts.append(len(ids))
        ids += tokenizer.encode_document(text)
    kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    return np.array(ids, dtype=kind), np.array(starts, dtype=np.int64)


def source_of(warc: str | None) -> str:
    """The source that a document came from: `NAME:file`, or a file of the crawl."""
    name, colon, _ = (warc or "").partition(":")
    return name if colon else CRAWLED


def written_rows(table: pa.Table, *, training: bool) -> dict[str, list[int]]:
    """The rows of a shard of documents by source, in the order in which their tokens are written;
    in training those of a weighted source as often as its weight says."""
    order = rounds(copies_of(table)) if training else range(table.num_rows)
    origins = table["warc"].to_pylist()
    found: dict[str, list[int]] = {}
    for row in order:
        found.setdefault(source_of(origins[row]), []).append(row)
    return found


def shard_sources(names: Iterable[str], prefix: str) -> dict[str, list[str]]:
    """The shards of a split (`tokens` or `heldout-tokens`) by source, from all files' names."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        stem = PurePath(name).stem
        if stem.startswith(f"{prefix}-") and name.endswith(".npy") and "." not in stem:
            source, _, _ = stem.removeprefix(f"{prefix}-").rpartition("-")
            found.setdefault(source or CRAWLED, []).append(name)
    return found


def _write_shard(
    work: Workspace,
    corpus: Manifest,
    tokenizer: Manifest,
    name: str,
    output: str,
    number: str,
) -> dict[str, tuple[int, int, int, int]]:
    """In a Ray worker: an input shard's sources, each unless an earlier attempt wrote it; their
    documents, bytes and tokens, and how many of these are not of copies."""
    store = work.store
    table = store.of(corpus).read_table(name)
    every = table["text"].to_pylist()
    report = {}
    for source, rows in written_rows(table, training=name.startswith("train-")).items():
        texts = [every[row] for row in rows]
        target = "-".join((output, *(() if source == CRAWLED else (source,)), number))
        if not work.has(f"{target}.npy"):
            model = load_tokenizer(store, tokenizer)
            ids, starts = encode_documents(model, texts)
            work.write_bytes(f"{target}.documents.npy", _npy(starts))
            work.write_bytes(f"{target}.npy", _npy(ids))
        size = sum(len(text.encode("utf-8", "replace")) for text in texts)
        tokens = _length(work.read_bytes(f"{target}.npy"))
        new = tokens
        if len(documents := set(rows)) < len(rows):  # copies come last
            starts = np.load(io.BytesIO(work.read_bytes(f"{target}.documents.npy")))
            new = int(starts[len(documents)])
        report[source] = (len(texts), size, tokens, new)
    return report


def _npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _length(data: bytes) -> int:
    return len(np.load(io.BytesIO(data), allow_pickle=False))
