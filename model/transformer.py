"""The transformer: embeddings, a stack of blocks, a norm, the output matrix."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attention, KVCache, LatentAttention, Visibility
from model.config import ModelConfig
from model.layers import FeedForward, activate, make_norm
from model.losses import softcapped
from model.moe import MixtureOfExperts
from model.rope import rope_table
from model.width import width_ratio

Angles = tuple[Tensor, Tensor]


class Block(nn.Module):
    """One layer. Each of the two sublayers f, attention and feed-forward, has its norms where
    `norm_placement` says:

    pre    x ─┬─ norm ─ f ─ + ─      (input_layernorm; post_attention_layernorm)
              └─────────────┘
    both   x ─┬─ norm ─ f ─ norm ─ + ─   (input_layernorm, post_attention_layernorm;
              └────────────────────┘      pre_feedforward_layernorm, post_feedforward_layernorm)
    post   x ─┬─ f ─ + ─ norm ─      (post_attention_layernorm; post_feedforward_layernorm)
              └──────┘

    The names are Hugging Face's for Llama and Gemma.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.placement = config.norm_placement
        if self.placement != "post":
            self.input_layernorm = make_norm(config)
        self.self_attn = (Attention if config.kv_latent is None else LatentAttention)(config, layer)
        self.post_attention_layernorm = make_norm(config)
        if self.placement == "both":
            self.pre_feedforward_layernorm = make_norm(config)
        self.mlp: Any = (
            MixtureOfExperts(config)
            if config.has_experts(layer)
            else FeedForward(config, config.mlp_size)
        )
        if self.placement != "pre":
            self.post_feedforward_layernorm = make_norm(config)

    def forward(
        self, x: Tensor, angles: Angles, visibility: Visibility, cache: KVCache | None
    ) -> Tensor:
        if self.placement == "pre":
            x = x + self.self_attn(self.input_layernorm(x), *angles, visibility, cache)
            return x + self.mlp(self.post_attention_layernorm(x))
        if self.placement == "post":
            x = self.post_attention_layernorm(x + self.self_attn(x, *angles, visibility, cache))
            return self.post_feedforward_layernorm(x + self.mlp(x))
        y = self.self_attn(self.input_layernorm(x), *angles, visibility, cache)
        x = x + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(y)


