"""Optimisers: Muon for the matrices inside the blocks, AdamW for everything else.

Both are kept under their parameters' names, so that a checkpoint is plain tensors and does not
depend on the order in which parameters were registered.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from model.config import ConfigError
from model.sharding import divided_like, is_divided, together, whole


@dataclass(frozen=True)
class OptimConfig:
    """Peak rates and decay. Weight decay is decoupled: parameter *= 1 - rate * decay
    (arXiv:1711.05101), for matrices only.

    learning_rate: AdamW's, for norms, biases and an untied output matrix (and for all, with kind
        adamw);
    embedding_learning_rate: AdamW's, for the embedding (tied or not); None: as learning_rate;
    muon_learning_rate: for the matrices inside the blocks;
    base_width: the width these rates, and the initialisation, were found at (`model.width`); 0:
        the model's own.
    """

    kind: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 3e-3
    embedding_learning_rate: float | None = None
    muon_learning_rate: float = 0.02
    muon_momentum: float = 0.95
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-10
    base_width: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("muon", "adamw"):
            raise ConfigError(f"optimizer kind {self.kind!r} is not one of muon, adamw")
        if self.base_width < 0:
            raise ConfigError(f"optimizer base_width {self.base_width} must be 0 or a width")
        for name in ("learning_rate", "muon_learning_rate", "eps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"optimizer {name} {getattr(self, name)} must be above 0")
        for name in ("muon_momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer {name} {getattr(self, name)} must be in [0, 1)")

    @property
    def matrix_rate(self) -> float:
        """The peak rate of the matrices inside the blocks."""
        return self.muon_learning_rate if self.kind == "muon" else self.learning_rate


# Coefficients of the quintic whose iteration drives all singular values towards 1, found by Keller
# Jordan to maximise the slope at 0: it converges not to 1 but into about [0.7, 1.2], which serves
# as well.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """U Vᵀ of each matrix (n, rows, columns), roughly: Newton-Schulz in `dtype` instead of an SVD.

    Source: Keller Jordan, "Muon" (2024), https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    wide = x.mT if x.shape[-2] > x.shape[-1] else x  # the Gram matrix is then the smaller one
    # The Frobenius norm bounds the largest singular value, so all start in [0, 1].
    x = wide / (wide.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(dtype)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


class Muon:
    """Nesterov momentum, orthogonalised; same-shaped matrices go through Newton-Schulz as one
    batch. Matrices divided among ranks are gathered for it, one after another.

    The update is scaled by √max(1, rows/columns), so that one rate suits all shapes and widths: its
    spectral norm then asks of every layer the same relative change of what it puts out, which is
    the condition for rates to transfer across widths (arXiv:2310.17813).
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], config: OptimConfig, dtype: torch.dtype
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.groups: list[tuple[list[str], list[Tensor], list[Tensor]]] = []
        for group in together(parameters.items()):
            by_shape: dict[torch.Size, list[str]] = defaultdict(list)
            for name, parameter in group.items():
                by_shape[parameter.shape].append(name)
            for names in by_shape.values():
                alike = [parameters[name] for name in names]
                self.groups.append((names, alike, [torch.zeros_like(p) for p in alike]))

    @torch.no_grad()
    def step(self, multiplier: float) -> None:
        rate = self.config.muon_learning_rate * multiplier
        beta = self.config.muon_momentum
        for _, parameters, momentum in self.groups:
            gradients = [_gradient(parameter) for parameter in parameters]
            torch._foreach_lerp_(momentum, gradients, 1 - beta)
            nesterov = torch._foreach_lerp(gradients, momentum, beta)
            # Divided matrices are gathered one by one: all of a shape would be too large.
            at_once = 1 if is_divided(parameters[0]) else len(parameters)
            updates = []
            for first in range(0, len(parameters), at_once):
                piece = slice(first, first + at_once)
                directions = torch.stack([whole(direction) for direction in nesterov[piece]])
                rows, columns = directions.shape[-2:]
                update = orthogonalise(directions.view(-1, rows, columns), dtype=self.dtype)
                parts = update.to(directions.dtype).contiguous().view_as(directions).unbind(0)
                pairs = zip(parts, parameters[piece], strict=True)
                updates += [divided_like(part, parameter) for part, parameter in pairs]
            if self.config.weight_decay:
                torch._foreach_mul_(parameters, 1 - rate * self.config.weight_decay)
            torch._foreach_add_(parameters, updates, alpha=-rate * max(1, rows / columns) ** 0.5)

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}.momentum": tensor
            for names, _, momentum in self.groups
            for name, tensor in zip(names, momentum, strict=True)
        }


class Optimizer:
    """All of a model's parameters under one `step`; which goes where is `split`.

    width_ratio: the width the rates were found at over the model's (`model.width`).
    """

    def __init__(
        self, model: nn.Module, config: OptimConfig, *, bf16: bool = True, width_ratio: float = 1.0
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices, embeddings, rest = split(named)
        if config.kind == "adamw":
            matrices, rest = {}, {**matrices, **rest}
        self.config = config
        self.muon = Muon(matrices, config, torch.bfloat16 if bf16 else torch.float32)
        # A norm's gain or a bias is a scale of its own; only matrices decay.
        scales = {n: p for n, p in rest.items() if p.ndim < 2}
        inputs = {n: p for n, p in rest.items() if "embed_" in n}
        wide = {n: p for n, p in rest.items() if n not in scales and n not in inputs}
        rate, decay = config.learning_rate, config.weight_decay
        kinds = [
            (scales, rate, 0.0),
            (inputs, rate, decay),
            (wide, rate * width_ratio, decay / width_ratio),
            (embeddings, config.embedding_learning_rate or rate, decay),
        ]
        groups = [
            ({"rate": peak, "weight_decay": shrink}, alike)
            for parameters, peak, shrink in kinds
            for alike in together(parameters.items())
        ]
        self.names = [name for _, alike in groups for name in alike]
        self.adamw = torch.optim.AdamW(
            [{"params": list(alike.values()), **rates} for rates, alike in groups],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        self.parameters = [list(alike.values()) for alike in together(named.items())]

    def step(self, multiplier: float) -> None:
        """One update at `multiplier` times the peak rates, from the gradients in place."""
        for group in self.adamw.param_groups:
            group["lr"] = group["rate"] * multiplier
        self.adamw.step()
        self.muon.step(multiplier)

    def zero_grad(self) -> None:
        for parameter in chain.from_iterable(self.parameters):
            parameter.grad = None

    def clip(self, limit: float | None) -> Tensor:
        """The global gradient norm; gradients are scaled down to `limit` when it is above."""
        alike = [[_gradient(parameter) for parameter in group] for group in self.parameters]
        norms = [whole(norm) for gradients in alike for norm in torch._foreach_norm(gradients)]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if limit is not None and bool(norm + 1e-6 > limit):
            for gradients in alike:
                torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        return norm

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the state, by parameter name; safetensors-ready."""
        tensors = self.muon.state()
        for name, parameter in zip(self.names, self._adamw_parameters(), strict=True):
            for key, value in self.adamw.state[parameter].items():
                tensors[f"{name}.{key}"] = value
        return tensors

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`, for the same parameters."""
        for key, tensor in self.blank_state().items():
            tensor.copy_(divided_like(state[key].to(tensor.device), tensor))

    def blank_state(self) -> dict[str, Tensor]:
        """`state` before the first step, which makes AdamW's: tensors to be filled."""
        for parameter in self._adamw_parameters():
            self.adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return self.state()

    def _adamw_parameters(self) -> Iterable[Tensor]:
        return (parameter for group in self.adamw.param_groups for parameter in group["params"])


def split(
    named: dict[str, nn.Parameter],
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(matrices inside blocks, input embeddings, the rest): Muon's, AdamW's, AdamW's. Experts'
    matrices are stacked: each is one of Muon's.

    Muon is for matrices that map hidden to hidden; embeddings and the output matrix have one side
    that is a vocabulary, where the spectral norm means nothing.
    """
    router = ".mlp.gate.weight"  # its outputs are experts, as a vocabulary's are words
    matrices = {
        n: p for n, p in named.items() if p.ndim >= 2 and ".layers." in n and not n.endswith(router)
    }
    embeddings = {n: p for n, p in named.items() if "embed_tokens" in n}
    rest = {n: p for n, p in named.items() if n not in matrices and n not in embeddings}
    return matrices, embeddings, rest


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
