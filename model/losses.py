"""Losses as pure functions. All are sums divided by a count that the caller knows for the whole
global batch, so that neither sharding nor gradient accumulation changes the normalisation.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.chunks import CHUNK_ROWS, CHUNK_ROWS_GPU, SLICE_ROWS, SLICE_ROWS_GPU

# Chosen rows are padded to a multiple of this. oneDNN makes and keeps a kernel for every number of
# rows it meets: with a fresh number in every step that cost 100 ms and 9 MB each time.
ROW_GRAIN = 128


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap), Gemma 2's; the logits themselves without a cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def cross_entropy_sum(
    hidden: Tensor,
    output_weight: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    output_bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Summed negative log-likelihood in nats, float32 scalar, of the targets that count.

    hidden: (B, T, C), the last hidden state; output_weight: (V, C); targets: (B, T) int; mask: (B,
    T) bool, which targets count (None: all); output_bias: (V,) and softcap: of the logits. The
    logits are never held as a whole: the output matrix, the softmax and both gradients are computed
    chunk by chunk, and masked rows are never computed at all.
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])
    targets = targets.reshape(-1)
    if mask is not None:
        chosen = mask.reshape(-1).nonzero().squeeze(1)
        hidden, targets = hidden.index_select(0, chosen), targets.index_select(0, chosen)
        hidden = F.pad(hidden, (0, 0, 0, -len(targets) % ROW_GRAIN))
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, output_weight = hidden.to(dtype), output_weight.to(dtype)
        output_bias = None if output_bias is None else output_bias.to(dtype)
    result: Tensor = _LinearCrossEntropy.apply(hidden, output_weight, targets, output_bias, softcap)
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(cap(hidden Wᵀ + b))[target], with gradients made in the forward pass.

    Everything is linear in the incoming gradient, a scalar, so backward only scales. Softmax and
    loss are in float32, whatever `hidden` is in: in bf16 every probability above 0.998 is 1, and
    what a model nearly knows has no loss and no gradient. Rows of `hidden` beyond the targets are
    padding: zeros, which take no part in the loss or in d weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        need = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if need else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if need else None
        bias_gradient = None
        if need and bias is not None:
            bias_gradient = torch.zeros_like(bias, dtype=torch.float32)
        on_cpu = hidden.device.type == "cpu"
        chunk = CHUNK_ROWS if on_cpu else CHUNK_ROWS_GPU
        slice_rows = SLICE_ROWS if on_cpu else SLICE_ROWS_GPU
        for first in range(0, len(hidden), chunk):
            rows = slice(first, first + chunk)
            h, wanted = hidden[rows], targets[rows, None]
            logits = h @ weight.T if bias is None else torch.addmm(bias, h, weight.T)
            logits = softcapped(logits, softcap)
            parts = zip(logits.split(slice_rows), wanted.split(slice_rows), strict=True)
            for part, want in parts:
                error = torch.softmax(part, dim=-1, dtype=torch.float32)
                known = error[: len(want)]
                loss -= known.gather(1, want).clamp_(min=1e-38).log_().sum()
                if need:
                    # d loss / d logits = softmax - one-hot
                    known.scatter_add_(1, want, torch.full_like(want, -1, dtype=error.dtype))
                    if softcap is not None:  # d cap·tanh(z/cap) / dz = 1 - tanh²
                        error *= 1 - (part / softcap).square_()
                    part.copy_(error)  # in the place of the logits
            if hidden_gradient is not None and weight_gradient is not None:
                torch.mm(logits, weight, out=hidden_gradient[rows])
                weight_gradient += logits.T @ h
                if bias_gradient is not None:
                    bias_gradient += logits[: len(wanted)].sum(0)
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None, None]:
        hidden_gradient, weight_gradient, bias_gradient = ctx.saved_tensors
        (scale,) = gradients
        return (
            hidden_gradient * scale.to(hidden_gradient.dtype),
            (weight_gradient * scale).to(ctx.weight_dtype),
            None,
            None if bias_gradient is None else (bias_gradient * scale).to(ctx.weight_dtype),
            None,
        )


def bits_per_byte(nats: float, bytes_: int) -> float:
    """Summed nats over the UTF-8 bytes they encode, in bits: comparable across tokenizers and with
    compressors, as loss per token is not."""
    return nats / (math.log(2) * bytes_) if bytes_ else math.nan
