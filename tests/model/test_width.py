"""The coordinate check: over widths, what a step changes has one scale (arXiv:2203.03466, D.1)."""

import functools
import math

import pytest
import torch

from model.config import ConfigError, ModelConfig
from model.losses import cross_entropy_sum
from model.optim import OptimConfig, Optimizer
from model.transformer import Transformer
from model.width import width_ratio

BASE, WIDTHS, STEPS = 32, (32, 64, 128, 256), 4


@functools.cache
def changes(width: int, kind: str, base: int) -> dict[str, float]:
    """Root mean squares of what a few steps change in the residual stream and the logits."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "layers": 2, "heads": width // 16, "mlp_width": 3 * width}
    config = ModelConfig(width=width, context=32, tied_embeddings=False, **sizes)
    model = Transformer(config, base)
    rates = OptimConfig(
        kind=kind, learning_rate=0.01, muon_learning_rate=0.02, base_width=base, eps=1e-12
    )
    optimizer = Optimizer(model, rates, bf16=False, width_ratio=width_ratio(config, base))
    tokens = torch.randint(0, 64, (8, 33), generator=torch.Generator().manual_seed(1))
    seen: dict[str, torch.Tensor] = {}
    model.model.layers[-1].register_forward_hook(
        lambda _, __, output: seen.__setitem__("stream", output.detach())
    )

    def look() -> dict[str, torch.Tensor]:
        logits = model(tokens[:, :-1]).detach()
        return {**seen, "logits": logits}

    before = look()
    for _ in range(STEPS):
        hidden = model.hidden(tokens[:, :-1])
        loss = cross_entropy_sum(hidden, model.output_weight, tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        optimizer.step(1.0)
        optimizer.zero_grad()
    after = look()
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in after}


def slope(kind: str, base: int, name: str) -> float:
    """The power of the width that the change of `name` grows with, over the widths."""
    sizes = [changes(width, kind, base)[name] for width in WIDTHS]
    x = [math.log(width) for width in WIDTHS]
    y = [math.log(size) for size in sizes]
    mean = sum(x) / len(x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["stream", "logits"])
def test_activations_change_alike_at_every_width(kind: str, name: str) -> None:
    assert abs(slope(kind, BASE, name)) < 0.2
    assert slope(kind, 0, name) > 0.25  # else the check could not tell


def test_at_the_base_width_nothing_is_different() -> None:
    config = ModelConfig(width=48, tied_embeddings=False)
    models = []
    for base in (0, 48):
        torch.manual_seed(0)
        models.append(Transformer(config, base))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_rates_and_decay_follow_the_width() -> None:
    config = ModelConfig(width=192, tied_embeddings=False)
    rates = OptimConfig(kind="adamw", learning_rate=0.1, weight_decay=0.3, base_width=48)
    optimizer = Optimizer(Transformer(config), rates, width_ratio=width_ratio(config, 48))
    places = iter(optimizer.names)
    told = {
        next(places): (group["rate"], group["weight_decay"])
        for group in optimizer.adamw.param_groups
        for _ in group["params"]
    }
    assert told["model.embed_tokens.weight"] == (0.1, 0.3)
    assert told["model.norm.weight"] == (0.1, 0.0)
    assert told["lm_head.weight"] == (0.025, 1.2)
    assert told["model.layers.0.mlp.down_proj.weight"] == (0.025, 1.2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "base_width needs tied_embeddings False"),
        (
            {"tied_embeddings": False, "scaled_embeddings": True},
            "base_width does not go with scaled_embeddings",
        ),
    ],
)
def test_models_that_cannot_follow_the_width_are_refused(flags: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Transformer(ModelConfig(**flags), 64)
