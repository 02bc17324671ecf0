"""Latent attention (DeepSeek-V2, arXiv:2405.04434) in the latent itself, as its cache keeps it.

A head's key is W_k c beside the turned channels r that all heads share, its value W_v c, both of
the token's latent c. So q · (W_k c) = (W_kᵀ q) · c, and Σ p W_v c = W_v Σ p c: with queries brought
into the latent, every head attends to the same row (c, r), once as key and once as value, and only
that row is kept. To the attention it is one key head that all query heads share; as a value, r is
carried along and dropped: with keys and values of one size torch's kernels take part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import LatentAttention
from model.engine.rotation import paired, turn_
from model.engine.weights import Matrix, Weights, activation_dtype, matrix
from model.layers import RMSNorm


@dataclass(frozen=True)
class LatentHeads:
    """What stands between a block's first product and the cache, and behind its attention."""

    query: Matrix | None  # query latent -> H · D; None: the first product gave the queries
    query_norm: RMSNorm | None
    norm: RMSNorm  # of the latent
    keys: Tensor  # W_k, (H, D - R, L); not quantized, as it meets no token's row but a head's
    values: Tensor  # W_v transposed, (H, L, E); likewise
    rotary: int  # R

    @classmethod
    def of(cls, attention: LatentAttention, weights: Weights) -> "LatentHeads":
        expanding = attention.kv_b_proj.weight.to(activation_dtype(weights))
        expanding = expanding.view(-1, sum(attention.parts), attention.latent)
        keys, values = expanding.split(attention.parts, dim=1)
        query = None
        if not attention.direct:
            rows = attention.scale * attention.q_b_proj.weight
            query = matrix(paired(rows, attention.head_dim, attention.rotary), weights)
        return cls(
            query=query,
            query_norm=None if attention.direct else attention.q_a_layernorm,
            norm=attention.kv_a_layernorm,
            keys=keys.contiguous(),
            values=values.mT.contiguous(),
            rotary=attention.rotary,
        )

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return () if self.query is None else (self.query,)

    def project(self, read: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """Queries or their latent, then the latent and the shared channels, (T, … + L + R) ->
        queries (H, T, L + R) and what the cache keeps, (1, T, L + R).
        """
        heads, still, channels = self.keys.shape
        q, latent, shared = read.split(
            (read.shape[1] - channels - self.rotary, channels, self.rotary), dim=1
        )
        if self.query is not None and self.query_norm is not None:
            q = self.query(self.query_norm(q))
        q = q.view(len(read), heads, -1).transpose(0, 1)
        within = q[..., :still] @ self.keys
        q = torch.cat((within, _turned(q[..., still:], turn)), dim=-1)
        return q, torch.cat((self.norm(latent)[None], _turned(shared[None], turn)), dim=-1)

    def expand(self, attended: Tensor) -> Tensor:
        """(T, H · (L + R)) as attention gives it -> values (T, H · E)."""
        heads, channels, _ = self.values.shape
        within = attended.view(len(attended), heads, -1)[..., :channels]
        return (within.transpose(0, 1) @ self.values).transpose(0, 1).flatten(1)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """x (H, T, R) turned, in float32."""
    # Not `Tensor.to`: of a single row it keeps the strides, and odd ones are no complex numbers'.
    return turn_(torch.empty(x.shape, device=x.device).copy_(x), turn)
