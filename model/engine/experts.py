"""A feed-forward of experts as the engine multiplies it: only those that a token has chosen.

The choice is the model's own (`model.moe.Router`, in float32 whatever the weights are), made of
rows that are normed first: folding the norm into every expert would fold it as often.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.engine.weights import Matrix, Weights, matrix, usual_rows
from model.layers import activate
from model.moe import MixtureOfExperts, Router


@dataclass(frozen=True)
class Expert:
    """down(activation(gate x) · up x)."""

    up: Matrix  # C -> 2 M, gate before up
    down: Matrix
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        """(T, C) -> (T, C)."""
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(activate(gate, self.activation).mul_(up))


@dataclass(frozen=True)
class ExpertWeights:
    """The matrices of a block's experts, and the norm before them."""

    norm: Callable[[Tensor], Tensor]
    router: Router
    routed: list[Expert]
    shared: Expert | None

    @classmethod
    def of(
        cls, mlp: MixtureOfExperts, norm: Callable[[Tensor], Tensor], weights: Weights
    ) -> "ExpertWeights":
        stacked, shared = mlp.experts, mlp.shared_experts
        activation = stacked.activation

        def expert(up: Tensor, down: Tensor) -> Expert:
            return Expert(matrix(up, weights), matrix(down, weights), activation)

        common = None
        if shared is not None:
            assert shared.gate_proj is not None  # `ModelConfig` refuses experts without gates
            gate_up = torch.cat((shared.gate_proj.weight, shared.up_proj.weight))
            common = expert(gate_up, shared.down_proj.weight)
        pairs = zip(stacked.gate_up_proj, stacked.down_proj, strict=True)
        return cls(norm, mlp.gate, [expert(*pair) for pair in pairs], common)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        shared = [] if self.shared is None else [self.shared]
        return tuple(matrix for one in (*shared, *self.routed) for matrix in (one.up, one.down))

    def __call__(self, x: Tensor) -> Tensor:
        """(T, C) before the norm -> (T, C), what the experts add to it.

        Tokens are sorted by expert, so that each that was chosen is one product, of a usual number
        of rows.
        """
        x = self.norm(x)
        chosen, weights = self.router.choose(x)
        y = torch.zeros_like(x) if self.shared is None else self.shared(x)
        order = chosen.flatten().argsort(stable=True)
        token = order // chosen.shape[1]
        weights = weights.flatten()[order, None].to(x.dtype)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.routed)).tolist()
        first = 0
        for expert, count in zip(self.routed, counts, strict=True):
            if count == 0:
                continue
            rows = slice(first, first + count)
            padded = F.pad(x[token[rows]], (0, 0, 0, usual_rows(count) - count))
            y.index_add_(0, token[rows], expert(padded)[:count].mul_(weights[rows]))
            first += count
        return y
