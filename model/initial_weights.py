"""Where the values of a model come from that is built without any: one parameter after another.

A model that is to be divided among ranks is built on the meta device, which holds no values, and
divided; then each rank gets memory for its part alone, and the values come by: those of a new model
(`fresh`), or those of a Hugging Face directory (`model.huggingface.read_parameters`). No rank ever
holds more than its part and one whole parameter.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.sharding import divided_like
from model.transformer import Transformer
from model.width import width_ratio

Values = Iterable[tuple[str, Tensor]]  # names of a model's state, each with the whole tensor


def without_values(config: ModelConfig, base_width: int = 0) -> Transformer:
    """A model on the meta device."""
    with torch.device("meta"):
        return Transformer(config, base_width)


@dataclass(frozen=True)
class InitialWeights:
    """The device a model is trained on, and the values it begins with."""

    device: torch.device
    values: Callable[[], Values]

    @torch.no_grad()
    def fill(self, model: Transformer) -> None:
        """Give a model on the meta device, divided or not, memory and values; every rank must."""
        model.to_empty(device=self.device)
        state = model.state_dict()
        for name, tensor in self.values():
            target = state.pop(name)
            target.copy_(divided_like(tensor.to(self.device), target))
        assert not state, f"no values for {', '.join(state)}"


def fresh(config: ModelConfig, base_width: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The values that `Transformer(config, base_width)` has after `torch.manual_seed(seed)`, to the
    bit, made one by one on the CPU; torch's generator is left as that leaves it.
    """
    model = without_values(config, base_width)
    torch.manual_seed(seed)
    for module in model.modules():
        _draw_in_vain(module)
    ratio = width_ratio(config, base_width)
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, dtype=parameter.dtype)
        model.reset_parameter(name, value, ratio)
        yield name, value
    persistent = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield name, torch.zeros(buffer.shape, dtype=buffer.dtype)


def _draw_in_vain(module: nn.Module) -> None:
    """The numbers that a module drew when it was made, before the model drew its own."""
    if isinstance(module, nn.Linear):
        nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    elif isinstance(module, nn.Embedding):
        nn.Embedding(module.num_embeddings, module.embedding_dim)
