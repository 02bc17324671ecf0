"""Self-attention: projections, rotary positions, cache, latent keys and values, one `attend()`."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from model import flex
from model.config import ModelConfig
from model.kernels import AttentionFunction
from model.layers import RMSNorm, make_norm, rotate

SHORT = 1024  # tokens up to which training on a CPU keeps the attention matrix
Visible = Tensor | BlockMask | None
LATENT_EPS = 1e-6  # of the latents' norms: DeepSeek's code has it fixed, whatever norm_eps is


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
    causal: a token sees no later one; without it, it sees its whole segment or row.
    """

    positions: Tensor | None
    segments: Tensor | None
    mask: Tensor | None
    cached: bool
    causal: bool = True
    _memo: dict[tuple[int | None, int], Visible] = field(default_factory=dict)

    def bias(
        self, window: int | None, queries: Tensor, keys: int, *, capped: bool = False
    ) -> Visible:
        """The boolean mask (B or 1, 1, T, S) for a layer, or its blocks where FlexAttention runs;
        None where plain causality (or, for a model that is not causal, everything) within T is
        visible. capped: the scores are.
        """
        if window is not None and window >= keys:
            window = None
        key = (window, keys)
        if key not in self._memo:
            self._memo[key] = self._build(window, queries, keys, capped)
        return self._memo[key]

    def _build(self, window: int | None, queries: Tensor, keys: int, capped: bool) -> Visible:
        length, device = queries.shape[2], queries.device
        free = self.mask is None and not self.cached
        if free and self.segments is None and window is None and not capped:
            return None
        if free and flex.usable(device.type):
            return flex.block_mask(
                queries, keys, causal=self.causal, window=window, segments=self.segments
            )
        if free and self.segments is None and window is None:
            return None
        column = torch.arange(keys, device=device)
        # Packed rows restart `positions` at every document, so only a cache may be addressed by
        # them.
        row = torch.arange(length, device=device)[None] if not self.cached else self.positions
        assert row is not None
        row = row[:, None, :, None]
        if self.mask is not None:
            visible = self.mask
        else:
            visible = column <= row if self.causal else torch.ones_like(column == row)
        if self.segments is not None:
            visible = visible & (self.segments[:, None, :, None] == self.segments[:, None, None, :])
        if window is not None:
            visible = visible & (column > row - window)
        return visible


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    *,
    scale: float,
    causal: bool = True,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v, the one place attention is computed.

    q: (B, H, T, D); k: (B, kv_heads, S, D); v: (B, kv_heads, S, E); visible: bool (B or 1, 1, T,
    S) or as blocks, or None for attention of T queries over the same T keys, causal or to
    everything. softcap: scores become cap · tanh(scores / cap). Returns (B, H, T, E).
    """
    if isinstance(visible, BlockMask):
        return flex.attend_flex(q, k, v, visible, scale=scale, softcap=softcap)
    grouped = k.shape[1] != q.shape[1]
    training = torch.is_grad_enabled() and q.device.type == "cpu" and q.shape[2] == k.shape[2]
    kernel = training and q.shape[2] <= SHORT and (causal or visible is not None)
    if grouped and (kernel or softcap is not None):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if softcap is not None:
        return _capped(q, k, v, visible, scale, causal, softcap)
    if kernel:
        y: Tensor = AttentionFunction.apply(q, k, v, visible, scale)
        return y
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=visible,
        is_causal=causal and visible is None,
        scale=scale,
        enable_gqa=grouped,
    )


def _capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float,
) -> Tensor:
    """Gemma 2's scores: torch's fused attention has no place for the tanh, so it is written out."""
    scores = softcap * torch.tanh((q @ k.mT) * (scale / softcap))
    if visible is None and causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v


class Attention(nn.Module):
    """Grouped-query attention with RoPE; the flags of `ModelConfig` say which variant."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_size
        self.window = config.window(layer)
        self.rope = config.positions == "rope"
        self.causal = config.causal
        self.softcap = config.attention_softcap
        self.scale = (config.query_scale or config.head_size) ** -0.5
        queries, keys = config.heads * self.head_dim, config.kv_count * self.head_dim
        self._project(config, queries, keys)
        self.o_proj = nn.Linear(
            config.heads * config.value_size, config.width, bias=config.linear_bias
        )
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else None

    def _project(self, config: ModelConfig, queries: int, keys: int) -> None:
        self.q_proj = nn.Linear(config.width, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, keys, bias=config.qkv_bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, visibility: Visibility, cache: KVCache | None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); cos and sin broadcast to (B, 1, T, D)."""
        batch, length, _ = x.shape
        q, k, v = self.queries_keys_values(x, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        visible = visibility.bias(self.window, q, k.shape[2], capped=self.softcap is not None)
        y = attend(q, k, v, visible, scale=self.scale, causal=self.causal, softcap=self.softcap)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))

    def queries_keys_values(
        self, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> (B, H, T, D), (B, kv_heads, T, D), (B, kv_heads, T, E)."""
        by_head = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(by_head)
        k = self.k_proj(x).view(by_head)
        v = self.v_proj(x).view(by_head).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if not self.rope:
            return q.transpose(1, 2), k.transpose(1, 2), v
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class LatentAttention(Attention):
    """Keys and values of all heads from one small latent per token (DeepSeek-V2, arXiv:2405.04434).

    x ─ kv_a_proj ─┬─ latent ─ norm ─ kv_b_proj ─┬─ values (E per head)
                   │                             └─ keys, channels without position (D - R)
                   └─ R channels ─ RoPE ─────────── keys, R channels that all heads share

    The channels with position come last in a head. A cache gets the keys and values written out.
    """

    def _project(self, config: ModelConfig, queries: int, keys: int) -> None:
        self.rotary, self.latent = config.rotary_size, config.kv_latent or 0
        self.parts = (self.head_dim - self.rotary, config.value_size)
        if config.rope_scaling is not None:
            self.scale *= config.rope_scaling.latent_score_scale
        width, latent = config.width, config.query_latent
        if latent is None:
            self.q_proj = nn.Linear(width, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(width, latent, bias=False)
            self.q_a_layernorm = RMSNorm(latent, LATENT_EPS)
            self.q_b_proj = nn.Linear(latent, queries, bias=False)
        self.direct = latent is None
        self.kv_a_proj_with_mqa = nn.Linear(width, self.latent + self.rotary, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_EPS)
        self.kv_b_proj = nn.Linear(self.latent, config.heads * sum(self.parts), bias=False)

    def queries_keys_values(
        self, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> (B, H, T, D), (B, H, T, D), (B, H, T, E)."""
        q = self.q_proj(x) if self.direct else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(*x.shape[:2], -1, self.head_dim)
        still, turning = q.split((self.parts[0], self.rotary), dim=-1)
        q = torch.cat((still.transpose(1, 2), rotate(turning, cos, sin)), dim=-1)
        latent, turning = self.kv_a_proj_with_mqa(x).split((self.latent, self.rotary), dim=-1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).view(
            *x.shape[:2], -1, sum(self.parts)
        )
        still, v = expanded.transpose(1, 2).split(self.parts, dim=-1)
        shared = rotate(turning[:, :, None], cos, sin).expand(-1, still.shape[1], -1, -1)
        return q, torch.cat((still, shared), dim=-1), v
