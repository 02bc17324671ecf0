"""The keys and values themselves: one tensor, addressed by token.

Page p holds tokens p·PAGE … (p + 1)·PAGE − 1 of it; who owns which page is `pages.PageTable`'s
business.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.engine.pages import PAGE, Copy, Run


class KVCache:
    """Keys and values of `pages` pages: (layers, 2, H_kv, pages · PAGE, D), keys before values.

    With latent attention one row of a token is both, for all heads: (layers, 1, 1, pages · PAGE, D)
    with D its latent and the channels that are turned (see `model.engine.latent_heads`).
    """

    def __init__(
        self, config: ModelConfig, pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        kinds, self.heads, self.size = 2, config.kv_count, config.head_size
        if config.kv_latent is not None:
            kinds, self.heads, self.size = 1, 1, config.kv_latent + config.rotary_size
        shape = (config.layers, kinds, self.heads, pages * PAGE, self.size)
        self.data = _zeros(shape, dtype, device)
        self.layers = list(self.data.flatten(1, 2))  # (2 H_kv or 1, tokens, D)
        self._kinds, self._parts = kinds, self.data.flatten(0, 1)
        self.keys, self.values = self.seen(0, pages * PAGE)

    def seen(self, first: int, count: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Keys and values of each layer, (H_kv, count, D), of the places from `first` on."""
        parts = self._parts.narrow(2, first, count).unbind(0)
        return parts[:: self._kinds], parts[self._kinds - 1 :: self._kinds]

    @torch.inference_mode()
    def copy(self, copies: Sequence[Copy]) -> None:
        """Neighbouring pages that stay neighbours go in one stroke."""
        for source, target, count in _strokes(copies):
            self._move(source, target, count)

    @torch.inference_mode()
    def shift(self, source: Run, target: Run) -> None:
        """Move a run to the left; the two may overlap."""
        for start in range(0, source.count, step := max(1, source.first - target.first)):
            count = min(step, source.count - start)
            self._move(source.first + start, target.first + start, count)

    def _move(self, source: int, target: int, count: int) -> None:
        if source != target:
            tokens = count * PAGE
            new = self.data[:, :, :, target * PAGE : target * PAGE + tokens]
            new.copy_(self.data[:, :, :, source * PAGE : source * PAGE + tokens])

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def _strokes(copies: Sequence[Copy]) -> list[tuple[int, int, int]]:
    """(source, target, count) of runs of copies."""
    strokes: list[tuple[int, int, int]] = []
    for copy in copies:
        if strokes:
            source, target, count = strokes[-1]
            if (copy.source, copy.target) == (source + count, target + count):
                strokes[-1] = (source, target, count + 1)
                continue
        strokes.append((copy.source, copy.target, 1))
    return strokes


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory the operating system hands out at first use: most of it rarely is."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
