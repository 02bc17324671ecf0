"""The pii stage: documents with personal data or secrets masked, or removed.

Text and title are looked at. An address stays as it is: it is what a document is known by, found
again in its WARC record, and forgotten.
"""

from __future__ import annotations

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
from tasks.corpus.personal import KINDS, mask
from tasks.corpus.sharding import run_shards
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Directory

NAMES = tuple(dict.fromkeys(kind.name for kind in KINDS))


class PIIConfig(StageConfig):
    """What happens to personal data and secrets in documents."""

    action: Literal["keep", "mask", "drop"] = "keep"
    """keep: the stage is left out. mask: each find becomes a word such as <email>. drop: a document
    with more finds than `most` is removed (rule pii), the finds of the others are masked."""
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


@stage("pii", version=2)
def pii(config: PIIConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    """Mask personal data and secrets, or remove the documents that have them."""
    if config.action == "keep":
        raise UserError("pii.action is 'keep', which needs no stage; choose 'mask' or 'drop'")
    where = work.store.of(documents)
    items = [(config, where, name) for name in document_shards(documents)]
    tally = Tally.total(run_shards(work, "masked", pii_shard, items, label="Personal data"))
    remedies = {"": "crawl more pages", "pii": f"raise pii.most (now: {config.most})"}
    require_some("pii", tally, remedies, "documents")
    return Outcome(
        counts=counts(tally),
        rules=tally.rules,
        metrics={f"masked_{name}": number for name, number in tally.mended.items()},
        reports=selection_reports("pii", tally),
    )


def pii_shard(
    work: Workspace, number: int, config: PIIConfig, where: Directory, name: str
) -> dict[str, Any]:
    """One shard masked; what is removed for its finds is written masked too."""
    table = where.read_table(name)
    kinds = frozenset(config.kinds)
    texts: list[str] = []
    titles: list[str] = []
    removals: list[Removal | None] = []
    masked = Tally()
    for text, title in zip(table["text"].to_pylist(), table["title"].to_pylist(), strict=True):
        clean, finds = mask(text, kinds)
        clean_title, in_title = mask(title or "", kinds)
        found = sum(finds.values()) + sum(in_title.values())
        removal = None
        if config.action == "drop" and found > config.most:
            removal = Removal("pii", f"{found} finds > {config.most}")
        removals.append(removal)
        texts.append(clean)
        titles.append(clean_title)
        if removal is None:
            for kind, number_found in (*finds.items(), *in_title.items()):
                masked.mend(kind, number_found)
    for column, values in (
        ("text", pa.array(texts, pa.string())),
        ("title", pa.array(titles, pa.string())),
        ("id", pa.array([document_id(text) for text in texts], pa.string())),
        ("bytes", pa.array([len(t.encode("utf-8", "replace")) for t in texts], pa.int64())),
    ):
        table = table.set_column(table.schema.get_field_index(column), column, values)
    tally = write_selection(work, number, table, removals)
    tally.add(masked)
    return asdict(tally)
