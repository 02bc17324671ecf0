"""Hot swap of the served model under streaming clients: failed requests and the longest gap.

    python benchmarks/swap.py [--quick] [--clients N] [--swaps N]

Two versions of the tiny model are deployed in turn, by the `deploy` flow, while clients stream
answers without a pause. A request fails when it is refused, breaks off, ends without its last
event, or is answered by two versions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Targets, finish
from benchmarks.runs import FlowRuns, wait_for
from benchmarks.stack import Home, home

TARGETS: Targets = {
    "failed_requests": ("<=", 0),
    "swaps": (">=", 1),
    "swaps_not_served": ("<=", 0),
    "longest_gap_seconds": ("<=", 10),
}


@dataclass
class Traffic:
    """What the clients saw; gaps are seconds between events of a stream, or before its first."""

    requests: int = 0
    failures: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    answered_by: str = ""


class Clients(threading.Thread):
    """N clients that stream one answer after the other until told to stop."""

    def __init__(self, url: str, count: int) -> None:
        super().__init__(daemon=True)
        self.url, self.count, self.traffic = url, count, Traffic()
        self._stop_asked = threading.Event()

    def run(self) -> None:
        asyncio.run(self._everyone())

    def stop(self) -> Traffic:
        self._stop_asked.set()
        self.join(120)
        return self.traffic

    async def _everyone(self) -> None:
        timeout = aiohttp.ClientTimeout(total=120)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            await asyncio.gather(*(self._client(session, n) for n in range(self.count)))

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        while not self._stop_asked.is_set():
            self.traffic.requests += 1
            try:
                problem = await self._stream(session, number)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            if problem:
                self.traffic.failures.append(problem)
                await asyncio.sleep(0.2)

    async def _stream(self, session: aiohttp.ClientSession, number: int) -> str:
        """Stream one answer; says what went wrong, or nothing."""
        body = {
            "model": "gristmill",
            "messages": [{"role": "user", "content": f"What does function {number} do?"}],
            "max_tokens": 100,
            "stream": True,
        }
        versions, finished, done = set(), False, False
        last = time.monotonic()
        async with session.post(f"{self.url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                return f"status {response.status}: {(await response.text())[:200]}"
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue
                now = time.monotonic()
                self.traffic.gaps.append(now - last)
                last = now
                text = line.removeprefix(b"data:").strip()
                if text == b"[DONE]":
                    done = True
                    continue
                event = json.loads(text)
                if "error" in event:
                    return f"error event: {event['error']}"
                versions.add(event["system_fingerprint"])
                finished |= any(choice.get("finish_reason") for choice in event["choices"])
        if not (done and finished):
            return "the stream ended without its last event"
        if len(versions) != 1:
            return f"one answer by {len(versions)} versions"
        self.traffic.answered_by = versions.pop()
        return ""


def swap(fresh: Home, runs: FlowRuns, version: int) -> float:
    """Deploy a version; seconds of the whole flow run."""
    begun = time.monotonic()
    runs.finish(runs.trigger("deploy", f'version="{version}"', config=None), 300)
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="8 clients, 4 swaps")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--swaps", type=int, default=12)
    arguments = parser.parse_args()
    clients = 8 if arguments.quick else arguments.clients
    swaps = 4 if arguments.quick else arguments.swaps
    with home() as fresh:
        fresh.run("up")
        runs = FlowRuns(fresh)
        for seed in (0, 1):
            runs.finish(runs.trigger("pipeline", f"finetune.seed={seed}"))
        crowd = Clients(fresh.settings.serve, clients)
        crowd.start()
        time.sleep(5)
        quiet = list(crowd.traffic.gaps)
        took, unserved = [], 0
        for number in range(swaps):
            version = 1 + number % 2
            took.append(swap(fresh, runs, version))
            try:
                wait_for(lambda v=version: f"-{v}-" in crowd.traffic.answered_by, 30)
            except SystemExit:
                unserved += 1
        traffic = crowd.stop()
    for problem in sorted(set(traffic.failures))[:10]:
        print(problem)
    metrics: dict[str, float | None] = {
        "clients": clients,
        "swaps": swaps,
        "requests": traffic.requests,
        "failed_requests": len(traffic.failures),
        "swaps_not_served": unserved,
        "longest_gap_seconds": round(max(traffic.gaps), 3),
        "longest_gap_without_swap_seconds": round(max(quiet, default=0), 3),
        "median_gap_ms": round(1000 * median(traffic.gaps), 2),
        "median_swap_seconds": round(median(took), 2),
    }
    finish("swap", metrics, TARGETS)


if __name__ == "__main__":
    main()
