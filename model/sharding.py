"""FSDP2: parameters, gradients and optimiser state divided among ranks (`fully_shard`).

Each block is gathered when its turn comes and let go after it; what stands outside the blocks stays
gathered from the forward to the backward pass, because the loss uses the output matrix there.
Checkpoints hold whole tensors, so that a run goes on with any number of ranks, or with none.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model.transformer import Transformer


def shard(module: nn.Module, model: Transformer) -> nn.Module:
    """Divide the parameters of `model` among all ranks; `module` computes its loss."""
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(module)
    return module


def is_divided(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be divided; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, divided as `model` is."""
    if not isinstance(model, DTensor):
        return tensor
    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with whole tensors; every rank must ask."""
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def load_whole_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The inverse of `whole_state`."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(divided_like(state[name].to(tensor.device), tensor))


def whole_model(model: Transformer) -> Transformer:
    """A model without division, with the same weights; every rank must ask."""
    if not any(map(is_divided, model.parameters())):
        return model
    state = whole_state(model)
    with torch.device("meta"):
        single = Transformer(model.config)
    single.to_empty(device="cpu")
    single.load_state_dict({name: tensor.cpu() for name, tensor in state.items()})
    return single
