"""Checkpoints of weights that are divided among ranks: each writes its own part.

    step-00000200/
      model/shard-00001-….safetensors       rank 0's part of every parameter, with its place
      optimizer/shard-00001-….safetensors   and of the optimiser's state
      …
      checkpoint.json                       as of any checkpoint, with each file's SHA-256

No rank ever holds the whole. A run goes on with any number of ranks, or with none: torch's
distributed checkpoints find out who needs which rows of which file. They are written as
safetensors, never pickled. All ranks must see one directory.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from model.checkpoint import (
    FILES,
    Checkpoint,
    CheckpointError,
    begin,
    commit,
    entry,
    verify_checkpoint,
)

KINDS = ("model", "optimizer")


@dataclass(frozen=True)
class Together:
    """The ranks that write and read checkpoints together, in a process group of their own: a
    thread may write while the run's own group is busy with gradients.
    """

    group: dist.ProcessGroup
    rank: int
    world: int

    @classmethod
    def of_all(cls) -> "Together":
        """Every rank must ask."""
        return cls(dist.new_group(backend="gloo"), dist.get_rank(), dist.get_world_size())

    def tell(self, word: Any) -> list[Any]:
        """What each rank says, by rank, for every rank."""
        words: list[Any] = [None] * self.world
        dist.all_gather_object(words, word, group=self.group)
        return words

    def save(self, directory: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path | None:
        """As `save_checkpoint`, of divided tensors, by all ranks; rank 0 returns the path.

        Raises `CheckpointError` on every rank when one of them cannot write.
        """
        partial = directory / f".partial-step-{checkpoint.step:08d}"
        files: dict[str, Any] = {}
        problem = None
        try:
            if self.rank == 0:
                begin(directory, checkpoint.step)
        except OSError as error:
            problem = str(error)
        self._agree(problem)
        try:
            for kind in KINDS:
                writer = HuggingFaceStorageWriter(str(partial / kind), save_distributed=True)
                state = dict(getattr(checkpoint, kind))
                dcp.save(state, storage_writer=writer, process_group=self.group)
                for file in (partial / kind).glob(f"shard-{self.rank + 1:05d}-*"):
                    files[f"{kind}/{file.name}"] = entry(file)
        except (OSError, dcp.CheckpointException) as error:
            problem = str(error)
        told = self.tell((problem, files))
        self._raise(next((word for word, _ in told if word), None))
        path = None
        if self.rank == 0:
            together = {name: what for _, each in told for name, what in each.items()}
            path = commit(partial, checkpoint, together, keep)
        self.tell(None)  # nobody goes on before it is whole
        return path

    def load(self, path: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """As `load_divided`, the digests shared among the ranks."""
        problem = None
        try:
            verify_checkpoint(path, part=self.rank, parts=self.world)
        except CheckpointError as error:
            problem = str(error)
        self._agree(problem)
        for kind in KINDS:
            reader = HuggingFaceStorageReader(str(path / kind))
            dcp.load(dict(tensors[kind]), storage_reader=reader, process_group=self.group)

    def _agree(self, problem: str | None) -> None:
        self._raise(next((word for word in self.tell(problem) if word), None))

    @staticmethod
    def _raise(problem: str | None) -> None:
        if problem is not None:
            raise CheckpointError(problem)


def is_divided(manifest: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was written by several ranks."""
    return any("/" in name for name in manifest["files"])


def load_divided(path: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Fill the tensors of a model and its optimiser from a verified checkpoint, in one process.

    tensors: of each of `KINDS` by name, on any device.
    """
    for kind in KINDS:
        _fill(path, kind, tensors[kind])


def _fill(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> None:
    reader = HuggingFaceStorageReader(str(path / kind))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)


def load_whole_model(path: Path) -> dict[str, Tensor]:
    """The verified parameters of any checkpoint, in one process."""
    if not is_divided(verify_checkpoint(path)):
        return load_file(path / FILES[0])
    about = HuggingFaceStorageReader(str(path / KINDS[0])).read_metadata().state_dict_metadata
    tensors = {
        name: each for name, each in about.items() if isinstance(each, TensorStorageMetadata)
    }
    state = {
        name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in tensors.items()
    }
    _fill(path, KINDS[0], state)
    return state
