"""Matrices as the engine keeps them: as they are, or as 8-bit integers with a scale per output.

A decode step reads every weight once, so its speed is that of the memory, and a quarter of the
bytes is a quarter of the time. Quantizing is absmax rounding, row by row (weight-only, as LLM.int8
arXiv:2208.07339 without the outlier columns, which small models do not have).
"""

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Literal["float32", "bfloat16", "int8"]
"""How weights are kept. Activations are float32 with the first, bfloat16 with the others."""

FEW = 12  # rows up to which multiplying by integers beats expanding them first (measured: 8 to 16)


class Matrix(Protocol):
    """x (T, in) -> (T, out)."""

    def __call__(self, x: Tensor) -> Tensor: ...


class Dense:
    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Int8:
    """y = (x · qᵀ) · scale with q (out, in) int8 and scale (out,)."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        scale = weight.float().abs().amax(1).clamp_min(1e-12) / 127
        self.weight = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.scale = scale.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] <= FEW:
            y = torch._weight_int8pack_mm(x, self.weight, self.scale)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def activation_dtype(weights: Weights) -> torch.dtype:
    return torch.float32 if weights == "float32" else torch.bfloat16


def matrix(weight: Tensor, weights: Weights, bias: Tensor | None = None) -> Matrix:
    """A matrix (out, in) as `weights` says."""
    dtype = activation_dtype(weights)
    if weights == "int8":
        return Int8(weight, dtype, bias)
    return Dense(weight.to(dtype), None if bias is None else bias.to(dtype))
