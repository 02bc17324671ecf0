"""The transformer: embeddings, a stack of pre-norm blocks, a norm, the output matrix."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attention, KVCache, Visibility
from model.config import ModelConfig
from model.layers import RMSNorm, SwiGLU, rope_table


class Block(nn.Module):
    """One layer.

    x ─┬─ input_layernorm ─ self_attn ─ + ─┬─ post_attention_layernorm ─ mlp ─ + ─ x
       └────────────────────────────────┘ └───────────────────────────────────┘
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.mlp_size)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, visibility: Visibility, cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, visibility, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything below the output matrix; the name `model` it goes by is Hugging Face's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)


class Transformer(nn.Module):
    """A causal language model. Parameter names are Hugging Face's
    (`model.layers.0.self_attn.q_proj…`).

    Initialisation: matrices and embeddings N(0, 0.02²); the two matrices that write into the
    residual stream (o_proj, down_proj) are scaled by 1/√(2·layers), so that its variance does not
    grow with depth (GPT-2); norms 1, biases 0. It uses torch's global generator: seed it before.
    """

    rope_cos: Tensor  # (context, head_dim), always float32
    rope_sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = (
            None
            if config.tied_embeddings
            else nn.Linear(config.width, config.vocab_size, bias=False)
        )
        cos, sin = rope_table(config.context, config.head_size, config.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        # `model.bfloat16()` would round the angles too, and far positions would blur into each
        # other.
        super()._apply(fn, recurse)
        config, device = self.config, self.rope_cos.device
        cos, sin = rope_table(config.context, config.head_size, config.rope_theta)
        self.rope_cos, self.rope_sin = cos.to(device), sin.to(device)
        return self

    def reset_parameters(self) -> None:
        residual_std = 0.02 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=residual_std)
            else:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V), or (B, K, V) at the K positions of `logits_at`.

        tokens: (B, T) int.
        positions: (B, T) int, each token's position in its own sequence, for RoPE and, with a
            cache, for causality; None: 0..T-1. At most `config.context - 1`.
        segments: (B, T) int: rows hold several documents, a token sees only its own segment; not
            with a cache. Give `positions` that restart at each document as well.
        mask: (B or 1, 1, T, S) bool, True where a query may look, instead of the causal rule.
        cache: see `KVCache`; with it, tokens are the new ones only and `positions` is required.
        logits_at: (B, K) int, the columns of `tokens` whose logits are wanted: a prefill needs one,
            and the output matrix is the largest of all.
        """
        x = self.hidden(tokens, positions, segments=segments, mask=mask, cache=cache)
        if logits_at is not None:
            x = x.gather(1, logits_at[:, :, None].expand(-1, -1, x.shape[-1]))
        return self.logits(x)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The last hidden state after the final norm, (B, T, C); arguments as in `forward`."""
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(
                f"sequence of {length} tokens is longer than the model's context of "
                f"{self.config.context}; shorten it or train with a larger context"
            )
        if cache is not None and (positions is None or segments is not None):
            raise ValueError("a cache needs positions, and excludes segments")
        if positions is None:
            cos, sin = self.rope_cos[:length], self.rope_sin[:length]
        else:
            cos, sin = self.rope_cos[positions][:, None], self.rope_sin[positions][:, None]
        x = self.model.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):
            # The residual stream too: autocast alone would carry it in float32, at half the speed.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        visibility = Visibility(positions, segments, mask, cached=cache is not None)
        for block in self.model.layers:
            x = block(x, cos, sin, visibility, cache)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V)."""
        return F.linear(hidden, self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """The output matrix, (V, C)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
