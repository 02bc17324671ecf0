"""The crawl stage: seeds in, WARC segments and a table of pages out.

Rounds of generate → fetch → update. A round's fetch lists are cut by host, so one Ray task owns a
host's politeness. After each round the state is saved; within a round the segments are the state.
`kill -9` at any moment repeats only the requests that were in flight.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
from pydantic import Field, ValidationError, field_validator

from tasks.corpus.fetch import SEGMENTS, Limits, PartitionResult, Plan, fetch_partition
from tasks.corpus.frontier import Address, Earlier, Frontier
from tasks.corpus.guard import endpoint, private_seeds
from tasks.corpus.pack import pack_segments
from tasks.corpus.pages import LINKS, PAGES
from tasks.corpus.urls import Aliases, Scope, canonical_url, host_of
from tasks.runtime.errors import UserError
from tasks.runtime.fingerprint import identity, place
from tasks.runtime.manifest import Manifest
from tasks.runtime.progress import Progress, run_logger
from tasks.runtime.ray_session import ray_session
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Report, StageConfig, Workspace, stage
from tasks.runtime.store import Directory

EMBEDDED = "embedded:stdlib"
EMBEDDED_NAME = "embedded://stdlib"
ROUNDS = "_rounds"

# Runs a function over a list of argument tuples somewhere, yielding (index, result) as they come.
Mapper = Callable[[Callable[..., Any], list[tuple[Any, ...]]], Iterable[tuple[int, Any]]]


class CrawlOptions(StageConfig):
    """How politely and how far to crawl."""

    domains: tuple[str, ...] = Field(
        (),
        description="Domains, subdomains included, to follow links to besides the seeds' hosts.",
    )
    include: tuple[str, ...] = Field(
        (),
        description="If given, only addresses matching one of these are fetched: a prefix of the "
        "path (/docs/) or a glob over the whole address (https://*.example.org/*).",
    )
    exclude: tuple[str, ...] = Field(
        ("/source/", "/library/index-"),
        description="Addresses never fetched, written like include. The default leaves out the "
        "embedded site's source code, and its alphabetical index, which would show to training "
        "the first sentence of functions that are held out of it.",
    )
    max_pages: int = Field(2000, ge=1, description="Documents after which the crawl stops.")
    max_depth: int = Field(16, ge=0, description="Links between a seed and a page, at most.")
    max_redirects: int = Field(5, ge=0, description="Redirects in a row that are followed.")
    max_bytes: int = Field(
        10_000_000, ge=1, description="Size in bytes, after decompression, of the largest page."
    )
    max_delay: float = Field(
        60.0,
        gt=0,
        description="Seconds between requests, or of Retry-After, beyond which a host is left.",
    )
    content_types: tuple[str, ...] = Field(
        ("text/html", "application/xhtml+xml", "text/plain"),
        description="Media types of pages that are kept.",
    )
    user_agent: str = Field(
        "Gristmill/1.0",
        pattern=r"^[A-Za-z_-]+(/\S+)?$",
        description="Name sent to sites; the part before the slash is looked up in robots.txt.",
    )
    contact: str = Field(
        "",
        pattern=r"^[ -~]*$",
        description="E-mail or web address where the owner of a site reaches you; sent with every "
        "request. Give one before crawling sites that are not yours.",
    )
    delay: float = place(
        1.0,
        ge=0,
        description="Seconds between requests to a host whose robots.txt names no Crawl-delay.",
    )
    timeout: float = place(30.0, gt=0, description="Seconds one request may take in all.")
    retries: int = place(2, ge=0, description="Further attempts after a failure that may pass.")
    parallel: int = place(4, ge=1, description="Requests in flight to one host, at most.")
    round_seconds: float = place(
        10.0, gt=0, description="About how long one round of fetching takes."
    )
    segment_bytes: int = place(
        64 * 1024 * 1024, ge=1, description="Size in bytes at which a WARC file is closed."
    )


class CrawlConfig(CrawlOptions):
    """What to crawl and how politely."""

    seeds: tuple[str, ...] = Field(
        (EMBEDDED,),
        min_length=1,
        description="Addresses the crawl starts from. embedded:stdlib is the standard library's "
        "documentation on this machine and needs no network.",
    )
    epoch: int = Field(
        0,
        ge=0,
        description="Raise it to crawl again: pages are asked for with If-None-Match and "
        "If-Modified-Since, and if none changed nothing after the crawl runs again.",
    )

    @field_validator("seeds")
    @classmethod
    def _are_addresses(cls, seeds: tuple[str, ...]) -> tuple[str, ...]:
        for seed in seeds:
            if seed == EMBEDDED:
                continue
            if seed.startswith("embedded:"):
                raise ValueError(f"seed {seed!r} is not known; the embedded site is {EMBEDDED!r}")
            try:
                canonical_url(seed)
            except ValueError as error:
                raise ValueError(
                    f"seed {seed!r} cannot be crawled: {error}; write it like https://example.org/"
                ) from error
        return seeds

    @property
    def agent(self) -> str:
        """The User-Agent header."""
        return f"{self.user_agent} (+{self.contact})" if self.contact else self.user_agent

    def limits(self) -> Limits:
        return Limits(
            user_agent=self.agent,
            token=self.user_agent.partition("/")[0],
            contact=self.contact,
            delay=self.delay,
            max_delay=self.max_delay,
            timeout=self.timeout,
            max_bytes=self.max_bytes,
            retries=self.retries,
            parallel=self.parallel,
            content_types=self.content_types,
        )


@stage("crawl", version=1, content_addressed=True)
def crawl(config: CrawlConfig, work: Workspace) -> Outcome:
    """Fetch the seeds' sites politely into WARC files."""
    settings = Settings.load()
    with ray_session(settings) as session:

        def on_ray(
            function: Callable[..., Any], items: list[tuple[Any, ...]]
        ) -> Iterator[tuple[int, Any]]:
            # A round is short and its tasks mostly wait for the network.
            return session.map(
                function, items, label="crawl", num_cpus=0.5, progress=_Unsaid("crawl", 1, "tasks")
            )

        return crawl_site(config, work, on_ray, settings.site, partitions=2 * session.cpus)


