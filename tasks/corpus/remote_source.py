"""Source files that lie elsewhere: behind http(s), or on whatever pyarrow.fs opens (`s3://…`).

Only below a configured root, like local ones: a form in a browser must not make this machine ask
for any address. A remote file is known by its size and its ETag or time of change, not by its
bytes: nobody downloads a petabyte to name it. A shard downloads the files it reads, one at a time.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from tasks.runtime.errors import Unavailable, UserError
from tasks.runtime.store import open_filesystem, refusal

ATTEMPTS = 4
TIMEOUT = 60.0  # seconds without a byte
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://")


def is_remote(location: str) -> bool:
    return bool(_SCHEME.match(location))


@dataclass(frozen=True)
class SourceFile:
    """One file of a source. `name` is what documents call it; `stamp` says which state of it."""

    location: str
    name: str
    size: int
    stamp: str = ""


def below(location: str, roots: list[str], what: str) -> str:
    """The location. Raises UserError when it lies below none of the remote roots."""
    climbs = any(part in ("..", ".") for part in location.split("/"))
    if not climbs and any(location.startswith(root.rstrip("/") + "/") for root in roots):
        return location
    allowed = ", ".join(roots) or "none"
    raise UserError(
        f"{what} {location!r} lies below none of the remote roots ({allowed}); "
        "add one to GRISTMILL_SOURCE_ROOTS, such as https://data.commoncrawl.org"
    )


def remote_files(start: str, endings: tuple[str, ...], roots: list[str], what: str) -> list[str]:
    """The file itself, or those below a directory that end so; http has no directories."""
    below(start, roots, what)
    if start.startswith(("http://", "https://")) or start.lower().endswith(endings):
        return [start]
    filesystem, path = open_filesystem(start)
    scheme = start[: len(start.rstrip("/")) - len(path)]
    try:
        below_it = fs.FileSelector(path, recursive=True, allow_not_found=True)
        found = filesystem.get_file_info(below_it)
    except OSError as error:
        raise refusal(start, error) from error
    names = [info.path for info in found if info.type == fs.FileType.File]
    return [scheme + name for name in sorted(names) if name.lower().endswith(endings)]


def look_up(location: str, name: str, roots: list[str], what: str) -> SourceFile:
    """Size and state of a remote file. Raises UserError when it is not there."""
    below(location, roots, what)
    if location.startswith(("http://", "https://")):
        with _answer(location, roots, what, method="HEAD") as head:
            stamp = head.headers.get("ETag") or head.headers.get("Last-Modified") or ""
            return SourceFile(location, name, int(head.headers.get("Content-Length") or 0), stamp)
    filesystem, path = open_filesystem(location)
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise refusal(location, error) from error
    if info.type != fs.FileType.File:
        raise UserError(f"{what} {location!r} is not there; check the source's path and base")
    return SourceFile(location, name, info.size, str(info.mtime_ns))


@contextlib.contextmanager
def local_copy(file: SourceFile, scratch: Path, roots: list[str]) -> Iterator[Path]:
    """The file on this machine: where it lies, or a copy that is removed at the end."""
    if not is_remote(file.location):
        yield Path(file.location)
        return
    target = scratch / re.sub(r"[^\w.-]", "_", file.location)[-200:]
    try:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _download(file.location, target, roots)
                break
            except (Unavailable, OSError):
                if attempt == ATTEMPTS:
                    raise
                time.sleep(2.0**attempt / 4)
        yield target
    finally:
        target.unlink(missing_ok=True)


def _download(location: str, target: Path, roots: list[str]) -> None:
    with open(target, "wb") as out:
        if not location.startswith(("http://", "https://")):
            filesystem, path = open_filesystem(location)
            try:
                with filesystem.open_input_stream(path, compression=None) as stream:
                    shutil.copyfileobj(stream, out, 1 << 20)
            except FileNotFoundError as error:
                raise UserError(
                    f"the source's file {location!r} is not there; check the source's path and base"
                ) from error
            except OSError as error:
                told = refusal(location, error)
                if isinstance(told, Unavailable):  # or the disk here is full
                    raise
                raise told from error
            return
        with _answer(location, roots, "the source's file") as body:
            try:
                shutil.copyfileobj(body, out, 1 << 20)
            except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
                raise Unavailable(f"{location!r} broke off ({error}); try again later") from error
            expected = body.headers.get("Content-Length")
            if expected is not None and out.tell() != int(expected):
                raise Unavailable(
                    f"{location!r} broke off after {out.tell()} of {expected} bytes; try again "
                    "later"
                )


class _WithinRoots(urllib.request.HTTPRedirectHandler):
    def __init__(self, roots: list[str], what: str) -> None:
        self._roots, self._what = roots, what

    def redirect_request(self, request: Any, *answer: Any) -> Any:
        below(answer[-1], self._roots, f"{self._what} redirects to")
        return super().redirect_request(request, *answer)


def _answer(location: str, roots: list[str], what: str, method: str = "GET") -> Any:
    """An open response. Raises UserError for a refusal, Unavailable for what may pass."""
    try:
        request = urllib.request.Request(
            location,
            method=method,
            headers={"User-Agent": "Gristmill/1.0", "Accept-Encoding": "identity"},
        )
        return urllib.request.build_opener(_WithinRoots(roots, what)).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code in (429, 500, 502, 503, 504):
            raise Unavailable(
                f"{what} {location!r} answered {error.code}; try again later"
            ) from error
        raise UserError(
            f"{what} {location!r} answered {error.code}; check the source's path and base"
        ) from error
    except (ValueError, http.client.InvalidURL) as error:
        raise UserError(
            f"{what} {location!r} is no address that can be asked for ({error}); percent-encode it"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(
            f"{what} {location!r} does not answer ({getattr(error, 'reason', error)}); check the "
            "address and the network"
        ) from error
