"""The split stage: held-out documents that no training ever sees, and nothing like them either.

Documents are divided by groups: clusters of similar documents (`cluster`, from deduplicate), and
pages of one subject (`group_urls`: a module's page and its source). A group is held out when the
hash of its smallest address falls below `fraction`, so the choice does not depend on how many
documents there are, and holds in the next epoch (`groups`). Then lines of training that also stand
in held-out documents are cut out (`leakage`), found without all held-out text in one process
(`held_out`).
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from tasks.corpus.arrays import read_array
from tasks.corpus.cuts import cut_rows, whole_lines, write_cuts
from tasks.corpus.documents import (
    REMOVED,
    Removal,
    Tally,
    document_id,
    document_shards,
    selection_reports,
)
from tasks.corpus.groups import Choice, Rule, choose, chosen
from tasks.corpus.held_out import find_own_marks, leaks
from tasks.corpus.leakage import line_marks, without_leaks
from tasks.corpus.sharding import run_shards
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Directory

EXAMPLES = 5
LEAK = "heldout-leak"


class SplitConfig(StageConfig):
    """Which documents are held out of all training."""

    fraction: float = Field(0.1, gt=0, le=0.5)
    """Share of the groups of similar documents that is held out."""
    seed: int = 12
    """Another seed holds other documents out."""
    group_urls: tuple[str, ...] = (r"/(?:library|source|latest)/([^/]+)\.html$",)
    """Regular expressions with one group; addresses that give the same text stay together."""
    largest_group: float = Field(0.05, gt=0, le=1)
    """A group with a larger share of all text is never held out: it would be the whole measure."""
    common_groups: int = Field(20, ge=2)
    """A passage that stands in so many groups is boilerplate, and no leak of held-out text."""

    @field_validator("group_urls")
    @classmethod
    def captures(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
            if groups != 1:
                raise ValueError(
                    f"{pattern!r} has {groups} groups; give exactly one, in parentheses, "
                    "that names what belongs together"
                )
        return value


@stage("split", version=2)
def split(config: SplitConfig, work: Workspace, *, documents: Manifest) -> Outcome:
    """Hold whole groups of similar documents out and cut their text out of the rest."""
    names, where = document_shards(documents), work.store.of(documents)
    rule = Rule(config.group_urls, config.seed, config.fraction, config.largest_group)
    choice = choose(rule, work, where, names)
    if choice.groups < 2:
        raise UserError(
            f"{choice.documents} documents form {choice.groups} group of similar ones, and a "
            "held-out split needs two; crawl more pages, or raise deduplicate.cluster_threshold"
        )
    own = find_own_marks(work, where, names, config.common_groups)
    items = [(where, name, own.ranges) for name in names]
    reports = run_shards(work, "divided", divide_shard, items, label="Split")
    return _outcome(choice, reports, own.common)


def divide_shard(
    work: Workspace, number: int, where: Directory, name: str, own: dict[str, int]
) -> dict[str, Any]:
    """One shard divided: `train-`, `heldout-`, `rejected-` and `cut-NNNNN.parquet` where not empty.

    `own` says in how many ranges the marks of held-out text stand.
    """
    held = chosen(work, number).held
    table = where.read_table(name)
    tally, trimmed, cuts = Tally(), list[dict[str, Any]](), list[dict[str, Any]]()
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": [], "rejected": []}
    documents = table.to_pylist()
    touched = np.flatnonzero(read_array(work, f"_touched-{number:05d}.npy") & ~held).tolist()
    marks = [line_marks(documents[row]["text"]) for row in touched]
    found = dict(zip(touched, zip(marks, leaks(work, own, marks), strict=True), strict=True))
    for row, document in enumerate(documents):
        lines: set[int] = set()
        if row in found:
            mine, hits = found[row]
            text, lines = without_leaks(mine, *hits)
        if not lines:
            tally.keep(document["bytes"])
            parts["heldout" if held[row] else "train"].append(document)
            continue
        if all(line.startswith("#") for line in text.split("\n") if line.strip()):
            reason = f"all but headings stands in held-out text ({len(lines)})"
            removal = Removal(LEAK, reason)
            tally.remove(removal, document["url"], document["text"])
            parts["rejected"].append(document | {"rule": removal.rule, "reason": removal.reason})
            continue
        size = len(text.encode("utf-8", "replace"))
        tally.mend("lines-shared-with-heldout", len(lines))
        trimmed.append(
            {"document": document["url"], "lines": len(lines), "bytes": document["bytes"] - size}
        )
        tally.keep(size)
        left = document | {"id": document_id(text), "text": text, "bytes": size}
        parts["train"].append(left)
        cuts += cut_rows(document, left["id"], whole_lines(LEAK, mine.lines, lines))
    write_cuts(work, number, cuts)
    schema = table.schema.remove_metadata()
    for part, rows in parts.items():
        if rows:
            fields = pa.schema([*schema, *REMOVED]) if part == "rejected" else schema
            whole = pa.Table.from_pylist(rows, fields)
            work.write_table(f"{part}-{number:05d}.parquet", whole)
    sizes = {part: sum(row["bytes"] for row in rows) for part, rows in parts.items()}
    return {
        "tally": asdict(tally),
        "trimmed": len(trimmed),
        "trimmed_bytes": sum(row["bytes"] for row in trimmed),
        "most_trimmed": sorted(trimmed, key=lambda row: -row["bytes"])[:EXAMPLES],
        "documents": {part: len(rows) for part, rows in parts.items()},
        "bytes": sizes,
    }


def _outcome(choice: Choice, reports: list[dict[str, Any]], common: dict[str, int]) -> Outcome:
    tally = Tally.total(report["tally"] for report in reports)
    totals = {
        f"{part}_{unit}": sum(report[unit][part] for report in reports)
        for part in ("train", "heldout")
        for unit in ("documents", "bytes")
    }
    if not totals["train_documents"]:
        raise UserError(
            f"all {tally.seen - totals['heldout_documents']} training documents consist of "
            "held-out text (rule heldout-leak); crawl more pages or lower split.common_groups"
        )
    most = sorted(
        (row for report in reports for row in report["most_trimmed"]), key=lambda row: -row["bytes"]
    )
    rows = [
        {
            "part": part,
            "groups": choice.held if part == "heldout" else choice.groups - choice.held,
            "documents": totals[f"{part}_documents"],
            "bytes": totals[f"{part}_bytes"],
        }
        for part in ("train", "heldout")
    ]
    return Outcome(
        counts={
            "documents": totals["train_documents"] + totals["heldout_documents"],
            "bytes": totals["train_bytes"] + totals["heldout_bytes"],
            "groups": choice.groups,
            **totals,
        },
        rules=tally.rules,
        metrics={
            "leaked_lines_cut": tally.mended.get("lines-shared-with-heldout", 0),
            "leaked_bytes_cut": sum(report["trimmed_bytes"] for report in reports),
            "documents_trimmed": sum(report["trimmed"] for report in reports),
            "common_passages": common["windows"],
            "common_names": common["names"],
        },
        reports=(
            Report("split", "table", rows, "Groups of similar documents, divided"),
            *selection_reports("split", tally),
            Report(
                "held-out-lines",
                "table",
                most[:EXAMPLES] or [{"document": "none", "lines": 0, "bytes": 0}],
                "Training documents that lost most lines because they stand in held-out ones",
            ),
        ),
    )
