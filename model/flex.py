"""FlexAttention where it is present: masks and caps inside one fused kernel.

Plain causal attention needs none of this: torch's `scaled_dot_product_attention` is FlashAttention
on a GPU. But with a mask (packed documents, windows) it falls back to slower kernels that read a
matrix of T x T, and for a cap of the scores (Gemma 2) it has no place. FlexAttention compiles both
into the kernel and leaves out blocks nobody sees. It needs a GPU and triton; where a small trial
fails, everything goes on as without.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.compiling import missing_compiler
from model.losses import softcapped

logger = logging.getLogger("gristmill.training")


@cache
def usable(device: str) -> bool:
    """Whether a compiled FlexAttention runs, forward and backward, on this device."""
    if device != "cuda" or missing_compiler(device) is not None:
        return False
    try:
        with torch.enable_grad():
            q = torch.randn(1, 1, 256, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
            seen = block_mask(q, 256, causal=True, window=100, segments=None)
            attend_flex(q, q, q, seen, scale=0.1, softcap=10.0).float().sum().backward()
        return True
    except Exception as error:  # of a compiler, a driver, a kernel: whatever it is, go on without
        logger.warning("no FlexAttention: %s", error)
        return False


def block_mask(
    queries: Tensor, keys: int, *, causal: bool, window: int | None, segments: Tensor | None
) -> BlockMask:
    """Who may look at whom, as `Visibility` says it, for queries (B, H, T, D) over `keys` keys."""

    def visible(batch: Tensor, _: Tensor, row: Tensor, column: Tensor) -> Tensor:
        seen = column <= row if causal else column == column
        if window is not None:
            seen = seen & (column > row - window)
        if segments is not None:
            seen = seen & (segments[batch, row] == segments[batch, column])
        return seen

    rows = None if segments is None else queries.shape[0]
    return create_block_mask(visible, rows, None, queries.shape[2], keys, str(queries.device))


def attend_flex(
    q: Tensor, k: Tensor, v: Tensor, visible: BlockMask, *, scale: float, softcap: float | None
) -> Tensor:
    """As `model.attention.attend`, with the mask as blocks."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcapped(score, softcap)

    grouped = k.shape[1] != q.shape[1]
    cap = None if softcap is None else capped
    y: Tensor = _kernel(q.device.type)(
        q, k, v, score_mod=cap, block_mask=visible, scale=scale, enable_gqa=grouped
    )
    return y


@cache
def _kernel(device: str) -> Callable[..., Any]:
    """Compiled where it can be; elsewhere torch's own plain formula, which tests compare."""
    plain: Callable[..., Any] = flex_attention
    return torch.compile(plain, dynamic=False) if device == "cuda" else plain
