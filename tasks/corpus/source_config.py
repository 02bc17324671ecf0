"""What a person says about text that is already there, and where such text may be read from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from tasks.runtime.errors import UserError
from tasks.runtime.fingerprint import place
from tasks.runtime.settings import Settings
from tasks.runtime.stage import StageConfig

FORMATS = {
    "warc": (".warc", ".warc.gz"),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json.gz"),
    "parquet": (".parquet",),
    "folder": (".txt", ".text", ".md", ".markdown", ".html", ".htm", ".xhtml", ".pdf"),
}


class SourceConfig(StageConfig):
    """Text that is already there: a file, or a directory with everything of its kind below it."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,40}$")
    """What reports and documents call it."""
    path: str = place(..., min_length=1)
    """A file or directory below one of the configured roots (GRISTMILL_SOURCE_ROOTS)."""
    format: Literal["folder", "jsonl", "parquet", "warc", "warc-list"] = "folder"
    """folder: text, Markdown, HTML and PDF files. jsonl and parquet: a document a row. warc: files
    of WARC records. warc-list: a file that names WARC files, one path a line, gzip or not."""
    base: str = place("")
    """Directory the lines of a warc-list are relative to; empty: that of the list."""
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
    stated = settings.source_roots or str(settings.home / "sources")
    return [Path(part).expanduser().resolve() for part in stated.split(os.pathsep) if part]


def allowed(path: Path, settings: Settings, what: str) -> Path:
    """The real path. Raises UserError when it lies outside every root, whatever links say."""
    real = path.expanduser().resolve()
    if not any(real.is_relative_to(root) for root in roots(settings)):
        below = ", ".join(map(str, roots(settings)))
        raise UserError(
            f"{what} {str(path)!r} lies outside the directories that sources may be read from "
            f"({below}); move it there or set GRISTMILL_SOURCE_ROOTS"
        )
    return real


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


def _listed(source: SourceConfig, path: Path, settings: Settings) -> Iterator[Path]:
    import gzip

    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    base = Path(source.base) if source.base else path.parent
    for line in data.decode("utf-8", "replace").splitlines():
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        listed = allowed(base / name, settings, f"source {source.name!r} lists")
        if not listed.is_file():
            raise UserError(
                f"source {source.name!r} lists {name!r}, which is not in {str(base)!r}; "
                "fetch it or set the source's base"
            )
        yield listed


def content_digest(source: SourceConfig, settings: Settings) -> str:
    """SHA-256 over the relative names and the bytes of a source's files.

    A file whose path, size and time of change are known from before is not read again.
    """
    files = files_of(source, settings)
    start = Path(source.path).expanduser().resolve()
    start = start if start.is_dir() else start.parent
    memory = settings.home / "cache" / "source-digests.json"
    known: dict[str, str] = json.loads(memory.read_text()) if memory.exists() else {}
    before = len(known)
    told = hashlib.sha256()
    for path in files:
        stat = path.stat()
        key = f"{path}\t{stat.st_size}\t{stat.st_mtime_ns}"
        if key not in known:
            with open(path, "rb") as stream:
                known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        told.update(f"{os.path.relpath(path, start)}\t{known[key]}\n".encode())
    if len(known) > before:
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(known))
        partial.replace(memory)
    return told.hexdigest()
