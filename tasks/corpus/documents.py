"""What the text stages hand to each other: shards of documents and of rejected ones, tallies.

A documents artifact holds
    documents-00000.parquet …   the documents that stayed (DOCUMENTS, and what a stage adds)
    rejected-00000.parquet …    those this stage removed, whole, with `rule` and `reason`
    cut-00000.parquet …         what it cut out of those that stayed, if anything (`cuts`)

Every removal is counted by rule and can be looked up with its text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Report, Workspace

DOCUMENTS = pa.schema(
    [
        ("id", pa.string()),  # first 16 hex digits of the SHA-256 of `text`
        ("url", pa.string()),
        ("canonical", pa.string()),  # what the page calls its canonical address, or empty
        ("title", pa.string()),
        ("text", pa.string()),  # Markdown: headings, lists, fenced code
        ("language", pa.string()),  # ISO 639-1 or "und"; what the page says, then what it is
        ("language_score", pa.float64()),  # 0 until the language stage has looked
        ("date", pa.string()),  # the page's own date, ISO 8601, or empty
        ("licence", pa.string()),  # what page or source says of it: an address, words, or empty
        ("fetched_at", pa.string()),
        ("bytes", pa.int64()),  # of `text` as UTF-8
        ("html_bytes", pa.int64()),
        ("warc", pa.string()),  # where the page came from: file of the crawl, offset, record
        ("offset", pa.int64()),
        ("record_id", pa.string()),
        ("digest", pa.string()),  # of the page's bytes: sha256:… or, as its record has it, sha1:…
    ]
)
REMOVED = (pa.field("rule", pa.string()), pa.field("reason", pa.string()))
EXAMPLES_PER_RULE = 2
EXCERPT = 300  # characters of a rejected document shown on the run page


def document_id(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def writable(text: str) -> str:
    """The text without lone surrogates, which no UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class Removal:
    """Why one document was removed: the rule's name and, in words, what it saw."""

    rule: str
    reason: str


@dataclass
class Tally:
    """Counts of one shard or of many: documents seen, kept and removed by rule, with examples."""

    seen: int = 0
    kept: int = 0
    bytes: int = 0  # of the text kept
    rules: dict[str, int] = field(default_factory=dict)
    mended: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def keep(self, text_bytes: int) -> None:
        self.seen += 1
        self.kept += 1
        self.bytes += text_bytes

    def remove(self, removal: Removal, url: str, text: str) -> None:
        self.seen += 1
        self.rules[removal.rule] = self.rules.get(removal.rule, 0) + 1
        examples = self.examples.setdefault(removal.rule, [])
        if len(examples) < EXAMPLES_PER_RULE:
            examples.append({"url": url, "reason": removal.reason, "text": text[:EXCERPT]})

    def mend(self, what: str, amount: int = 1) -> None:
        self.mended[what] = self.mended.get(what, 0) + amount

    def add(self, other: Tally) -> None:
        self.seen += other.seen
        self.kept += other.kept
        self.bytes += other.bytes
        for mine, theirs in ((self.rules, other.rules), (self.mended, other.mended)):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count
        for rule, examples in other.examples.items():
            mine_too = self.examples.setdefault(rule, [])
            mine_too.extend(examples[: EXAMPLES_PER_RULE - len(mine_too)])

    @classmethod
    def total(cls, parts: Iterable[Mapping[str, Any]]) -> Tally:
        """The sum of tallies that came as JSON, in their order."""
        whole = cls()
        for part in parts:
            whole.add(cls(**part))
        return whole


def write_selection(
    work: Workspace, number: int, documents: pa.Table, removals: Sequence[Removal | None]
) -> Tally:
    """Write one shard as what stayed and what went. `removals` has an entry for each row."""
    tally = Tally()
    columns = zip(
        documents["url"].to_pylist(),
        documents["text"].to_pylist(),
        documents["bytes"].to_pylist(),
        removals,
        strict=True,
    )
    for url, text, size, removal in columns:
        if removal is None:
            tally.keep(size)
        else:
            tally.remove(removal, url, text)
    kept = pa.array([removal is None for removal in removals], pa.bool_())
    gone = [removal for removal in removals if removal is not None]
    rejected = documents.filter(pa.compute.invert(kept))
    rejected = rejected.append_column(REMOVED[0], pa.array([r.rule for r in gone], pa.string()))
    rejected = rejected.append_column(REMOVED[1], pa.array([r.reason for r in gone], pa.string()))
    work.write_table(f"rejected-{number:05d}.parquet", rejected)
    work.write_table(f"documents-{number:05d}.parquet", documents.filter(kept))
    return tally


def require_some(stage: str, tally: Tally, remedies: Mapping[str, str], unit: str) -> None:
    """Raise UserError when nothing is left, naming the rule that removed most and what to do."""
    if tally.kept:
        return
    if not tally.rules:
        raise UserError(f"{stage} got no {unit} at all; {remedies['']}")
    rule, count = max(tally.rules.items(), key=lambda item: (item[1], item[0]))
    remedy = remedies.get(rule, remedies[""])
    raise UserError(
        f"{stage} left none of {tally.seen} {unit}: rule {rule!r} removed {count} of them "
        f"(first: {tally.examples[rule][0]['url']}, {tally.examples[rule][0]['reason']}); {remedy}"
    )


def selection_reports(stage: str, tally: Tally, unit: str = "documents") -> tuple[Report, ...]:
    """A table of counts per rule and, as Markdown, examples of what was removed."""
    rows: list[dict[str, Any]] = [
        {"rule": rule, "removed": count, "share": f"{100 * count / max(tally.seen, 1):.1f} %"}
        for rule, count in sorted(tally.rules.items(), key=lambda item: (-item[1], item[0]))
    ]
    rows += [
        {"rule": f"(mended) {what}", "removed": 0, "share": f"{count} mended"}
        for what, count in sorted(tally.mended.items())
    ]
    share = f"{100 * tally.kept / max(tally.seen, 1):.1f} %"
    rows.append({"rule": "(kept)", "removed": tally.seen - tally.kept, "share": f"{share} kept"})
    title = f"{stage}: {tally.kept:,} of {tally.seen:,} {unit} kept, {tally.bytes:,} bytes of text"
    reports = [Report(f"{stage}-rules", "table", rows, title)]
    if tally.examples:
        body = [f"## What {stage} removed: examples"]
        for rule, examples in sorted(tally.examples.items()):
            body.append(f"### {rule} ({tally.rules[rule]:,})")
            for example in examples:
                excerpt = example["text"].replace("```", "'''")
                body.append(f"`{example['url']}`: {example['reason']}\n\n```\n{excerpt}\n```")
        reports.append(Report(f"{stage}-examples", "markdown", "\n\n".join(body)))
    return tuple(reports)


def counts(tally: Tally) -> dict[str, int]:
    return {"documents": tally.kept, "bytes": tally.bytes, "seen": tally.seen}


def places_among(whole: Iterable[Hashable], some: Sequence[Hashable]) -> NDArray[np.int64]:
    """Where `some` stand in `whole`, of which they are a selection in the same order: (len(some),).

    What is there twice is found twice, one place after the other. Raises ValueError when one is not
    there.
    """
    following = enumerate(whole)
    places = [next((place for place, one in following if one == it), -1) for it in some]
    if places and min(places) < 0:
        missing = some[places.index(-1)]
        raise ValueError(f"{missing!r} is none of the documents that were measured, in their order")
    return np.array(places, np.int64)


def document_shards(documents: Manifest) -> list[str]:
    """Names of the shards of a documents artifact, in order."""
    return documents.names("documents-", ".parquet")
