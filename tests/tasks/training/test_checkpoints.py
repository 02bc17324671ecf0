"""Checkpoints in a store that is no directory come back as they were, the best among them."""

from pathlib import Path

import torch

from model.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from model.train import BEST
from tasks.runtime.store import Directory
from tasks.training.checkpoints import RemoteCheckpoints, checkpoint_folder
from tasks.training.job import CHECKPOINTS


def checkpoint(step: int) -> Checkpoint:
    tensors = {"w": torch.full((3,), float(step))}
    return Checkpoint(step, tensors, tensors, {"curve": []})


def test_the_newest_and_the_best_come_back_and_older_ones_go(tmp_path: Path) -> None:
    # file:// is reached as S3 is, not as a directory.
    there = Directory((tmp_path / "store").as_uri(), str(tmp_path / "store"))
    remote = RemoteCheckpoints(there, tmp_path / "worker")
    for step in (10, 20, 30, 40):
        remote.push(save_checkpoint(remote.folder, checkpoint(step), keep=2), step)
    for step in (20, 30):
        remote.push(save_checkpoint(remote.folder / BEST, checkpoint(step), keep=1), step)
    kept = {name.rpartition("/")[0] for name in there.names()}
    assert kept == {f"{CHECKPOINTS}/{n}" for n in ("step-00000030", "step-00000040")} | {
        f"{CHECKPOINTS}/best/step-00000030"
    }
    with checkpoint_folder(there, rank=0) as (folder, push):
        assert [path.name for path in list_checkpoints(folder)] == ["step-00000040"]
        assert [path.name for path in list_checkpoints(folder / BEST)] == ["step-00000030"]
        assert load_checkpoint(folder / BEST / "step-00000030").model["w"][0] == 30
        push(save_checkpoint(folder, checkpoint(50)), 50)
    assert f"{CHECKPOINTS}/step-00000050/checkpoint.json" in there.names()
    assert not folder.exists()


def test_a_damaged_newest_one_gives_way_to_the_one_before(tmp_path: Path) -> None:
    there = Directory(str(tmp_path), str(tmp_path))
    for step in (10, 20):
        save_checkpoint(tmp_path / CHECKPOINTS, checkpoint(step))
    weights = tmp_path / CHECKPOINTS / "step-00000020" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with checkpoint_folder(there, rank=0) as (folder, _):
        assert [path.name for path in list_checkpoints(folder)] == ["step-00000010"]
