"""The site that crawl benchmarks fetch: generated, served from memory by a process of its own.

It writes a line to its log when a request arrives, `+ PORT PATH`, and one when it has answered,
`- PORT PATH`: what was asked for is known from the server, whatever a crawler says of itself. The
same pages stand at every one of its ports, each a host of its own to a crawler.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.one_core import CHECKOUT

NAVIGATION = 40  # links that every page has, as sites do
OWN_LINKS = 25
WORDS = 2500
START = """
import asyncio, sys
from benchmarks.crawl_server import serve
asyncio.run(serve(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
"""


def pages(count: int) -> dict[str, bytes]:
    """Path → HTML of about 20 KB: a menu, text, links into a tree and across it."""
    rng = random.Random(0)
    vocabulary = [
        "".join(rng.choice("bcdfghklmnprstvw") + rng.choice("aeiou") for _ in range(n))
        for n in (1, 2, 2, 3, 3, 4)
        for _ in range(700)
    ]
    menu = "".join(
        f'<li class="item"><a class="link" href="/page/{n % count}.html">Section {n}</a></li>'
        for n in range(1, NAVIGATION + 1)
    )
    made = {}
    for number in range(count):
        near = {4 * number + k for k in range(1, 5)}
        near |= {rng.randrange(count) for _ in range(OWN_LINKS - 4)}
        links = iter(sorted(n for n in near if n < count))
        words = rng.choices(vocabulary, k=WORDS)
        paragraphs = []
        for start in range(0, WORDS, 100):
            text = " ".join(words[start : start + 100])
            link = next(links, None)
            if link is not None:
                text += f' <a href="../page/{link}.html#part" title="{words[start]}">see {link}</a>'
            paragraphs.append(f"<p>{text}.</p>")
        rest = "".join(f'<a href="/page/{link}.html">{link}</a> ' for link in links)
        made[f"/page/{number}.html"] = (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            f"<title>Page {number}</title></head><body><nav><ul>{menu}</ul></nav><main>"
            f"<h1>Page {number}</h1>{''.join(paragraphs)}{rest}</main></body></html>"
        ).encode()
    return made


class Answering(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, GET only; each answer takes up to `latency` seconds."""

    def __init__(self, site: dict[str, bytes], log: int, latency: float) -> None:
        self._site, self._log, self._latency = site, log, latency
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # of a socket
        self._transport = transport
        self._port = transport.get_extra_info("sockname")[1]

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            path = self._data.split(b" ", 2)[1].decode()
            self._data = self._data[end + 4 :]
            self._note("+", path)
            if self._latency:
                pause = self._latency * random.random()
                asyncio.get_running_loop().call_later(pause, self._answer, path)
            else:
                self._answer(path)

    def _note(self, what: str, path: str) -> None:
        os.write(self._log, f"{what} {self._port} {path}\n".encode())

    def _answer(self, path: str) -> None:
        if self._transport.is_closing():  # who asked is gone
            return
        body = self._site.get(path)
        status, kind = b"200 OK", b"text/html; charset=utf-8"
        if body is None:
            status, kind, body = b"404 Not Found", b"text/plain", b"no such page\n"
        self._transport.write(
            b"HTTP/1.1 %s\r\nServer: benchmark\r\nContent-Type: %s\r\nContent-Length: %d\r\n"
            b"\r\n%s" % (status, kind, len(body), body)
        )
        self._note("-", path)


async def serve(count: int, log: str, hosts: int, latency: float) -> None:
    """Serve until killed; prints the ports."""
    site = pages(count)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(lambda: Answering(site, descriptor, latency), "127.0.0.1", 0)
        for _ in range(hosts)
    ]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


class Server:
    """The running server as its measurers see it."""

    def __init__(self, ports: list[int], log: Path, process: psutil.Process) -> None:
        self.seeds = [f"http://127.0.0.1:{port}/page/0.html" for port in ports]
        self.log, self.process = log, process

    def requests(self) -> Counter[str]:
        """How often each address was asked for since `forget`."""
        return self._noted("+")

    def answers(self) -> Counter[str]:
        """How often each address was answered; a request on a dead connection never is."""
        return self._noted("-")

    def _noted(self, what: str) -> Counter[str]:
        lines = (line.split() for line in self.log.read_text().splitlines())
        return Counter(
            f"http://127.0.0.1:{port}{path}" for sign, port, path in lines if sign == what
        )

    def forget(self) -> None:
        os.truncate(self.log, 0)

    def cpu(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system


@contextlib.contextmanager
def running(count: int, folder: Path, hosts: int = 1, latency: float = 0.0) -> Iterator[Server]:
    """A server of `count` pages at each of so many hosts."""
    log = folder / "requests.log"
    log.touch()
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(count), str(log), str(hosts), str(latency)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        ports = [int(word) for word in process.stdout.readline().split()]
        yield Server(ports, log, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(10)