class _Unsaid(Progress):
    """The crawl says how many pages it has, not how many Ray tasks of a round."""

    def update(self, done: float, total: float | None = None) -> None:
        self.done = done

    def finish(self) -> None:
        pass


def crawl_site(
    config: CrawlConfig, work: Workspace, run: Mapper, embedded: str, partitions: int
) -> Outcome:
    """The whole crawl; `run` decides where partitions are fetched, `embedded` where that site is.

    Raises UserError naming the seeds when not one page could be had.
    """
    aliases = Aliases(((EMBEDDED_NAME, embedded.rstrip("/")),))
    seeds = {_seed_address(seed): seed for seed in config.seeds}
    private = private_seeds(aliases.place(url) for url in seeds)
    if not config.contact and any(endpoint(aliases.place(u)) not in private for u in seeds):
        run_logger().warning(
            "crawl.contact is empty: owners of the sites cannot reach you; set an e-mail or address"
        )
    earlier_manifest = _earlier_epoch(config, work)
    earlier_directory = work.store.of(earlier_manifest) if earlier_manifest else None
    frontier = Frontier(
        Scope(frozenset(), config.domains, config.include, config.exclude, config.max_depth),
        config.max_pages,
        config.max_redirects,
        config.round_seconds,
        _earlier_pages(earlier_directory) if earlier_directory else None,
    )
    saved = _Rounds(work)
    partitions = saved.restore(frontier, partitions)
    if not frontier.addresses:
        for url in seeds:
            frontier.add_seed(url)
        saved.save(frontier, partitions, {})
    progress = work.progress("crawl", config.max_pages, "pages", start=_documents(frontier))
    while plans := frontier.generate():
        cut = _cut(plans, saved.number + 1, partitions, config, aliases, private)
        results: list[PartitionResult] = [
            result for _, result in run(fetch_partition, [(plan, work) for plan in cut])
        ]
        links = frontier.update(
            plans,
            (outcome for result in results for outcome in result.outcomes),
            (host for result in results for host in result.hosts),
        )
        saved.save(frontier, partitions, links)
        known = sum(a.kind == "page" and a.state != "skipped" for a in frontier.addresses.values())
        progress.update(_documents(frontier), min(known, config.max_pages))
    progress.finish()
    frontier.close()
    if not _documents(frontier):
        raise UserError(_nothing_found(frontier, seeds))
    return _finish(config, work, run, frontier, saved, aliases, earlier_directory)


