"""The corpus report: what there is, what was removed and why, where it came from.

A stage of its own after the split: it reads the manifests of the whole chain, their reports and
columns of their tables, and writes one HTML page that needs nothing else (`report.html`). With
token shards it also counts tokens by source.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.compute as pc
from pydantic import Field

from tasks.corpus.arrays import read_array
from tasks.corpus.opt_out import OPT_OUT
from tasks.corpus.report_page import render
from tasks.corpus.sharding import run_shards
from tasks.corpus.tracked_report import track
from tasks.corpus.weights import copies_of, rounds
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Outcome, Report, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import REPORT, Store
from tasks.tokenizer.shards import CRAWLED, source_of

PAGE = "report.html"
COLUMNS = ("url", "language", "bytes", "date", "fetched_at", "warc", "licence")
# A shard of the open web has as many hosts as pages, and pages word licences as they like: the rest
# is summed.
HOSTS_PER_SHARD = 2000
LICENCES = 12  # in the datasheet
OTHERS = "(others)"
CLUSTERS_TABLE = "clusters.parquet"
ADDRESSES = 3  # of a cluster
EXCERPT = 240  # characters of a rejected document
NOT_STATED = "(not stated)"


class ReportConfig(StageConfig):
    """What the report shows."""

    examples: int = Field(3, ge=0, le=20, description="Removed documents shown for each rule.")
    clusters: int = Field(12, ge=0, le=100, description="Largest clusters of duplicates shown.")


@dataclass
class Amount:
    """Documents, bytes and words of a group of documents; tokens where they are known."""

    documents: int = 0
    bytes: int = 0
    words: int = 0
    tokens: int = 0

    def add(self, other: Amount) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Composition:
    """What documents there are, by several groupings. Adds up over shards."""

    total: Amount = field(default_factory=Amount)
    groups: dict[str, dict[str, Amount]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)  # binary logarithm of bytes → documents
    dates: list[str] = field(default_factory=list)  # first and last of the pages' own dates
    fetched: list[str] = field(default_factory=list)

    def add(self, other: Composition) -> None:
        self.total.add(other.total)
        for bin, count in other.lengths.items():
            self.lengths[bin] = self.lengths.get(bin, 0) + count
        for kind, groups in other.groups.items():
            mine = self.groups.setdefault(kind, {})
            for name, amount in groups.items():
                mine.setdefault(name, Amount()).add(amount)
        for name in ("dates", "fetched"):
            known = sorted([*getattr(self, name), *getattr(other, name)])
            setattr(self, name, [known[0], known[-1]] if known else [])

    @classmethod
    def of_json(cls, body: dict[str, Any]) -> Composition:
        groups = {
            kind: {name: Amount(**amount) for name, amount in found.items()}
            for kind, found in body["groups"].items()
        }
        lengths = {int(bin): count for bin, count in body["lengths"].items()}
        return cls(Amount(**body["total"]), groups, lengths, body["dates"], body["fetched"])


@stage("corpus-report", version=3)
def report_corpus(
    config: ReportConfig, work: Workspace, *, corpus: Manifest, tokens: Manifest | None = None
) -> Outcome:
    """Tell what the corpus holds, what was removed, and where it came from."""
    chain = work.store.lineage(corpus)
    parts = [
        (corpus, name, tokens, f"{prefix}tokens-{number:05d}.documents.npy")
        for split, prefix in (("train-", ""), ("heldout-", "heldout-"))
        for number, name in enumerate(corpus.names(split, ".parquet"))
    ]
    whole = Composition()
    for told in run_shards(work, "composition", describe_shard, parts, label="Corpus report"):
        whole.add(Composition.of_json(told))
    rejects = [
        (config.examples, made, name)
        for made in chain
        for name in made.names("rejected-", ".parquet")
    ]
    removed = run_shards(work, "removed", examples_shard, rejects, label="Removals")
    examples: dict[tuple[str, str], list[dict[str, str]]] = {}
    for (_, made, _), found in zip(rejects, removed, strict=True):
        for rule, some in found.items():
            mine = examples.setdefault((made.stage, rule), [])
            mine += some[: config.examples - len(mine)]
    body = page_of(config, work.store, chain, corpus, whole, examples)
    html = render(body)
    work.write_bytes(PAGE, html.encode())
    numbers = {name: value for name, value in asdict(whole.total).items() if value}
    link = track(work, {"corpus": corpus}, numbers, html)
    place = f"`{work.location(PAGE)}`"
    funnel = [{k: row[k] for k in ("stage", "seen", "kept", "removed")} for row in body["funnel"]]
    reports = [
        Report("corpus-funnel", "table", funnel, "Documents from stage to stage"),
        Report(
            "corpus-report",
            "markdown",
            f"The report is one HTML page: {f'[open it]({link}), ' if link else ''}{place}",
            "The corpus report",
        ),
    ]
    return Outcome(counts=numbers, metrics={"mlflow": link}, reports=tuple(reports))


def describe_shard(
    work: Workspace, number: int, corpus: Manifest, name: str, tokens: Manifest | None, starts: str
) -> dict[str, Any]:
    """The composition of one shard of the corpus, as JSON."""
    directory = work.store.of(corpus)
    table = directory.read_table(name)
    words = pc.count_substring_regex(table["text"], r"\S+").to_pylist()
    order = rounds(copies_of(table)) if name.startswith("train-") else range(table.num_rows)
    sources = [source_of(warc) for warc in table["warc"].to_pylist()]
    counted = _token_counts(work.store, tokens, starts, list(order), sources)
    found = Composition()
    rows = table.select(list(COLUMNS)).to_pylist()
    for row, word_count, token_count in zip(rows, words, counted, strict=True):
        amount = Amount(1, row["bytes"], word_count, token_count)
        found.total.add(amount)
        bin = max(row["bytes"], 1).bit_length() - 1
        found.lengths[bin] = found.lengths.get(bin, 0) + 1
        for kind, group in (
            ("source", source_of(row["warc"])),
            ("language", row["language"] or NOT_STATED),
            ("host", urlsplit(row["url"]).netloc or NOT_STATED),
            ("licence", row["licence"] or NOT_STATED),
            ("split", name.partition("-")[0]),
        ):
            found.groups.setdefault(kind, {}).setdefault(group, Amount()).add(amount)
    for kind in ("host", "licence"):
        groups = found.groups.get(kind, {})
        for group in sorted(groups, key=lambda name: -groups[name].bytes)[HOSTS_PER_SHARD:]:
            groups.setdefault(OTHERS, Amount()).add(groups.pop(group))
    for attribute, column in (("dates", "date"), ("fetched", "fetched_at")):
        stated = [row[column][:10] for row in rows if row[column]]
        setattr(found, attribute, [min(stated), max(stated)] if stated else [])
    return asdict(found)


def _token_counts(
    store: Store, tokens: Manifest | None, name: str, order: list[int], sources: list[str]
) -> list[int]:
    """Tokens of each document of a shard, whose sources these are; zeros without token shards.

    Each source has a shard of its own, with its rows of `order`, all copies of a document.
    """
    counts = [0] * len(sources)
    if tokens is None:
        return counts
    directory = store.of(tokens)
    for source in sorted(set(sources)):
        file = name if source == CRAWLED else name.replace("tokens-", f"tokens-{source}-", 1)
        if file not in tokens.names():
            continue
        starts = read_array(directory, file)
        end = len(read_array(directory, file.replace(".documents.npy", ".npy")))
        rows = [row for row in order if sources[row] == source]
        for row, count in zip(rows, np.diff([*starts, end]).tolist(), strict=True):
            counts[row] += count
    return counts


def examples_shard(
    work: Workspace, number: int, limit: int, made: Manifest, name: str
) -> dict[str, list[dict[str, str]]]:
    """The first removed documents of each rule in one table of rejected ones."""
    table = work.store.of(made).read_table(name, ["url", "rule", "reason", "text"])
    found: dict[str, list[dict[str, str]]] = {}
    for rule in pc.unique(table["rule"]).to_pylist():
        some = table.filter(pc.equal(table["rule"], rule)).slice(0, limit).to_pylist()
        found[rule] = [
            {
                "url": row["url"] or "",
                "reason": row["reason"],
                "text": (row["text"] or "")[:EXCERPT],
            }
            for row in some
        ]
    return found


def page_of(
    config: ReportConfig,
    store: Store,
    chain: list[Manifest],
    corpus: Manifest,
    whole: Composition,
    examples: dict[tuple[str, str], list[dict[str, str]]],
) -> dict[str, Any]:
    """Everything the page shows, as plain values."""
    licences = {
        source["name"]: source.get("licence", "")
        for made in chain
        for source in made.config.get("sources", ())
    }
    return {
        "corpus": corpus.fingerprint,
        "created": corpus.created,
        "total": asdict(whole.total),
        "split": _rows(whole, "split"),
        "funnel": [_funnel_row(store, made, examples) for made in chain],
        "lengths": sorted(whole.lengths.items()),
        "language": _rows(whole, "language"),
        "host": _rows(whole, "host"),
        "source": [
            row | {"licence": licences.get(row["name"], "")} for row in _rows(whole, "source")
        ],
        "clusters": _clusters(store, chain, config.clusters),
        "crawl": [row for made in chain for row in _table(store, made, "crawl-hosts")],
        "datasheet": _datasheet(chain, whole, licences),
        "chain": [
            {
                "stage": made.stage,
                "artifact": made.fingerprint[:12],
                "made": made.created[:19].replace("T", " "),
                "code": made.code,
                "seconds": made.cost.get("wall_seconds", 0.0),
                "note": made.not_replayable,
            }
            for made in chain
        ],
    }


def _rows(whole: Composition, kind: str) -> list[dict[str, Any]]:
    groups = whole.groups.get(kind, {})
    ordered = sorted(groups, key=lambda name: (-groups[name].bytes, name))
    return [{"name": name} | asdict(groups[name]) for name in ordered]


def _funnel_row(
    store: Store, made: Manifest, examples: dict[tuple[str, str], list[dict[str, str]]]
) -> dict[str, Any]:
    removed = sum(made.rules.values())
    kept = made.counts.get("pages" if made.stage == "crawl" else "documents", 0)
    told = _table(store, made, "crawl-rules") if made.stage == "crawl" else []
    addresses = {row["reason"]: row["such as"] for row in told}
    rules = [
        {
            "rule": rule,
            "removed": count,
            "examples": examples.get((made.stage, rule))
            or [{"url": url, "reason": "", "text": ""} for url in addresses.get(rule, ())],
        }
        for rule, count in sorted(made.rules.items(), key=lambda item: (-item[1], item[0]))
    ]
    return {
        "stage": made.stage,
        "seen": kept + removed,
        "kept": kept,
        "removed": removed,
        "rules": rules,
        "metrics": {name: value for name, value in made.metrics.items() if value not in (None, 0)},
    }


def _table(store: Store, made: Manifest, key: str) -> list[dict[str, Any]]:
    """A table among an artifact's own reports."""
    if REPORT not in made.names():
        return []
    reports = json.loads(store.of(made).read_bytes(REPORT))
    return next((r["body"] for r in reports if r["key"] == key and r["kind"] == "table"), [])


