"""Mixture of experts as in DeepSeek: a token passes the shared experts and a few routed ones.

Balance without an auxiliary loss (arXiv:2408.15664): with sigmoid routing each expert has a bias
that counts only in the choice, not in the weight, and after every step the bias of overloaded
experts goes down and of the others up by a constant (`balance`). No gradient is spent on evenness.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import FeedForward, activate


class Router(nn.Module):
    """Which experts a token goes to, and with which weights; computed in float32.

    softmax (DeepSeek-V2): the best by probability, groups ranked by their best expert;
    sigmoid (DeepSeek-V3): the best by score + bias, groups ranked by the sum of their best two.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, config.width))
        if config.routing == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.experts))
        self.load: Tensor | None = None  # (experts,) tokens each got since the last `balance`

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `choose`; while training, the choice counts as load."""
        chosen, weights = self.choose(x)
        if self.training:
            load = torch.bincount(chosen.flatten(), minlength=self.config.experts).float()
            self.load = load if self.load is None else self.load + load
        return chosen, weights

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) -> indices (N, experts_per_token) and weights likewise, float32."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        if config.routing == "sigmoid":
            scores = logits.sigmoid()
            ranked = scores + self.e_score_correction_bias
        else:
            scores = ranked = logits.softmax(-1)
        if config.groups_per_token < config.expert_groups:
            ranked = ranked.masked_fill(~self._eligible(ranked), -torch.inf)
        chosen = ranked.topk(config.experts_per_token, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        if config.normalised_routing:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * config.routing_scale

    def _eligible(self, ranked: Tensor) -> Tensor:
        """(N, experts) bool: the experts of each token's best groups."""
        config = self.config
        groups = ranked.unflatten(1, (config.expert_groups, -1))
        best = groups.topk(2 if config.routing == "sigmoid" else 1, dim=-1).values.sum(-1)
        allowed = torch.zeros_like(best, dtype=torch.bool)
        allowed.scatter_(1, best.topk(config.groups_per_token, dim=-1).indices, True)
        return allowed.repeat_interleave(groups.shape[-1], dim=1)


class Experts(nn.Module):
    """All experts' matrices stacked; gate and up of an expert lie one below the other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, hidden = config.experts, config.expert_width
        self.activation = config.activation
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * hidden, config.width))
        self.down_proj = nn.Parameter(torch.empty(count, config.width, hidden))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x (N, C), chosen and weights (N, K) -> (N, C): the weighted sum of the chosen experts.

        Tokens are sorted by expert, so that each expert is one product; one that no token chose
        still takes part with no rows, and so has a gradient (of zeros) on every rank.
        """
        order = chosen.flatten().argsort(stable=True)
        token = order // chosen.shape[1]
        counts = torch.bincount(chosen.flatten(), minlength=len(self.gate_up_proj)).tolist()
        outputs = []
        for rows, gate_up, down in zip(
            x[token].split(counts), self.gate_up_proj, self.down_proj, strict=True
        ):
            gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
            outputs.append(F.linear(activate(gate, self.activation) * up, down))
        weighted = torch.cat(outputs) * weights.flatten()[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add_(0, token, weighted.to(x.dtype))


class MixtureOfExperts(nn.Module):
    """x -> shared experts(x) + Σ weight · expert(x) over the chosen ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.shared_experts * config.expert_width
        self.shared_experts = FeedForward(config, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        flat = x.flatten(0, -2)
        routed = self.experts(flat, *self.gate(flat)).view_as(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)


@contextlib.contextmanager
def uncounted(model: nn.Module, idle: bool) -> Iterator[None]:
    """With `idle`, tokens that pass meanwhile are no load that `balance` should follow."""
    routers = [module for module in model.modules() if isinstance(module, Router)] if idle else []
    loads = [router.load for router in routers]
    yield
    for router, load in zip(routers, loads, strict=True):
        router.load = load


@torch.no_grad()
def balance(model: nn.Module, rate: float) -> float | None:
    """After a step: move each expert's bias by `rate` towards even load, over all ranks.

    Returns how uneven the loads were: the busiest expert's over the mean, of the worst layer; None
    for a model without experts. Softmax routing has no bias: its load is measured only.
    """
    worst = None
    for router in (module for module in model.modules() if isinstance(module, Router)):
        load, router.load = router.load, None
        if load is None:
            continue
        if dist.is_initialized():
            dist.all_reduce(load)
        mean = load.mean()
        if router.config.routing == "sigmoid":
            router.e_score_correction_bias += rate * (mean - load).sign()
        worst = max(worst or 0.0, float(load.max() / mean))
    return worst
