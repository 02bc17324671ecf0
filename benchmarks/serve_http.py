"""What HTTP and Ray Serve add to the engine: first token and throughput of 32 streams.

    python benchmarks/serve_http.py [--quick]

The engine alone, in a process of its own on one core, and the same model behind the whole endpoint
(proxy, replica, protocol) take turns. Behind the endpoint the engine has the same core to itself;
the proxy, the replica and the clients share the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Targets, finish
from benchmarks.served import THIRTY_MILLION, VOCABULARY, Models
from benchmarks.stack import CHECKOUT, home
from model.engine import Engine, Sampling, load_model

STREAMS, TOKENS = 32, 128
PROMPT = 32  # tokens
ENGINE_CORE, OTHER_CORE = 0, 1
TARGETS: Targets = {
    "added_first_token_ms": ("<=", 2.0),
    "throughput_kept": (">=", 0.95),
}


def prompt(draw: random.Random) -> list[int]:
    return [draw.randrange(300, VOCABULARY - 100) for _ in range(PROMPT)]


def engine_alone(directory: Path) -> None:
    """Answer commands on standard input: `first N` and `streams`, each with a line of JSON."""
    os.sched_setaffinity(0, {ENGINE_CORE})
    loaded = load_model(directory)
    engine = Engine(loaded.model, loaded.tokenizer, slots=STREAMS)
    draw = random.Random(os.getpid())

    def run(count: int, tokens: int) -> tuple[float, float]:
        """Seconds to the first token of anybody, and to the last."""
        left, ended = count, threading.Event()
        begun, first = time.perf_counter(), 0.0
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)

        def heard(updates: list[Any]) -> None:
            nonlocal left, first
            first = first or time.perf_counter()
            left -= sum(update.finish_reason is not None for update in updates)
            if not left:
                ended.set()

        for _ in range(count):
            engine.submit(prompt(draw), sampling, heard)
        ended.wait()
        return first - begun, time.perf_counter() - begun

    for command in sys.stdin:
        name, _, count = command.strip().partition(" ")
        if name == "first":
            print(json.dumps([run(1, 4)[0] for _ in range(int(count))]), flush=True)
        else:
            print(json.dumps(STREAMS * TOKENS / run(STREAMS, TOKENS)[1]), flush=True)
    engine.close()


class Alone:
    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--engine", str(directory)],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, command: str) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


class Clients:
    """Streams of 32 clients at once; first tokens of one, on a bare socket, as a client's own work
    is none of ours.
    """

    def __init__(self, url: str) -> None:
        self.url = f"{url}/v1/completions"
        self.draw = random.Random(7)

    def first(self, count: int) -> list[float]:
        """Seconds from the first byte of a request to the first event of its answer."""
        place = urlsplit(self.url)
        with socket.create_connection((place.hostname, place.port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return [self._first(connection, place.netloc, place.path) for _ in range(count)]

    def _first(self, connection: socket.socket, host: str, path: str) -> float:
        body = json.dumps(self._request(4)).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        begun, heard, first = time.perf_counter(), b"", 0.0
        connection.sendall(request)
        while not heard.endswith(b"\r\n0\r\n\r\n"):
            part = connection.recv(65536)
            heard += part
            if not part or not heard.startswith(b"HTTP/1.1 200 "):
                raise SystemExit(f"a stream was refused: {heard[:300]!r}")
            if not first and b"data: {" in heard:
                first = time.perf_counter() - begun
        if b"data: [DONE]" not in heard:
            raise SystemExit(f"a stream broke off: {heard[-300:]!r}")
        return first

    def streams(self) -> float:
        return asyncio.run(self._streams())

    async def _streams(self) -> float:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            begun = time.perf_counter()
            tokens = await asyncio.gather(*(self._stream(session) for _ in range(STREAMS)))
            return sum(tokens) / (time.perf_counter() - begun)

    async def _stream(self, session: aiohttp.ClientSession) -> int:
        """The tokens of one answer."""
        used = 0
        async with session.post(self.url, json=self._request(TOKENS)) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {") and b'"usage":{' in line:
                    used = json.loads(line[6:])["usage"]["completion_tokens"]
        if used != TOKENS:
            raise SystemExit(f"a stream brought {used} tokens instead of {TOKENS}")
        return used

    def _request(self, tokens: int) -> dict[str, Any]:
        return {
            "model": "gristmill",
            "prompt": prompt(self.draw),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def pin(models: Models) -> None:
    """The engine's process to its core, every other thread of the stack to the other one."""
    engine = models.engine()
    for process in models.fresh.processes():
        core = ENGINE_CORE if process == engine else OTHER_CORE
        with suppress(psutil.NoSuchProcess):  # some are short-lived
            for thread in process.threads():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, {core})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        engine_alone(arguments.engine)
        return
    if (psutil.cpu_count() or 1) < 2:
        raise SystemExit("this benchmark needs two cores")
    rounds, count = (3, 20) if arguments.quick else (7, 60)
    with home() as fresh, tempfile.TemporaryDirectory() as scratch:
        fresh.run("up")
        models = Models(fresh, THIRTY_MILLION, Path(scratch))
        models.deploy(1)
        clients = Clients(fresh.settings.serve)
        clients.streams()
        pin(models)
        everywhere = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {OTHER_CORE})
        alone = Alone(models.directory(1))
        first: dict[str, list[float]] = {"alone": [], "served": []}
        rates: dict[str, list[float]] = {"alone": [], "served": []}
        for turn in range(rounds + 1):
            seconds = alone.ask(f"first {count}"), clients.first(count)
            speeds = alone.ask("streams"), clients.streams()
            if turn:  # the first warms up
                for name, some, rate in zip(first, seconds, speeds, strict=True):
                    first[name] += some
                    rates[name].append(rate)
        alone.close()
        os.sched_setaffinity(0, everywhere)
    added = median(first["served"]) - median(first["alone"])
    kept = [served / alone for served, alone in zip(rates["served"], rates["alone"], strict=True)]
    metrics: dict[str, float | None] = {
        "first_token_alone_ms": 1e3 * median(first["alone"]),
        "first_token_served_ms": 1e3 * median(first["served"]),
        "added_first_token_ms": 1e3 * added,
        "tokens_per_second_alone": median(rates["alone"]),
        "tokens_per_second_served": median(rates["served"]),
        "throughput_kept": median(kept),
    }
    finish("serve_http", metrics, TARGETS)


if __name__ == "__main__":
    main()
