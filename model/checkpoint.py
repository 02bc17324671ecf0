"""Checkpoints: a directory per step, written atomically, verified on load, never pickled.

    step-00000200/
      model.safetensors       parameters
      optimizer.safetensors   optimiser state, by parameter name
      checkpoint.json         step, the run's own state, size and SHA-256 of the two, and of itself

A checkpoint is written under another name, flushed to disk and renamed: what is called step-… is
whole. Of divided weights each rank writes its own part (`model.divided_checkpoint`): the two files
are then folders.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "checkpoint.json"
FILES = ("model.safetensors", "optimizer.safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint that must not be used. The message names it, the reason and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    step: int  # steps completed
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]  # JSON: what else the run must know to go on


def save_checkpoint(directory: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write `checkpoint` below `directory` and keep only the newest `keep`; returns its path."""
    partial = begin(directory, checkpoint.step)
    files = {}
    for name, tensors in zip(FILES, (checkpoint.model, checkpoint.optimizer), strict=True):
        save_file(
            {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()},
            partial / name,
        )
        files[name] = entry(partial / name)
    return commit(partial, checkpoint, files, keep)


def begin(directory: Path, step: int) -> Path:
    """An empty folder for what shall become a checkpoint below `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".partial-step-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def entry(file: Path) -> dict[str, Any]:
    """What the manifest says of a file, which is flushed to disk."""
    _flush(file)
    return {"bytes": file.stat().st_size, "sha256": _digest(file)}


def commit(partial: Path, checkpoint: Checkpoint, files: dict[str, Any], keep: int) -> Path:
    """Make the folder a checkpoint, and remove all but the newest `keep`; returns its path."""
    manifest = {"step": checkpoint.step, "state": checkpoint.state, "files": files}
    manifest = json.loads(json.dumps(manifest))  # as it will be read
    manifest["sha256"] = _digest_of_manifest(manifest)
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True))
    _flush(partial / MANIFEST)
    path = partial.with_name(partial.name.removeprefix(".partial-"))
    shutil.rmtree(path, ignore_errors=True)  # a step replayed after a restart is written again
    partial.rename(path)
    _flush(path.parent)
    for old in list_checkpoints(path.parent)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


class CheckpointWriter:
    """Writes checkpoints in a thread while training goes on, one at a time and in order.

    `written` is called in that thread with the path of each one that is whole. save: how one is
    written; `save_checkpoint` where one rank has all of it.
    """

    def __init__(
        self,
        directory: Path,
        written: Callable[[Path, int], None],
        save: Callable[..., Path | None] = save_checkpoint,
    ) -> None:
        self.directory, self.written, self.save = directory, written, save
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, checkpoint: Checkpoint, keep: int, folder: str = "") -> None:
        """Copy the tensors now and write them soon; waits for the checkpoint before."""
        copied = replace(
            checkpoint, model=_copied(checkpoint.model), optimizer=_copied(checkpoint.optimizer)
        )
        self.wait()
        arguments = (copied, keep, self.directory / folder)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the last one is whole; raises what went wrong with it."""
        self.finish()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Until nothing is being written any more, come of it what may."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, checkpoint: Checkpoint, keep: int, directory: Path) -> None:
        try:
            path = self.save(directory, checkpoint, keep=keep)
            if path is not None:
                self.written(path, checkpoint.step)
        except BaseException as error:
            self._error = error


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint that lies in whole files; raises `CheckpointError` if a byte
    is wrong.
    """
    manifest = verify_checkpoint(path)
    model, optimizer = (load_file(path / name) for name in FILES)
    return Checkpoint(manifest["step"], model, optimizer, manifest["state"])


def verify_checkpoint(path: Path, *, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """The manifest. Raises `CheckpointError` if a byte of a file is wrong.

    Of several who verify together, each can take one part of the files.
    """
    manifest, remedy = read_manifest(path), f"delete {path} to go on from an older one"
    for name, expected in sorted(manifest["files"].items())[part::parts]:
        file = path / name
        size = file.stat().st_size if file.exists() else 0
        if size != expected["bytes"]:
            raise CheckpointError(
                f"checkpoint {path.name} is cut short: {name} has {size} of {expected['bytes']} "
                f"bytes; {remedy}"
            )
        if _digest(file) != expected["sha256"]:
            raise CheckpointError(
                f"checkpoint {path.name} is damaged: {name} does not have its recorded SHA-256; "
                f"{remedy}"
            )
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, state, files. Raises `CheckpointError` if that is not
    what was written; one from before manifests had a digest is believed.
    """
    remedy = f"delete {path} to go on from an older one"
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):  # of JSON and of UTF-8
        manifest = None
    if not _is_manifest(manifest):
        raise CheckpointError(f"checkpoint {path.name} has no readable {MANIFEST}; {remedy}")
    if manifest["step"] != step_of(path):
        raise CheckpointError(
            f"checkpoint {path.name} is damaged: {MANIFEST} is of step {manifest['step']}; {remedy}"
        )
    if manifest.get("sha256", digest := _digest_of_manifest(manifest)) != digest:
        raise CheckpointError(
            f"checkpoint {path.name} is damaged: {MANIFEST} does not have its recorded SHA-256; "
            f"{remedy}"
        )
    return dict(manifest)


def _is_manifest(found: Any) -> bool:
    """Whether it has the form of what `commit` writes."""
    match found:
        case {"step": int(), "state": dict(), "files": dict(files)}:
            return all(map(_is_entry, files.values()))
    return False


def _is_entry(found: Any) -> bool:
    match found:
        case {"bytes": int(), "sha256": str()}:
            return True
    return False


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints below `directory`, oldest first; a directory that does not exist has none."""
    if not directory.exists():
        return []
    return sorted(p for p in directory.iterdir() if re.fullmatch(r"step-\d{8,}", p.name))


def step_of(path: Path) -> int:
    """The steps completed when a checkpoint was made."""
    return int(path.name.removeprefix("step-"))


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint below `directory`."""
    return next(reversed(list_checkpoints(directory)), None)


def _digest_of_manifest(manifest: Mapping[str, Any]) -> str:
    """Of all it says but this."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
