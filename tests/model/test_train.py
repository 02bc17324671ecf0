"""The loop: it learns, resumes to the bit, shares work between ranks, stops on nonsense."""

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

from model import train as training
from model.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    list_checkpoints,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
)
from model.compiling import compile_blocks, missing_compiler
from model.config import ConfigError, ModelConfig
from model.initial_weights import InitialWeights, fresh, without_values
from model.loader import DataError, WindowLoader
from model.masking import MaskedLoader
from model.optim import OptimConfig
from model.packing import Example, PackedLoader
from model.sharding import whole_model
from model.spikes import SpikeGuard
from model.train import DivergedError, train
from model.train_config import TrainConfig
from model.transformer import Transformer
from tests.model.ranks import end_rank, run_ranks

TEXT = (b"the quick brown fox jumps over the lazy dog and the dog sleeps on. " * 60)[:3000]
CONFIG = TrainConfig(
    total_tokens=12 * 8 * 32, batch=8, micro_batch=3, checkpoint_every=4, log_every=1
)


TINY = ModelConfig(vocab_size=128, width=32, layers=2, heads=2, context=32)


def tiny_model(context: int = 32) -> Transformer:
    torch.manual_seed(0)
    return Transformer(replace(TINY, context=context))


@pytest.fixture
def loader(tmp_path: Path) -> WindowLoader:
    np.save(tmp_path / "tokens-00000.npy", np.frombuffer(TEXT, np.uint8).astype(np.uint16))
    return WindowLoader([tmp_path / "tokens-00000.npy"], 32, seed=1)


class Killed(BaseException):
    """As abrupt as an exception can be."""


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