class MaskedHead(nn.Module):
    """BERT's way from the last hidden state to the output matrix: norm(activation(dense(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.dense = nn.Linear(config.width, config.width)
        self.norm = make_norm(config)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(activate(self.dense(x), self.activation))


class Decoder(nn.Module):
    """Everything below the output matrix; the name `model` it goes by is Hugging Face's.

    With norms after the sublayers (BERT) the one outside the layers stands behind the embeddings,
    else behind the last layer.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.context, config.width)
        if config.token_types:
            self.embed_token_types = nn.Embedding(config.token_types, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = make_norm(config)
        self.head = MaskedHead(config) if config.masked_head else None


class Transformer(nn.Module):
    """A language model. Parameter names are Hugging Face's for Llama
    (`model.layers.0.self_attn.q_proj…`); `model.families` has the other families' names.

    Initialisation: matrices and embeddings N(0, 0.02²); the matrices that write into the residual
    stream (o_proj, down_proj) are scaled by 1/√(2·layers), so that its variance does not grow with
    depth (GPT-2); norms 1, biases 0. With a `base_width` these are of a model of that width, and
    follow the width from there (`model.width`). It uses torch's global generator: seed it before.
    """

    rope_cos: Tensor  # (context, rotary channels), always float32
    rope_sin: Tensor

    def __init__(self, config: ModelConfig, base_width: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = (
            None
            if config.tied_embeddings
            else nn.Linear(config.width, config.vocab_size, bias=False)
        )
        self.remat = False  # keep only blocks' inputs for the backward pass, compute the rest again
        for name, table in zip(self._tables, self._angles(), strict=True):
            self.register_buffer(name, table, persistent=False)
        self.reset_parameters(width_ratio(config, base_width))

    @property
    def _tables(self) -> tuple[str, ...]:
        names = ("rope_cos", "rope_sin", "window_cos", "window_sin")
        return names if self.config.window_rope_theta is not None else names[:2]

    def _angles(self) -> tuple[Tensor, ...]:
        """The cosines and sines of `_tables`, from the config."""
        config = self.config
        size = config.rotary_size if config.positions == "rope" else 0
        tables = rope_table(config.context, size, config.rope_theta, config.rope_scaling)
        if config.window_rope_theta is None:
            return tables
        return *tables, *rope_table(config.context, size, config.window_rope_theta)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        # `model.bfloat16()` would round the angles too, and far positions would blur into each
        # other.
        super()._apply(fn, recurse)
        device = self.rope_cos.device
        if device.type != "meta":
            for name, table in zip(self._tables, self._angles(), strict=True):
                setattr(self, name, table.to(device))
        return self

    def reset_parameters(self, width_ratio: float = 1.0) -> None:
        for name, parameter in self.named_parameters():
            self.reset_parameter(name, parameter, width_ratio)

    def reset_parameter(self, name: str, parameter: Tensor, width_ratio: float = 1.0) -> None:
        """Give a tensor of the shape of the parameter `name` its initial values."""
        std = 0.02 * math.sqrt(width_ratio)
        if name.endswith("norm.weight"):
            # The latents' norms (DeepSeek) never have an offset.
            offset = self.config.norm == "rms+1" and "_a_layernorm" not in name
            nn.init.constant_(parameter, 0.0 if offset else 1.0)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "o_proj." in name or "down_proj" in name:
            nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.layers))
        elif "embed_" in name:
            nn.init.normal_(parameter, std=0.02)
        elif name == "lm_head.weight" or name.endswith(".mlp.gate.weight"):
            nn.init.normal_(parameter, std=0.02 * width_ratio)
        else:
            nn.init.normal_(parameter, std=std)

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
        config, length = self.config, tokens.shape[1]
        if length > self.config.context:
            raise ValueError(
                f"sequence of {length} tokens is longer than the model's context of "
                f"{self.config.context}; shorten it or train with a larger context"
            )
        if cache is not None and (positions is None or segments is not None):
            raise ValueError("a cache needs positions, and excludes segments")
        where = slice(length) if positions is None else positions
        x = self.model.embed_tokens(tokens)
        if config.scaled_embeddings:
            x = x * torch.tensor(config.width**0.5, dtype=x.dtype)
        if config.positions == "learned":
            table = self.model.embed_positions
            x = x + (table.weight[:length] if positions is None else table(positions))
        if config.token_types:
            x = x + self.model.embed_token_types.weight[0]
        if torch.is_autocast_enabled(x.device.type):
            # The residual stream too: autocast alone would carry it in float32, at half the speed.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if config.norm_placement == "post":
            x = self.model.norm(x)
        turns = [getattr(self, name)[where].to(x.dtype) for name in self._tables]
        if positions is not None:
            turns = [turn[:, None] for turn in turns]
        everywhere, windowed = (turns[0], turns[1]), (turns[-2], turns[-1])
        visibility = Visibility(positions, segments, mask, cache is not None, config.causal)
        for layer, block in enumerate(self.model.layers):
            angles = everywhere if config.window(layer) is None else windowed
            if self.remat and torch.is_grad_enabled():
                x = checkpoint(block, x, angles, visibility, cache, use_reentrant=False)
            else:
                x = block(x, angles, visibility, cache)
        if config.norm_placement != "post":
            x = self.model.norm(x)
        return x if self.model.head is None else self.model.head(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V)."""
        logits = F.linear(hidden, self.output_weight, self.output_bias)
        return softcapped(logits, self.config.logit_softcap)

    @property
    def output_weight(self) -> Tensor:
        """The output matrix, (V, C)."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def output_bias(self) -> Tensor | None:
        """The output's bias (V,), where the model has one."""
        return None if self.model.head is None else self.model.head.output_bias
