"""The shape of a model: one frozen dataclass whose flags tell the families apart.

There is no class per family. Llama is the defaults; Mistral is Llama with `sliding_window`; Qwen3
is Llama with `qk_norm` (and usually a `head_dim` of its own); Qwen2 is Llama with `qkv_bias`. A
flag stands here only if every part of `model/` honours it; `model.huggingface` says which
combinations have a name in the outside world.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any


class ConfigError(ValueError):
    """A model that cannot exist. The message names the value and the remedy."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and flags of a decoder-only transformer. Raises `ConfigError` when inconsistent."""

    # Sizes
    vocab_size: int = 4096
    width: int = 192  # of the residual stream (Hugging Face: hidden_size)
    layers: int = 6
    context: int = 512  # longest sequence in tokens (max_position_embeddings)

    # Attention
    heads: int = 3
    kv_heads: int | None = None  # fewer than heads: grouped-query attention; None: as many as heads
    head_dim: int | None = None  # None: width / heads
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's query and key, before RoPE
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it
    rope_theta: float = 10_000.0

    # Feed-forward: SwiGLU
    mlp_width: int | None = None  # None: 8/3 of the width, rounded up to a multiple of 64

    # Norms and embeddings
    norm_eps: float = 1e-5
    tied_embeddings: bool = True  # the output matrix is the embedding matrix

    def __post_init__(self) -> None:
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_dim is None and self.heads > 0:
            if self.width % self.heads:
                raise ConfigError(
                    f"width {self.width} is not a multiple of heads {self.heads}; "
                    "choose them so that it is, or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.mlp_width is None:
            object.__setattr__(self, "mlp_width", -(-self.width * 8 // (3 * 64)) * 64)
        self.validate()

    def validate(self) -> None:
        """Raise `ConfigError` in one sentence for the first impossible value."""
        for name in ("vocab_size", "width", "layers", "context", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if self.kv_count < 1 or self.heads % self.kv_count:
            raise ConfigError(
                f"heads {self.heads} is not a multiple of kv_heads {self.kv_count}; "
                "every key-value head serves the same number of query heads"
            )
        if self.head_size < 2 or self.head_size % 2:
            raise ConfigError(
                f"head_dim {self.head_size} must be even and at least 2: RoPE turns pairs of "
                f"channels"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(
                f"sliding_window {self.sliding_window} must be at least 1; use None for full "
                f"attention"
            )
        if self.rope_theta <= 1:
            raise ConfigError(f"rope_theta {self.rope_theta} must be above 1 (10000 is usual)")
        if self.norm_eps <= 0:
            raise ConfigError(f"norm_eps {self.norm_eps} must be above 0 (1e-5 is usual)")

    # The optional sizes once resolved, typed without None.
    @property
    def kv_count(self) -> int:
        """Key-value heads."""
        return self.kv_heads or 0

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.head_dim or 0

    @property
    def mlp_size(self) -> int:
        """Hidden channels of the feed-forward block."""
        return self.mlp_width or 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`; an unknown key is a `ConfigError`."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"unknown model setting {unknown[0]!r}; known are {', '.join(known)}")
        return cls(**values)
