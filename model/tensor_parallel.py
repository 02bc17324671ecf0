"""Tensor parallelism: each block's matrices divided among a group of ranks (arXiv:1909.08053).

    x ─┬─ q k v by outputs: whole heads ───── attention ── o by inputs ──┐
       │                                                       sum over the group
    x ─┴─ gate up by outputs: hidden channels ─ product ── down by inputs ┘

A rank computes some heads and some hidden channels of every token of its slice of the batch. Norms,
embeddings and the output matrix are whole on every rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from model.sharding import Ranks
from model.transformer import Transformer

BY_OUTPUTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
BY_INPUTS = ("self_attn.o_proj", "mlp.down_proj")


def divide_blocks(model: Transformer, ranks: Ranks) -> None:
    """Leave each rank its part of every block; `ModelConfig.require_tensor` says what can be."""
    assert ranks.mesh is not None
    plan: dict[str, ParallelStyle] = dict.fromkeys(BY_OUTPUTS, ColwiseParallel())
    plan |= dict.fromkeys(BY_INPUTS, RowwiseParallel())
    for block in model.model.layers:
        there = {name: style for name, style in plan.items() if _has(block, name)}
        parallelize_module(block, ranks.mesh["tensor"], there)


def _has(block: torch.nn.Module, name: str) -> bool:
    return dict(block.named_modules()).get(name) is not None


@torch.no_grad()
def join_gradients(model: Transformer, ranks: Ranks) -> None:
    """After the backward pass: what is whole on every rank has one gradient in a tensor group.

    A norm over a head's channels has seen this rank's heads only: those gradients are added. All
    others were computed from the same numbers; they are averaged so that copies never drift apart
    where a device does not add in the same order twice.
    """
    assert ranks.mesh is not None
    group, size = ranks.mesh.get_group("tensor"), ranks.mesh["tensor"].size()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is None or _divided_in_group(parameter):
            continue
        part = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        dist.all_reduce(part, group=group)
        if not name.endswith(("q_norm.weight", "k_norm.weight")):
            part /= size


def _divided_in_group(parameter: Tensor) -> bool:
    names = parameter.device_mesh.mesh_dim_names if isinstance(parameter, DTensor) else None
    return "tensor" in (names or ())
