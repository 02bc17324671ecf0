"""Fetching one partition of a round: some hosts, each polite, all at once, into one WARC segment.

A partition's outcome is a function of its plan and of the segments it wrote. Run again after a
kill, it reads what its segments already hold and asks only for the rest.
"""

from __future__ import annotations

import asyncio

from tasks.corpus.client import Client
from tasks.corpus.fetch_plan import HostResult, Outcome, PartitionResult, Plan
from tasks.corpus.host_fetcher import HostFetcher
from tasks.corpus.segments import Segments
from tasks.runtime.stage import Workspace

HOSTS_AT_ONCE = 200  # of one partition; each has its own connections


def fetch_partition(plan: Plan, work: Workspace) -> PartitionResult:
    """Fetch what the plan asks for and its segments do not hold yet. The Ray task of the crawl."""
    segments = Segments(plan, work)
    try:
        done = list(segments.replay())
        results = asyncio.run(_fetch(plan, segments, done))
        names = segments.commit()
    finally:
        segments.close()
    outcomes = [outcome for outcome in done if outcome.kind != "robots"]
    return PartitionResult(tuple(outcomes), tuple(results), tuple(names))


async def _fetch(plan: Plan, segments: Segments, done: list[Outcome]) -> list[HostResult]:
    room = asyncio.Semaphore(HOSTS_AT_ONCE)

    async def fetch_host(fetcher: HostFetcher) -> None:
        async with room:
            await fetcher.run()

    async with Client.open(plan.limits, plan.private, plan.parallel) as client:
        fetchers = [HostFetcher(host, plan, client, segments, done) for host in plan.hosts]
        await asyncio.gather(*(fetch_host(fetcher) for fetcher in fetchers))
    return [fetcher.result() for fetcher in fetchers]
