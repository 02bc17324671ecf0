"""The quality stage: rules of Gopher, C4 and FineWeb, aware of code.

Every rule's measure is written for every document (`attributes-NNNNN.parquet`, one column a rule);
the bounds of the config are applied to those columns last, so every decision can be looked up.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from tasks.corpus.documents import (
    Removal,
    Tally,
    counts,
    document_shards,
    require_some,
    selection_reports,
    write_selection,
)
from tasks.corpus.filters.alphabetic import ALPHABETIC
from tasks.corpus.filters.boilerplate import LOREM_IPSUM, NOTICES
from tasks.corpus.filters.bullets import BULLETS
from tasks.corpus.filters.length import WORDS
from tasks.corpus.filters.line_shape import PUNCTUATED_LINES, SHORT_LINES
from tasks.corpus.filters.repetition import (
    DUPLICATE_GRAMS,
    DUPLICATE_LINE_CHARACTERS,
    DUPLICATE_LINES,
    DUPLICATE_PARAGRAPHS,
    TOP_GRAMS,
)
from tasks.corpus.filters.rule import Rule
from tasks.corpus.filters.stop_words import ENGLISH_STOP_WORDS
from tasks.corpus.filters.symbols import ELLIPSES, SYMBOLS
from tasks.corpus.filters.word_length import WORD_LENGTH
from tasks.corpus.reading import Reading
from tasks.corpus.sharding import run_shards
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, StageConfig, Workspace, stage

# In this order: a document that breaks several is counted under the first.
RULES: tuple[Rule, ...] = (
    WORDS,
    BULLETS,
    WORD_LENGTH,
    ALPHABETIC,
    SYMBOLS,
    ELLIPSES,
    ENGLISH_STOP_WORDS,
    DUPLICATE_LINES,
    DUPLICATE_LINE_CHARACTERS,
    DUPLICATE_PARAGRAPHS,
    TOP_GRAMS,
    DUPLICATE_GRAMS,
    LOREM_IPSUM,
    NOTICES,
    PUNCTUATED_LINES,
    SHORT_LINES,
)


class QualityConfig(StageConfig):
    """Which documents are good enough."""

    exclude_urls: tuple[str, ...] = ()
    """Regular expressions; a document whose address holds a match is removed (rule url)."""
    min_words: int = Field(50, ge=1)
    """Least words in a document."""
    max_words: int = Field(100_000, ge=1)
    """Most words in a document."""
    max_bullet_lines: float = Field(0.9, ge=0, le=1)
    """Largest share of lines that are list items; indexes and menus are above."""
    min_word_length: float = Field(3.0, ge=0)
    """Least mean length of the words of the prose, in characters."""
    max_word_length: float = Field(10.0, ge=0)
    """Largest mean length of the words of the prose, in characters."""
    min_alphabetic_words: float = Field(0.8, ge=0, le=1)
    """Least share of words with a letter in them."""
    max_symbols: float = Field(0.1, ge=0)
    """Most hash signs and ellipses for each word."""
    max_ellipsis_lines: float = Field(0.3, ge=0, le=1)
    """Largest share of lines that end in an ellipsis."""
    min_stop_words: int = Field(2, ge=0, le=8)
    """Least number of the eight commonest English words; 0 for other languages."""
    max_duplicate_lines: float = Field(0.3, ge=0, le=1)
    """Largest share of lines that repeat an earlier one."""
    max_duplicate_line_characters: float = Field(0.2, ge=0, le=1)
    """Largest share of the characters that stand in such lines."""
    max_duplicate_paragraphs: float = Field(0.3, ge=0, le=1)
    """Largest share of paragraphs that repeat an earlier one."""
    max_top_grams: float = Field(1.0, ge=0)
    """Commonest phrase of 2 to 4 words: its share of the text, relative to Gopher's bounds."""
    max_duplicate_grams: float = Field(1.0, ge=0)
    """Repeated phrases of 5 to 10 words: their share of the text, relative to Gopher's bounds."""
    max_lorem_ipsum: int = Field(0, ge=0)
    """Most occurrences of placeholder text."""
    max_notice_lines: float = Field(0.3, ge=0, le=1)
    """Largest share of lines about cookies, JavaScript, terms and rights."""
    min_punctuated_lines: float = Field(0.12, ge=0, le=1)
    """Least share of lines that end in punctuation; pages with code are exempt."""
    max_short_lines: float = Field(0.67, ge=0, le=1)
    """Largest share of lines below 30 characters; pages with code are exempt."""

    @field_validator("exclude_urls")
    @classmethod
    def compiles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def ordered(self) -> QualityConfig:
        for low, high in (("min_words", "max_words"), ("min_word_length", "max_word_length")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low} {getattr(self, low)} > {high} {getattr(self, high)}; lower the one "
                    "or raise the other"
                )
        return self


@stage("quality", version=1)
def quality(config: QualityConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    """Measure every document by the quality rules and keep those within bounds."""
    items = [(config, documents, name) for name in document_shards(documents)]
    reports = run_shards(work, "measured", quality_shard, items, label="Quality")
    tally = Tally.total(reports)
    remedies = {
        rule.name: " or ".join(
            f"{'lower' if bound == rule.low else 'raise'} quality.{bound} "
            f"(now: {getattr(config, bound)})"
            for bound in (rule.low, rule.high)
            if bound
        )
        for rule in RULES
    } | {"": "crawl more pages", "url": "remove a pattern from quality.exclude_urls"}
    require_some("quality", tally, remedies, "documents")
    return Outcome(
        counts=counts(tally), rules=tally.rules, reports=selection_reports("quality", tally)
    )


def quality_shard(
    work: Workspace, number: int, config: QualityConfig, documents: Manifest, name: str
) -> dict[str, Any]:
    table = work.store.of(documents).read_table(name)
    attributes = measure(table["text"].to_pylist())
    beside = {"id": table["id"], "url": table["url"]}
    work.write_table(f"attributes-{number:05d}.parquet", pa.table(beside | attributes))
    tally = write_selection(work, number, table, select(config, table["url"], attributes))
    return asdict(tally)


def measure(texts: list[str]) -> dict[str, pa.Array]:
    """One column for each rule; null where the rule does not apply."""
    columns: dict[str, list[float | None]] = {rule.name: [] for rule in RULES}
    for text in texts:
        reading = Reading.of(text)
        for rule in RULES:
            columns[rule.name].append(rule.measure(reading))
    return {name: pa.array(values, pa.float64()) for name, values in columns.items()}


def select(
    config: QualityConfig, urls: pa.ChunkedArray, attributes: dict[str, pa.Array]
) -> list[Removal | None]:
    """The first rule each document breaks, or None."""
    removals: list[Removal | None] = [None] * len(urls)
    patterns = [re.compile(pattern) for pattern in config.exclude_urls]
    for row, url in enumerate(urls.to_pylist()):
        matching = next((pattern for pattern in patterns if pattern.search(url)), None)
        if matching is not None:
            removals[row] = Removal("url", f"the address matches {matching.pattern!r}")
    for rule in RULES:
        low = getattr(config, rule.low) if rule.low else -math.inf
        high = getattr(config, rule.high) if rule.high else math.inf
        for row, value in enumerate(attributes[rule.name].to_pylist()):
            if removals[row] is not None or value is None or low <= value <= high:
                continue
            sign, bound = ("<", low) if value < low else (">", high)
            removals[row] = Removal(rule.name, f"{rule.name} {value:.4g} {sign} {bound:g}")
    return removals
