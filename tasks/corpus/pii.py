"""Personal data and secrets: masked in every document, and documents with many of them dropped.

The pii stage masks text and title, and writes beside the documents how many finds of each kind they
had: `attributes-NNNNN.parquet` with `id` (of the masked text), `url` and a column for each kind. It
stands before measuring and knows no threshold. The pii-drop stage applies `most` to those columns.

An address stays as it is: it is what a document is known by, found again in its WARC record, and
forgotten.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from tasks.corpus.documents import (
    Removal,
    Tally,
    counts,
    document_id,
    document_shards,
    require_some,
    selection_reports,
    write_selection,
)
from tasks.corpus.measure import attributes_of
from tasks.corpus.personal import KINDS, mask
from tasks.corpus.sharding import run_shards
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Directory

NAMES = tuple(dict.fromkeys(kind.name for kind in KINDS))


class PIIConfig(StageConfig):
    """What happens to personal data and secrets in documents."""

    action: Literal["keep", "mask", "drop"] = "keep"
    """keep: nothing is looked for. mask: each find becomes a word such as <email>. drop: the same,
    and a document with more finds than `most` is removed (rule pii)."""
    kinds: tuple[str, ...] = NAMES
    """Which kinds count: secrets, emails, ibans, cards, ip_addresses, telephones."""
    most: int = Field(0, ge=0)
    """With drop: finds a document may have."""

    @field_validator("kinds")
    @classmethod
    def known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(value) - set(NAMES))
        if unknown or not value:
            raise ValueError(f"kinds {unknown or 'are none'}; there are {', '.join(NAMES)}")
        return value

    def masking(self) -> MaskConfig:
        return MaskConfig(kinds=self.kinds)

    def limit(self) -> LimitConfig:
        return LimitConfig(most=self.most)


class MaskConfig(StageConfig):
    """Which kinds of personal data are masked, of those that PIIConfig lists."""

    kinds: tuple[str, ...]


class LimitConfig(StageConfig):
    """How many finds a document may have."""

    most: int


@stage("pii", version=5)
def pii(config: MaskConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    """Mask personal data and secrets, and count them beside the documents."""
    where = work.store.of(documents)
    items = [(config, where, name) for name in document_shards(documents)]
    tally = Tally.total(run_shards(work, "masked", mask_shard, items, label="Personal data"))
    return Outcome(
        counts=counts(tally),
        metrics={f"masked_{name}": number for name, number in tally.mended.items()},
        reports=selection_reports("pii", tally),
    )


def mask_shard(
    work: Workspace, number: int, config: MaskConfig, where: Directory, name: str
) -> dict[str, Any]:
    """One shard masked, and its attributes."""
    table = where.read_table(name)
    kinds = frozenset(config.kinds)
    texts: list[str] = []
    titles: list[str] = []
    found: list[Counter[str]] = []
    for text, title in zip(table["text"].to_pylist(), table["title"].to_pylist(), strict=True):
        clean, finds = mask(text, kinds)
        clean_title, in_title = mask(title or "", kinds)
        texts.append(clean)
        titles.append(clean_title)
        found.append(Counter(finds) + Counter(in_title))
    sizes = [len(text.encode("utf-8", "replace")) for text in texts]
    for column, values in (
        ("text", pa.array(texts, pa.string())),
        ("title", pa.array(titles, pa.string())),
        ("id", pa.array(map(document_id, texts), pa.string())),
        ("bytes", pa.array(sizes, pa.int64())),
    ):
        table = table.set_column(table.schema.get_field_index(column), column, values)
    counted = {kind: pa.array([one[kind] for one in found], pa.int64()) for kind in config.kinds}
    beside = pa.table({"id": table["id"], "url": table["url"]} | counted)
    work.write_table(f"attributes-{number:05d}.parquet", beside)
    work.write_table(f"documents-{number:05d}.parquet", table)
    tally = Tally()
    for size, one in zip(sizes, found, strict=True):
        tally.keep(size)
        for kind, several in one.items():
            tally.mend(kind, several)
    return asdict(tally)


@stage("pii-drop", version=1)
def drop_pii(
    config: LimitConfig, work: Workspace, *, documents: Manifest, attributes: Manifest
) -> Outcome:
    """Remove the documents that had too much personal data; `attributes` are the pii stage's."""
    where, counted = work.store.of(documents), work.store.of(attributes)
    kinds = attributes.config["kinds"]
    items = [(config, where, name, counted, kinds) for name in document_shards(documents)]
    tally = Tally.total(run_shards(work, "selected", drop_shard, items, label="Personal data"))
    remedies = {"": "crawl more pages", "pii": f"raise pii.most (now: {config.most})"}
    require_some("pii-drop", tally, remedies, "documents")
    return Outcome(
        counts=counts(tally), rules=tally.rules, reports=selection_reports("pii-drop", tally)
    )


def drop_shard(
    work: Workspace,
    number: int,
    config: LimitConfig,
    where: Directory,
    name: str,
    attributes: Directory,
    kinds: list[str],
) -> dict[str, Any]:
    table = where.read_table(name)
    columns = attributes_of(attributes, number, table, kinds).to_pydict().values()
    finds = [sum(row) for row in zip(*columns, strict=True)]
    removals = [
        Removal("pii", f"{found} finds > {config.most}") if found > config.most else None
        for found in finds
    ]
    return asdict(write_selection(work, number, table, removals))
