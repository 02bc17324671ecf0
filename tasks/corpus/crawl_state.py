"""Where a crawl stands: saved after every round, and taken over from the epoch before."""

from __future__ import annotations

import json

import pyarrow as pa
from pydantic import ValidationError

from tasks.corpus.addresses import Address, Earlier
from tasks.corpus.crawl_config import CrawlConfig
from tasks.corpus.frontier import Frontier
from tasks.corpus.pages import LINKS
from tasks.runtime.fingerprint import identity
from tasks.runtime.manifest import Manifest
from tasks.runtime.stage import Workspace
from tasks.runtime.store import Directory

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


def earlier_epoch(config: CrawlConfig, work: Workspace) -> Manifest | None:
    """The latest earlier epoch of the same crawl, if the store still has one."""
    # How a later epoch is crawled does not make it another crawl.
    alike = {"epoch": 0, "revisit_chance": 0.0}
    wanted = identity(config.model_copy(update=alike))
    best: tuple[int, Manifest] | None = None
    for manifest in work.store.all(work.stage):
        try:
            other = CrawlConfig(**manifest.config)
        except ValidationError:
            continue  # made by another version of this stage
        if identity(other.model_copy(update=alike)) != wanted:
            continue
        if other.epoch < config.epoch and (best is None or other.epoch >= best[0]):
            best = (other.epoch, manifest)
    return best[1] if best else None


def earlier_pages(directory: Directory) -> dict[str, Earlier]:
    links = {
        row["url"]: tuple(row["links"]) for row in directory.read_table("links.parquet").to_pylist()
    }
    rows = {row["url"]: row for row in directory.read_table("urls.parquet").to_pylist()}
    pages = directory.read_table("pages.parquet").to_pylist()
    earlier = {}
    for page in pages:
        row = rows[page["url"]]
        row["segment"] = row.pop("warc")
        address = Address(**row)
        # A conditional request refers to the record that holds the body.
        address.record_id, address.fetched_at = page["record_id"], page["fetched_at"]
        address.segment, address.offset = page["warc"], page["offset"]
        address.length = page["length"]
        found = links.get(page["url"], ())
        earlier[page["url"]] = Earlier(address, page["fetch_url"], found)
    return earlier
