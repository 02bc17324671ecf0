"""Loss spikes: batches that are not learned from, and weights that are gone back to."""

import contextlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model import train as training
from model.checkpoint import (
    Checkpoint,
    CheckpointError,
    save_checkpoint,
)
from model.loader import WindowLoader
from model.spikes import SpikeGuard
from model.train import train
from tests.model.ranks import end_rank, run_ranks
from tests.model.tiny_training import CONFIG, Killed, tiny_model


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
    first, second = run_ranks(__file__, 2, str(tmp_path), "refreshed")
    assert first["back_to"] == 20
    assert first == second
    said = run_ranks(__file__, 2, str(tmp_path), "alone")
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


if __name__ == "__main__":
    _apart_rank(Path(sys.argv[1]), sys.argv[-1])
