"""The crawl stage: seeds in, WARC segments and a table of pages out.

Rounds of generate → fetch → update. A round's fetch lists are cut by host, so one Ray task owns a
host's politeness. After each round the state is saved; within a round the segments are the state.
`kill -9` at any moment repeats only the requests that were in flight.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from tasks.corpus.addresses import CARRIED_STATES, DOCUMENT_STATES, Address, Host
from tasks.corpus.crawl_config import EMBEDDED, CrawlConfig, CrawlOptions
from tasks.corpus.crawl_report import crawl_outcome
from tasks.corpus.crawl_state import EarlierEpoch, Rounds
from tasks.corpus.fetch import fetch_partition
from tasks.corpus.fetch_plan import DOWN, SEGMENTS, PartitionResult, Plan
from tasks.corpus.frontier import Frontier
from tasks.corpus.guard import endpoint, private_seeds
from tasks.corpus.pack import pack_segments
from tasks.corpus.pages import PAGES
from tasks.corpus.revisit import Revisit
from tasks.corpus.tombstoned import Forgotten
from tasks.corpus.urls import Aliases, Scope, canonical_url, host_of
from tasks.runtime.errors import UserError
from tasks.runtime.progress import Progress, run_logger
from tasks.runtime.ray_session import ray_session
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.store import Store

__all__ = ["EMBEDDED", "CrawlConfig", "CrawlOptions", "SiteDown", "crawl", "crawl_site"]

EMBEDDED_NAME = "embedded://stdlib"

# Runs a function over a list of argument tuples somewhere, yielding (index, result) as they come.
Mapper = Callable[[Callable[..., Any], list[tuple[Any, ...]]], Iterable[tuple[int, Any]]]


def foreseen(config: CrawlConfig, store: Store) -> str:
    """What a later epoch goes on from, or why it starts anew: for its plan."""
    return EarlierEpoch.of(config, store).note


@stage("crawl", version=5, retries=3, content_addressed=True, foresee=foreseen)
def crawl(config: CrawlConfig, work: Workspace) -> Outcome:
    """Fetch the seeds' sites politely into WARC files."""
    settings = Settings.load()
    with ray_session(settings) as session:
        partitions = 2 * session.cpus

        def on_ray(
            function: Callable[..., Any], items: list[tuple[Any, ...]]
        ) -> Iterator[tuple[int, Any]]:
            # A round is short and its tasks mostly wait for the network.
            return session.map(
                function,
                items,
                label="crawl",
                num_cpus=0.5,
                in_flight=partitions,
                progress=_Unsaid("crawl", 1, "tasks"),
            )

        # Tombstones keep pages from being fetched but are not part of a crawl's identity: what was
        # fetched before one was set, the forget stage leaves out.
        forgotten = Forgotten.standing(settings).address
        return crawl_site(config, work, on_ray, settings.site, partitions, forgotten=forgotten)


class _Unsaid(Progress):
    """The crawl says how many pages it has, not how many Ray tasks of a round."""

    def update(self, done: float, total: float | None = None) -> None:
        self.done = done

    def finish(self) -> None:
        pass


def crawl_site(
    config: CrawlConfig,
    work: Workspace,
    run: Mapper,
    embedded: str,
    partitions: int,
    forgotten: Callable[[str], object] = lambda url: None,
) -> Outcome:
    """The whole crawl; `run` decides where partitions are fetched, `embedded` where that site is.

    An address of which `forgotten` says anything is never asked for.

    Raises UserError naming the seeds when not one page could be had.
    """
    aliases = Aliases(((EMBEDDED_NAME, embedded.rstrip("/")),))
    seeds = {_seed_address(seed): seed for seed in config.seeds}
    private = private_seeds(aliases.place(url) for url in seeds)
    if not config.contact and any(endpoint(aliases.place(u)) not in private for u in seeds):
        run_logger().warning(
            "crawl.contact is empty: owners of the sites cannot reach you; set an e-mail or address"
        )
    before = EarlierEpoch.of(config, work.store)
    if before.note:
        run_logger().info(before.note)
    frontier = Frontier(
        Scope(
            frozenset(),
            config.domains,
            config.include,
            config.exclude,
            config.max_depth,
            config.content_types,
        ),
        config.max_pages,
        config.max_redirects,
        config.round_seconds,
        before.pages(config.max_bytes),
        forgotten,
        Revisit(
            config.revisit_chance,
            partial(_allowed, config, aliases),
            config.keep_stale,
            before.leads(),
        ),
        config.max_pages_per_host,
        config.max_numbered,
    )
    saved = Rounds(work)
    partitions = saved.restore(frontier, min(partitions, config.parallel_total))
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
        _require_an_answer(frontier, results)
        links = frontier.update(
            plans,
            (outcome for result in results for outcome in result.outcomes),
            (host for result in results for host in result.hosts),
        )
        # A partition has one request in flight at least. Within a round their number stays what it
        # was: the segments that a killed attempt left are found by it.
        partitions = min(partitions, config.parallel_total)
        saved.save(frontier, partitions, links)
        known = sum(a.kind == "page" and a.state != "skipped" for a in frontier.addresses.values())
        progress.update(_documents(frontier), min(known, config.max_pages))
    progress.finish()
    frontier.close()
    # With nothing but stale pages it is our own network that is down, as likely as not.
    if not any(a.is_document and not a.stale for a in frontier.addresses.values()):
        raise UserError(_nothing_found(frontier, seeds))
    return _finish(config, work, run, frontier, saved, aliases, before)


