"""Ranks that share the blocks' matrices compute what one rank computes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ConfigError, ModelConfig
from model.loader import WindowLoader
from model.optim import OptimConfig
from model.sharding import whole_model
from model.train import train
from model.train_config import TrainConfig
from model.transformer import Transformer
from tests.model.ranks import end_rank, run_ranks

SHAPES = {
    "qwen3": {"kv_heads": 2, "qk_norm": True, "tied_embeddings": False},
    "gemma2": {
        "norm": "rms+1",
        "norm_placement": "both",
        "scaled_embeddings": True,
        "attention_softcap": 20.0,
        "sliding_window": 9,
        "full_attention_every": 2,
    },
    "gpt2": {
        "positions": "learned",
        "norm": "layer",
        "gated_mlp": False,
        "qkv_bias": True,
        "linear_bias": True,
    },
}
MEANS = {"qwen3": "adamw", "gemma2": "muon", "gpt2": "muon"}


def trained(folder: Path, shape: str, **how) -> tuple[list[float], Transformer]:
    """The curve and the whole model of a short run."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "width": 32, "layers": 2, "heads": 4, "mlp_width": 48}
    model = Transformer(ModelConfig(context=32, **sizes, **SHAPES[shape]))
    config = TrainConfig(
        total_tokens=8 * 8 * 32,
        batch=8,
        micro_batch=2,
        log_every=1,
        precision="fp32",
        optim=OptimConfig(kind=MEANS[shape], eps=1e-6),
        **how,
    )
    loader = WindowLoader([folder / "tokens.npy"], 32, seed=1)
    curve = [record.loss for record in train(model, loader, config)]
    return curve, whole_model(model)


@pytest.mark.parametrize(
    ("shapes", "world"),
    [
        (["qwen3", "gpt2"], 2),
        pytest.param(["gemma2"], 2, marks=pytest.mark.slow),
        pytest.param(["qwen3", "gpt2"], 4, marks=pytest.mark.slow),  # and divided among two groups
    ],
)
def test_a_tensor_group_learns_what_one_rank_learns(tmp_path, shapes, world) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 99, 3000, np.uint16))
    said = run_ranks(__file__, world, str(tmp_path), *shapes)
    for shape in shapes:
        curve, alone = trained(tmp_path, shape)
        for one in said:
            np.testing.assert_allclose(one[shape], curve, rtol=1e-5)
        together = load_file(tmp_path / f"{shape}.safetensors")
        for name, weight in alone.state_dict().items():
            torch.testing.assert_close(together[name], weight, rtol=1e-3, atol=2e-5, msg=name)


def _one_rank(folder: Path, shapes: list[str]) -> None:
    torch.distributed.init_process_group("gloo")
    said = {}
    for shape in shapes:
        sharded = torch.distributed.get_world_size() > 2
        said[shape], model = trained(folder, shape, tensor=2, sharded=sharded)
        if torch.distributed.get_rank() == 0:
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            save_file(state, folder / f"{shape}.safetensors")
    torch.distributed.destroy_process_group()
    end_rank(said)


@pytest.mark.parametrize(
    ("flags", "tensor", "message"),
    [
        ({"heads": 4}, 8, "heads 4 is not a multiple of tensor 8"),
        ({"heads": 4, "kv_heads": 1}, 2, "kv_heads 1 is not a multiple of tensor 2"),
        ({"heads": 4, "mlp_width": 129}, 4, "mlp_width 129 is not a multiple of tensor 4"),
        ({"kv_latent": 8, "rope_dim": 8}, 3, "not for kv_latent or experts; use tensor 1"),
    ],
)
def test_what_cannot_be_divided_is_named(flags, tensor, message) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**flags).require_tensor(tensor)


if __name__ == "__main__":
    _one_rank(Path(sys.argv[1]), sys.argv[2:])