def _seed_address(seed: str) -> str:
    return f"{EMBEDDED_NAME}/index.html" if seed == EMBEDDED else canonical_url(seed)


def _documents(frontier: Frontier) -> int:
    return sum(address.is_document for address in frontier.addresses.values())


def _cut(
    plans: list[Any],
    number: int,
    partitions: int,
    config: CrawlConfig,
    aliases: Aliases,
    private: tuple[tuple[str, int], ...],
) -> list[Plan]:
    """Hosts dealt to partitions by a hash of their name: the same on every attempt."""
    groups: dict[int, list[Any]] = {}
    for plan in plans:
        groups.setdefault(zlib.crc32(plan.host.encode()) % partitions, []).append(plan)
    return [
        Plan(
            f"{number:06d}-{partition:04d}",
            tuple(hosts),
            config.limits(),
            aliases,
            private,
            config.segment_bytes,
        )
        for partition, hosts in sorted(groups.items())
    ]


class _Rounds:
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
        return int(state["partitions"])

    def save(self, frontier: Frontier, partitions: int, links: dict[str, tuple[str, ...]]) -> None:
        self.number += 1
        rows = [{"url": url, "links": list(found)} for url, found in links.items()]
        self._work.write_table(self._name("links.parquet"), pa.Table.from_pylist(rows, LINKS))
        self._work.write_table(self._name("urls.parquet"), frontier.url_table())
        self._work.write_table(self._name("hosts.parquet"), frontier.host_table())
        state = {"partitions": partitions, "counts": dict(frontier.counts)}
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


def _earlier_epoch(config: CrawlConfig, work: Workspace) -> Manifest | None:
    """The latest earlier epoch of the same crawl, if the store still has one."""
    wanted = identity(config.model_copy(update={"epoch": 0}))
    best: tuple[int, Manifest] | None = None
    for manifest in work.store.all(work.stage):
        try:
            other = CrawlConfig(**manifest.config)
        except ValidationError:
            continue  # made by another version of this stage
        if identity(other.model_copy(update={"epoch": 0})) != wanted:
            continue
        if other.epoch < config.epoch and (best is None or other.epoch >= best[0]):
            best = (other.epoch, manifest)
    return best[1] if best else None


def _earlier_pages(directory: Directory) -> dict[str, Earlier]:
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


def _nothing_found(frontier: Frontier, seeds: dict[str, str]) -> str:
    tried = []
    for url, seed in seeds.items():
        address = frontier.addresses[url]
        for _ in range(frontier.max_redirects):  # the reason stands at the end of a chain
            address = frontier.addresses.get(address.location, address)
        if address.noindex:
            reason = "its page says noindex"
        else:
            reason = address.reason or f"{address.state}, HTTP {address.status}"
        tried.append(f"{seed} ({reason})")
    remedy = (
        "start the local stack with `gristmill up`"
        if list(seeds.values()) == [EMBEDDED]
        else "check the addresses and the network, or set other crawl seeds"
    )
    return f"the crawl found no page at {', '.join(tried)}; {remedy}"


# --- the artifact --------------------------------------------------------------------------------


def _finish(
    config: CrawlConfig,
    work: Workspace,
    run: Mapper,
    frontier: Frontier,
    saved: _Rounds,
    aliases: Aliases,
    earlier: Directory | None,
) -> Outcome:
    addresses = sorted(frontier.addresses.values(), key=lambda address: address.url)
    documents = [address for address in addresses if address.is_document]
    segments = [n for n in work.names() if n.startswith(f"{SEGMENTS}/")]
    carried = [
        (frontier.earlier[a.url].address.segment, a.offset, a.length)
        for a in documents
        if a.state == "not_modified"
    ]
    places = pack_segments(work, run, segments, earlier, carried, config.segment_bytes)
    rows = []
    for address in addresses:
        key = (f"{SEGMENTS}/{address.segment}", address.offset)
        if address.state == "not_modified":
            key = (frontier.earlier[address.url].address.segment, address.offset)
        warc, offset = places(*key) if address.length else ("", 0)
        rows.append((address, warc, offset))
    pages = [
        {name: getattr(a, name) for name in PAGES.names if hasattr(a, name)}
        | {"fetch_url": aliases.place(a.url), "warc": warc, "offset": offset}
        for a, warc, offset in rows
        if a.is_document
    ]
    work.write_table("pages.parquet", pa.Table.from_pylist(pages, PAGES))
    work.write_table("urls.parquet", _url_table(frontier, rows))
    work.write_table("hosts.parquet", frontier.host_table())
    work.write_table("links.parquet", saved.links())
    return _outcome(frontier, documents, saved.number)