def _clusters(store: Store, chain: list[Manifest], limit: int) -> list[dict[str, Any]]:
    """The largest groups of similar documents, those removed as duplicates included."""
    made = next((m for m in chain if m.stage == "deduplicate"), None)
    if made is None or CLUSTERS_TABLE not in made.names():
        return []
    shown: dict[str, dict[str, Any]] = {}
    for member in store.of(made).read_table(CLUSTERS_TABLE).to_pylist():
        numbers = {name: member[name] for name in ("documents", "removed")}
        row = shown.setdefault(member["cluster"], numbers | {"such as": []})
        if len(row["such as"]) < ADDRESSES:
            row["such as"].append(member["url"])
    rows = list(shown.values())[:limit]
    return [row | {"such as": ", ".join(row["such as"])} for row in rows]


def _datasheet(
    chain: list[Manifest], whole: Composition, licences: dict[str, str]
) -> list[tuple[str, str]]:
    """Facts by name, after Gebru et al., Datasheets for Datasets (arXiv:1803.09010)."""
    by_stage = {made.stage: made for made in chain}
    facts: list[tuple[str, str]] = []

    def tell(name: str, value: object) -> None:
        if value not in ("", None, (), []):
            facts.append((name, str(value)))

    crawled = by_stage.get("crawl")
    if crawled is not None:
        config = crawled.config
        tell("Seeds", ", ".join(config.get("seeds", ())))
        tell("Collected by", _agent(config))
        tell("Epoch of the crawl", config.get("epoch"))
        tell("Robots rules and crawl delays", "honoured (RFC 9309)")
        honours = config.get("honour_opt_outs")
        tell("Opt-outs of text mining", "honoured" if honours else "not honoured")
        tell("Left out by robots.txt", _total([crawled], "robots.txt"))
    readers = [by_stage[name] for name in ("crawl", "extract", "gather") if name in by_stage]
    tell("Left out by an opt-out", _total(readers, OPT_OUT, "opt-out"))
    tell("Left out by noindex", _total(readers, "noindex"))
    tell("Sources", ", ".join(f"{n} (licence: {t or 'not stated'})" for n, t in licences.items()))
    tell("Licences, as pages and sources state them", _licences(whole))
    tell("Fetched", " to ".join(dict.fromkeys(whole.fetched)))
    tell("The pages' own dates", " to ".join(dict.fromkeys(whole.dates)))
    personal = by_stage.get("pii")
    if personal is None:
        tell("Personal data", "not looked for (pii.action=keep)")
    else:
        tell("Personal data", f"masked, before the selection: {personal.metrics}")
        limit = by_stage.get("pii-drop")
        tell("Most finds of it in a document", limit and limit.config["most"])
    forgotten = by_stage.get("forget")
    tell("Tombstones that stood", forgotten.config.get("tombstones") if forgotten else 0)
    tell("Documents left out for them", forgotten.rules.get("tombstoned", 0) if forgotten else 0)
    erased = [made.stage for made in chain if made.erased]
    tell("Erased afterwards from", ", ".join(erased))
    tell("Held out of all training", f"{_share(whole)} of the text, by groups of similar pages")
    removed = sum(sum(made.rules.values()) for made in chain if made.stage != "crawl")
    tell("Documents removed by all rules", f"{removed:,}")
    return facts


def _licences(whole: Composition) -> str:
    """`CC0-1.0: 3 documents, …`: the commonest first, the others counted together."""
    groups = whole.groups.get("licence", {})
    ordered = sorted(groups, key=lambda name: (-groups[name].documents, name))
    told = [f"{name}: {groups[name].documents:,} documents" for name in ordered[:LICENCES]]
    if rest := ordered[LICENCES:]:
        total = sum(groups[name].documents for name in rest)
        told.append(f"{len(rest):,} others: {total:,} documents")
    return "; ".join(told)


def _agent(config: dict[str, Any]) -> str:
    contact = config.get("contact") or "no contact given"
    return f"{config.get('user_agent', '')}, {contact}"


def _total(stages: list[Manifest], *starts: str) -> int:
    """How much these stages removed by rules that begin with one of these words."""
    rules = [item for made in stages for item in made.rules.items()]
    return sum(count for rule, count in rules if rule.startswith(starts))


def _share(whole: Composition) -> str:
    held = whole.groups.get("split", {}).get("heldout", Amount()).bytes
    return f"{100 * held / max(whole.total.bytes, 1):.1f} %"
