"""The quality stage: the bounds of the rules, applied to what the measure stage wrote.

The rules are those of Gopher, C4 and FineWeb, aware of code (`filters`). Their measures stand
beside the documents, so that another bound runs this stage again and none before it.
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
from tasks.corpus.filters.address import by_address, words_of_address
from tasks.corpus.filters.catalogue import RULES
from tasks.corpus.measure import attributes_of
from tasks.corpus.sharding import run_shards
from tasks.corpus.urls import domain_name
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Directory

MODEL = "model_score"  # the rule of the quality model


class QualityConfig(StageConfig):
    """Which documents are good enough."""

    exclude_urls: tuple[str, ...] = ()
    """Regular expressions; a document whose address holds a match is removed (rule url)."""
    exclude_hosts: tuple[str, ...] = ()
    """Domains; documents of them and of what lies below them are removed (rule host)."""
    exclude_url_words: tuple[str, ...] = ()
    """Words; a document whose address has one as a whole word is removed (rule url-words)."""
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
    """Least number of the eight commonest English words in English text."""
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
    max_lines_per_word: float = Field(1.0, ge=0, le=1)
    """Most lines for each word of the prose (FineWeb: 0.3); 1 is no limit."""
    min_sentences: int = Field(0, ge=0)
    """Least sentences (C4: 3); pages with code are exempt."""
    min_terminal_lines: float = Field(0.0, ge=0, le=1)
    """Least share of lines that end in . ! ? or a quotation mark (C4 drops the others)."""
    max_few_word_lines: float = Field(1.0, ge=0, le=1)
    """Largest share of lines of fewer than three words (C4 drops them); 1 is no limit."""
    max_script_lines: float = Field(1.0, ge=0, le=1)
    """Largest share of lines that speak of JavaScript (C4 drops them); 1 is no limit."""
    max_curly_lines: float = Field(1.0, ge=0, le=1)
    """Largest share of lines of prose with a curly bracket (C4: 0); 1 is no limit."""
    max_toxic_words: float = Field(1000.0, ge=0, le=1000)
    """Most words of abuse in 1,000; 1000 is no limit."""
    max_adult_words: float = Field(1000.0, ge=0, le=1000)
    """Most words of pornography in 1,000; 1000 is no limit."""
    min_model_score: float = Field(0.0, ge=0, le=1)
    """Least score by the quality model; needs corpus.quality_model.examples."""

    @field_validator("exclude_urls")
    @classmethod
    def compiles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return value

    @field_validator("exclude_hosts")
    @classmethod
    def are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(domain_name, value))

    @field_validator("exclude_url_words")
    @classmethod
    def are_words(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for word in value:
            if not word or words_of_address(word) != [word.lower()]:
                raise ValueError(f"{word!r} is not one word; write a pattern in exclude_urls")
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


@stage("quality", version=3)
def quality(
    config: QualityConfig,
    work: Workspace,
    *,
    documents: Manifest,
    attributes: Manifest,
    scores: Manifest | None = None,
) -> Outcome:
    """Keep the documents whose measures are within bounds. `scores` are the quality model's."""
    if config.min_model_score > 0 and scores is None:
        raise UserError(
            f"quality.min_model_score is {config.min_model_score:g} and there is no quality model; "
            "give labelled examples (corpus.quality_model.examples) or set it to 0"
        )
    where, measured = work.store.of(documents), work.store.of(attributes)
    scored = work.store.of(scores) if scores is not None else None
    items = [(config, where, name, measured, scored) for name in document_shards(documents)]
    reports = run_shards(work, "selected", quality_shard, items, label="Quality")
    tally = Tally.total(reports)
    remedies = {
        rule.name: " or ".join(
            f"{'lower' if bound == rule.low else 'raise'} quality.{bound} "
            f"(now: {getattr(config, bound)})"
            for bound in (rule.low, rule.high)
            if bound
        )
        for rule in RULES
    } | {
        "": "crawl more pages",
        "url": "remove a pattern from quality.exclude_urls",
        "host": "remove a domain from quality.exclude_hosts",
        MODEL: f"lower quality.min_model_score (now: {config.min_model_score})",
        "url-words": "remove a word from quality.exclude_url_words",
    }
    require_some("quality", tally, remedies, "documents")
    return Outcome(
        counts=counts(tally), rules=tally.rules, reports=selection_reports("quality", tally)
    )


def quality_shard(
    work: Workspace,
    number: int,
    config: QualityConfig,
    where: Directory,
    name: str,
    attributes: Directory,
    scores: Directory | None,
) -> dict[str, Any]:
    table = where.read_table(name)
    measured = attributes_of(attributes, number, table, [rule.name for rule in RULES])
    removals = select(config, table["url"], measured)
    if scores is not None:
        scored = attributes_of(scores, number, table, ["score"])["score"].to_pylist()
        for row, value in enumerate(scored):
            if removals[row] is None and value < config.min_model_score:
                reason = f"{MODEL} {value:.4g} < {config.min_model_score:g}"
                removals[row] = Removal(MODEL, reason)
    return asdict(write_selection(work, number, table, removals))


def select(
    config: QualityConfig, urls: pa.ChunkedArray, attributes: pa.Table
) -> list[Removal | None]:
    """The first rule each document breaks, or None."""
    judge = by_address(config.exclude_urls, config.exclude_hosts, config.exclude_url_words)
    removals = [judge(url) for url in urls.to_pylist()]
    for rule in RULES:
        low = getattr(config, rule.low) if rule.low else -math.inf
        high = getattr(config, rule.high) if rule.high else math.inf
        for row, value in enumerate(attributes[rule.name].to_pylist()):
            if removals[row] is not None or value is None or low <= value <= high:
                continue
            sign, bound = ("<", low) if value < low else (">", high)
            removals[row] = Removal(rule.name, f"{rule.name} {value:.4g} {sign} {bound:g}")
    return removals
