"""Where a training's checkpoints lie: in the workspace, or beside the worker and copied up."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from model.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints, verify_checkpoint
from model.train import BEST
from tasks.runtime.store import Directory
from tasks.training.job import CHECKPOINTS

logger = logging.getLogger("gristmill.training")


@contextmanager
def checkpoint_folder(
    directory: Directory, rank: int
) -> Iterator[tuple[Path, Callable[[Path, int], None], Callable[[], None]]]:
    """(a local folder of checkpoints, a function that stores each new one for good, one that brings
    all that are stored).

    In a local store that is the workspace itself. Otherwise those that are as they were written are
    fetched first, and every new one is copied up, its manifest last.
    """
    if directory.is_local:
        folder = Path(directory.location(CHECKPOINTS))
        if rank == 0:
            drop_damaged(folder)
        yield folder, lambda path, step: None, lambda: None
        return
    folder = Path(tempfile.mkdtemp(prefix="gristmill-checkpoints-"))
    remote = RemoteCheckpoints(directory, folder)
    try:
        remote.pull()
        remote.mirror()  # older ones too, or what is kept would depend on where a run broke off
        yield folder, remote.push, remote.mirror
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def drop_damaged(folder: Path) -> None:
    """Remove newest checkpoints that cannot be read, so that the run goes on from one that can."""
    while (path := latest_checkpoint(folder)) is not None and not readable(path):
        pass


def readable(path: Path) -> bool:
    """Whether a checkpoint is as it was written; one that is not is removed."""
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        logger.warning("%s; going on from an older one", error)
        shutil.rmtree(path)
        return False
    return True


def best_checkpoint(folder: Path) -> Path:
    """The checkpoint, among a training's own in `folder`, that held-out documents liked best.

    Raises `CheckpointError` when it cannot be read: the last weights are not what was asked for.
    """
    drop_damaged(folder / BEST)
    best = latest_checkpoint(folder / BEST)
    if best is None:
        raise CheckpointError(
            f"{folder / BEST} has no checkpoint that can be read, so the best weights are lost; "
            f"delete {folder} to train anew, or take the last: weights=last"
        )
    return best


class RemoteCheckpoints:
    """Checkpoints in a store that is no directory: what lies in the local folder lies there."""

    def __init__(self, directory: Directory, folder: Path) -> None:
        self.directory, self.folder = directory, folder

    def _whole(self) -> list[str]:
        """Paths of those that have their manifest, `step-…` and `best/step-…`, oldest first."""
        start, end = f"{CHECKPOINTS}/", "/checkpoint.json"
        names = [name for name in self.directory.names() if name.startswith(start)]
        return sorted(n.removeprefix(start).removesuffix(end) for n in names if n.endswith(end))

    def pull(self) -> None:
        """The newest, and the best so far; where one cannot be read, the one before it."""
        done = set()
        for path in reversed(self._whole()):
            kind = path.rpartition("/")[0]
            if kind not in done and self._fetch(path):
                done.add(kind)

    def mirror(self) -> None:
        """All of the run that are stored, and no others, so that every rank has the same ones."""
        stored = [path for path in self._whole() if "/" not in path]
        here = {path.name for path in list_checkpoints(self.folder)}
        for path in stored:
            if path not in here:
                self._fetch(path)
        for path in here.difference(stored):
            shutil.rmtree(self.folder / path)

    def _fetch(self, path: str) -> bool:
        """Whether it can be read; otherwise it isn't kept."""
        prefix = f"{CHECKPOINTS}/{path}/"
        for name in self.directory.names():
            if name.startswith(prefix):
                target = self.folder / path / name.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self.directory.read_bytes(name))
        return readable(self.folder / path)

    def push(self, path: Path, step: int) -> None:
        before = self._whole()
        within = path.relative_to(self.folder)
        for file in sorted(path.iterdir(), key=lambda file: file.name == "checkpoint.json"):
            self.directory.put(file, f"{CHECKPOINTS}/{within}/{file.name}")
        for name in before:
            if not (self.folder / name).exists():
                location = self.directory.location(f"{CHECKPOINTS}/{name}")
                self.directory.filesystem.delete_dir(location)
