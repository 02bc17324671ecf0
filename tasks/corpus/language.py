"""The language stage: whether the corpus wants a document for the language it is in.

Which one that is, the measure stage has found out (`language_id`); here the thresholds are applied.
A page that is all code has no language to be wrong about.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pyarrow as pa
from pydantic import Field, field_validator

from tasks.corpus.documents import (
    Removal,
    Tally,
    counts,
    document_shards,
    require_some,
    selection_reports,
    write_selection,
)
from tasks.corpus.language_id import UNDETERMINED, identifier
from tasks.corpus.measure import IDENTIFIED, attributes_of
from tasks.corpus.reading import TECHNICAL
from tasks.corpus.sharding import run_shards
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Directory


class LanguageConfig(StageConfig):
    """Which languages stay."""

    languages: tuple[str, ...] = ("en",)
    """Two-letter codes (ISO 639-1) that are kept; empty keeps every language."""
    threshold: float = Field(0.5, ge=0, le=1)
    """Least probability of the identified language; less is removed (rule language-unsure)."""
    least_words: int = Field(10, ge=1)
    """With fewer words of prose, or unsure of a page with code, it is kept as `und`."""

    @field_validator("languages")
    @classmethod
    def known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(value) - set(identifier().labels))
        if unknown:
            raise ValueError(
                f"languages {unknown} are not known; give ISO 639-1 codes such as 'en' or 'de'"
            )
        return value


@stage("language", version=1)
def language(
    config: LanguageConfig, work: Workspace, *, documents: Manifest, attributes: Manifest
) -> Outcome:
    """Keep the documents in the wanted languages."""
    where, measured = work.store.of(documents), work.store.of(attributes)
    items = [(config, where, name, measured) for name in document_shards(documents)]
    reports = run_shards(work, "selected", language_shard, items, label="Language")
    tally = Tally.total(report["tally"] for report in reports)
    found: dict[str, int] = {}
    for report in reports:
        for code, count in report["languages"].items():
            found[code] = found.get(code, 0) + count
    wanted = ", ".join(config.languages)
    remedies = {
        "": "crawl more pages",
        "language-other": f"add it to language.languages (now: {wanted})",
        "language-unsure": f"lower language.threshold (now: {config.threshold})",
    }
    require_some("language", tally, remedies, "documents")
    rows = [
        {"language": code, "documents": count}
        for code, count in sorted(found.items(), key=lambda item: (-item[1], item[0]))
    ]
    return Outcome(
        counts=counts(tally),
        rules=tally.rules,
        reports=(
            *selection_reports("language", tally),
            Report("languages", "table", rows, "Languages found, before selection"),
        ),
    )


def language_shard(
    work: Workspace,
    number: int,
    config: LanguageConfig,
    where: Directory,
    name: str,
    attributes: Directory,
) -> dict[str, Any]:
    table = where.read_table(name)
    measured = attributes_of(attributes, number, table, IDENTIFIED.names).to_pylist()
    codes, scores = [], []
    for row in measured:
        code, score = row["language"], row["language_score"]
        few = row["language_words"] < config.least_words
        if few or (score < config.threshold and row["code_share"] >= TECHNICAL):
            code, score = UNDETERMINED, 0.0
        codes.append(code)
        scores.append(score)
    removals = [_judge(config, code, score) for code, score in zip(codes, scores, strict=True)]
    for column, values in (
        ("language", pa.array(codes, pa.string())),
        ("language_score", pa.array(scores, pa.float64())),
    ):
        table = table.set_column(table.schema.get_field_index(column), column, values)
    tally = write_selection(work, number, table, removals)
    return {"tally": asdict(tally), "languages": {c: codes.count(c) for c in set(codes)}}


def _judge(config: LanguageConfig, code: str, score: float) -> Removal | None:
    if not config.languages or code == UNDETERMINED:
        return None
    if score < config.threshold:
        return Removal("language-unsure", f"{code} with {score:.2f} < {config.threshold:g}")
    if code not in config.languages:
        return Removal("language-other", f"is {code} ({score:.2f})")
    return None
