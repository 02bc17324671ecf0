"""Checkpoints of divided weights: every rank its part, exact, verified, for any number of ranks."""

import contextlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import CheckpointError, read_manifest, verify_checkpoint
from model.config import ModelConfig
from model.divided_checkpoint import is_divided, load_whole_model
from model.loader import WindowLoader
from model.sharding import whole_model
from model.train import train
from model.train_config import TrainConfig
from model.transformer import Transformer
from tests.model.ranks import end_rank, run_ranks

CONFIG = TrainConfig(
    total_tokens=12 * 8 * 32,
    batch=8,
    micro_batch=2,
    log_every=1,
    checkpoint_every=4,
    keep_checkpoints=9,
    precision="fp32",
    sharded=True,
)


class Killed(BaseException):
    """As abrupt as an exception can be."""


def trained(folder: Path, checkpoints: str, kill_at: int | None = None, **how):
    """The curve and the whole weights of a run, which may be killed before its end."""
    torch.manual_seed(0)
    # 3 heads of 10 channels: rows that two ranks cannot share evenly.
    shape = ModelConfig(vocab_size=101, width=30, layers=2, heads=3, mlp_width=51, context=32)
    model = Transformer(shape)
    loader = WindowLoader([folder / "tokens.npy"], 32, seed=1)

    def on_step(record) -> None:
        if record.step == kill_at:
            raise Killed

    options = {"checkpoints": folder / checkpoints, "on_step": on_step}
    curve = [r.loss for r in train(model, loader, replace(CONFIG, **how), **options)]
    return curve, whole_model(model).state_dict()


def _one_rank(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    said = {}
    said["unbroken"], expected = trained(folder, "a")
    with contextlib.suppress(Killed):
        trained(folder, "b", kill_at=7)
    torch.distributed.barrier()
    said["resumed"], found = trained(folder, "b")
    said["same"] = all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    # Written whole by rank 0, gone on from divided.
    with contextlib.suppress(Killed):
        trained(folder, "c", kill_at=7, divided_checkpoints=False)
    torch.distributed.barrier()
    _, found = trained(folder, "c")
    said["same after whole"] = all(torch.equal(found[n], t) for n, t in expected.items())
    shard = folder / "damaged" / "step-00000008" / "optimizer"
    if torch.distributed.get_rank() == 0:
        shutil.copytree(folder / "a" / "step-00000008", shard.parent)
        _damage(next(shard.glob("shard-00002-*")))
    torch.distributed.barrier()
    try:
        trained(folder, "damaged")
    except CheckpointError as error:
        said["error"] = str(error)
    torch.distributed.destroy_process_group()
    end_rank(said)


def _copied_rank(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    how = {"sharded": False, "batch": 12}
    unbroken, expected = trained(folder, "a", **how)
    with contextlib.suppress(Killed):
        trained(folder, "b", kill_at=7, **how)
    torch.distributed.barrier()
    resumed, found = trained(folder, "b", **how)
    same = all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    torch.distributed.destroy_process_group()
    end_rank({"same": same and resumed == unbroken})


def _damage(file: Path) -> None:
    body = bytearray(file.read_bytes())
    body[-3] ^= 1
    file.write_bytes(body)


def test_divided_checkpoints_are_exact_verified_and_for_any_number_of_ranks(tmp_path) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 99, 3000, np.uint16))
    for said in run_ranks(__file__, 2, str(tmp_path)):
        assert said["resumed"] == said["unbroken"] and said["same"] and said["same after whole"]
        assert "step-00000008 is damaged: optimizer/shard-00002" in said["error"]
    newest = tmp_path / "a" / "step-00000012"
    manifest = read_manifest(newest)
    assert is_divided(manifest) and len(manifest["files"]) == 4
    assert not is_divided(read_manifest(tmp_path / "c" / "step-00000004"))
    # One process goes on from the middle, undivided: rounding alone is different.
    middle = tmp_path / "alone" / "step-00000008"
    shutil.copytree(tmp_path / "a" / "step-00000008", middle)
    curve, alone = trained(tmp_path, "alone")
    np.testing.assert_allclose(curve, said["unbroken"], rtol=1e-5)
    for name, tensor in load_whole_model(newest).items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_any_number_of_copies_goes_on_to_the_bit(tmp_path, world) -> None:
    # With DDP three ranks would not: its first step adds in another order than those after it.
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 99, 3000, np.uint16))
    said = run_ranks(__file__, world, str(tmp_path), "copied")
    assert [one["same"] for one in said] == [True] * world


def test_a_part_that_is_cut_short_is_named(tmp_path) -> None:
    file = tmp_path / "step-00000001" / "model" / "shard-00001-model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x" * 10)
    entry = {"bytes": 12, "sha256": "0" * 64}
    files = {"model/shard-00001-model.safetensors": entry}
    manifest = {"step": 1, "state": {}, "files": files}
    (tmp_path / "step-00000001" / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"cut short: model/shard-00001\S+ has 10 of 12"):
        verify_checkpoint(tmp_path / "step-00000001")


if __name__ == "__main__":
    (_copied_rank if "copied" in sys.argv else _one_rank)(Path(sys.argv[1]))
