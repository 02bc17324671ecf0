"""Rotary positions as the engine turns by them: two channels that turn together lie side by side,
one complex number, and turning is one product with a table made once.
"""

import torch
from torch import Tensor

from model.transformer import Transformer


def angles(model: Transformer) -> list[Tensor]:
    """cos + i sin, each (context, R / 2) in complex64: of layers that see everything, then, where
    they differ, of those with a window. Empty without rotation. R: the channels of a head that are
    turned.
    """
    config = model.config
    if config.positions != "rope":
        return []
    names = ("rope", "window") if config.window_rope_theta is not None else ("rope",)
    half = config.rotary_size // 2
    tables = [(model.get_buffer(f"{name}_cos"), model.get_buffer(f"{name}_sin")) for name in names]
    return [torch.complex(cos[:, :half].float(), sin[:, :half].float()) for cos, sin in tables]


def paired(rows: Tensor, head: int, rotary: int) -> Tensor:
    """Rows (N head, …), of which the last `rotary` of each head turn in rotate-half's order, in the
    order of `turn_`: to attention, which sums over a head's channels, theirs means nothing.
    """
    still = head - rotary
    turning = torch.arange(still, head, device=rows.device).view(2, -1).t().flatten()
    order = torch.cat((torch.arange(still, device=rows.device), turning))
    return rows.unflatten(0, (-1, head))[:, order].flatten(0, 1)


def turn_(x: Tensor, turn: Tensor) -> Tensor:
    """Turn x (H, T, R) in float32 in place; turn: (T, R / 2) of a table of `angles`."""
    x.view(torch.complex64).mul_(turn)
    return x
