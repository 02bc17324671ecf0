"""The token shards stage: documents as flat arrays of token ids, ready to be memory mapped.

One output shard for each input shard: `tokens-00000.npy`, uint16 (uint32 from a vocabulary of
65,536 on), documents one after another, each `<s> text </s>`; and `tokens-00000.documents.npy`,
int64, where each document starts. A document of a weighted source stands there as often as its
weight says (`tasks.corpus.weights`). The training split gives `tokens-*`, the held-out split
`heldout-tokens-*`.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.chat import Tokenizer
from tasks.corpus.weights import copies_of, rounds
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.ray_session import ray_session
from tasks.runtime.stage import Outcome, Report, StageConfig, Workspace, stage

SPLITS = {"train": "tokens", "heldout": "heldout-tokens"}


class ShardsConfig(StageConfig):
    """Token shards follow from the corpus and the tokenizer; there is nothing to choose yet."""


@stage("token-shards", version=1)
def write_token_shards(
    config: ShardsConfig, work: Workspace, *, corpus: Manifest, tokenizer: Manifest
) -> Outcome:
    """Write both splits of the corpus as token ids, shard by shard."""
    items = [
        (work, corpus, tokenizer, name, f"{output}-{number:05d}")
        for split, output in SPLITS.items()
        for number, name in enumerate(corpus.names(f"{split}-", ".parquet"))
    ]
    counts = {
        f"{prefix}{unit}": 0
        for prefix in ("", "heldout_")
        for unit in ("documents", "bytes", "tokens")
    }
    with ray_session() as session:
        for index, (documents, size, tokens) in session.map(_write_shard, items, label="Tokens"):
            prefix = "heldout_" if items[index][4].startswith("heldout") else ""
            counts[f"{prefix}documents"] += documents
            counts[f"{prefix}bytes"] += size
            counts[f"{prefix}tokens"] += tokens
    if counts["tokens"] == 0:
        raise UserError("the training split holds no text to write as tokens; crawl more documents")
    rate = counts["bytes"] / counts["tokens"]
    table = [
        {
            "split": split,
            "documents": counts[f"{prefix}documents"],
            "bytes": counts[f"{prefix}bytes"],
            "tokens": counts[f"{prefix}tokens"],
        }
        for split, prefix in (("train", ""), ("held out", "heldout_"))
    ]
    return Outcome(
        counts=counts,
        metrics={"bytes_per_token": round(rate, 4)},
        reports=(Report("token-shards", "table", table, "Documents, bytes and tokens by split"),),
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


def _write_shard(
    work: Workspace,
    corpus: Manifest,
    tokenizer: Manifest,
    source: str,
    target: str,
) -> tuple[int, int, int]:
    """In a Ray worker: one shard, unless an earlier attempt wrote it; documents, bytes, tokens."""
    store = work.store
    table = store.of(corpus).read_table(source)
    order = rounds(copies_of(table)) if source.startswith("train-") else range(table.num_rows)
    every = table["text"].to_pylist()
    texts = [every[row] for row in order]
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    if not work.has(f"{target}.npy"):
        model = Tokenizer.load(store.local(tokenizer, "tokenizer.model"))
        ids, starts = encode_documents(model, texts)
        work.write_bytes(f"{target}.documents.npy", _npy(starts))
        work.write_bytes(f"{target}.npy", _npy(ids))
    return len(texts), size, _length(work.read_bytes(f"{target}.npy"))


def _npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _length(data: bytes) -> int:
    return len(np.load(io.BytesIO(data), allow_pickle=False))
