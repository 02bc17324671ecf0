"""The shape of a model as a form: a family of the outside world, its sizes, and what sets it apart.

The family fixes the flags that make it what it is (`FAMILIES`); sizes and the few flags people vary
stay free. Whatever is built here has a name outside (`model.families`), so it can be exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from model.config import ConfigError, ModelConfig
from model.families import FormatError, family_of
from tasks.runtime.stage_config import StageConfig

Family = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "gemma2",
    "gemma3",
    "deepseek_v2",
    "deepseek_v3",
    "bert",
]
PLAIN_MLP = {"gated_mlp": False, "qkv_bias": True, "linear_bias": True}
LEARNED = {"positions": "learned", "norm": "layer"}
GEMMA = {
    "norm": "rms+1",
    "norm_placement": "both",
    "activation": "gelu_tanh",
    "scaled_embeddings": True,
}
FAMILIES: Mapping[Family, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gpt2": {**LEARNED, **PLAIN_MLP, "activation": "gelu_tanh"},
    "gemma2": {
        **GEMMA,
        "full_attention_every": 2,
        "attention_softcap": 50.0,
        "logit_softcap": 30.0,
    },
    "gemma3": {**GEMMA, "qk_norm": True, "full_attention_every": 6, "window_rope_theta": 10_000.0},
    "deepseek_v2": {},
    "deepseek_v3": {"routing": "sigmoid", "normalised_routing": True},
    "bert": {
        **LEARNED,
        **PLAIN_MLP,
        "activation": "gelu",
        "causal": False,
        "norm_placement": "post",
        "token_types": 2,
        "masked_head": True,
    },
}
WINDOWED = ("mistral", "gemma2", "gemma3")
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
LATENT = ("deepseek_v2", "deepseek_v3")
STRIDE = 8  # channels: transformers multiplies all experts at once, in rows of whole 16 bytes
# By our engine, see model/engine/loading.py.
SERVED = (*LLAMAS, "gpt2", "gemma2", "gemma3", *LATENT)


class LatentOptions(StageConfig):
    """Latent attention (DeepSeek): keys and values of all heads from a few channels per token."""

    channels: int = Field(0, ge=0)
    """Channels that keys and values are made from; 0: two heads' worth."""
    query_channels: int = Field(0, ge=0)
    """Channels that queries are made from; 0: the residual stream itself."""
    rope_channels: int = Field(0, ge=0)
    """Channels of a head that carry its position; 0: half of a head's."""


class ExpertOptions(StageConfig):
    """Experts (DeepSeek): many feed-forward blocks, of which each token passes a few."""

    count: int = Field(8, ge=2)
    """Experts of a layer."""
    per_token: int = Field(2, ge=1)
    """Experts each token is sent to."""
    width: int = Field(0, ge=0)
    """Hidden channels of an expert, a multiple of 8; 0: as many as make a token's experts one
    feed-forward block, in whole 8s."""
    shared: int = Field(1, ge=1)
    """Experts that every token passes, beside those."""
    dense_layers: int = Field(1, ge=0)
    """First layers that have a plain feed-forward block instead."""


class ModelOptions(StageConfig):
    """The shape of the model."""

    family: Family = "llama"
    """Which architecture: what norms, positions, biases, attention and feed-forward are like. Our
    engine serves all but BERT, which can be trained and exported."""
    width: int = Field(256, ge=2)
    """Channels of the residual stream."""
    layers: int = Field(4, ge=1)
    """Transformer blocks."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    kv_heads: int = Field(0, ge=0)
    """Key-value heads (grouped-query attention); 0: as many as heads."""
    head_width: int = Field(0, ge=0)
    """Channels of a head; 0: the width divided by the heads."""
    mlp_width: int = Field(1024, ge=0)
    """Channels of the feed-forward blocks; 0: 8/3 of the width, rounded up to 64s."""
    context: int = Field(256, ge=2)
    """Longest text the model can read, in tokens; more than it was trained on is guesswork."""
    sliding_window: int = Field(0, ge=0)
    """Tokens each token can look back on, itself included (Mistral, Gemma); 0: all."""
    qk_norm: bool = False
    """Normalise queries and keys of each head (Qwen3)."""
    rope_theta: float = Field(10_000.0, gt=1)
    """Base of the rotary positions."""
    tied_embeddings: bool = True
    """Use the embedding matrix as the output matrix, too."""
    latent: LatentOptions = LatentOptions()
    experts: ExpertOptions = ExpertOptions()

    @model_validator(mode="after")
    def exists(self) -> Self:
        if self.family in WINDOWED and not self.sliding_window:
            raise ValueError(
                f"{self.family} looks through a window: give sliding_window, in tokens"
            )
        if self.family not in LATENT:
            for name in ("latent", "experts"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name} are of the families {' and '.join(LATENT)}, not of {self.family}"
                    )
        for name, channels in (("width", self.width), ("experts.width", self.experts.width)):
            if self.family in LATENT and channels % STRIDE:
                raise ValueError(
                    f"{name} {channels} is not a multiple of {STRIDE}, and transformers runs no "
                    f"other experts; take {channels // STRIDE * STRIDE or STRIDE}"
                )
        try:
            found = family_of(self.config(vocab_size=1)).model_type.removesuffix("_text")
        except (ConfigError, FormatError) as error:
            raise ValueError(str(error)) from error
        # Llama with another flag or two is Mistral or Qwen; that was always so in this form.
        if found != self.family and not {found, self.family} <= set(LLAMAS):
            raise ValueError(f"with these settings it is no {self.family} model but {found}")
        return self

    @property
    def causal(self) -> bool:
        """Whether it predicts the next token; else it guesses masked ones (BERT)."""
        return self.family != "bert"

    def config(self, vocab_size: int) -> ModelConfig:
        sizes = {
            "vocab_size": vocab_size,
            "width": self.width,
            "layers": self.layers,
            "heads": self.heads,
            "kv_heads": self.kv_heads or None,
            "head_dim": self.head_width or None,
            "mlp_width": self.mlp_width or None,
            "context": self.context,
            "sliding_window": self.sliding_window or None,
            "qk_norm": self.qk_norm,
            "rope_theta": self.rope_theta,
            "tied_embeddings": self.tied_embeddings,
        }
        if self.family in LATENT:
            sizes |= self._latent() | self._experts()
        return ModelConfig(**(sizes | dict(FAMILIES[self.family])))

    def _latent(self) -> dict[str, Any]:
        head = self.head_width or self.width // self.heads
        return {
            "kv_latent": self.latent.channels or 2 * head,
            "query_latent": self.latent.query_channels or None,
            "rope_dim": self.latent.rope_channels or -(-head // 4) * 2,
        }

    def _experts(self) -> dict[str, Any]:
        passed = self.experts.per_token + self.experts.shared
        share = (self.mlp_width or self.width) // passed // STRIDE * STRIDE
        return {
            "experts": self.experts.count,
            "experts_per_token": self.experts.per_token,
            "expert_width": self.experts.width or max(share, STRIDE),
            "shared_experts": self.experts.shared,
            "dense_layers": self.experts.dense_layers,
        }
