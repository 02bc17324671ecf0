"""The shape of a model: one frozen dataclass whose flags tell the families apart.

There is no class per family. Llama is the defaults; Mistral is Llama with `sliding_window`; Qwen3
is Llama with `qk_norm` (and usually a `head_dim` of its own); Qwen2 is Llama with `qkv_bias`;
GPT-2 has learned positions, LayerNorm and biases; Gemma scales, caps and normalises more; DeepSeek
has latent attention and experts; BERT looks both ways. A flag stands here only if every part of
`model/` honours it or names it in an error; `model.families` says which combinations have a name in
the outside world.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from model.rope_scaling import RopeScaling


class ConfigError(ValueError):
    """A model that cannot exist. The message names the value and the remedy."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and flags of a transformer. Raises `ConfigError` when inconsistent."""

    # Sizes
    vocab_size: int = 4096
    width: int = 192  # of the residual stream (Hugging Face: hidden_size)
    layers: int = 6
    context: int = 512  # longest sequence in tokens (max_position_embeddings)

    # Attention
    heads: int = 3
    kv_heads: int | None = None  # fewer than heads: grouped-query attention; None: as many as heads
    head_dim: int | None = None  # of queries and keys; None: width / heads
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's query and key, before RoPE
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None  # not of layers that have a window_rope_theta

    # Feed-forward: activation(gate) * up -> down
    mlp_width: int | None = None  # None: 8/3 of the width, rounded up to a multiple of 64

    # Norms and embeddings
    norm_eps: float = 1e-5
    tied_embeddings: bool = True  # the output matrix is the embedding matrix

    # What sets GPT-2, Gemma and BERT apart
    causal: bool = True  # False: every token sees the whole sequence, and the loss is masked-LM
    positions: Literal["rope", "learned"] = "rope"
    norm: Literal["rms", "rms+1", "layer"] = "rms"  # rms+1: weights are stored minus one (Gemma)
    norm_placement: Literal["pre", "post", "both"] = "pre"  # of each sublayer: see `Block`
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True  # False: down(activation(up))
    linear_bias: bool = False  # of the attention's output and of the feed-forward
    scaled_embeddings: bool = False  # input embeddings times √width
    query_scale: float | None = None  # scores are divided by its root; None: head_dim
    attention_softcap: float | None = None  # scores become cap · tanh(scores / cap)
    logit_softcap: float | None = None
    full_attention_every: int | None = None  # with a window: layers n-1, 2n-1, … see everything
    window_rope_theta: float | None = None  # of the layers with a window; None: rope_theta
    token_types: int = 0  # rows of BERT's segment embedding; every token gets row 0
    masked_head: bool = False  # BERT's: dense, activation, norm before the output matrix, its bias

    # Latent attention (DeepSeek): keys and values are made from `kv_latent` channels per token
    kv_latent: int | None = None
    query_latent: int | None = None  # queries likewise; None: from the residual stream
    rope_dim: int | None = None  # of head_dim's channels, those turned, shared by all heads' keys
    value_dim: int | None = None  # channels of a head's values; None: head_dim

    # Experts (DeepSeek): the feed-forward of all layers but the first `dense_layers`
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0  # hidden channels of one expert
    shared_experts: int = 0  # experts' widths of feed-forward that every token passes, beside them
    dense_layers: int = 0
    expert_groups: int = 1  # experts are chosen from the `groups_per_token` best groups only
    groups_per_token: int = 1
    routing: Literal["softmax", "sigmoid"] = "softmax"  # sigmoid: with a balancing bias per expert
    normalised_routing: bool = False  # the weights of a token's experts sum to 1 before scaling
    routing_scale: float = 1.0

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
        if self.kv_latent is not None and self.value_dim is None:
            object.__setattr__(self, "value_dim", self.head_dim)
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
        if self.head_size < 2 or (self.positions == "rope" and self.rotary_size % 2):
            raise ConfigError(
                f"head_dim {self.head_size} must be even and at least 2: RoPE turns pairs of "
                f"channels"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(
                f"sliding_window {self.sliding_window} must be at least 1; use None for full "
                f"attention"
            )
        for name in ("rope_theta", "window_rope_theta"):
            value = getattr(self, name)
            if value is not None and value <= 1:
                raise ConfigError(f"{name} {value} must be above 1 (10000 is usual)")
        if self.rope_scaling is not None:
            problem = self.rope_scaling.problem()
            if problem is None and self.positions != "rope":
                problem = f"rope_scaling means nothing with positions {self.positions!r}"
            if problem is not None:
                raise ConfigError(problem)
        if self.norm_eps <= 0:
            raise ConfigError(f"norm_eps {self.norm_eps} must be above 0 (1e-5 is usual)")
        for name in ("query_scale", "attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} {value} must be above 0; use None for none")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}"
                )
        self._validate_pairs()
        if self.kv_latent is not None:
            self._validate_latent()
        if self.experts:
            self._validate_experts()

    def _validate_pairs(self) -> None:
        """Flags that mean nothing without another one: none is accepted and ignored."""
        for name, needed in NEEDS.items():
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default and not getattr(self, needed):
                raise ConfigError(f"{name} {getattr(self, name)} means nothing without {needed}")
        if not self.causal and self.sliding_window is not None:
            raise ConfigError("sliding_window is of causal models; use None with causal=False")
        if self.full_attention_every is not None and self.full_attention_every < 2:
            raise ConfigError(
                f"full_attention_every {self.full_attention_every} must be at least 2; "
                "without a window in any layer, sliding_window is None"
            )
        if self.positions == "learned" and (self.kv_latent is not None or self.qk_norm):
            raise ConfigError(
                "learned positions go with neither kv_latent nor qk_norm; use positions='rope'"
            )
        if self.norm == "layer" and self.qk_norm:
            raise ConfigError(
                "qk_norm is an RMS norm, and norm is 'layer'; use norm 'rms' or leave qk_norm out"
            )
        if self.masked_head and not self.tied_embeddings:
            raise ConfigError("masked_head needs tied_embeddings")

    def _validate_latent(self) -> None:
        for name in ("kv_latent", "rope_dim"):
            if (getattr(self, name) or 0) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1 with kv_latent")
        if self.rotary_size >= self.head_size:
            raise ConfigError(
                f"rope_dim {self.rope_dim} must be below head_dim {self.head_dim}: the other "
                f"channels come from the latent"
            )
        if self.kv_count != self.heads or self.qkv_bias or self.qk_norm:
            raise ConfigError(
                "kv_latent shares keys and values among all heads already: kv_heads must equal "
                "heads, without qkv_bias and qk_norm"
            )

    def _validate_experts(self) -> None:
        if not 1 <= self.experts_per_token <= self.experts or self.expert_width < 1:
            raise ConfigError(
                f"experts_per_token {self.experts_per_token} must be between 1 and experts "
                f"{self.experts}, expert_width {self.expert_width} at least 1"
            )
        if self.experts % self.expert_groups or not 1 <= self.groups_per_token <= (
            self.expert_groups
        ):
            raise ConfigError(
                f"experts {self.experts} must be a multiple of expert_groups {self.expert_groups}, "
                f"and groups_per_token {self.groups_per_token} between 1 and that"
            )
        eligible = self.experts // self.expert_groups * self.groups_per_token
        if self.experts_per_token > eligible:
            raise ConfigError(
                f"experts_per_token {self.experts_per_token} is more than the {eligible} experts "
                f"of {self.groups_per_token} groups; raise groups_per_token"
            )
        if self.linear_bias or not self.gated_mlp:
            raise ConfigError("experts are gated and have no biases")
        if self.routing == "sigmoid" and self.experts // self.expert_groups < 2:
            raise ConfigError(
                f"{self.expert_groups} expert_groups of one expert: groups are ranked by their "
                f"two best experts; use fewer groups"
            )

    # The optional sizes once resolved, typed without None.
    @property
    def kv_count(self) -> int:
        """Key-value heads."""
        return self.kv_heads or 0

    @property
    def head_size(self) -> int:
        """Channels of one head's queries and keys."""
        return self.head_dim or 0

    @property
    def value_size(self) -> int:
        """Channels of one head's values."""
        return self.value_dim or self.head_size

    @property
    def rotary_size(self) -> int:
        """Channels of a head that RoPE turns."""
        return self.rope_dim or self.head_size

    @property
    def mlp_size(self) -> int:
        """Hidden channels of the feed-forward block."""
        return self.mlp_width or 0

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer (from 0); None: it sees everything."""
        every = self.full_attention_every
        return None if every is not None and (layer + 1) % every == 0 else self.sliding_window

    def has_experts(self, layer: int) -> bool:
        return self.experts > 0 and layer >= self.dense_layers

    def require_tensor(self, tensor: int) -> None:
        """Raises `ConfigError` when groups of `tensor` ranks cannot share the blocks' matrices."""
        if tensor > 1 and (self.kv_latent is not None or self.experts):
            raise ConfigError(
                "tensor parallelism is for plain attention and feed-forward, not for kv_latent or "
                "experts; use tensor 1, and sharded to save memory"
            )
        sizes = {"heads": self.heads, "kv_heads": self.kv_count, "mlp_width": self.mlp_size}
        for name, size in sizes.items():
            if size % tensor:
                raise ConfigError(f"{name} {size} is not a multiple of tensor {tensor}")

    def not_generated(self) -> list[str]:
        """The flags that are set and that `model.engine` does not generate with: those of BERT."""
        ours = type(self).__dataclass_fields__
        names = [name for name in NOT_GENERATED if getattr(self, name) != ours[name].default]
        return names + ["norm_placement"] * (self.norm_placement == "post")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`; an unknown key is a `ConfigError`."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"unknown model setting {unknown[0]!r}; known are {', '.join(known)}")
        scaling = values.get("rope_scaling")
        if isinstance(scaling, dict):
            values = values | {"rope_scaling": RopeScaling(**scaling)}
        return cls(**values)


NOT_GENERATED = ("causal", "token_types", "masked_head")
CHOICES = {
    "positions": ("rope", "learned"),
    "norm": ("rms", "rms+1", "layer"),
    "norm_placement": ("pre", "post", "both"),
    "activation": ("silu", "gelu", "gelu_tanh"),
    "routing": ("softmax", "sigmoid"),
}
NEEDS = {
    "full_attention_every": "sliding_window",
    "window_rope_theta": "full_attention_every",
    "query_latent": "kv_latent",
    "rope_dim": "kv_latent",
    "value_dim": "kv_latent",
    **dict.fromkeys(
        (
            "experts_per_token",
            "expert_width",
            "shared_experts",
            "dense_layers",
            "expert_groups",
            "groups_per_token",
            "routing",
            "normalised_routing",
            "routing_scale",
        ),
        "experts",
    ),
}
