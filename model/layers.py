"""The small parts of a block: norms, rotary positions, the feed-forward."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels import RMSNormFunction, RotateFunction


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32 (arXiv:1910.07467).

    offset: added to the stored weight; Gemma stores weights minus one, so that decay pulls to 1.
    """

    def __init__(self, width: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), in the dtype of `x`."""
        weight = self.weight + self.offset if self.offset else self.weight
        y: Tensor = RMSNormFunction.apply(x, weight, self.eps)
        return y


class LayerNorm(nn.LayerNorm):
    """(x - mean) / std * weight + bias over the last axis (arXiv:1607.06450)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), in the dtype of `x`."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def make_norm(config: ModelConfig, width: int | None = None) -> RMSNorm | LayerNorm:
    """The norm that `config` asks for, over the residual stream or `width` channels."""
    width = width or config.width
    if config.norm == "layer":
        return LayerNorm(width, config.norm_eps)
    return RMSNorm(width, config.norm_eps, offset=1.0 if config.norm == "rms+1" else 0.0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys by their positions, and put heads first: (B, T, H, D) -> (B, H, T, D).

    cos and sin broadcast to (B, 1, T, D).
    """
    y: Tensor = RotateFunction.apply(x, cos, sin)
    return y


def activate(x: Tensor, name: str) -> Tensor:
    """The nonlinearity of `ModelConfig.activation`."""
    if name == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


class FeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)) (arXiv:2002.05202), or down(activation(up(x))) ungated."""

    def __init__(self, config: ModelConfig, hidden: int) -> None:
        super().__init__()
        width, bias = config.width, config.linear_bias
        self.activation = config.activation
        self.gate_proj = nn.Linear(width, hidden, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if self.gate_proj is None:
            return self.down_proj(activate(self.up_proj(x), self.activation))
        return self.down_proj(activate(self.gate_proj(x), self.activation) * self.up_proj(x))
