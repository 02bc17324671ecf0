"""Divided weights in bf16: the curve of whole ones, and no copy of the whole model."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from model.config import ModelConfig
from model.initial_weights import InitialWeights, fresh, without_values
from model.loader import WindowLoader
from model.sharding import Ranks, is_divided, shard, synchronised
from model.train import train
from model.train_config import TrainConfig
from model.transformer import Transformer
from tests.model.ranks import end_rank, run_ranks
from tests.model.test_initial_weights import CPU, DEEP
from tests.tiny_models import DEEPSEEK3

SIZES = {"vocab_size": 128, "width": 64, "layers": 2, "context": 32, "heads": 2}
SHAPES = {"llama": {}, "experts": DEEPSEEK3}
CONFIG = TrainConfig(
    total_tokens=12 * 8 * 32, batch=8, micro_batch=2, log_every=1, precision="bf16", sharded=True
)


def loader(folder: Path) -> WindowLoader:
    return WindowLoader([folder / "tokens.npy"], 32, seed=1)


def curve(folder: Path, shape: str) -> tuple[list[float], list[float]]:
    """Of a short run, and what the model said when it was asked."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SIZES | SHAPES[shape]))
    answers: list[float] = []

    def ask(step: int, losses: dict[str, float]) -> None:
        with torch.no_grad():
            answers.append(float(model(torch.arange(8)[None]).double().abs().mean()))

    looks = {"heldout": {"a": loader(folder)}, "on_heldout": ask}
    records = train(model, loader(folder), replace(CONFIG, heldout_every=6), **looks)
    return [record.loss for record in records], answers


class HiddenSum(torch.nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.hidden(tokens).float().sum()


def held_in_a_pass() -> tuple[int, bool]:
    """Bytes held when a forward pass has ended, and whether gradients are divided after a backward
    pass that is not the last of its step.
    """
    model = without_values(DEEP)
    model.remat = True
    module = shard(HiddenSum(model), model, Ranks.here(1, CPU), bf16=True)
    InitialWeights(CPU, lambda: fresh(DEEP, 0, 3)).fill(model)
    with (
        torch.autocast("cpu", torch.bfloat16),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched,
    ):
        loss = module(torch.zeros((1, 2), dtype=torch.int64))
    events = watched.profiler.kineto_results.events()
    with synchronised(module, last=False):
        loss.backward()
    divided = all(p.grad is not None and is_divided(p.grad) for p in model.parameters())
    return sum(event.nbytes() for event in events if event.name() == "[memory]"), divided


def _rank(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    said = {shape: curve(folder, shape) for shape in SHAPES}
    held, divided = held_in_a_pass()
    end_rank(said | {"held": held, "gradients divided": divided})


def test_two_ranks_divided_in_bf16_follow_the_curve_of_one_and_hold_their_parts(tmp_path) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 96, 3000, np.uint16))
    expected = {shape: curve(tmp_path, shape) for shape in SHAPES}
    size = sum(tensor.numel() * 4 for tensor in without_values(DEEP).parameters())
    for said in run_ranks(__file__, 2, str(tmp_path)):
        for shape, (losses, answers) in expected.items():
            np.testing.assert_allclose(said[shape][0], losses, rtol=1e-3)
            np.testing.assert_allclose(said[shape][1], answers, rtol=1e-2)
        assert said["held"] < 0.1 * size  # casts to bf16 of all that was gathered are half of it
        assert said["gradients divided"]


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
