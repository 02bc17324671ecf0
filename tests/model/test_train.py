"""The loop: it learns, resumes to the bit, keeps the best, stops on nonsense."""

import contextlib
import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    list_checkpoints,
    load_checkpoint,
    read_manifest,
)
from model.compiling import compile_blocks, missing_compiler
from model.config import ConfigError, ModelConfig
from model.loader import DataError, WindowLoader
from model.masking import MaskedLoader
from model.optim import OptimConfig
from model.packing import Example, PackedLoader
from model.train import DivergedError, train
from model.transformer import Transformer
from tests.model.tiny_training import CONFIG, Killed, tiny_model


def test_the_loss_goes_down_on_a_small_text(loader: WindowLoader) -> None:
    config = replace(CONFIG, total_tokens=60 * 8 * 32, log_every=10)
    records = train(tiny_model(), loader, config, token_bytes=torch.ones(128, dtype=torch.int64))
    assert [record.step for record in records] == [10, 20, 30, 40, 50, 60]
    assert records[0].loss > 3 and records[-1].loss < 1.5
    assert records[-1].bits_per_byte == pytest.approx(records[-1].loss / np.log(2))
    assert records[-1].tokens == config.total_tokens and records[-1].eta_seconds == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_resumes_on_the_same_curve_to_the_bit(loader, tmp_path, precision) -> None:
    config = replace(CONFIG, precision=precision)
    unbroken = tiny_model()
    curve = {r.step: (r.loss, r.grad_norm) for r in train(unbroken, loader, config)}

    def kill(step, record) -> None:
        if record.step == step:
            raise Killed

    for kill_at in (6, 9, None):
        broken = tiny_model()
        with contextlib.suppress(Killed):
            records = train(
                broken,
                loader,
                config,
                checkpoints=tmp_path / "c",
                on_step=functools.partial(kill, kill_at),
            )
    assert {r.step: (r.loss, r.grad_norm) for r in records} == curve
    for a, b in zip(unbroken.parameters(), broken.parameters(), strict=True):
        assert torch.equal(a, b)


def test_records_and_time_go_on_where_a_kill_came_between_them(loader, tmp_path) -> None:
    config = replace(CONFIG, log_every=5, checkpoint_every=7)
    expected = train(tiny_model(), loader, config, token_bytes=torch.ones(128, dtype=torch.int64))

    def slow_and_killed(record) -> None:
        time.sleep(0.3)
        if record.step == 10:
            raise Killed

    options = {"checkpoints": tmp_path, "token_bytes": torch.ones(128, dtype=torch.int64)}
    with contextlib.suppress(Killed):
        train(tiny_model(), loader, config, on_step=slow_and_killed, **options)
    records = train(tiny_model(), loader, config, **options)  # from step 7, between 5 and 10
    assert [(r.step, r.loss, r.bits_per_byte) for r in records] == [
        (r.step, r.loss, r.bits_per_byte) for r in expected
    ]
    seven, twelve = (read_manifest(path)["state"] for path in list_checkpoints(tmp_path))
    assert twelve["seconds"] > seven["seconds"] > 0.3
    # A checkpoint of before these were kept is still gone on from.
    (old, _), new = list_checkpoints(tmp_path), tmp_path / "old" / "step-00000007"
    shutil.copytree(old, new)
    for name in ("seconds", "meter"):
        del seven[name]
    manifest = read_manifest(new) | {"state": seven}
    del manifest["sha256"]
    (new / "checkpoint.json").write_text(json.dumps(manifest))
    again = train(tiny_model(), loader, config, checkpoints=new.parent)
    assert [r.step for r in again] == [5, 10, 12] and again[-1].loss == records[-1].loss


def test_looks_and_checkpoints_are_no_part_of_the_rate(loader, tmp_path) -> None:
    config = replace(CONFIG, heldout_every=1, total_tokens=6 * 8 * 32)
    records = train(
        tiny_model(),
        loader,
        config,
        heldout={"a": loader},
        on_heldout=lambda step, losses: time.sleep(0.5),
    )
    assert min(record.tokens_per_second for record in records[1:]) > 2 * 8 * 32


def test_micro_batches_change_nothing_but_rounding(loader: WindowLoader) -> None:
    curves = [
        [
            r.loss
            for r in train(tiny_model(), loader, replace(CONFIG, micro_batch=m, precision="fp32"))
        ]
        for m in (8, 3, 1)
    ]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)
    np.testing.assert_allclose(curves[0], curves[2], rtol=1e-4)


