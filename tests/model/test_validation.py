"""What a run is judged by is the same text, however many share the looking."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.loader import Batch, WindowLoader
from model.masking import MaskedLoader
from model.packing import Example, PackedLoader
from model.sharding import Ranks
from model.validation import heldout_losses

RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Alone(Ranks):
    """One of several, whose sums are not added yet."""

    def add(self, values: Tensor) -> None:
        pass


class Seen(nn.Module):
    """A loss that depends on every target that counts, and how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, batch: Batch) -> Tensor:
        self.calls += 1
        counted = torch.ones_like(batch.targets) if batch.mask is None else batch.mask
        return (batch.targets * counted).sum().float()


@pytest.mark.parametrize("sequences", [1, 5, 32])
@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_set_is_fixed_for_any_number_of_ranks(
    sequences: int, world: int, tmp_path: Path
) -> None:
    np.save(tmp_path / "tokens.npy", RNG.integers(5, 90, 3000).astype(np.uint16))
    windows = WindowLoader([tmp_path / "tokens.npy"], 16, seed=1)
    examples = [Example(RNG.integers(5, 90, 9).tolist(), [True] * 9) for _ in range(80)]
    sources = {
        "windows": windows,
        "masked": MaskedLoader(windows, mask=3, vocab_size=99, seed=0),
        "packed": PackedLoader(examples, 16, seed=1, pad=0),
    }

    def found(ranks: Ranks) -> tuple[dict[str, float], int]:
        loss = Seen()
        cpu = torch.device("cpu")
        losses = heldout_losses(loss, sources, sequences, 3, cpu, ranks, bf16=False)
        return losses, loss.calls

    whole, _ = found(Ranks())
    parts = [found(Alone(index, world)) for index in range(world)]
    for name, loss in whole.items():
        assert sum(losses[name] for losses, _ in parts) == pytest.approx(loss, rel=1e-6)
    assert len({calls for _, calls in parts}) == 1  # or those with divided weights wait for ever