@pytest.mark.parametrize(
    "how",
    [
        ("copied", "muon"),
        ("sharded", "muon"),
        pytest.param(("tensor", "muon"), marks=pytest.mark.slow),
        pytest.param(("compiled", "muon"), marks=pytest.mark.slow),  # and sharded
        pytest.param(("sharded", "adamw"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_two_ranks_follow_the_curve_of_one(loader: WindowLoader, tmp_path: Path, how) -> None:
    config = replace(CONFIG, precision="fp32", optim=OptimConfig(kind=how[1]))
    model = tiny_model()
    seen: dict[int, dict[str, float]] = {}
    answers: list[float] = []
    looks = {"heldout": {"a": loader}, "on_heldout": asking(model, seen, answers)}
    records = train(model, loader, replace(config, heldout_every=5), **looks)
    expected = [r.loss for r in records]
    first, second = run_ranks(__file__, 2, str(tmp_path), *how)
    assert first["curve"] == second["curve"]
    np.testing.assert_allclose(first["curve"], expected, rtol=1e-4)
    assert first["heldout"] == second["heldout"]
    # The model can be asked there, also when its weights are divided, and learns on as before.
    assert first["asked"] == second["asked"] == pytest.approx(answers, rel=1e-3)
    assert first["heldout"] == pytest.approx(seen[12]["heldout_loss"], rel=1e-3)
    # Threads of the process group that live on may abort the process at its exit. (The mesh of
    # divided weights holds the group until then.)
    assert how[0] != "copied" or not [
        name for name in first["threads"] + second["threads"] if "gloo" in name
    ]
    steps = list_checkpoints(tmp_path / "c")
    assert [path.name for path in steps] == ["step-00000008", "step-00000012"]
    if how[0] == "sharded":  # each rank wrote its part
        assert len(list(steps[-1].glob("model/shard-*"))) == 2
    # What two ranks wrote, divided or not, is whole: one goes on with it.
    alone = tiny_model()
    train(alone, loader, config, checkpoints=tmp_path / "c")
    assert first["sum"] == pytest.approx(
        alone.output_weight.detach().double().abs().sum().item(), rel=1e-6
    )


def asking(model: Transformer, seen: dict[int, dict[str, float]], answers: list[float]):
    """Keeps the losses told, and a number of what the model then says to some tokens."""

    def ask(step: int, losses: dict[str, float]) -> None:
        seen[step] = losses
        with torch.no_grad():
            answers.append(float(model(torch.arange(8)[None]).double().abs().sum()))

    return ask


def _one_rank(folder: Path, how: str, kind: str) -> None:
    torch.distributed.init_process_group("gloo")
    loader = WindowLoader([folder / "tokens-00000.npy"], 32, seed=1)
    config = replace(CONFIG, precision="fp32", optim=OptimConfig(kind=kind))
    config = replace(config, sharded=how in ("sharded", "compiled"), compiled=how == "compiled")
    config = replace(config, tensor=2 if how == "tensor" else 1, heldout_every=5)
    seen: dict[int, dict[str, float]] = {}
    asked: list[float] = []
    model = without_values(TINY)  # each rank gets memory for its part alone
    weights = InitialWeights(torch.device("cpu"), lambda: fresh(TINY, 0, seed=0))
    options = {"checkpoints": folder / "c", "on_heldout": asking(model, seen, asked)}
    records = train(model, loader, config, weights=weights, heldout={"a": loader}, **options)
    said = {
        "asked": asked,
        "curve": [record.loss for record in records],
        "heldout": seen[12]["heldout_loss"],
        "sum": whole_model(model).output_weight.detach().double().abs().sum().item(),
    }
    torch.distributed.destroy_process_group()
    tasks = Path("/proc/self/task").glob("*/comm")
    end_rank(said | {"threads": [task.read_text().strip() for task in tasks]})


UNEVEN = {
    "llama": {},
    "experts": {
        "experts": 4,
        "experts_per_token": 2,
        "expert_width": 16,
        "dense_layers": 1,
        "routing": "sigmoid",
    },
}


def uneven(folder: Path, shape: str, sharded: bool) -> dict[str, object]:
    """Curve and evenness of a run whose batch of 8 three ranks share as 2, 3 and 3."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(128, 32, 2, 32, heads=2, **UNEVEN[shape]))
    loader = WindowLoader([folder / "tokens-00000.npy"], 32, seed=1)
    config = replace(CONFIG, precision="fp32", micro_batch=2, sharded=sharded)
    records = train(model, loader, config)
    return {"loss": [r.loss for r in records], "imbalance": [r.imbalance or 0 for r in records]}


def test_three_sharded_ranks_with_unequal_work_follow_the_curve_of_one(loader, tmp_path) -> None:
    said = run_ranks(__file__, 3, str(tmp_path), "uneven")
    for shape in UNEVEN:
        alone = uneven(tmp_path, shape, sharded=False)
        for one in said:
            np.testing.assert_allclose(one[shape]["loss"], alone["loss"], rtol=1e-4)
            # What a rank computes only to keep others company is no load of the experts.
            np.testing.assert_allclose(one[shape]["imbalance"], alone["imbalance"], rtol=0.02)


def _uneven_rank(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    said = {shape: uneven(folder, shape, sharded=True) for shape in UNEVEN}
    torch.distributed.destroy_process_group()
    end_rank(said)


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
    command = [sys.executable, __file__, str(tmp_path), "uncompiled"]
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


class Poisoned(WindowLoader):
    """Random tokens in the steps named; the text elsewhere."""

    steps: tuple[int, ...] = ()

    def order(self, first, count):
        return super().order(first, count) + (10**6 if first // 8 in self.steps else 0)

    def read(self, ids):
        batch = super().read(ids % 10**6)
        bad = torch.from_numpy(ids >= 10**6)[:, None]
        noise = torch.from_numpy(np.random.default_rng(ids[0]).integers(0, 128, (len(ids), 33)))
        tokens = torch.where(bad, noise[:, :-1], batch.tokens)
        return replace(batch, tokens=tokens, targets=torch.where(bad, noise[:, 1:], batch.targets))

    def places(self, number):
        return super().places(number % 10**6)


# Beside steps that are bad: the checkpoint that is gone back to, or none. The one of 30 steps, or
# what was written since, holds the weights that were lost.
@pytest.mark.parametrize(
    ("bad", "back_to"),
    [((30,), None), ((30, 31, 32), 20), ((28, 29, 30), 20), (tuple(range(40, 46)), 30)],
)
def test_a_loss_spike_is_not_learned_from_and_resumes_to_the_bit(
    loader, tmp_path, monkeypatch, caplog, bad, back_to
) -> None:
    poisoned = Poisoned([tmp_path / "tokens-00000.npy"], 32, seed=1)
    poisoned.steps = bad
    config = replace(CONFIG, total_tokens=54 * 8 * 32, checkpoint_every=10, spike=6.0)
    model, other_weights = tiny_model(), []

    def restoring(restored, optimizer, path, together) -> None:
        before = restored.output_weight.detach().clone()
        restore(restored, optimizer, path, together)
        other_weights.append((path, not torch.equal(before, restored.output_weight)))

    restore = training._restore
    monkeypatch.setattr(training, "_restore", restoring)
    records = train(model, poisoned, config, checkpoints=tmp_path / "c")
    last = records[-1]
    assert last.skipped == len(bad) and last.back_to == back_to
    assert [step for record in records for step in record.refused] == [step + 1 for step in bad]
    assert (
        f"step {bad[0] + 1} was not taken" in caplog.text and "of tokens-00000.npy" in caplog.text
    )
    assert last.loss < records[27].loss + (0.3 if back_to is None else 0.6)
    assert last.rollbacks == (back_to is not None)
    assert all(changed for path, changed in other_weights if path is not None)

    def kill(record) -> None:
        if record.step == bad[-1] + 3:
            raise Killed

    again = tiny_model()
    with contextlib.suppress(Killed):
        train(again, poisoned, config, checkpoints=tmp_path / "d", on_step=kill)
    resumed = train(again, poisoned, config, checkpoints=tmp_path / "d")
    assert [(r.loss, r.back_to, list(r.refused)) for r in resumed] == [
        (r.loss, r.back_to, list(r.refused)) for r in records
    ]
    assert torch.equal(again.output_weight, model.output_weight)


def guard_after(accepted: int) -> SpikeGuard:
    guard = SpikeGuard(6.0)
    for step in range(1, accepted + 1):
        assert guard.takes(2.0, step)
    return guard


def lose(guard: SpikeGuard, first: int) -> None:
    for step in range(first, first + 3):
        assert not guard.takes(9.0, step)
    assert guard.lost


def test_weights_to_go_back_to_are_older_and_were_never_left(tmp_path: Path) -> None:
    def kept(*steps: int) -> list[Path]:
        return [
            save_checkpoint(tmp_path, Checkpoint(step, {}, {}, {"guard": guards[step]}), keep=99)
            for step in steps
        ]

    guards = {step: guard_after(step).state() for step in range(1, 101)}
    guard = guard_after(50)
    lose(guard, 51)
    # Refused steps change no weights: what was written meanwhile has those that are lost.
    assert guard.older([]) is None and guard.older(kept(50, 52)) is None
    assert guard.older(kept(10, 30, 40)).name == "step-00000030"  # 16 steps or more before
    (oldest, _) = paths = kept(40, 45)
    assert guard.older(paths) == oldest
    guard.go_back(oldest, 53)
    assert not guard.lost and (guard.rollbacks, guard.back_to) == (1, 40)
    lose(guard, 54)  # judged by the losses of then, at once
    assert guard.older(paths) is None  # has the weights that are lost again
    guard.go_back(None, 56)
    for step in range(57, 90):
        assert guard.takes(2.0, step)
    lose(guard, 90)
    assert guard.older(kept(40, 45, 50)).name == "step-00000040"
    again = SpikeGuard(6.0)
    again.load_state(json.loads(json.dumps(guard.state())))
    assert again.older(kept(40, 45, 50)).name == "step-00000040"


def test_ranks_with_folders_of_their_own_go_back_to_the_same_step(loader, tmp_path) -> None:
    first, second = run_ranks(__file__, 2, str(tmp_path), "apart", "refreshed")
    assert first["back_to"] == 20
    assert first == second
    said = run_ranks(__file__, 2, str(tmp_path), "apart", "alone")
    assert [one["problem"] for one in said] == [
        "the workers' checkpoints to go back to are of steps"
    ] * 2


def _apart_rank(folder: Path, how: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    poisoned = Poisoned([folder / "tokens-00000.npy"], 32, seed=1)
    poisoned.steps = (30, 31, 32)
    config = replace(CONFIG, total_tokens=40 * 8 * 32, checkpoint_every=10, spike=6.0)
    mine, written = folder / f"{how}-{rank}", folder / f"{how}-0"

    def refresh() -> None:
        if how == "refreshed" and rank:
            shutil.copytree(written, mine, dirs_exist_ok=True)

    model, said = tiny_model(), {}
    try:
        records = train(model, poisoned, config, checkpoints=mine, refresh=refresh)
        said["back_to"] = records[-1].back_to
        said["sum"] = model.output_weight.detach().double().abs().sum().item()
    except CheckpointError as error:
        said["problem"] = str(error).partition(" [")[0]
    torch.distributed.destroy_process_group()
    end_rank(said)


def test_a_lasting_rise_without_checkpoints_does_not_stop_learning(loader, tmp_path) -> None:
    poisoned = Poisoned([tmp_path / "tokens-00000.npy"], 32, seed=1)
    poisoned.steps = tuple(range(30, 40))
    config = replace(CONFIG, total_tokens=40 * 8 * 32, spike=6.0)
    records = train(tiny_model(), poisoned, config)
    assert [records[step].skipped for step in (29, 30, 31, 32, 39)] == [0, 1, 2, 3, 3]
    assert records[-1].loss < records[32].loss and records[-1].rollbacks == 0


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
    if "uneven" in sys.argv:
        _uneven_rank(Path(sys.argv[1]))
    elif "uncompiled" in sys.argv:
        _uncompiled(Path(sys.argv[1]))
    elif "apart" in sys.argv:
        _apart_rank(Path(sys.argv[1]), sys.argv[-1])
    else:
        _one_rank(Path(sys.argv[1]), *sys.argv[2:])