def test_fine_tuning_learns_only_what_it_is_asked_to(tmp_path: Path) -> None:
    # The answer is the question's last token + 60; the noise before it cannot be learned.
    rng = np.random.default_rng(0)
    data = []
    for _ in range(40):
        key = int(rng.integers(3, 12))
        noise = rng.integers(3, 128, 3).tolist()
        data.append(Example([*noise, key, key + 60, 2], [False] * 4 + [True] * 2))
    loader = PackedLoader(data, 32, seed=0, pad=0)
    tokens = 32 * loader.rows(150)
    records = train(tiny_model(), loader, replace(CONFIG, total_tokens=tokens, log_every=33))
    assert records[-1].loss < 0.5 < records[0].loss


def test_held_out_text_is_looked_at_and_the_best_is_kept(loader, tmp_path) -> None:
    seen: dict[int, dict[str, float]] = {}
    (tmp_path / "noise").mkdir()
    noise = np.random.default_rng(0).integers(0, 128, 3000, dtype=np.uint16)
    np.save(tmp_path / "noise" / "tokens-00000.npy", noise)
    other = WindowLoader([tmp_path / "noise" / "tokens-00000.npy"], 32, seed=1)
    config = replace(CONFIG, total_tokens=24 * 8 * 32, heldout_every=4, keep_best=1)
    options = {"checkpoints": tmp_path / "c", "on_heldout": seen.__setitem__}
    model = tiny_model()
    records = train(model, loader, config, heldout={"text": loader, "noise": other}, **options)
    assert list(seen) == [4, 8, 12, 16, 20, 24]
    last = seen[24]
    assert last["heldout_loss_text"] < last["heldout_loss"] < last["heldout_loss_noise"]
    best = min(seen, key=lambda step: seen[step]["heldout_loss"])
    (kept,) = list_checkpoints(tmp_path / "c" / "best")
    assert load_checkpoint(kept).step == best
    # To look changes nothing of what is learned.
    blind = tiny_model()
    assert [r.loss for r in train(blind, loader, config)] == [r.loss for r in records]
    assert torch.equal(blind.output_weight, model.output_weight)


@pytest.mark.slow
def test_compiled_blocks_follow_the_same_curve(loader: WindowLoader) -> None:
    if missing_compiler("cpu"):
        pytest.skip("no compiler on this machine")
    config = replace(CONFIG, precision="fp32", micro_batch=8, total_tokens=3 * 8 * 32)
    expected = [record.loss for record in train(tiny_model(), loader, config)]
    compiled = train(tiny_model(), loader, replace(config, compiled=True))
    np.testing.assert_allclose([record.loss for record in compiled], expected, rtol=1e-3)


