"""The artifact store: immutable artifacts under `<store>/<stage>/<fingerprint>/`.

A directory or anything `pyarrow.fs` opens (`s3://bucket/prefix`). `manifest.json`, written last and
atomically, is the commit marker: without it there is no artifact.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from tasks.runtime.errors import Unavailable, UserError
from tasks.runtime.manifest import FileEntry, Manifest
from tasks.runtime.settings import Settings

MANIFEST = "manifest.json"
REPORT = "report.json"
_LOCAL = fs.LocalFileSystem()
_PLACES = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_DEFAULT_REGION")
_DENIALS = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "HTTP status 403")


def open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem and root path behind a directory name or URI."""
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
    return _remote(uri, tuple(os.environ.get(name) for name in _PLACES))


@lru_cache(maxsize=64)
def _remote(uri: str, _environment: tuple[str | None, ...]) -> tuple[fs.FileSystem, str]:
    """Kept: each opening makes connections of its own and looks for credentials anew."""
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"store {uri!r} cannot be opened: {error}; use a directory or s3://…"
        ) from error
    return filesystem, path.rstrip("/")


def refusal(uri: str, error: OSError) -> UserError:
    """What a person is told when the service behind a URI refuses or does not answer."""
    said = " ".join(str(error).split())
    if "NO_SUCH_BUCKET" in said or "not found. To create buckets" in said:
        return UserError(f"{uri!r} lies in a bucket that does not exist; create it")
    if any(word in said for word in _DENIALS):
        return UserError(
            f"access to {uri!r} is denied; give credentials that may read, list and write there "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role)"
        )
    return Unavailable(
        f"{uri!r} does not answer ({said[:200]}); check the network and AWS_ENDPOINT_URL"
    )


@lru_cache(maxsize=64)
def _require(uri: str, environment: tuple[str | None, ...]) -> None:
    """Raise UserError or Unavailable unless the store can be listed: better than half-way."""
    filesystem, root = _remote(uri, environment)
    bucket = root.partition("/")[0]
    if not bucket:
        raise UserError(f"store {uri!r} names no bucket; give s3://BUCKET/PREFIX")
    try:
        found = filesystem.get_file_info(bucket)
        filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    except OSError as error:
        raise refusal(uri, error) from error
    if found.type == fs.FileType.NotFound:
        raise UserError(f"{uri!r} lies in a bucket that does not exist; create it")


