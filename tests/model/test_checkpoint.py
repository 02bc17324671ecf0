"""Checkpoints are whole, or refused by name."""

import json
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


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tensors = {"a": torch.arange(1000.0)}
    return save_checkpoint(tmp_path, Checkpoint(7, tensors, {"b": torch.ones(3)}, {"x": 1}))


def test_checkpoints_round_trip(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    assert checkpoint.step == 7 and checkpoint.state == {"x": 1}
    assert torch.equal(checkpoint.model["a"], torch.arange(1000.0))
    assert torch.equal(checkpoint.optimizer["b"], torch.ones(3))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-10], "step-00000007 is cut short: model.safetensors has"),
        (lambda data: data[:-1] + b"x", "step-00000007 is damaged: model.safetensors does not"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(saved: Path, damage, message: str) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved)


@pytest.mark.parametrize("text", [b"", b"{", b"\x00\xff", b"null", b"[]", b"{}", b'{"step": 7}'])
def test_a_checkpoint_without_its_manifest_is_refused(saved: Path, text: bytes) -> None:
    (saved / "checkpoint.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"has no readable checkpoint\.json; delete"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"files": {"model.safetensors": {"bytes": "8"}}}, "has no readable checkpoint.json"),
        ({"files": {"model.safetensors": None}}, "has no readable checkpoint.json"),
        ({"step": 8}, "is damaged: checkpoint.json is of step 8; delete"),
        ({"state": {"x": 2}}, "checkpoint.json does not have its recorded SHA-256; delete"),
        ({"files": {}}, "checkpoint.json does not have its recorded SHA-256; delete"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(saved: Path, changed: dict, message: str) -> None:
    file = saved / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved)


def test_a_checkpoint_from_before_manifests_had_a_digest_is_read(saved: Path) -> None:
    file = saved / "checkpoint.json"
    manifest = json.loads(file.read_text())
    del manifest["sha256"]
    file.write_text(json.dumps(manifest))
    assert load_checkpoint(saved).state == {"x": 1}


def test_half_written_checkpoints_are_invisible_and_old_ones_go(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, Checkpoint(step, {}, {}, {}), keep=2)
    (tmp_path / ".partial-step-00000006").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000005"]
    assert list_checkpoints(tmp_path / "nowhere") == []
