"""Checkpoints in a store that is no directory come back as they were, the best among them."""

from pathlib import Path

import pytest
import torch

from model.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from model.train import BEST
from tasks.runtime.store import Directory
from tasks.training.checkpoints import RemoteCheckpoints, best_checkpoint, checkpoint_folder
from tasks.training.job import CHECKPOINTS
from tests.s3_server import s3_server


def checkpoint(step: int) -> Checkpoint:
    tensors = {"w": torch.full((3,), float(step))}
    return Checkpoint(step, tensors, tensors, {"curve": []})


def test_those_kept_and_the_best_come_back_and_older_ones_go(tmp_path: Path) -> None:
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
    with checkpoint_folder(there, rank=0) as (folder, push, _):
        found = [path.name for path in list_checkpoints(folder)]
        assert found == ["step-00000030", "step-00000040"]
        assert [path.name for path in list_checkpoints(folder / BEST)] == ["step-00000030"]
        assert load_checkpoint(folder / BEST / "step-00000030").model["w"][0] == 30
        push(save_checkpoint(folder, checkpoint(50), keep=3), 50)
    # As if the run had not been broken off: what it may go back to is the same.
    kept = {name.rpartition("/")[0] for name in there.names() if "/best/" not in name}
    assert kept == {f"{CHECKPOINTS}/step-000000{step}" for step in (30, 40, 50)}
    assert not folder.exists()


def test_before_a_rank_goes_back_it_has_all_that_are_stored(tmp_path: Path) -> None:
    there = Directory((tmp_path / "store").as_uri(), str(tmp_path / "store"))
    remote = RemoteCheckpoints(there, tmp_path / "worker")
    for step in (10, 20):
        remote.push(save_checkpoint(remote.folder, checkpoint(step), keep=2), step)
    with checkpoint_folder(there, rank=1) as (folder, _, refresh):
        found = [path.name for path in list_checkpoints(folder)]
        assert found == ["step-00000010", "step-00000020"]
        remote.push(save_checkpoint(remote.folder, checkpoint(30), keep=2), 30)
        refresh()
        found = [path.name for path in list_checkpoints(folder)]
        assert found == ["step-00000020", "step-00000030"]
        assert load_checkpoint(folder / "step-00000030").model["w"][0] == 30


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"\xff" + data])
def test_a_damaged_newest_one_gives_way_to_the_one_before(tmp_path: Path, name, damage) -> None:
    there = Directory(str(tmp_path), str(tmp_path))
    for step in (10, 20):
        save_checkpoint(tmp_path / CHECKPOINTS, checkpoint(step))
    file = tmp_path / CHECKPOINTS / "step-00000020" / name
    file.write_bytes(damage(file.read_bytes()))
    with checkpoint_folder(there, rank=0) as (folder, *_):
        assert [path.name for path in list_checkpoints(folder)] == ["step-00000010"]


def test_the_best_weights_are_never_others(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(20))
    best = save_checkpoint(tmp_path / BEST, checkpoint(10), keep=1)
    assert best_checkpoint(tmp_path) == best
    (best / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"so the best weights are lost; delete .* to train"):
        best_checkpoint(tmp_path)


def test_on_s3_too_a_damaged_newest_one_gives_way_to_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.bucket("runs")
        there = Directory("s3://runs/pretrain/x", "runs/pretrain/x")
        remote = RemoteCheckpoints(there, tmp_path / "worker")
        for step in (10, 20):
            remote.push(save_checkpoint(remote.folder, checkpoint(step)), step)
            remote.push(save_checkpoint(remote.folder / BEST, checkpoint(step)), step)
        weights = f"{CHECKPOINTS}/step-00000020/model.safetensors"
        there.write_bytes(weights, there.read_bytes(weights)[:-1] + b"x")
        with checkpoint_folder(there, rank=0) as (folder, push, _):
            assert [path.name for path in list_checkpoints(folder)] == ["step-00000010"]
            assert load_checkpoint(folder / "step-00000010").model["w"][0] == 10
            assert [path.name for path in list_checkpoints(folder / BEST)] == ["step-00000020"]
            push(save_checkpoint(folder, checkpoint(15)), 15)
        # The one that could not be read is gone, what was good is still there.
        kept = {name.split("/")[1] for name in there.names() if "best" not in name}
        assert kept == {"step-00000010", "step-00000015"}
