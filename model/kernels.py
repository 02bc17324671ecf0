"""Operations whose backward pass is written out, because memory traffic is what training costs.

Autograd's own composition of the same formulas reads and writes every intermediate, often in
float32. At width 192 on two CPU cores these three and the loss (`losses.cross_entropy_sum`) make
training about 1.7 times as fast (3.4 M parameters). Each has the plain formula as its test.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor


class RMSNormFunction(torch.autograd.Function):
    """y = g · x̂ with x̂ = x / rms(x), rms in float32, products in the dtype of x.

    dx = (dŷ - x̂ · mean(dŷ · x̂)) / rms(x) with dŷ = g · dy; dg = Σ dy · x̂.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        mean_square = (
            torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        )
        scale = mean_square.add_(eps).rsqrt_()
        normed = (x32 * scale).to(x.dtype)
        ctx.save_for_backward(normed, weight, scale)
        return normed * weight.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, weight, scale = ctx.saved_tensors
        (dy,) = gradients
        g = weight.to(dy.dtype)
        product = dy * normed
        mean = (product @ g).div_(g.shape[-1]).unsqueeze(-1)
        dx = torch.addcmul(dy * g, normed, mean, value=-1).mul_(scale.to(dy.dtype))
        return dx, product.flatten(0, -2).sum(0).to(weight.dtype), None


class RotateFunction(torch.autograd.Function):
    """Rotary positions: (a, b) -> (a·cos - b·sin, b·cos + a·sin) on the halves a, b of the last
    axis.

    x: (B, T, H, D), out: (B, H, T, D) contiguous; cos, sin broadcast to out. A rotation's gradient
    is the rotation by the negative angle.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out = x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3])
        return _rotate(x.transpose(1, 2), cos, sin, 1, out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (dy,) = gradients
        out = dy.new_empty(dy.shape[0], dy.shape[2], dy.shape[1], dy.shape[3])
        _rotate(dy, cos, sin, -1, out.transpose(1, 2))
        return out, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int, out: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


class AttentionFunction(torch.autograd.Function):
    """softmax(scale · q kᵀ) v with the probabilities kept for the backward pass.

    q, k: (B, H, T, D), v: (B, H, T, E), contiguous; visible: bool, broadcasts to (B, H, T, T), or
    None for causal. torch's CPU flash attention takes 6 times as long backward as forward; at T of
    a few hundred the T x T matrix is small and plain matrix products win.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float
    ) -> Tensor:
        batch, heads, length, _ = q.shape
        q, k, v = (tensor.reshape(-1, length, tensor.shape[-1]) for tensor in (q, k, v))
        if visible is None:
            scores = torch.baddbmm(_causal(length, q.dtype), q, k.mT, alpha=scale)
        else:
            scores = torch.bmm(q, k.mT).mul_(scale)
            scores.view(batch, heads, length, length).masked_fill_(~visible, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return torch.bmm(weights, v).view(batch, heads, length, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, weights = ctx.saved_tensors
        shape = *gradients[0].shape[:3], -1
        dy = gradients[0].reshape(v.shape)
        dv = torch.bmm(weights.mT, dy)
        dw = torch.bmm(dy, v.mT)
        ds = torch._softmax_backward_data(dw, weights, -1, weights.dtype).mul_(ctx.scale)
        dq, dk = torch.bmm(ds, k), torch.bmm(ds.mT, q)
        return dq.view(shape), dk.view(shape), dv.view(shape), None, None


@cache
def _causal(length: int, dtype: torch.dtype) -> Tensor:
    return torch.full((length, length), -torch.inf, dtype=dtype).triu_(1)
