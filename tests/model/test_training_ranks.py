"""Several ranks learn as one does, whether each has all weights or a part."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import (
    list_checkpoints,
)
from model.config import ModelConfig
from model.initial_weights import InitialWeights, fresh, without_values
from model.loader import WindowLoader
from model.optim import OptimConfig
from model.sharding import whole_model
from model.train import train
from model.transformer import Transformer
from tests.model.ranks import end_rank, run_ranks
from tests.model.tiny_training import CONFIG, TINY, tiny_model


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


if __name__ == "__main__":
    if "uneven" in sys.argv:
        _uneven_rank(Path(sys.argv[1]))
    else:
        _one_rank(Path(sys.argv[1]), *sys.argv[2:])
