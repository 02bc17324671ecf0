"""Where the keys and values of running sequences lie: one slot per sequence, slots kept dense.

A slot holds `context` tokens, so admitting a sequence reserves all it can ever need and nothing
has to be preempted. Running sequences always occupy slots 0..n-1: a decode step then reads plain
views, where a page table would copy every key and value through a gather first, which at these
sizes costs as much as the step itself (width 192, 64 sequences of 96 tokens, one core: 0.4 ms a
layer for attention, 0.6 ms for the gather). Whoever frees a slot moves the last sequence into the
hole.
"""

import math

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig


class SlotCache:
    """Keys and values of up to `slots` sequences.

    One tensor per layer, (slots, 2, H_kv, context, D): keys first on the second axis, then values.
    """

    def __init__(
        self, config: ModelConfig, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots = slots
        self.context = config.context
        shape = (slots, 2, config.kv_count, config.context, config.head_size)
        self.layers = [_zeros(shape, dtype, device) for _ in range(config.layers)]

    def write_prompts(self, layer: int, first: int, keys: Tensor, values: Tensor) -> None:
        """Tokens 0..T-1 of slots first, first+1, ...; keys and values: (B, H_kv, T, D)."""
        count, length = keys.shape[0], keys.shape[2]
        target = self.layers[layer][first : first + count, :, :, :length]
        target[:, 0] = keys
        target[:, 1] = values

    def write_tokens(self, layer: int, slots: Tensor, positions: Tensor, pair: Tensor) -> None:
        """One token for each of `slots` (n,) at its position (n,); pair: (n, 2, H_kv, D)."""
        self.layers[layer].permute(0, 3, 1, 2, 4)[slots, positions] = pair

    def read(self, layer: int, count: int, columns: int) -> tuple[Tensor, Tensor]:
        """Keys and values of slots 0..count-1, each (count, H_kv, columns, D), without a copy."""
        view = self.layers[layer][:count, :, :, :columns]
        return view[:, 0], view[:, 1]

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot over another."""
        for layer in self.layers:
            layer[target, :, :, :length] = layer[source, :, :, :length]

    @property
    def bytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self.layers)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose pages the operating system hands out at first use: most slots are rarely full.

    Zeros and not just memory: what lies past a sequence's end is masked, but 0 · NaN would be NaN.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
