"""Where a crawl stands: saved after every round, and taken over from the epoch before."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from tasks.corpus.addresses import Address, Earlier
from tasks.corpus.crawl_config import PAGE_SETTINGS, CrawlConfig
from tasks.corpus.frontier import Frontier
from tasks.corpus.pages import LINKS
from tasks.corpus.revisit import Lead
from tasks.runtime.fingerprint import identity
from tasks.runtime.manifest import Manifest
from tasks.runtime.planning import differences
from tasks.runtime.stage import Workspace
from tasks.runtime.store import Directory, Store

ROUNDS = "_rounds"


class Rounds:
    """The saved state after each round; its JSON file, written last, is the commit."""

    def __init__(self, work: Workspace) -> None:
        self._work = work
        self.number = -1

    def restore(self, frontier: Frontier, partitions: int) -> int:
        """Take up the last whole round, if there is one; returns the number of partitions."""
        commits = [n for n in self._work.names() if n.startswith(ROUNDS) and n.endswith(".json")]
        if not commits:
            return partitions
        self.number = int(commits[-1].rpartition("/")[2].removesuffix(".json"))
        state = json.loads(self._work.read_bytes(commits[-1]))
        frontier.restore(
            self._work.read_table(self._name("urls.parquet")),
            self._work.read_table(self._name("hosts.parquet")),
            state["counts"],
        )
        frontier.begun = state["begun"]
        return int(state["partitions"])

    def save(self, frontier: Frontier, partitions: int, links: dict[str, tuple[str, ...]]) -> None:
        self.number += 1
        rows = [{"url": url, "links": list(found)} for url, found in links.items()]
        self._work.write_table(self._name("links.parquet"), pa.Table.from_pylist(rows, LINKS))
        self._work.write_table(self._name("urls.parquet"), frontier.url_table())
        self._work.write_table(self._name("hosts.parquet"), frontier.host_table())
        counts = dict(frontier.counts)
        state = {"partitions": partitions, "counts": counts, "begun": frontier.begun}
        self._work.write_json(f"{ROUNDS}/{self.number:06d}.json", state)
        for table in ("urls", "hosts"):  # the round before the last is never needed again
            name = f"{ROUNDS}/{self.number - 2:06d}-{table}.parquet"
            if self.number >= 2 and self._work.has(name):
                self._work.filesystem.delete_file(self._work.location(name))

    def links(self) -> pa.Table:
        names = [n for n in self._work.names() if n.startswith(ROUNDS) and "links" in n]
        tables = [self._work.read_table(name) for name in names]
        return pa.concat_tables(tables).sort_by("url") if tables else LINKS.empty_table()

    def _name(self, table: str) -> str:
        return f"{ROUNDS}/{self.number:06d}-{table}"


@dataclass(frozen=True)
class EarlierEpoch:
    """The latest earlier epoch of the same crawl, if the store still has one: with the same seeds,
    or else with one of them.

    `note` says, in a later epoch, what it goes on from, or which settings make it start anew, and
    which epochs since then are of no use.
    """

    directory: Directory | None = None
    note: str = ""

    @classmethod
    def of(cls, config: CrawlConfig, store: Store) -> EarlierEpoch:
        found: list[tuple[int, Manifest, CrawlConfig]] = []
        refused: list[int] = []
        for manifest in store.all("crawl"):
            epoch, seeds = manifest.config.get("epoch", 0), manifest.config.get("seeds", ())
            if epoch >= config.epoch or not {*seeds} & {*config.seeds}:
                continue
            if other := settings_of(manifest):
                found.append((epoch, manifest, other))
            else:
                refused.append(epoch)
        # Of the same number one of the same settings, or else, as the order is stable, the last.
        found.sort(key=lambda it: (it[2].seeds == config.seeds, it[0], _is_alike(it[2], config)))
        same = [epoch for epoch in found if page_settings(epoch[2]) == page_settings(config)]
        if same:
            number, manifest, other = same[-1]
            changed = _changes(identity(other), identity(config))
            said = f"epoch {config.epoch} goes on from epoch {number}"
            said = f"{said}; with other settings: {changed}"
            later = [epoch for epoch in refused if epoch >= number]
            return cls(store.of(manifest), f"{said}; {_of_no_use(later)}" if later else said)
        if found:
            number, _, other = found[-1]
            changed = _changes(page_settings(other), page_settings(config))
            said = f"epoch {config.epoch} asks for every page anew, not as epoch {number} left it"
            return cls(None, f"{said}: {changed}")
        if refused:
            said = f"epoch {config.epoch} asks for every page anew"
            return cls(None, f"{said}: {_of_no_use(refused)}")
        return cls()

    def pages(self, max_bytes: int) -> dict[str, Earlier]:
        """What is known of every document of at most `max_bytes`."""
        if self.directory is None:
            return {}
        rows, links = self._rows, self._links
        earlier = {}
        for page in self.directory.read_table("pages.parquet").to_pylist():
            row = rows[page["url"]]
            address = Address(**{k: v for k, v in row.items() if k != "warc"})
            # A conditional request refers to the record that holds the body.
            address.record_id, address.fetched_at = page["record_id"], page["fetched_at"]
            address.segment, address.offset = page["warc"], page["offset"]
            address.length = page["length"]
            if address.bytes <= max_bytes:
                found = links.get(page["url"], ())
                earlier[page["url"]] = Earlier(address, page["fetch_url"], found)
        return earlier

    def leads(self) -> dict[str, Lead]:
        """Where redirects and sitemaps led."""
        if self.directory is None:
            return {}
        links = self._links
        maps: dict[str, list[str]] = {}  # by the sitemap that names them
        for url, row in self._rows.items():
            if row["kind"] == "sitemap":
                maps.setdefault(row["source"], []).append(url)
        return {
            url: Lead(
                row["location"],
                links.get(url, ()),
                () if row["location"] else tuple(maps.get(url, ())),
                row.get("stale", 0),
            )
            for url, row in self._rows.items()
            if row["location"] or (row["kind"] == "sitemap" and (url in links or url in maps))
        }

    @cached_property
    def _rows(self) -> dict[str, dict[str, Any]]:
        assert self.directory is not None
        return {row["url"]: row for row in self.directory.read_table("urls.parquet").to_pylist()}

    @cached_property
    def _links(self) -> dict[str, tuple[str, ...]]:
        assert self.directory is not None
        rows = self.directory.read_table("links.parquet").to_pylist()
        return {row["url"]: tuple(row["links"]) for row in rows}


def settings_of(crawl: Manifest) -> CrawlConfig | None:
    """What a crawl was made with; None where this version of the stage refuses it."""
    try:
        return CrawlConfig.model_validate(crawl.config)
    except ValidationError:
        return None


def page_settings(config: CrawlConfig) -> dict[str, Any]:
    """What decides what a page is; pace, limits and scope do not."""
    values: dict[str, Any] = identity(config)
    return {name: values[name] for name in PAGE_SETTINGS}


def _of_no_use(epochs: list[int]) -> str:
    numbers = ", ".join(map(str, sorted({*epochs})))
    return f"of epoch {numbers} the settings are refused by now"


def _is_alike(one: CrawlConfig, other: CrawlConfig) -> bool:
    return bool(identity(one) | {"epoch": 0} == identity(other) | {"epoch": 0})


def _changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    return "; ".join(differences(old | {"epoch": 0}, new | {"epoch": 0}, "crawl")) or "none"
