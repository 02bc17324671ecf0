"""Causal self-attention: projections, rotary positions, cache, one `attend()`."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels import AttentionFunction
from model.layers import RMSNorm, rotate

SHORT = 1024  # tokens up to which training on a CPU keeps the attention matrix


class KVCache(Protocol):
    """What attention asks of a cache. One object serves all layers of one forward call.

    `update` stores the new keys and values of `layer`, each (B, kv_heads, T, head_dim) in the order
    of the `positions` given to the forward call, and returns all that the queries may look at, each
    (B, kv_heads, S, head_dim). Column j of what it returns must hold position j of its sequence,
    unless the caller gives `mask` to the forward call; columns past a sequence's end may hold
    anything finite. Keys arrive with RoPE already applied.
    """

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass
class Visibility:
    """Who may look at whom in one forward call; built once and shared by all layers.

    positions: (B, T) of the queries, or None when they are 0..T-1.
    segments: (B, T), documents packed into one row; a token sees only its own segment. None: one
        each.
    mask: (B or 1, 1, T, S) bool, True where a query may look: replaces causality and segments, but
        a sliding window still applies on top, taking column j as position j.
    cached: keys come from a cache, so that column j is position j and S may exceed T.
    """

    positions: Tensor | None
    segments: Tensor | None
    mask: Tensor | None
    cached: bool
    _memo: dict[tuple[int | None, int], Tensor | None] = field(default_factory=dict)

    def bias(self, window: int | None, queries: Tensor, keys: int) -> Tensor | None:
        """The boolean mask (B or 1, 1, T, S) for a layer; None where plain causality within T is
        all.
        """
        key = (window, keys)
        if key not in self._memo:
            self._memo[key] = self._build(window, queries.shape[2], keys, queries.device)
        return self._memo[key]

    def _build(
        self, window: int | None, length: int, keys: int, device: torch.device
    ) -> Tensor | None:
        if window is not None and window >= keys:
            window = None
        if self.mask is None and self.segments is None and not self.cached and window is None:
            return None
        column = torch.arange(keys, device=device)
        # Packed rows restart `positions` at every document, so only a cache may be addressed by
        # them.
        row = torch.arange(length, device=device)[None] if not self.cached else self.positions
        assert row is not None
        row = row[:, None, :, None]
        visible = column <= row if self.mask is None else self.mask
        if self.segments is not None:
            visible = visible & (self.segments[:, None, :, None] == self.segments[:, None, None, :])
        if window is not None:
            visible = visible & (column > row - window)
        return visible


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √D) v, the one place attention is computed.

    q: (B, H, T, D); k, v: (B, kv_heads, S, D); visible: bool (B or 1, 1, T, S), or None for causal
    attention of T queries over the same T keys. Returns (B, H, T, D).
    """
    grouped = k.shape[1] != q.shape[1]
    training = torch.is_grad_enabled() and q.device.type == "cpu" and q.shape[2] == k.shape[2]
    if training and q.shape[2] <= SHORT:
        if grouped:
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y: Tensor = AttentionFunction.apply(q, k, v, visible)
        return y
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=grouped
    )


class Attention(nn.Module):
    """Grouped-query attention with RoPE; the flags of `ModelConfig` say which variant."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_size
        self.window = config.sliding_window
        queries, keys = config.heads * self.head_dim, config.kv_count * self.head_dim
        self.q_proj = nn.Linear(config.width, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, visibility: Visibility, cache: KVCache | None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); cos and sin broadcast to (B, 1, T, D)."""
        batch, length, _ = x.shape
        by_head = (batch, length, -1, self.head_dim)
        q = self.q_proj(x).view(by_head)
        k = self.k_proj(x).view(by_head)
        v = self.v_proj(x).view(by_head).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = attend(q, k, v, visibility.bias(self.window, q, k.shape[2]))
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
