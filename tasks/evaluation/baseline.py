"""The compression baseline stage: bits per byte of PPMd and xz, conditioned on the training text.

It depends on the corpus only, so models are compared with it without running it again. It also says
which held-out documents are scored, so that a model is scored on the very same bytes.
    documents.parquet   id and bytes of each, in their order
"""

from __future__ import annotations

from typing import Literal

import pyarrow as pa
from pydantic import Field

from tasks.corpus.sampling import Document, sample_documents
from tasks.evaluation.compression import (
    LABELS,
    METHODS,
    Method,
    compressed_size,
    conditional_bits_per_byte,
)
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.ray_session import ray_session
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Store

DOCUMENTS = pa.schema([("id", pa.string()), ("bytes", pa.int64())])


class BaselineConfig(StageConfig):
    """Which held-out text is scored, and what compressors have read before."""

    heldout_megabytes: float = Field(0.5, gt=0)
    """Held-out text that is scored; more than this is sampled by document."""
    training_megabytes: float = Field(32.0, gt=0)
    """Training text the compressors are conditioned on; more than this is sampled by document."""


@stage("compression-baseline", version=1)
def compression_baseline(config: BaselineConfig, work: Workspace, *, corpus: Manifest) -> Outcome:
    """What PPMd and xz need for the held-out documents after reading the training documents."""
    texts: tuple[Literal["training", "both"], ...] = ("training", "both")
    items = [(config, work, corpus, method, which) for which in texts for method in METHODS]
    sizes: dict[tuple[Method, str], int] = {}
    with ray_session() as session:
        documents = next(
            result
            for _, result in session.map(
                _choose, [(config, work, corpus)], label="Held-out documents", unit="texts"
            )
        )
        for index, size in session.map(_compress, items, label="Compressors", unit="texts"):
            sizes[items[index][3], items[index][4]] = size
    total = sum(documents["bytes"].to_pylist())
    work.write_table("documents.parquet", documents)
    bits = {
        method: conditional_bits_per_byte(sizes[method, "both"], sizes[method, "training"], total)
        for method in METHODS
    }
    table = [
        {"compressor": LABELS[method], "bits per byte": round(bits[method], 4)}
        for method in METHODS
    ]
    return Outcome(
        counts={"documents": documents.num_rows, "bytes": total},
        metrics={f"{method}_bits_per_byte": round(bits[method], 5) for method in METHODS},
        reports=(
            Report("baseline", "table", table, f"Conditioned on training text, on {total:,} bytes"),
        ),
    )


def heldout_documents(store: Store, corpus: Manifest, baseline: Manifest) -> list[Document]:
    """The documents a baseline scored, in its order. Raises UserError when one is missing."""
    wanted = store.of(baseline).read_table("documents.parquet")["id"].to_pylist()
    found: dict[str, str] = {}
    for table in store.tables(corpus, "heldout-", ["id", "text"]):
        names, texts = (table.column(name).to_pylist() for name in ("id", "text"))
        found.update(zip(names, texts, strict=True))
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(
            f"held-out document {missing[0]} of baseline {baseline.fingerprint[:12]} is not in "
            f"corpus {corpus.fingerprint[:12]}; evaluate with the baseline of the same corpus"
        )
    budget = int(float(baseline.config["heldout_megabytes"]) * 1e6)
    return [Document(name, found[name][:budget]) for name in wanted]


def _choose(config: BaselineConfig, work: Workspace, corpus: Manifest) -> pa.Table:
    """In a Ray worker: the held-out documents to score."""
    documents = _sample(work.store, corpus, "heldout-", config.heldout_megabytes)
    if not any(text.strip() for _, text in documents):
        raise UserError(
            "the corpus's held-out split holds no text to score a model on; "
            "raise the split's held-out share or crawl more documents"
        )
    rows = [{"id": name, "bytes": len(_bytes(text))} for name, text in documents]
    return pa.Table.from_pylist(rows, DOCUMENTS)


def _compress(
    config: BaselineConfig, work: Workspace, corpus: Manifest, method: Method, which: str
) -> int:
    """In a Ray worker: the compressed size of the training text, alone or with the held-out."""
    documents = _sample(work.store, corpus, "train-", config.training_megabytes)
    if which == "both":
        documents += _sample(work.store, corpus, "heldout-", config.heldout_megabytes)
    return compressed_size(method, b"".join(_bytes(text) for _, text in documents))


def _sample(store: Store, corpus: Manifest, prefix: str, megabytes: float) -> list[Document]:
    return sample_documents(store.tables(corpus, prefix, ["id", "text"]), int(megabytes * 1e6))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")
