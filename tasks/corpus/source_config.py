"""What a person says about text that is already there, and where such text may be read from."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from tasks.corpus.remote_source import (
    SourceFile,
    below,
    is_remote,
    local_copy,
    look_up,
    remote_files,
)
from tasks.runtime.errors import UserError
from tasks.runtime.fingerprint import place
from tasks.runtime.settings import Settings
from tasks.runtime.stage_config import StageConfig

UNKNOWN_SIZE = 1 << 30  # about that of a segment of Common Crawl
FORMATS = {
    "warc": (".warc", ".warc.gz", ".warc.zst", ".warc.wet", ".warc.wet.gz", ".warc.wet.zst"),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".ndjson", ".json.gz"),
    "parquet": (".parquet",),
    "folder": (".txt", ".text", ".md", ".markdown", ".html", ".htm", ".xhtml", ".pdf"),
}


class SourceConfig(StageConfig):
    """Text that is already there: a file, or a directory with everything of its kind below it."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,40}$")
    """What reports and documents call it."""
    path: str = place(..., min_length=1)
    """A file or directory below one of the configured roots (GRISTMILL_SOURCE_ROOTS); also s3://…
    or, for one file or a list, https://…, below a root that says so."""
    format: Literal["folder", "jsonl", "parquet", "warc", "warc-list"] = "folder"
    """folder: text, Markdown, HTML and PDF files. jsonl and parquet: a document a row. warc: files
    of WARC records, plain, gzip or zstd. warc-list: a file that names WARC files, one path a line,
    gzip or not."""
    base: str = place("")
    """What the lines of a warc-list are relative to, https://data.commoncrawl.org/ for Common
    Crawl's; empty: the directory of the list."""
    weight: float = Field(1.0, gt=0, le=100)
    """How often a training run sees the source's documents in one pass over the corpus, those of
    the seeds being seen once: 2 is twice, 0.5 half of them."""
    text_field: str = "text"
    """Field or column that holds the text of a row."""
    url_field: str = "url"
    """Field or column with a row's address; without one it is the file and the row's number."""
    title_field: str = "title"
    """Field or column with a row's title, where there is one."""
    date_field: str = "date"
    """Field or column with a row's date, where there is one."""
    licence: str = ""
    """Under which terms the text may be used; told in the datasheet."""


def roots(settings: Settings) -> list[Path]:
    """Directories below which sources may lie; by default `sources/` in the home."""
    stated = _stated_roots(settings)
    return [Path(part).expanduser().resolve() for part in stated if not is_remote(part)]


def remote_roots(settings: Settings) -> list[str]:
    """Addresses below which remote sources may lie; none by default."""
    return [part for part in _stated_roots(settings) if is_remote(part)]


def _stated_roots(settings: Settings) -> list[str]:
    stated = settings.source_roots or str(settings.home / "sources")
    # A colon stands in addresses, too: before // and before a port.
    return [part for part in re.split(r":(?!//)(?!\d+(?:[/:]|$))", stated) if part]


def allowed(path: Path, settings: Settings, what: str) -> Path:
    """The real path, of what is there or might be. Raises UserError when nobody could look at it or
    it lies outside every root, whatever links say.
    """
    try:
        real = path.expanduser().resolve()
        if any(real.is_relative_to(root) for root in roots(settings)):
            real.exists()  # finds a name too long, a directory nobody may look into
            return real
    except (OSError, RuntimeError, ValueError) as error:  # the latter two: a loop of links, a NUL
        raise UserError(
            f"{what} {str(path)[:200]!r} cannot be looked at ({_reason(error)}); check the path"
        ) from error
    below = ", ".join(map(str, roots(settings)))
    raise UserError(
        f"{what} {str(path)!r} lies outside the directories that sources may be read from "
        f"({below}); move it there or set GRISTMILL_SOURCE_ROOTS"
    )


def _reason(error: Exception) -> str:
    """What the system says, without the path, which may be long."""
    return getattr(error, "strerror", None) or str(error)


def files_of(source: SourceConfig, settings: Settings) -> list[Path]:
    """The files of a source in the order of their names, each below a root.

    Raises UserError naming the source when there are none.
    """
    start = allowed(Path(source.path), settings, f"source {source.name!r}:")
    if not start.exists():
        raise UserError(f"source {source.name!r}: {source.path!r} does not exist; check the path")
    if source.format == "warc-list":
        found = list(_listed(source, start, settings))
    elif start.is_file():
        found = [start]
    else:
        endings = FORMATS[source.format]
        inside = (path for path in sorted(start.rglob("*")) if path.is_file())
        named = [path for path in inside if path.name.lower().endswith(endings)]
        found = [allowed(path, settings, f"source {source.name!r}:") for path in named]
    if not found:
        wanted = ", ".join(FORMATS.get(source.format, ("lines",)))
        raise UserError(
            f"source {source.name!r}: no file of format {source.format!r} ({wanted}) in "
            f"{source.path!r}; check path and format"
        )
    return found


