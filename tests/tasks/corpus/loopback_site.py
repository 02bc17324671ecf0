"""A real site on a free loopback port for crawler tests, and a crawl without Ray."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tasks.corpus.crawl import CrawlConfig, crawl_site
from tasks.corpus.pages import page_rows, read_pages
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Workspace, discard
from tasks.runtime.store import MANIFEST, Store

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Clock:
    """The time, for a test that does not want to wait for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0  # seconds
        now = time.time
        monkeypatch.setattr("time.time", lambda: now() + self.ahead)


def page(*links: str, text: str = "Some words.", head: str = "") -> str:
    anchors = "".join(f'<a href="{link}">link</a>' for link in links)
    return f"<!DOCTYPE html><title>t</title>{head}<p>{text}</p>{anchors}"


def redirect(target: str, status: int = 302) -> Any:
    return lambda: web.Response(status=status, headers={"Location": target})


def small_site(**more: Any) -> dict[str, Any]:
    return {
        "/": page("/a", "/b#part", "a", "mailto:x@y.z"),
        "/a": page("/b", "/", text="page a"),
        "/b": page("/c", text="page b"),
        "/c": page(text="page c"),
    } | more


class LoopbackSite:
    """Serves `pages` (path → HTML, response factory or handler) and notes every request."""

    def __init__(
        self, pages: dict[str, Any], robots: str | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.host = host
        self.pages = dict(pages)
        if robots is not None:
            self.pages["/robots.txt"] = lambda: web.Response(text=robots)
        self.requests: list[tuple[float, str, dict[str, str]]] = []
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> LoopbackSite:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def url(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.port}"

    @property
    def paths(self) -> Counter[str]:
        return Counter(path for _, path, _ in self.requests)

    def times(self) -> list[float]:
        about = ("/robots.txt", "/.well-known/tdmrep.json", "/sitemap.xml")
        return [moment for moment, path, _ in self.requests if path not in about]

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._run())

    async def _run(self) -> None:
        self._stop = asyncio.Event()
        application = web.Application()
        application.router.add_get("/{path:.*}", self._answer)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, self.host, 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path_qs
        self.requests.append((time.monotonic(), path, dict(request.headers)))
        found = self.pages.get(path)
        if found is None:
            return web.Response(status=404, text="no such page")
        if isinstance(found, str):
            return web.Response(text=found, content_type="text/html")
        answer = found(request) if signature(found).parameters else found()
        return await answer if asyncio.iscoroutine(answer) else answer


def in_process(
    function: Callable[..., Any], items: list[tuple[Any, ...]]
) -> Iterator[tuple[int, Any]]:
    """Stands where a Ray session's map stands in the stage."""
    for index, item in enumerate(items):
        yield index, function(*item)


class Crawler:
    """Crawls into a store below `home`, as the stage does, but in this process."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.settings = Settings(home=home)
        self.store = Store.open(self.settings)

    def workspace(self, fingerprint: str) -> Workspace:
        directory = self.store.directory("crawl", fingerprint)
        return Workspace(directory.uri, directory.path, "crawl", fingerprint, self.home)

    def crawl(
        self,
        *seeds: str,
        embedded: str = "http://127.0.0.1:9",
        run: Any = in_process,
        partitions: int = 2,
        **options: Any,
    ) -> CrawlResult:
        options = {"delay": 0.0, "retries": 1, "timeout": 5.0, "exclude": ()} | options
        config = CrawlConfig(seeds=seeds, **options)
        work = self.workspace(f"{config.epoch:064d}")
        try:
            outcome = crawl_site(config, work, run, embedded, partitions)
        except UserError:
            discard(work)
            raise
        names = [name for name in work.names() if not name.startswith("_")]
        manifest = Manifest(
            stage="crawl",
            version=1,
            fingerprint=work.fingerprint,
            content=str(outcome.content),
            config=config.model_dump(mode="json"),
            files=tuple(work.entry(name) for name in names),
        )
        work.write_bytes(MANIFEST, manifest.model_dump_json().encode())
        return CrawlResult(outcome, work)


class CrawlResult:
    def __init__(self, outcome: Outcome, work: Workspace) -> None:
        self.outcome, self.work = outcome, work
        self.counts = outcome.counts
        self.rules = outcome.rules
        self.addresses = {row["url"]: row for row in work.read_table("urls.parquet").to_pylist()}
        self.pages = {page.url: page for page in read_pages(work, page_rows(work))}

    def reason(self, url: str) -> tuple[str, str]:
        row = self.addresses[url]
        return row["state"], row["reason"]