@dataclass(frozen=True)
class Directory:
    """One directory of the store; small, picklable, usable from any Ray worker."""

    uri: str
    path: str

    @property
    def filesystem(self) -> fs.FileSystem:
        return _LOCAL if self.is_local else open_filesystem(self.uri)[0]

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    def location(self, name: str) -> str:
        return f"{self.path}/{name}"

    def has(self, name: str) -> bool:
        info = self.filesystem.get_file_info(self.location(name))
        return info.type == fs.FileType.File

    def names(self) -> list[str]:
        """Names of all committed files below, relative and sorted; partial writes are left out."""
        selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        names = [
            info.path[len(self.path) :].lstrip("/")
            for info in found
            if info.type == fs.FileType.File
        ]
        return sorted(name for name in names if ".partial-" not in name)

    def read_bytes(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(self.location(name), compression=None) as stream:
            return stream.read()

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Columns in the order asked for. `pq.read_table` plans a data set first: 1 ms a file."""
        with self.filesystem.open_input_file(self.location(name)) as source:
            table = pq.ParquetFile(source, pre_buffer=not self.is_local).read(columns)
        return table if columns is None else table.select(columns)

    def read_present(self, name: str, columns: Iterable[str]) -> pa.Table:
        """Those of these columns that the table has, in their order."""
        with self.filesystem.open_input_file(self.location(name)) as source:
            parquet = pq.ParquetFile(source)
            has = set(parquet.schema_arrow.names)
            return parquet.read([column for column in columns if column in has])

    def write_bytes(self, name: str, data: bytes) -> FileEntry:
        """Write a whole file atomically: readers see the old file or the new one."""
        filesystem, target = self.filesystem, self.location(name)
        self._make_room(target)
        if self.is_local:
            partial = _partial(target)
            try:
                with open(partial, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(partial, target)
            except OSError:
                Path(partial).unlink(missing_ok=True)  # a full disk needs the room
                raise
        else:
            with filesystem.open_output_stream(target, compression=None) as stream:
                stream.write(data)
        return FileEntry(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())

    def write_table(self, name: str, table: pa.Table) -> FileEntry:
        """Write Parquet (zstd) atomically."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        return self.write_bytes(name, sink.getvalue().to_pybytes())

    def write_json(self, name: str, value: object) -> FileEntry:
        return self.write_bytes(name, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())

    def put(self, source: Path, name: str) -> FileEntry:
        """Copy a local file in, atomically and without holding it in memory."""
        filesystem, target = self.filesystem, self.location(name)
        self._make_room(target)
        # An upload becomes an object when it ends: no partial name, which S3 could only copy from.
        partial = _partial(target) if self.is_local else target
        digest, size = hashlib.sha256(), 0
        try:
            with (
                open(source, "rb") as stream,
                filesystem.open_output_stream(partial, compression=None) as out,
            ):
                while block := stream.read(1 << 20):
                    digest.update(block)
                    size += len(block)
                    out.write(block)
        except OSError:
            # pyarrow closes a stream that broke off as if it were whole.
            if filesystem.get_file_info(partial).is_file:
                filesystem.delete_file(partial)
            raise
        if self.is_local:
            os.replace(partial, target)
        return FileEntry(name=name, size=size, sha256=digest.hexdigest())

    def _make_room(self, target: str) -> None:
        """Object stores have no directories: markers for them would cost two requests a file."""
        if self.filesystem.type_name not in ("s3", "gcs"):
            self.filesystem.create_dir(os.path.dirname(target), recursive=True)

    def entry(self, name: str) -> FileEntry:
        """Size and digest of a file as it lies there."""
        digest, size = hashlib.sha256(), 0
        with self.filesystem.open_input_stream(self.location(name), compression=None) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                size += len(block)
        return FileEntry(name=name, size=size, sha256=digest.hexdigest())

    def remove(self) -> None:
        """The manifest first: what is left when this is interrupted is no artifact."""
        if self.has(MANIFEST):
            self.filesystem.delete_file(self.location(MANIFEST))
        if self.filesystem.get_file_info(self.path).type == fs.FileType.Directory:
            self.filesystem.delete_dir(self.path)


def _partial(target: str) -> str:
    """A name beside `target` that `names` leaves out."""
    return f"{target}.partial-{uuid.uuid4().hex[:8]}"


@dataclass(frozen=True)
class Store:
    """All artifacts of one home or cluster."""

    uri: str
    cache: Path

    @classmethod
    def open(cls, settings: Settings | None = None) -> Store:
        """Raises UserError when a remote store is not there or refuses us."""
        settings = settings or Settings.load()
        if "://" in settings.store_uri:
            _require(settings.store_uri, tuple(os.environ.get(name) for name in _PLACES))
        return cls(settings.store_uri, settings.home / "cache")

    def directory(self, stage: str, fingerprint: str) -> Directory:
        return Directory(self.uri, f"{open_filesystem(self.uri)[1]}/{stage}/{fingerprint}")

    def of(self, manifest: Manifest) -> Directory:
        """Where that artifact's files lie."""
        return self.directory(manifest.stage, manifest.fingerprint)

    def find(self, stage: str, fingerprint: str) -> Manifest | None:
        directory = self.directory(stage, fingerprint)
        if not directory.has(MANIFEST):
            return None
        return Manifest.model_validate_json(directory.read_bytes(MANIFEST))

    def get(self, stage: str, fingerprint: str) -> Manifest:
        """The manifest of an artifact; a unique prefix of the fingerprint is enough."""
        matches = [m for m in self.all(stage) if m.fingerprint.startswith(fingerprint)]
        if len(matches) != 1:
            raise UserError(
                f"{len(matches)} artifacts of stage {stage!r} match {fingerprint!r}; "
                "name one fingerprint (gristmill plan shows them)"
            )
        return matches[0]

    def all(self, stage: str) -> list[Manifest]:
        """Committed artifacts of a stage, oldest first."""
        filesystem, root = open_filesystem(self.uri)
        selector = fs.FileSelector(f"{root}/{stage}", allow_not_found=True)
        found = (
            self.find(stage, info.base_name)
            for info in filesystem.get_file_info(selector)
            if info.type == fs.FileType.Directory
        )
        return sorted((m for m in found if m), key=lambda m: (m.created, m.fingerprint))

    def stages(self) -> list[str]:
        """Names of all stages that have a directory, sorted."""
        filesystem, root = open_filesystem(self.uri)
        found = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def unfinished(self, stage: str) -> list[str]:
        """Fingerprints of a stage's directories without a manifest."""
        filesystem, root = open_filesystem(self.uri)
        selector = fs.FileSelector(f"{root}/{stage}", allow_not_found=True)
        names = [
            info.base_name
            for info in filesystem.get_file_info(selector)
            if info.type == fs.FileType.Directory
        ]
        return sorted(name for name in names if not self.directory(stage, name).has(MANIFEST))

    def amend(self, manifest: Manifest, **changes: Any) -> Manifest:
        """Write an artifact's manifest anew with `changes`; sizes and digests as they are now.

        For erasures only: all else about an artifact never changes.
        """
        directory = self.of(manifest)
        files = tuple(directory.entry(entry.name) for entry in manifest.files)
        amended = manifest.model_copy(update={"files": files, **changes})
        directory.write_bytes(MANIFEST, (amended.model_dump_json(indent=1) + "\n").encode())
        self.forget_copies(manifest)
        return amended

    def forget_copies(self, manifest: Manifest) -> None:
        """Remove this machine's copies of a remote artifact's files."""
        shutil.rmtree(self.cache / manifest.stage / manifest.fingerprint, ignore_errors=True)

    def lineage(self, manifest: Manifest) -> list[Manifest]:
        """An artifact and all it was made from, as far as they are still there, oldest first."""
        stages = self.stages()
        found = {manifest.fingerprint: manifest}
        todo = manifest.made_of
        while todo:
            mark = todo.pop()
            if mark in found:
                continue
            made = next((m for stage in stages if (m := self.find(stage, mark))), None)
            if made is not None:
                found[mark] = made
                todo += made.made_of
        return sorted(found.values(), key=lambda m: (m.created, m.fingerprint))

    def latest(self, stage: str) -> Manifest | None:
        manifests = self.all(stage)
        return manifests[-1] if manifests else None

    def local(self, manifest: Manifest, name: str) -> Path:
        """A local path of one file: the file itself, or a verified copy of a remote one.

        Raises UserError when the copy's digest differs from the manifest's.
        """
        directory = self.of(manifest)
        if directory.is_local:
            return Path(directory.location(name))
        target = self.cache / manifest.stage / manifest.fingerprint / name
        expected = manifest.file(name)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}")
            partial.write_bytes(directory.read_bytes(name))
            partial.replace(target)
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        if digest != expected.sha256:
            target.unlink()
            raise UserError(
                f"{directory.location(name)} has digest {digest[:12]}, its manifest says "
                f"{expected.sha256[:12]}; the store is damaged: remove the artifact and run again"
            )
        return target

    def verify(self, manifest: Manifest) -> None:
        """Compare every file with the manifest; raises UserError naming the first that differs."""
        directory = self.of(manifest)
        for expected in manifest.files:
            present = directory.has(expected.name)
            if not present or directory.entry(expected.name) != expected:
                raise UserError(
                    f"{directory.location(expected.name)} "
                    f"{'differs from its manifest' if present else 'is missing'}; "
                    "remove the artifact's directory and run again"
                )

    def tables(
        self, manifest: Manifest, prefix: str = "", columns: list[str] | None = None
    ) -> Iterator[pa.Table]:
        """The Parquet files of an artifact whose names start with `prefix`, in order."""
        directory = self.of(manifest)
        for name in manifest.names(prefix, ".parquet"):
            yield directory.read_table(name, columns)
