"""One step of the network over many sequences, in as few operations as the arithmetic allows.

The weights are `model.transformer.Transformer`'s; what differs is the dispatch. At a few million
parameters a decode step spends more time starting operations than computing, so query, key and
value are one matrix product, gate and up another, keys and values are written in one scatter, and
masks and angles are made once a step instead of once a layer. `tests/model/test_engine.py` holds
it equal to the plain forward.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.engine.kv_cache import SlotCache
from model.transformer import Block, Transformer


@dataclass(frozen=True)
class LayerWeights:
    """One block's matrices, those that read the same input stacked along their outputs."""

    input_norm: Tensor
    qkv: Tensor  # ((H + 2 H_kv) D, C)
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # (H + H_kv, D): the query norm's weight, then the key norm's
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor  # (2 M, C)
    down: Tensor

    @classmethod
    def of(cls, block: nn.Module, config: ModelConfig, dtype: torch.dtype) -> "LayerWeights":
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        qkv_bias = qk_norm = None
        if config.qkv_bias:
            qkv_bias = torch.cat([p.bias for p in projections]).to(dtype)
        if attention.q_norm is not None and attention.k_norm is not None:
            query = attention.q_norm.weight.expand(config.heads, -1)
            key = attention.k_norm.weight.expand(config.kv_count, -1)
            qk_norm = torch.cat((query, key)).to(dtype)
        return cls(
            block.input_layernorm.weight.to(dtype),
            torch.cat([p.weight.to(dtype) for p in projections]),
            qkv_bias,
            qk_norm,
            attention.o_proj.weight.to(dtype),
            block.post_attention_layernorm.weight.to(dtype),
            torch.cat((mlp.gate_proj.weight.to(dtype), mlp.up_proj.weight.to(dtype))),
            mlp.down_proj.weight.to(dtype),
        )


class Runner:
    """The network and its cache. Not thread-safe: one thread owns it."""

    @torch.inference_mode()
    def __init__(self, model: Transformer, slots: int, dtype: torch.dtype = torch.float32) -> None:
        self.config = config = model.config
        self.embedding = model.model.embed_tokens.weight.to(dtype)
        self.device = self.embedding.device
        self.output = model.output_weight.to(dtype)
        self.norm = model.model.norm.weight.to(dtype)
        self.layers = [LayerWeights.of(block, config, dtype) for block in model.model.layers]
        self.cos = model.rope_cos.to(dtype)
        self.sin = model.rope_sin.to(dtype)
        self.cache = SlotCache(config, slots, dtype, self.device)
        self.columns = torch.arange(config.context, device=self.device)
        self.slots = torch.arange(slots, device=self.device)
        self.shut = torch.tensor(float("-inf"), dtype=dtype, device=self.device)
        self.open = torch.zeros((), dtype=dtype, device=self.device)

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], first: int) -> Tensor:
        """Read whole prompts into slots first, first+1, …; the logits after each, (B, V)."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        # Padding on the right is never looked at: causality hides it from the prompt, and the
        # position mask hides it from later tokens until they overwrite it.
        tokens = torch.tensor(
            [prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self.device
        )
        cos, sin = self.cos[:longest, None], self.sin[:longest, None]
        window = self.config.sliding_window
        mask = None
        if window is not None and window < longest:
            row, column = self.columns[:longest, None], self.columns[:longest]
            mask = (column <= row) & (column > row - window)
        x = F.embedding(tokens, self.embedding)
        for index, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, cos, sin)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            self.cache.write_prompts(index, first, k, v)
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=k.shape[1] != q.shape[1]
            )
            x = self._finish_block(layer, x, y.transpose(1, 2))
        last = torch.tensor(lengths, device=self.device) - 1
        return self._logits(x[self.slots[: len(prompts)], last])

    @torch.inference_mode()
    def decode(self, tokens: list[int], positions: list[int]) -> Tensor:
        """One more token for slots 0..n-1, each at its own position; the logits after, (n, V)."""
        count, columns = len(tokens), max(positions) + 1
        at = torch.tensor(positions, device=self.device)
        cos, sin = self.cos[at][:, None, None], self.sin[at][:, None, None]
        mask = self._decode_mask(at, columns)
        slots = self.slots[:count]
        heads, kv_heads, size = self.config.heads, self.config.kv_count, self.config.head_size
        x = F.embedding(torch.tensor(tokens, device=self.device), self.embedding)[:, None]
        for index, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, cos, sin)
            self.cache.write_tokens(index, slots, at, torch.stack((k[:, 0], v[:, 0]), 1))
            keys, values = self.cache.read(index, count, columns)
            # Query heads that share a key head stand in the place of query positions.
            q = q.view(count, kv_heads, heads // kv_heads, size)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = self._finish_block(layer, x, y)
        return self._logits(x[:, 0])

    def _decode_mask(self, at: Tensor, columns: int) -> Tensor:
        """(n, 1, 1, columns): 0 where the token at position `at` may look, -inf elsewhere."""
        column = self.columns[:columns]
        hidden = column > at[:, None]
        if self.config.sliding_window is not None:
            hidden |= column <= at[:, None] - self.config.sliding_window
        return torch.where(hidden, self.shut, self.open)[:, None, None]

    def _qkv(
        self, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> queries (B, T, H, D), keys and values (B, T, H_kv, D), rotated."""
        batch, length, _ = x.shape
        heads, kv_heads, size = self.config.heads, self.config.kv_count, self.config.head_size
        normed = F.rms_norm(x, x.shape[-1:], layer.input_norm, self.config.norm_eps)
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(batch, length, -1, size)
        qk = qkv[:, :, : heads + kv_heads]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (size,), None, self.config.norm_eps) * layer.qk_norm
        half = size // 2
        turned = torch.cat((-qk[..., half:], qk[..., :half]), dim=-1)
        qk = torch.addcmul(qk * cos, turned, sin)
        return qk[:, :, :heads], qk[:, :, heads:], qkv[:, :, heads + kv_heads :]

    def _finish_block(self, layer: LayerWeights, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection, feed-forward, both residual additions; overwrites x (B, T, C)."""
        batch, length, _ = x.shape
        x += F.linear(attended.reshape(batch, length, -1), layer.output)
        normed = F.rms_norm(x, x.shape[-1:], layer.mlp_norm, self.config.norm_eps)
        gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
        x += F.linear(F.silu(gate) * up, layer.down)
        return x

    def _logits(self, hidden: Tensor) -> Tensor:
        """(n, C) -> (n, V) in float32."""
        normed = F.rms_norm(hidden, hidden.shape[-1:], self.norm, self.config.norm_eps)
        return F.linear(normed, self.output).float()
