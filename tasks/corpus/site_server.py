"""The loopback server of the embedded corpus site.

`python -m tasks.corpus.site_server --root DIR --port N` renders the site into DIR where it is
missing or was rendered by another interpreter or renderer, then serves it: ETag and Last-Modified,
304 for conditional requests (RFC 9110, section 13), HEAD, redirects, and below /private/, which
robots.txt disallows, a calendar without end as many sites have one.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, date, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from multiprocessing import get_context
from pathlib import Path

from aiohttp import web

from tasks.corpus.site import is_current, render_site
from tasks.runtime.errors import UserError

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".xml": "application/xml; charset=utf-8",
}
# Files in which `{base}` stands for the server's own address.
TEMPLATES = frozenset({"/robots.txt", "/sitemap.xml"})

log = logging.getLogger("gristmill.site")


def site_application(root: Path, compress: bool = False) -> web.Application:
    """The application serving a rendered site; `compress` answers with gzip where accepted."""
    redirects: dict[str, str] = json.loads((root / "site.json").read_text())["redirects"]
    files = _Files(root / "pages")

    async def answer(request: web.Request) -> web.StreamResponse:
        path = request.path
        if path in redirects:
            raise web.HTTPMovedPermanently(redirects[path])
        if path.startswith("/private/calendar/"):
            return _calendar(path.rpartition("/")[2])
        found = files.read(path)
        if found is None:
            raise web.HTTPNotFound(text="No such page.\n")
        body, etag, modified = found
        headers = {
            "ETag": etag,
            "Last-Modified": format_datetime(modified, usegmt=True),
            "Cache-Control": "max-age=60",
        }
        if path in TEMPLATES:
            base = f"{request.scheme}://{request.host}".encode()
            body = body.replace(b"{base}", base)
        if _not_modified(request, etag, modified):
            return web.Response(status=304, headers=headers)
        headers["Content-Type"] = TYPES.get(Path(path).suffix, "application/octet-stream")
        response = web.Response(body=body, headers=headers)
        if compress:
            response.enable_compression()
        return response

    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    return application


class _Files:
    """Reads pages below one directory; digests are kept as long as a file does not change."""

    def __init__(self, pages: Path) -> None:
        self.pages = pages.resolve()
        self._etags: dict[str, tuple[tuple[int, int], str]] = {}

    def read(self, path: str) -> tuple[bytes, str, datetime] | None:
        target = (self.pages / path.lstrip("/")).resolve()
        if not target.is_relative_to(self.pages) or not target.is_file():
            return None
        body = target.read_bytes()
        stat = target.stat()
        version = (stat.st_mtime_ns, stat.st_size)
        known = self._etags.get(path)
        if known is None or known[0] != version:
            known = (version, f'"{hashlib.sha256(body).hexdigest()[:24]}"')
            self._etags[path] = known
        return body, known[1], datetime.fromtimestamp(int(stat.st_mtime), UTC)


def _not_modified(request: web.Request, etag: str, modified: datetime) -> bool:
    tags = request.headers.get("If-None-Match")
    if tags is not None:
        candidates = {tag.strip().removeprefix("W/") for tag in tags.split(",")}
        return "*" in candidates or etag in candidates
    since = request.headers.get("If-Modified-Since")
    if since is None:
        return False
    try:
        return modified <= parsedate_to_datetime(since)
    except (TypeError, ValueError):
        return False


def _calendar(text: str) -> web.Response:
    try:
        following = (date.fromisoformat(text) + timedelta(days=1)).isoformat()
    except (ValueError, OverflowError):
        raise web.HTTPNotFound(text="No such day.\n") from None
    return web.Response(
        text=f"<!DOCTYPE html>\n<title>{text}</title>\n<p>Nothing happened on {text}.</p>\n"
        f'<p><a href="/private/calendar/{following}">Next day</a></p>\n',
        content_type="text/html",
    )


async def serve_site(root: Path, host: str, port: int, compress: bool = False) -> None:
    """Serve until SIGTERM or SIGINT; raises OSError when the port is taken."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    runner = web.AppRunner(site_application(root, compress), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        log.info("serving %s on http://%s:%d", root, host, port)
        await stop.wait()
    finally:
        await runner.cleanup()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="directory of the rendered site")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind; loopback by default")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--gzip", action="store_true", help="compress where the client accepts it")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        if not is_current(options.root):
            # In a process of its own, whose memory (ten times what serving needs) ends with it.
            with ProcessPoolExecutor(1, get_context("spawn")) as renderer:
                pages = renderer.submit(render_site, options.root).result()
            log.info("rendered %d pages into %s", pages, options.root)
    except UserError as error:
        log.error("%s", error)
        return 1
    try:
        asyncio.run(serve_site(options.root, options.host, options.port, options.gzip))
    except OSError as error:
        log.error(
            "port %d on %s is taken (%s); pass another --port", options.port, options.host, error
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