def test_without_a_compiler_blocks_stay_as_they_are(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "needs a C++ compiler; install g++" in str(missing_compiler("cpu"))
    assert compile_blocks(tiny_model().model.layers, torch.device("cpu")) is False


def test_with_a_compiler_that_fails_training_goes_on_uncompiled(loader, tmp_path) -> None:
    compiler = tmp_path / "broken-g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    # In a process of its own: torch remembers the compiler it found, and what it compiled.
    fresh = {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    fresh |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | fresh, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not compiled: torch.compile fails here" in done.stderr
    config = replace(CONFIG, total_tokens=3 * 8 * 32)
    losses = [record.loss for record in train(tiny_model(), loader, config)]
    assert json.loads(done.stdout) == pytest.approx(losses, rel=1e-3)


def _uncompiled(folder: Path) -> None:
    loader = WindowLoader([folder / "tokens-00000.npy"], 32, seed=1)
    config = replace(CONFIG, total_tokens=3 * 8 * 32, compiled=True)
    print(json.dumps([record.loss for record in train(tiny_model(), loader, config)]))


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where a directory should be")
    writer = CheckpointWriter(tmp_path / "c", lambda path, step: None)
    writer.write(Checkpoint(1, {}, {}, {}), 2)
    with pytest.raises(FileExistsError):
        writer.wait()


def test_a_diverged_run_names_the_step_and_the_sequences(loader: WindowLoader) -> None:
    config = replace(CONFIG, optim=OptimConfig(learning_rate=1e30))
    starts = ", ".join(str(number * 32) for number in loader.order(8, 8).tolist())
    where = f"at step 2 on tokens-00000.npy from {starts}; lower the"
    with pytest.raises(DivergedError, match=where) as stopped:
        train(tiny_model(), loader, config)
    assert {place.count for place in stopped.value.places} == {32}
    again = pickle.loads(pickle.dumps(stopped.value))  # as Ray hands it on
    assert (str(again), again.places) == (str(stopped.value), stopped.value.places)


def test_masked_tokens_are_learned_by_a_model_that_looks_both_ways(loader) -> None:
    torch.manual_seed(0)
    flags = {"positions": "learned", "norm": "layer", "norm_placement": "post", "masked_head": True}
    shape = ModelConfig(128, 32, 2, 32, heads=2, causal=False, activation="gelu", **flags)
    masked = MaskedLoader(loader, mask=1, vocab_size=128, seed=0)
    config = replace(CONFIG, total_tokens=80 * 8 * 32, log_every=20)
    records = train(Transformer(shape), masked, config)
    assert records[-1].loss < records[0].loss - 0.5
    with pytest.raises(ConfigError, match="give it a MaskedLoader"):
        train(Transformer(shape), loader, config)


def test_experts_are_trained_and_kept_busy_through_a_kill(loader, tmp_path) -> None:
    torch.manual_seed(0)
    flags = {"experts": 4, "experts_per_token": 2, "expert_width": 16, "shared_experts": 1}
    shape = ModelConfig(128, 32, 2, 32, heads=2, routing="sigmoid", **flags)
    models = [Transformer(shape) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    config = replace(CONFIG, activation_checkpointing=True, peak_flops=1e12)
    records = train(models[0], loader, config)
    assert records[-1].loss < records[0].loss and records[-1].imbalance >= 1
    assert 0 < records[-1].mfu < 1
    biases = models[0].model.layers[0].mlp.gate.e_score_correction_bias
    assert biases.abs().max() > 0

    def kill(record) -> None:
        if record.step == 7:
            raise Killed

    with contextlib.suppress(Killed):
        train(models[1], loader, config, checkpoints=tmp_path / "c", on_step=kill)
    train(models[1], loader, config, checkpoints=tmp_path / "c")
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_contradictions_are_refused(loader: WindowLoader, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sequence 32 is longer than the model's context 16"):
        train(tiny_model(context=16), loader, CONFIG)
    with pytest.raises(ConfigError, match="batch 0 must be at least 1"):
        replace(CONFIG, batch=0)
    train(tiny_model(), loader, CONFIG, checkpoints=tmp_path / "c")
    with pytest.raises(CheckpointError, match="step-00000012 was made with train setting clip"):
        train(tiny_model(), loader, replace(CONFIG, clip=2.0), checkpoints=tmp_path / "c")


@pytest.mark.parametrize("where", ["trained on", "held out"])
def test_a_token_that_the_model_lacks_is_named_with_its_shard(loader, tmp_path, where) -> None:
    (tmp_path / "other").mkdir()
    tokens = np.full(330, 7, np.uint16)
    tokens[320] = 128  # the last target of the last sequence, and nothing else
    np.save(tmp_path / "other" / "tokens-00000.npy", tokens)
    other = WindowLoader([tmp_path / "other" / "tokens-00000.npy"], 32, seed=1)
    named = "tokens-00000.npy from 288: token 128 is outside the model's vocabulary of 128; use"
    with pytest.raises(DataError, match=named):
        if where == "trained on":
            train(tiny_model(), other, replace(CONFIG, total_tokens=2 * 8 * 32))
        else:
            config = replace(CONFIG, total_tokens=8 * 32)
            train(tiny_model(), loader, config, heldout={"a": other})


def test_a_finished_run_has_nothing_left_to_do(loader: WindowLoader, tmp_path: Path) -> None:
    first = tiny_model()
    train(first, loader, CONFIG, checkpoints=tmp_path / "c")
    second = tiny_model()
    curve = train(second, loader, CONFIG, checkpoints=tmp_path / "c")
    assert [record.step for record in curve] == list(range(1, 13))
    assert torch.equal(first.output_weight, second.output_weight)


if __name__ == "__main__":
    _uncompiled(Path(sys.argv[1]))