def other_files(source: SourceConfig, settings: Settings) -> dict[str, int]:
    """How many files of a local directory are not read for their ending, by ending; those without
    one as `(none)`. Nothing of one file, a list or a remote place.
    """
    start = Path(source.path).expanduser()
    if is_remote(source.path) or source.format == "warc-list" or not start.is_dir():
        return {}
    start = allowed(start, settings, f"source {source.name!r}:")
    names = (path.name.lower() for path in start.rglob("*") if path.is_file())
    endings = FORMATS[source.format]
    unread = Counter(Path(n).suffix or "(none)" for n in names if not n.endswith(endings))
    return dict(sorted(unread.items(), key=lambda item: (-item[1], item[0])))


def source_files(source: SourceConfig, settings: Settings) -> list[SourceFile]:
    """The files of a source, wherever they lie, in the order of their names.

    Raises UserError naming the source when there are none or one lies below no root.
    """
    what = f"source {source.name!r}:"
    base = source.base or str(Path(source.path).parent)
    if not is_remote(source.path) and not (source.format == "warc-list" and is_remote(base)):
        local = files_of(source, settings)
        start = Path(source.path).expanduser().resolve()
        start = start if start.is_dir() else start.parent
        return [
            SourceFile(str(path), os.path.relpath(path, start), path.stat().st_size)
            for path in local
        ]
    roots = remote_roots(settings)
    if source.format != "warc-list":
        found = remote_files(source.path, FORMATS[source.format], roots, what)
        start_at = source.path.rstrip("/")
        return _some(source, [look_up(one, _relative(one, start_at), roots, what) for one in found])
    if is_remote(source.path):
        listing = look_up(source.path, "list", roots, what)
        base = source.base or source.path.rpartition("/")[0]
    else:
        path = allowed(Path(source.path), settings, what)
        if not path.is_file():
            raise UserError(f"{what} {source.path!r} is no file; check the path")
        listing = SourceFile(str(path), "list", 0)
    scratch = settings.home / "cache"
    scratch.mkdir(parents=True, exist_ok=True)
    with local_copy(listing, scratch, roots) as copy:
        names = _lines(source, copy)
    if not is_remote(base):
        raise UserError(f"{what} the list's base {base!r} is no address; set it to one")
    # Lists of the web's size are taken at their word: asking for each file's state would take hours
    # before anything begins. A file that is not there is counted when it is read.
    places = {name: below(f"{base.rstrip('/')}/{name}", roots, what) for name in names}
    return _some(source, [SourceFile(at, name, UNKNOWN_SIZE) for name, at in places.items()])


def _some(source: SourceConfig, found: list[SourceFile]) -> list[SourceFile]:
    if not found:
        raise UserError(
            f"source {source.name!r}: nothing of format {source.format!r} at {source.path!r}; "
            "check path and format"
        )
    return found


def _relative(location: str, start: str) -> str:
    return location.removeprefix(f"{start}/") if location != start else start.rpartition("/")[2]


def _lines(source: SourceConfig, path: Path) -> list[str]:
    """The paths in a list, gzip or not. Raises UserError where it cannot be read."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"source {source.name!r}: the list {source.path!r} cannot be read ({_reason(error)}); "
            "check that it is a whole file"
        ) from error
    lines = (line.strip() for line in data.decode("utf-8", "replace").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _listed(source: SourceConfig, path: Path, settings: Settings) -> Iterator[Path]:
    base = Path(source.base) if source.base else path.parent
    for name in _lines(source, path):
        listed = allowed(base / name, settings, f"source {source.name!r} lists")
        if not listed.is_file():
            raise UserError(
                f"source {source.name!r} lists {name!r}, which is not in {str(base)!r}; "
                "fetch it or set the source's base"
            )
        yield listed


def content_digest(source: SourceConfig, settings: Settings) -> str:
    """SHA-256 over the relative names and the bytes of a source's files; of remote ones over names,
    sizes and states, of remote lists over the names.

    A file whose path, size and time of change are known from before is not read again.
    """
    files = source_files(source, settings)
    memory = settings.home / "cache" / "source-digests.json"
    known: dict[str, str] = json.loads(memory.read_text()) if memory.exists() else {}
    before = len(known)
    told = hashlib.sha256()
    for file in files:
        if is_remote(file.location):
            told.update(f"{file.name}\t{file.size}\t{file.stamp}\n".encode())
            continue
        stat = Path(file.location).stat()
        key = f"{file.location}\t{stat.st_size}\t{stat.st_mtime_ns}"
        if key not in known:
            try:
                with open(file.location, "rb") as stream:
                    known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise UserError(
                    f"source {source.name!r}: {file.name!r} cannot be read ({_reason(error)}); "
                    "make it readable or take it away"
                ) from error
        told.update(f"{file.name}\t{known[key]}\n".encode())
    if len(known) > before:
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(known))
        partial.replace(memory)
    return told.hexdigest()
