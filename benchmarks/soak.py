"""A quarter of an hour of everything at once, then ten times more clients than slots.

    python benchmarks/soak.py [--quick] [--minutes N]

Mixed load: streams whose every answer is compared with the one the engine gives alone, streams that
are broken off, clients that vanish before the answer, malformed bodies, and another version swapped
in again and again. Overload: clients that ask without a pause, as many as slots, then ten times as
many.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import aiohttp
import psutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Targets, finish
from benchmarks.runs import wait_for
from benchmarks.served import SMALL, VOCABULARY, Models
from benchmarks.stack import home
from model.engine import Sampling, generate_batch, load_model
from serve.deploy import fingerprint_of
from serve.specification import EngineOptions

VERSIONS = (1, 2)
PROMPTS, TOKENS = 24, 48
CLEAR = 0.01  # nats by which the first choice must lead for rounding never to change it
SLOTS = 16
TARGETS: Targets = {
    "wrong_answers": ("<=", 0),
    "unexpected_failures": ("<=", 0),
    "malformed_not_refused": ("<=", 0),
    "swaps": (">=", 2),
    "pages_leaked": ("<=", 0),
    "memory_growth": ("<=", 1.1),
    "overload_latency_ratio": ("<=", 2.0),
    "refused_p95_ms": ("<=", 200),
}
MALFORMED: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[1, 2]",
    b"\xff\xfe{}",
    b'{"model": 5}',
    b'{"model": "gristmill", "prompt": "a", "temperature": -1}',
    b'{"model": "gristmill", "prompt": "a", "temperature": NaN}',
    b'{"model": "gristmill", "prompt": "\\ud800"}',
    b'{"model": "gristmill", "prompt": "a", "max_tokens": "many"}',
    b'{"model": "gristmill", "prompt": "a", "nonsense": 1}',
    b'{"model": "nobody", "prompt": "a"}',
    b'{"model": "gristmill", "prompt": [999999]}',
    b'{"model": "gristmill", "prompt": "' + b"word " * 5000 + b'"}',
    b'{"model": "gristmill", "prompt": "a", "structured_outputs": {"regex": "((((a+)+)+)+"}}',
    b'{"model": "gristmill", "prompt": "a"' + b" " * (2 << 20) + b"}",
    b"[" * 100_000,
)
Expected = dict[str, dict[int, str]]  # version → prompt number → text


class Load:
    """Clients of one endpoint and what they saw."""

    def __init__(self, url: str, prompts: list[list[int]], expected: Expected) -> None:
        self.url, self.prompts, self.expected = url, prompts, expected
        self.seen: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.wrong = self.accepted_malformed = 0
        self.ended = False

    def body(self, number: int, **more: Any) -> dict[str, Any]:
        return {
            "model": "gristmill",
            "prompt": self.prompts[number],
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        } | more

    async def mixed(self, seconds: float, meanwhile: Callable[[], Awaitable[None]]) -> None:
        """Every kind of client for that long, beside `meanwhile`."""
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        async with session:
            kinds = [self._reader] * 6 + [self._breaker] * 3 + [self._vanisher] * 2 + [self._vandal]
            clients = [
                asyncio.create_task(self._repeat(kind, session, random.Random(number)))
                for number, kind in enumerate(kinds)
            ]
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                await meanwhile()
            self.ended = True
            await asyncio.gather(*clients)

    async def _repeat(
        self,
        kind: Callable[[aiohttp.ClientSession, random.Random], Awaitable[None]],
        session: aiohttp.ClientSession,
        draw: random.Random,
    ) -> None:
        while not self.ended:
            try:
                await kind(session, draw)
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                self.problems[f"{kind.__name__}: {type(error).__name__}: {error}"[:200]] += 1
                await asyncio.sleep(0.1)

    async def _reader(self, session: aiohttp.ClientSession, draw: random.Random) -> None:
        """A stream read to its end and compared."""
        number = draw.randrange(len(self.prompts))
        text, version, done = "", "", False
        async with session.post(self.url, json=self.body(number, stream=True)) as response:
            if response.status == 429:
                self.seen["refused"] += 1
                await asyncio.sleep(0.2)
                return
            if response.status != 200:
                raise ValueError(f"status {response.status}: {(await response.text())[:100]}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ValueError(str(event["error"]))
                    version = event["system_fingerprint"]
                    text += "".join(choice["text"] for choice in event["choices"])
                done |= line.startswith(b"data: [DONE]")
        self.seen["answers"] += 1
        if not done or text != self.expected[version][number]:
            self.wrong += 1
            self.problems[f"wrong answer of {version} to prompt {number}: {text[:80]!r}"] += 1

    async def _breaker(self, session: aiohttp.ClientSession, draw: random.Random) -> None:
        """A stream left in the middle."""
        number = draw.randrange(len(self.prompts))
        leave = draw.randrange(1, 40)
        async with session.post(self.url, json=self.body(number, stream=True, n=2)) as response:
            async for line in response.content:
                leave -= line.startswith(b"data:")
                if leave <= 0:
                    response.close()
                    break
        self.seen["broken off"] += 1

    async def _vanisher(self, session: aiohttp.ClientSession, draw: random.Random) -> None:
        """Gone before the answer."""
        number = draw.randrange(len(self.prompts))
        try:
            async with asyncio.timeout(draw.uniform(0.01, 0.2)):
                async with session.post(self.url, json=self.body(number)) as response:
                    await response.read()
        except TimeoutError:
            self.seen["vanished"] += 1

    async def _vandal(self, session: aiohttp.ClientSession, draw: random.Random) -> None:
        body = draw.choice(MALFORMED)
        headers = {"Content-Type": "application/json"}
        async with session.post(self.url, data=body, headers=headers) as response:
            self.seen["malformed"] += 1
            answer = await response.json()
            if not (400 <= response.status < 500 and "message" in answer.get("error", {})):
                self.accepted_malformed += 1
                self.problems[f"{body[:80]!r} got {response.status}: {str(answer)[:100]}"] += 1
        await asyncio.sleep(0.05)

    async def crowd(self, clients: int, seconds: float) -> tuple[list[float], list[float]]:
        """Seconds of the answers and of the refusals that so many clients got."""
        answered: list[float] = []
        refused: list[float] = []
        deadline = time.monotonic() + seconds

        async def client(session: aiohttp.ClientSession, draw: random.Random) -> None:
            while time.monotonic() < deadline:
                body = self.body(draw.randrange(len(self.prompts)))
                begun = time.monotonic()
                async with session.post(self.url, json=body) as response:
                    await response.read()
                    spent = time.monotonic() - begun
                    if response.status == 200:
                        answered.append(spent)
                    elif response.status == 429:
                        refused.append(spent)
                        await asyncio.sleep(float(response.headers["Retry-After"]))
                    else:
                        self.problems[f"overload: status {response.status}"] += 1

        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(client(session, random.Random(n)) for n in range(clients)))
        return answered, refused


def questions(models: Models) -> tuple[list[list[int]], Expected]:
    """Prompts whose greedy answers by every version leave no room for rounding, and the answers."""
    draw = random.Random(3)
    tried = [
        [draw.randrange(300, VOCABULARY - 100) for _ in range(draw.randrange(4, 60))]
        for _ in range(6 * PROMPTS)
    ]
    clear = set(range(len(tried)))
    texts: dict[int, list[str]] = {}
    for number in VERSIONS:
        loaded = load_model(models.directory(number))
        sampling = Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=2)
        answers = generate_batch(loaded.model, loaded.tokenizer, tried, sampling)
        for index, answer in enumerate(answers):
            leads = [first - second for first, second in map(_two_best, answer.logprobs)]
            if min(leads) < CLEAR:
                clear.discard(index)
        texts[number] = [answer.text for answer in answers]
    kept = sorted(clear)[:PROMPTS]
    if len(kept) < PROMPTS:
        raise SystemExit(f"only {len(kept)} of {len(tried)} prompts have clear answers")
    expected = {
        fingerprint_of(models.version(number)[0]): {
            place: texts[number][index] for place, index in enumerate(kept)
        }
        for number in VERSIONS
    }
    return [tried[index] for index in kept], expected


def _two_best(told: Any) -> tuple[float, float]:
    best = sorted((value for _, value in told.top), reverse=True)
    return best[0], best[1]


async def metric(url: str, name: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        found = re.findall(rf"^gristmill_{name}{{.*}} (.*)$", await response.text(), re.MULTILINE)
        return sum(map(float, found))


def resident_mb(replica: psutil.Process) -> float:
    """Of a replica and its engines: two, while one takes over from the other."""
    total = 0
    for process in (replica, *replica.children()):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one minute, swaps every 10 s")
    parser.add_argument("--minutes", type=float, default=15)
    arguments = parser.parse_args()
    seconds, between = (60.0, 10.0) if arguments.quick else (60 * arguments.minutes, 60.0)
    with home() as fresh, tempfile.TemporaryDirectory() as scratch:
        fresh.run("up")
        models = Models(fresh, SMALL, Path(scratch))
        prompts, expected = questions(models)
        options = EngineOptions(slots=SLOTS, max_waiting=64)
        models.deploy(1, options)
        url = fresh.settings.serve
        load = Load(f"{url}/v1/completions", prompts, expected)
        replica = models.replica()
        memory: list[float] = []
        swaps = 0
        swapped = time.monotonic()

        async def meanwhile() -> None:
            """A sample of the memory each second; at times another version."""
            nonlocal swaps, swapped
            await asyncio.sleep(1)
            memory.append(resident_mb(replica))
            if time.monotonic() - swapped > between:
                swaps += 1
                await asyncio.to_thread(models.deploy, VERSIONS[swaps % len(VERSIONS)], options)
                swapped = time.monotonic()

        asyncio.run(load.mixed(seconds, meanwhile))
        idle = "num_requests_running"
        wait_for(lambda: asyncio.run(metric(url, idle)) == 0, 60, "the engine to be idle")
        leaked = asyncio.run(metric(url, "kv_cache_usage_perc"))
        same_process = psutil.pid_exists(replica.pid) and models.replica().pid == replica.pid

        models.deploy(1, EngineOptions(slots=SLOTS, max_waiting=SLOTS // 2))
        span = 10 if arguments.quick else 30
        asyncio.run(load.crowd(SLOTS, 5))
        alone, _ = asyncio.run(load.crowd(SLOTS, span))
        answered, refused = asyncio.run(load.crowd(10 * SLOTS, span))
    for problem, count in load.problems.most_common(10):
        print(f"{count} × {problem}")
    third = max(1, len(memory) // 3)
    metrics: dict[str, float | None] = {
        "minutes": seconds / 60,
        **{name.replace(" ", "_"): count for name, count in load.seen.items()},
        "swaps": swaps,
        "wrong_answers": load.wrong,
        "unexpected_failures": sum(load.problems.values()) + (not same_process),
        "malformed_not_refused": load.accepted_malformed,
        "pages_leaked": leaked,
        "memory_mb": round(memory[-1]),
        "memory_growth": mean(memory[-third:]) / mean(memory[third : 2 * third]),
        "latency_ms": 1e3 * median(alone),
        "overload_latency_ms": 1e3 * median(answered),
        "overload_latency_ratio": median(answered) / median(alone),
        "overload_latency_p95_ratio": quantiles(answered, n=20)[-1] / quantiles(alone, n=20)[-1],
        "overload_answers": len(answered),
        "overload_refusals": len(refused),
        "refused_p95_ms": 1e3 * quantiles(refused, n=20)[-1] if len(refused) > 1 else None,
    }
    finish("soak", metrics, TARGETS)


if __name__ == "__main__":
    main()