def _allowed(config: CrawlConfig, aliases: Aliases, host: Host, url: str) -> bool:
    """Whether robots.txt, as it was read in this epoch, lets us have a page."""
    place = aliases.place(url)
    parts = urlsplit(url)
    robots = host.robots.get(f"{parts.scheme}://{parts.netloc}")
    if robots is None or not robots.allows(place, config.user_agent.partition("/")[0]):
        return False
    return not (config.honour_opt_outs and robots.opts_out(place))


def _seed_address(seed: str) -> str:
    return f"{EMBEDDED_NAME}/index.html" if seed == EMBEDDED else canonical_url(seed)


def _documents(frontier: Frontier) -> int:
    return sum(address.is_document for address in frontier.addresses.values())


class SiteDown(ConnectionError):
    """No site of the crawl answers any more; run again, it goes on from where it stood."""


def _require_an_answer(frontier: Frontier, results: list[PartitionResult]) -> None:
    """Refuse to end a crawl in the middle because its sites went away.

    The round is not saved, so the next run asks again for what failed, and for nothing else.
    """
    down = {host.host: host.left for result in results for host in result.hosts if host.left}
    down |= {name: host.left for name, host in frontier.hosts.items() if host.left}
    fetched = {a.url for a in frontier.addresses.values() if a.is_document and not a.stale}
    fetched |= {o.url for r in results for o in r.outcomes if o.state in DOCUMENT_STATES}
    if DOWN & set(down.values()) and fetched and not {host_of(url) for url in fetched} - set(down):
        hosts = ", ".join(f"{name}: {reason}" for name, reason in sorted(down.items()))
        raise SiteDown(
            f"the crawl stopped after {len(fetched)} pages ({hosts}); "
            "run it again when the site answers: it goes on from there"
        )


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
            max(config.parallel_total // len(groups), 1),
        )
        for partition, hosts in sorted(groups.items())
    ]


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


def _finish(
    config: CrawlConfig,
    work: Workspace,
    run: Mapper,
    frontier: Frontier,
    saved: Rounds,
    aliases: Aliases,
    before: EarlierEpoch,
) -> Outcome:
    addresses = sorted(frontier.addresses.values(), key=lambda address: address.url)
    documents = [address for address in addresses if address.is_document]
    segments = [n for n in work.names() if n.startswith(f"{SEGMENTS}/")]
    carried = [
        (frontier.earlier[a.url].address.segment, a.offset, a.length)
        for a in documents
        if a.state in CARRIED_STATES
    ]
    places = pack_segments(work, run, segments, before.directory, carried, config.segment_bytes)
    rows = []
    for address in addresses:
        key = (f"{SEGMENTS}/{address.segment}", address.offset)
        if address.state in CARRIED_STATES:
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
    return crawl_outcome(frontier, documents, saved.number, before.note)


def _url_table(frontier: Frontier, rows: list[tuple[Address, str, int]]) -> pa.Table:
    values = [vars(address) | {"segment": warc, "offset": offset} for address, warc, offset in rows]
    table = pa.Table.from_pylist(values, schema=frontier.url_table().schema)
    return table.rename_columns(["warc" if n == "segment" else n for n in table.column_names])
