"""The lines stage: lines of prose that C4's rules drop, out of documents that are no code.

C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2) keeps lines that end in a terminal mark and
have at least five words, drops those that speak of JavaScript or of policies and cookies, and then
pages of fewer than three sentences: that is a threshold (`quality.min_sentences`) and stands with
the others. FineWeb found that the first rule alone costs a third of all tokens, so none is on by
default; as bounds on whole pages they stand with `quality` as well (`filters/colossal.py`).

Aware of code: code blocks and tables are never cut, pages of which a tenth is code stay as they
are, and a heading goes only when nothing is left below it (rule heading). Every line is counted by
the first rule that drops it, and told in `cut-NNNNN.parquet`. The stage stands before measuring:
all that follows sees the text as it stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from tasks.corpus.cuts import Cut, cut_rows, write_cuts
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
from tasks.corpus.reading import Reading
from tasks.corpus.sharding import run_shards
from tasks.corpus.text_units import units_of, without
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Directory

LineRule = Literal["punctuation", "words", "javascript", "policy"]
HEADING = "heading"  # the rule by which one with nothing left below it goes
NOTHING = "no-line-left"  # the rule by which a document goes that has no other line
TERMINAL = (".", "!", "?", '"', "”", "。", "！", "？", "」")
# The phrases of C4's published code.
POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
EXAMPLES = 2  # lines of each rule and shard that the report shows
EXCERPT = 200


class LinesConfig(StageConfig):
    """Which lines of prose are cut out of documents, as C4 does."""

    rules: tuple[LineRule, ...] = ()
    """punctuation: lines that do not end in a full stop, an exclamation or question mark or a
    quotation mark. words: lines of fewer words than shortest_words. javascript, policy: lines that
    speak of JavaScript, or of terms of use, privacy and cookies. Empty: the stage is left out."""
    shortest_words: int = Field(5, ge=1)
    """Rule words: a line of fewer goes."""


@stage("lines", version=3)
def edit_lines(config: LinesConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    """Cut lines by C4's rules out of documents that are no code."""
    where = work.store.of(documents)
    items = [(config, where, name) for name in document_shards(documents)]
    reports = run_shards(work, "edited", edit_shard, items, label="Lines")
    tally = Tally.total(report["tally"] for report in reports)
    remedies = {"": "crawl more pages", NOTHING: "drop a rule of lines.rules"}
    require_some("lines", tally, remedies, "documents")
    examples = {
        rule: [line for report in reports for line in report["examples"].get(rule, ())]
        for rule in config.rules
    }
    rows = [
        {
            "rule": rule,
            "lines": tally.mended.get(f"lines-{rule}", 0),
            "examples": " ⏎ ".join(examples[rule][:EXAMPLES]),
        }
        for rule in config.rules
    ]
    return Outcome(
        counts=counts(tally),
        rules=tally.rules,
        metrics={f"mended_{name}": count for name, count in tally.mended.items()},
        reports=(
            *selection_reports("lines", tally),
            Report("lines", "table", rows, "Lines cut, by the first rule that drops them"),
        ),
    )


def edit_shard(
    work: Workspace, number: int, config: LinesConfig, where: Directory, name: str
) -> dict[str, Any]:
    table = where.read_table(name)
    cuts: list[dict[str, Any]] = []
    texts: list[str] = []
    removals: list[Removal | None] = []
    cut: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for document in table.select(["id", "url", "record_id", "text"]).to_pylist():
        text = document["text"]
        left, dropped = edited(text, config)
        for one in dropped:
            if one.rule == HEADING:
                continue
            cut[one.rule] += 1
            if len(examples.setdefault(one.rule, [])) < EXAMPLES:
                # With its address, by which a purge finds it.
                examples[one.rule].append(f"{one.text.strip()[:EXCERPT]} ({document['url']})")
        nothing = not left.strip()
        removals.append(Removal(NOTHING, "every line broke a rule") if nothing else None)
        texts.append(text if nothing else left)  # what goes can be looked at whole
        if dropped and not nothing:
            cuts += cut_rows(document, document_id(left), dropped)
    write_cuts(work, number, cuts)
    for column, values in (
        ("id", pa.array(map(document_id, texts), pa.string())),
        ("text", pa.array(texts, pa.string())),
        ("bytes", pa.array([len(t.encode("utf-8", "replace")) for t in texts], pa.int64())),
    ):
        table = table.set_column(table.schema.get_field_index(column), column, values)
    tally = write_selection(work, number, table, removals)
    for rule, count in cut.items():
        tally.mend(f"lines-{rule}", count)
    return {"tally": asdict(tally), "examples": examples}


def edited(text: str, config: LinesConfig) -> tuple[str, list[Cut]]:
    """What is left of a text, and each line that went with the rule that dropped it."""
    if Reading.of(text).is_technical:
        return text, []
    lines = text.split("\n")
    checks = [(rule, _CHECKS[rule]) for rule in config.rules]
    gone: set[int] = set()
    rules: dict[int, str] = {}
    headings: list[tuple[int, int]] = []  # level and line of those with nothing below them yet
    for unit in units_of(lines):
        line = lines[unit.first]
        if unit.kind == "line" and (level := _level(line)):
            headings = [*_open(headings, level, gone), (level, unit.first)]
            continue
        broken = None
        if unit.kind == "line":
            broken = next((rule for rule, check in checks if check(line.rstrip(), config)), None)
        if broken:
            gone.add(unit.first)
            rules[unit.first] = broken
        else:
            headings = []
    if not rules:
        return text, []
    _open(headings, 1, gone)
    dropped = [Cut(rules.get(number, HEADING), number, lines[number]) for number in sorted(gone)]
    return without(lines, gone, ()), dropped


def _open(headings: list[tuple[int, int]], level: int, gone: set[int]) -> list[tuple[int, int]]:
    """The headings that a new one of this level stands below; the others end with nothing."""
    gone.update(line for depth, line in headings if depth >= level)
    return [(depth, line) for depth, line in headings if depth < level]


def _level(line: str) -> int:
    """Of a Markdown heading; 0 for other lines."""
    level = len(line) - len(line.lstrip("#"))
    return level if 0 < level <= 6 and line[level : level + 1] == " " else 0


_CHECKS: dict[str, Callable[[str, LinesConfig], bool]] = {
    "punctuation": lambda line, _: not line.endswith(TERMINAL),
    "words": lambda line, config: len(line.split()) < config.shortest_words,
    "javascript": lambda line, _: "javascript" in line.lower(),
    "policy": lambda line, _: any(phrase in line.lower() for phrase in POLICY),
}