def _url_table(frontier: Frontier, rows: list[tuple[Address, str, int]]) -> pa.Table:
    values = [vars(address) | {"segment": warc, "offset": offset} for address, warc, offset in rows]
    table = pa.Table.from_pylist(values, schema=frontier.url_table().schema)
    return table.rename_columns(["warc" if n == "segment" else n for n in table.column_names])


def content_digest(documents: Iterable[Address]) -> str:
    """What stages downstream depend on: which documents there are and what they say."""
    lines = sorted(f"{address.url}\t{address.digest}\n" for address in documents)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _outcome(frontier: Frontier, documents: list[Address], rounds: int) -> Outcome:
    addresses = list(frontier.addresses.values())
    states = Counter(a.state for a in addresses if a.kind == "page")
    rules = Counter(
        "noindex" if a.noindex else a.reason
        for a in addresses
        if not a.is_document and a.kind == "page" and a.state != "redirect"
    )
    counts = {
        "pages": len(documents),
        "fetched": sum(a.state == "fetched" for a in documents),
        "not_modified": sum(a.state == "not_modified" for a in documents),
        "redirects": states["redirect"],
        "errors": states["error"],
        "robots_denied": states["denied"],
        "skipped": states["skipped"],
        "addresses": len(addresses),
        "same_body": len(documents) - len({a.digest for a in documents}),
        "links_to_known": frontier.counts["links to a known address"],
        "links_out_of_scope": frontier.counts["links to another host"],
        "hosts": sum(host.in_scope for host in frontier.hosts.values()),
        "requests": sum(host.requests for host in frontier.hosts.values()),
        "bytes": sum(a.bytes for a in documents),
        "rounds": rounds,
    }
    if frontier.earlier:
        before = {url: earlier.address.digest for url, earlier in frontier.earlier.items()}
        now = {a.url: a.digest for a in documents}
        counts |= {
            "new": len(now.keys() - before.keys()),
            "gone": len(before.keys() - now.keys()),
            "changed": sum(now[url] != before[url] for url in now.keys() & before.keys()),
        }
    return Outcome(
        counts=counts,
        rules=dict(rules.most_common()),
        content=content_digest(documents),
        reports=(
            Report("crawl-hosts", "table", _host_rows(frontier), "Hosts of the crawl"),
            Report("crawl-rules", "table", _rule_rows(addresses), "What became of addresses"),
        ),
    )


def _host_rows(frontier: Frontier, limit: int = 200) -> list[dict[str, Any]]:
    by_host: dict[str, list[Address]] = {}
    for address in frontier.addresses.values():
        by_host.setdefault(host_of(address.url), []).append(address)
    rows: list[dict[str, Any]] = []
    for host in frontier.hosts.values():
        if not host.in_scope:
            continue
        own = by_host.get(host.host, [])
        taken = [a.seconds for a in own if a.seconds]
        rows.append(
            {
                "host": host.host,
                "fetched": sum(a.is_document for a in own),
                "failed": sum(a.state == "error" for a in own),
                "denied": sum(a.state == "denied" for a in own),
                "requests": host.requests,
                "bytes": host.bytes,
                "delay, s": host.delay,
                "mean pause, s": round(host.paused / max(host.requests, 1), 4),
                "mean answer, s": round(sum(taken) / max(len(taken), 1), 4),
            }
        )
    return sorted(rows, key=lambda row: -row["fetched"])[:limit]


def _rule_rows(addresses: list[Address], examples: int = 2) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for address in addresses:
        reason = "noindex" if address.noindex else address.reason
        groups.setdefault((address.state, reason), []).append(address.url)
    return [
        {"state": state, "reason": reason, "addresses": len(urls), "such as": urls[:examples]}
        for (state, reason), urls in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
