"""The small parts of a block: RMSNorm, rotary positions, the SwiGLU feed-forward."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import RMSNormFunction, RotateFunction


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32 (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), in the dtype of `x`."""
        y: Tensor = RMSNormFunction.apply(x, self.weight, self.eps)
        return y


def rope_table(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (positions, head_dim) in float32, of rotary embeddings
    (arXiv:2104.09864).

    Both halves of the head hold the same angles: the rotate-half layout of Hugging Face's
    checkpoints, not the interleaved pairs of the paper.
    """
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angles = torch.outer(torch.arange(positions).float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys by their positions, and put heads first: (B, T, H, D) -> (B, H, T, D).

    cos and sin broadcast to (B, 1, T, D).
    """
    y: Tensor = RotateFunction.apply(x, cos, sin)
    return y


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
