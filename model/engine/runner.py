"""One step of the network over many sequences, in as few operations as the arithmetic allows.

The weights are `model.transformer.Transformer`'s; what differs is the dispatch. At a few million
parameters a decode step spends more time starting operations than computing, so query, key and
value are one matrix product, gate and up another, the norms' weights are multiplied into them,
rotation happens in place, keys and values are written in one scatter, and masks and angles are made
once a step instead of once a layer. Prompts being read and answers being
written go through the matrices together; only attention is computed sequence by sequence, each over
a view of its own keys: no padding, no mask, and no influence on the neighbours.
`tests/model/test_engine.py` holds it equal to the plain forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attention
from model.config import ModelConfig
from model.engine.kv_cache import KVCache
from model.engine.pages import PAGE
from model.engine.weights import Matrix, Weights, activation_dtype, matrix
from model.layers import FeedForward
from model.transformer import Block, Transformer


@dataclass(frozen=True)
class LayerWeights:
    """One block's matrices, those that read the same input stacked along their outputs.

    Matrices behind a norm carry its weight: W · (g ∘ x / rms(x)) = (W ∘ g) · x / rms(x), so that of
    the norm one number for each row is left.
    """

    qkv: Matrix  # C -> (H + 2 H_kv) D
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # (H + H_kv, D): the query norm's weight, then the key norm's
    output: Matrix
    gate_up: Matrix  # C -> 2 M
    down: Matrix

    @classmethod
    def of(cls, block: nn.Module, config: ModelConfig, weights: Weights) -> "LayerWeights":
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        assert isinstance(attention, Attention) and isinstance(mlp, FeedForward)
        assert mlp.gate_proj is not None  # `ModelConfig.beyond_llama` kept others out
        dtype = activation_dtype(weights)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = torch.cat([p.bias for p in projections]).to(dtype) if config.qkv_bias else None
        qk_norm = None
        if attention.q_norm is not None and attention.k_norm is not None:
            query = attention.q_norm.weight.expand(config.heads, -1)
            key = attention.k_norm.weight.expand(config.kv_count, -1)
            qk_norm = torch.cat((query, key)).to(dtype)
        qkv = torch.cat([p.weight for p in projections]) * block.input_layernorm.weight
        gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        return cls(
            matrix(qkv, weights),
            bias,
            qk_norm,
            matrix(attention.o_proj.weight, weights),
            matrix(gate_up * block.post_attention_layernorm.weight, weights),
            matrix(mlp.down_proj.weight, weights),
        )


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence to be read: the first stands at position `start`, and the sequence's
    cache begins at page `page`.
    """

    page: int
    start: int
    tokens: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class View:
    """The part of the cache that a span's queries look at: `count` tokens from place `first`."""

    first: int
    count: int
    mask: Tensor | None  # (t, count), -inf where a query may not look

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q (t, H, D); keys, values (1, H_kv, places, D) of the whole cache -> (t, H · D)."""
        length, heads, size = q.shape
        kv_heads = keys.shape[1]
        k = keys.narrow(2, self.first, self.count)
        v = values.narrow(2, self.first, self.count)
        if length == 1:
            # Query heads that share a key head stand in the place of query positions.
            q = q.view(1, kv_heads, heads // kv_heads, size)
            return F.scaled_dot_product_attention(q, k, v).reshape(1, -1)
        y = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k,
            v,
            attn_mask=self.mask,
            is_causal=self.mask is None,
            enable_gqa=kv_heads != heads,
        )
        return y[0].transpose(0, 1).reshape(length, -1)


class Runner:
    """The network and its cache. Not thread-safe: one thread owns it."""

    @torch.inference_mode()
    def __init__(self, model: Transformer, pages: int, weights: Weights = "float32") -> None:
        dtype = activation_dtype(weights)
        self.config = config = model.config
        self.embedding = model.model.embed_tokens.weight.to(dtype)
        self.device = self.embedding.device
        self.output = matrix(model.output_weight, weights)
        self.norm = model.model.norm.weight.to(dtype)
        self.layers = [LayerWeights.of(block, config, weights) for block in model.model.layers]
        self.cos = model.rope_cos.to(dtype)
        # The first half's sign is rotate-half's, so that turning needs no negation.
        sign = torch.ones_like(model.rope_sin[:1])
        sign[:, : config.head_size // 2] = -1
        self.sin = (model.rope_sin * sign).to(dtype)
        self.eps = torch.full((1, 1), config.norm_eps, device=self.device)
        self.cache = KVCache(config, pages, dtype, self.device)

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> Tensor:
        """Read the tokens of all spans into the cache; the last hidden states of all their tokens,
        normed, (T, C), in the order of the spans.
        """
        positions = torch.tensor([p for s in spans for p in range(s.start, s.end)])
        offsets = torch.tensor([s.page * PAGE for s in spans for _ in s.tokens])
        tokens = torch.tensor([token for s in spans for token in s.tokens])
        positions, tokens = positions.to(self.device), tokens.to(self.device)
        places = positions + offsets.to(self.device)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        views = [self._view(span) for span in spans]
        lengths = [len(span.tokens) for span in spans]
        x = F.embedding(tokens, self.embedding)
        for index, layer in enumerate(self.layers):
            q, pair = self._qkv(layer, x, cos, sin)
            self.cache.layers[index].index_copy_(1, places, pair)
            keys, values = self.cache.keys[index], self.cache.values[index]
            parts = q.split(lengths)
            y = [v.attend(part, keys, values) for v, part in zip(views, parts, strict=True)]
            x = self._finish_block(layer, x, torch.cat(y) if len(y) > 1 else y[0])
        return F.rms_norm(x, x.shape[-1:], self.norm, self.config.norm_eps)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(n, C) as `forward` gives it -> (n, V) in float32."""
        return self.output(hidden).float()

    def _view(self, span: Span) -> View:
        """What a span's tokens see; a mask only where its tokens have different pasts."""
        length, window = len(span.tokens), self.config.sliding_window
        first = 0 if window is None else max(0, span.start - window + 1)
        mask = None
        if length > 1 and (span.start > 0 or (window is not None and window < span.end)):
            row = torch.arange(span.start, span.end, device=self.device)[:, None]
            column = torch.arange(first, span.end, device=self.device)
            hidden = column > row
            if window is not None:
                hidden |= column <= row - window
            mask = torch.zeros(hidden.shape, dtype=self.cos.dtype, device=self.device)
            mask.masked_fill_(hidden, float("-inf"))
        return View(span.page * PAGE + first, span.end - first, mask)

    def _qkv(
        self, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x (T, C) -> rotated queries (T, H, D); keys and values (2 H_kv, T, D) for the cache."""
        heads, size = self.config.heads, self.config.head_size
        rotated = heads + self.config.kv_count
        qkv = layer.qkv(x).mul_(self._inverse_rms(x))
        if layer.qkv_bias is not None:
            qkv += layer.qkv_bias
        qkv = qkv.view(x.shape[0], -1, size)
        qk = qkv[:, :rotated]
        if layer.qk_norm is not None:
            qk.copy_(F.rms_norm(qk, (size,), None, self.config.norm_eps) * layer.qk_norm)
        turned = qk.roll(size // 2, -1)
        qk.mul_(cos).addcmul_(turned, sin)
        return qkv[:, :heads], qkv[:, heads:].transpose(0, 1)

    def _inverse_rms(self, x: Tensor) -> Tensor:
        """(T, C) -> (T, 1) in float32."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.addcmul(self.eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()

    def _finish_block(self, layer: LayerWeights, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection, feed-forward, both residual additions; may overwrite x (T, C)."""
        x = layer.output.add_to(x, attended)
        gate, up = layer.gate_up(x).mul_(self._inverse_rms(x)).chunk(2, dim=-1)
        return layer.down.add_to(x, F.silu(gate).mul_(up))
