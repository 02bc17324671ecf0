"""Rotary positions as the engine turns by them: in place, by tables made once."""

import torch
from torch import Tensor

from model.transformer import Transformer

Turn = tuple[Tensor, Tensor]


def angles(model: Transformer, dtype: torch.dtype) -> list[Turn]:
    """Cosines and sines, each (context, D): of layers that see everything, then, where they differ,
    of those with a window. The first half's sign is rotate-half's, so that turning needs no
    negation. Empty without rotation. D: the channels of a head that are turned.
    """
    config = model.config
    if config.positions != "rope":
        return []
    sign = torch.ones_like(model.rope_sin[:1])
    sign[:, : config.rotary_size // 2] = -1
    names = ("rope", "window") if config.window_rope_theta is not None else ("rope",)
    tables = [(model.get_buffer(f"{name}_cos"), model.get_buffer(f"{name}_sin")) for name in names]
    return [(cos.to(dtype), (sin * sign).to(dtype)) for cos, sin in tables]


def rotate_(x: Tensor, turn: Turn) -> Tensor:
    """Turn x (T, H, D) in place by cosines and sines, each (T, 1, D)."""
    cos, sin = turn
    turned = x.roll(x.shape[-1] // 2, -1)
    return x.mul_(cos).addcmul_(turned, sin)
