"""What is divided among the ranks of a run: the batch, and if asked for the weights.

`SummedGradients` joins the ranks of a run on CPUs that each have all weights; on GPUs DDP does.

FSDP2 (`shard`) divides parameters, gradients and optimiser state: each block is gathered when its
turn comes, in the dtype it computes in, and let go after it; what stands outside the blocks stays
gathered from the forward to the backward pass, because the loss uses the output matrix there.
Tensor parallelism (`model.tensor_parallel`) divides the work of each block as well.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model.moe import Router
from model.transformer import Transformer


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run: it is number `index` of the `count` that each read a slice
    of every batch. With a mesh of the dimensions data and tensor, those of one tensor group share
    the blocks' matrices and read the same slice.
    """

    index: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None

    @classmethod
    def here(cls, tensor: int, device: torch.device) -> "Ranks":
        """Of the process group that is initialised, if there is one, in groups of `tensor`."""
        if not dist.is_initialized():
            return cls()
        if tensor == 1:
            return cls(dist.get_rank(), dist.get_world_size())
        groups = dist.get_world_size() // tensor
        mesh = init_device_mesh(device.type, (groups, tensor), mesh_dim_names=("data", "tensor"))
        return cls(mesh.get_local_rank("data"), groups, mesh)

    def add(self, values: Tensor) -> None:
        """In place, the sum over the slices of a batch."""
        if self.count > 1:
            group = None if self.mesh is None else self.mesh.get_group("data")
            dist.all_reduce(values, group=group)


class SummedGradients:
    """The gradients of copies of a model on CPUs, added over all that read a slice.

    DDP finds out in the first step it sees in which order it adds, so three ranks or more that go
    on from a checkpoint would round otherwise than those that never stopped. Here all gradients
    lie in one buffer, by the order of parameters; and a CPU has nothing to overlap the exchange
    with: one of all is quicker than many (two ranks, 12 M parameters: 0.45 s a step, not 0.46).
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffer = torch.zeros(sum(parameter.numel() for parameter in parameters))
        self._handles = []
        parts = self.buffer.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            dist.broadcast(parameter.data, 0)
            place = partial(_move_gradient, part.view_as(parameter))
            self._handles.append(parameter.register_post_accumulate_grad_hook(place))

    def add(self) -> None:
        """After the last backward pass of a step; every rank must call."""
        self.ranks.add(self.buffer)

    def let_go(self) -> None:
        for handle in self._handles:
            handle.remove()


def _move_gradient(place: Tensor, parameter: Tensor) -> None:
    """Into the buffer; what later micro-batches bring is added there by itself."""
    gradient = parameter.grad
    if gradient is not None and gradient.data_ptr() != place.data_ptr():
        parameter.grad = place.copy_(gradient)


def shard(module: nn.Module, model: Transformer, ranks: Ranks, *, bf16: bool) -> nn.Module:
    """Divide the parameters of `model` among all that read a slice; `module` computes its loss.

    bf16: blocks are gathered in bf16, and their gradients added in float32. Autocast would keep its
    own casts of what was gathered in float32, the whole model's, until the step ends. Two things
    are gathered in float32 still: routers, which choose in float32, and the tables outside the
    blocks, where the gradients of all places of a token are added.
    """
    mesh = None if ranks.mesh is None else ranks.mesh["data"]
    rough = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        if not bf16:
            fully_shard(block, mesh=mesh)
            continue
        for router in (part for part in block.modules() if isinstance(part, Router)):
            fully_shard(router, mesh=mesh)
        fully_shard(block, mesh=mesh, mp_policy=rough)
    fully_shard(module, mesh=mesh)
    return module


@contextlib.contextmanager
def synchronised(module: nn.Module, last: bool) -> Iterator[None]:
    """Copies send gradients with the last micro-batch of a step only. Divided ones go with each, or
    every rank would hold those of the whole model until then.
    """
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """What stands outside the blocks of a divided model is whole meanwhile, as it is in a step, so
    that the model can be asked without its loss. Every rank must take part.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    yield
    module.reshard()


def together(tensors: Iterable[tuple[str, Tensor]]) -> list[dict[str, Tensor]]:
    """In groups that one operation over many tensors takes: those divided among the same ranks."""
    groups: dict[DeviceMesh | None, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        groups[tensor.device_mesh if isinstance(tensor, DTensor) else None][name] = tensor
    return list(groups.values())


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


def whole_tensors(tensors: Mapping[str, Tensor], *, kept: bool = True) -> dict[str, Tensor]:
    """The same with none divided; every rank must ask, and gets nothing unless they are `kept`.

    Divided ones are gathered one after the other and go to the CPU: no device ever holds them all.
    """
    found = {}
    for name, tensor in tensors.items():
        all_of_it = whole(tensor)
        if kept:
            found[name] = all_of_it.cpu() if is_divided(tensor) else all_of_it
    return found


@torch.no_grad()
def load_whole_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a model, divided or not, with whole tensors."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(divided_like(state[name].to(tensor.device), tensor))


def whole_model(model: Transformer, *, kept: bool = True) -> Transformer:
    """A model without division, with the same weights; every rank must ask, and gets its own back
    unless the whole is to be `kept`.
    """
    if not any(map(is_divided, model.parameters())):
        return model
    state = whole_tensors(model.state_dict(), kept=kept)
    if not kept:
        return model
    with torch.device("meta"):
        single = Transformer(model.config)
    single.to_empty(device="cpu")
    single.load_state_dict({name: tensor.cpu() for name, tensor in state.items()})
    return single
