"""One block's parameters as the runner multiplies them: stacked, with the norms folded in.

A norm before a matrix is a gain g, and of LayerNorm an offset b and a mean μ as well:
W (g ∘ (x - μ) / s + b) = (W ∘ g)(I - 11ᵀ/C) x / s + W b. All but the number s of each row is known
beforehand, so a norm costs one reduction and one division. The scale of attention's scores is in
what gives the queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.attention import Attention, LatentAttention
from model.config import ModelConfig
from model.engine.experts import ExpertWeights
from model.engine.latent_heads import LatentHeads
from model.engine.rotation import paired
from model.engine.weights import Matrix, Weights, activation_dtype, matrix
from model.layers import FeedForward, LayerNorm, RMSNorm
from model.moe import MixtureOfExperts
from model.transformer import Block

Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FeedForwardWeights:
    """The matrices of a feed-forward, and its biases where the family has any."""

    up: Matrix  # C -> 2 M, gate before up; C -> M without a gate
    up_bias: Tensor | None
    down: Matrix
    down_bias: Tensor | None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return self.up, self.down

    @classmethod
    def of(
        cls, mlp: FeedForward, norm: RMSNorm | LayerNorm, weights: Weights
    ) -> "FeedForwardWeights":
        dtype = activation_dtype(weights)
        gates = [mlp.gate_proj] if mlp.gate_proj is not None else []
        up, up_bias = _behind(norm, [*gates, mlp.up_proj])
        return cls(
            up=matrix(up, weights),
            up_bias=_cast(up_bias, dtype),
            down=matrix(mlp.down_proj.weight, weights),
            down_bias=_cast(mlp.down_proj.bias, dtype),
        )


@dataclass(frozen=True)
class LayerWeights:
    """The matrices of a block, those that read the same input stacked along their outputs, and
    their biases where the family has any. Norms behind a sublayer (Gemma's) stay norms.
    """

    qkv: Matrix  # C -> (H + 2 H_kv) D; with latents, C -> queries or their latent, then keys'
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # (H + H_kv, 1, D), float32: the query norm's gain, the key norm's
    latent: LatentHeads | None
    output: Matrix
    output_bias: Tensor | None
    output_norm: Norm | None
    mlp: FeedForwardWeights | ExpertWeights
    mlp_norm: Norm | None
    window: int | None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """In the order in which a step reads them."""
        latent = () if self.latent is None else self.latent.matrices
        return self.qkv, *latent, self.output, *self.mlp.matrices

    @classmethod
    def of(cls, block: nn.Module, config: ModelConfig, weights: Weights) -> "LayerWeights":
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        assert isinstance(attention, Attention)
        dtype = activation_dtype(weights)
        latent = None
        if isinstance(attention, LatentAttention):
            latent = LatentHeads.of(attention, weights)
        stacked, stacked_bias = _behind(block.input_layernorm, _first(attention))
        # A norm of the queries would undo their scale: then its gain has it.
        scale = attention.scale if attention.q_norm is None else 1.0
        qkv = _arranged(attention, config, stacked, scale)
        qkv_bias = None
        if stacked_bias is not None:
            qkv_bias = _arranged(attention, config, stacked_bias, scale)
        after = block.placement == "both"
        before_mlp = block.pre_feedforward_layernorm if after else block.post_attention_layernorm
        kind = ExpertWeights if isinstance(mlp, MixtureOfExperts) else FeedForwardWeights
        return cls(
            qkv=matrix(qkv, weights),
            qkv_bias=_cast(qkv_bias, dtype),
            qk_norm=_qk_norm(attention, config),
            latent=latent,
            output=matrix(attention.o_proj.weight, weights),
            output_bias=_cast(attention.o_proj.bias, dtype),
            output_norm=block.post_attention_layernorm if after else None,
            mlp=kind.of(mlp, before_mlp, weights),
            mlp_norm=block.post_feedforward_layernorm if after else None,
            window=attention.window,
        )


def _first(attention: Attention) -> list[nn.Linear]:
    """The projections that read a block's input."""
    if isinstance(attention, LatentAttention):
        queries = attention.q_proj if attention.direct else attention.q_a_proj
        return [queries, attention.kv_a_proj_with_mqa]
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _arranged(
    attention: Attention, config: ModelConfig, rows: Tensor, scale: float = 1.0
) -> Tensor:
    """What `_first` gives, with the queries times `scale`, and the channels that rotation turns in
    the order of `rotation.turn_`.
    """
    if isinstance(attention, LatentAttention):
        last = attention.latent + attention.rotary
        queries, latent = rows.split((len(rows) - last, last))
        if attention.direct:
            queries = paired(scale * queries, attention.head_dim, attention.rotary)
        return torch.cat((queries, paired(latent, last, attention.rotary)))
    size = config.head_size
    ends = (config.heads * size, (config.heads + config.kv_count) * size)
    queries, keys, values = rows.tensor_split(ends)
    read = torch.cat((scale * queries, keys))
    return torch.cat((paired(read, size, size) if config.positions == "rope" else read, values))


def gain(norm: RMSNorm | LayerNorm) -> Tensor:
    """What a norm multiplies by."""
    return norm.weight + norm.offset if isinstance(norm, RMSNorm) else norm.weight


def _behind(
    norm: RMSNorm | LayerNorm, projections: Sequence[nn.Linear]
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of projections that read what the norm gives, one below the other."""
    weight = torch.cat([projection.weight for projection in projections])
    biases: list[Tensor] = [p.bias for p in projections if p.bias is not None]
    bias = torch.cat(biases) if biases else None
    folded = weight * gain(norm)
    if isinstance(norm, LayerNorm):
        offset = weight @ norm.bias
        bias = offset if bias is None else bias + offset
        folded = folded - folded.mean(1, keepdim=True)
    return folded, bias


def _qk_norm(attention: Attention, config: ModelConfig) -> Tensor | None:
    if attention.q_norm is None or attention.k_norm is None:
        return None
    query = gain(attention.q_norm).expand(config.heads, -1)
    gains = torch.cat((query, gain(attention.k_norm).expand(config.kv_count, -1)))
    return _arranged(attention, config, gains.flatten(), attention.scale).view_as(gains)[:, None]


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
