"""The language stage: which language a document is in, and whether the corpus wants it.

py3langid's model ships in its wheel; nothing is downloaded. It looks at prose only: identifiers and
keywords are no evidence of English, and a page that is all code has no language to be wrong about.
"""

from __future__ import annotations

import re
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
from tasks.corpus.language_id import identifier
from tasks.corpus.reading import Reading
from tasks.corpus.sharding import run_shards
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Report, StageConfig, Workspace, stage

SAMPLE_WORDS = 400  # more of them do not change the answer
UNDETERMINED = "und"  # ISO 639-2
_CODE = re.compile(r"[_(={<\\]|://")


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
def language(config: LanguageConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    """Identify each document's language and keep the wanted ones."""
    items = [(config, documents, name) for name in document_shards(documents)]
    reports = run_shards(work, "identified", language_shard, items, label="Language")
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
    work: Workspace, number: int, config: LanguageConfig, documents: Manifest, name: str
) -> dict[str, Any]:
    table = work.store.of(documents).read_table(name)
    codes, scores, removals = [], [], []
    for text in table["text"].to_pylist():
        reading = Reading.of(text)
        code, score = identify(reading, config.least_words)
        if score < config.threshold and reading.is_technical:
            code, score = UNDETERMINED, 0.0
        codes.append(code)
        scores.append(score)
        removals.append(_judge(config, code, score))
    table = table.set_column(
        table.schema.get_field_index("language"), "language", pa.array(codes, pa.string())
    ).set_column(
        table.schema.get_field_index("language_score"),
        "language_score",
        pa.array(scores, pa.float64()),
    )
    tally = write_selection(work, number, table, removals)
    return {"tally": asdict(tally), "languages": {c: codes.count(c) for c in set(codes)}}


def identify(reading: Reading, least_words: int = 1) -> tuple[str, float]:
    """(ISO 639-1 code, probability) of the prose; (`und`, 0) when there is too little of it."""
    words = reading.prose_words[:SAMPLE_WORDS]
    plain = words
    if _CODE.search(" ".join(words)):
        plain = [word for word in words if not _CODE.search(word)]
    # Unspaced scripts put a sentence into one "word".
    if sum(len(word) // 12 - 1 for word in plain if len(word) > 23) + len(plain) < least_words:
        return UNDETERMINED, 0.0
    code, score = identifier().classify(" ".join(plain))
    return str(code), round(float(score), 4)


def _judge(config: LanguageConfig, code: str, score: float) -> Removal | None:
    if not config.languages or code == UNDETERMINED:
        return None
    if score < config.threshold:
        return Removal("language-unsure", f"{code} with {score:.2f} < {config.threshold:g}")
    if code not in config.languages:
        return Removal("language-other", f"is {code} ({score:.2f})")
    return None
