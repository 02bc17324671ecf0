"""Values that come one parameter after another: those of a whole model, in less memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from model.config import ModelConfig
from model.huggingface import load_directory, read_parameters, save_directory
from model.initial_weights import InitialWeights, fresh, without_values
from model.sharding import Ranks, shard, whole_tensors
from model.transformer import Transformer
from tests.model.ranks import end_rank, run_ranks
from tests.tiny_models import BERT, DEEPSEEK3, GEMMA3, GPT2

SIZES = {"vocab_size": 96, "width": 32, "layers": 2, "context": 32, "heads": 2}
# Most of it in blocks, as in a model that is worth dividing.
DEEP = ModelConfig(**SIZES | {"width": 128, "layers": 12})
CPU = torch.device("cpu")


@pytest.mark.parametrize("flags", [{}, GPT2, GEMMA3, BERT, DEEPSEEK3, {"tied_embeddings": False}])
def test_values_are_those_of_a_model_made_whole_to_the_bit(flags: dict[str, Any]) -> None:
    config = ModelConfig(**SIZES | flags)
    base_width = 16 if flags == {"tied_embeddings": False} else 0
    torch.manual_seed(7)
    whole = Transformer(config, base_width)
    drawn_next = torch.rand(1)
    model = without_values(config, base_width)
    InitialWeights(CPU, lambda: fresh(config, base_width, 7)).fill(model)
    assert torch.equal(torch.rand(1), drawn_next)
    expected = dict(whole.named_parameters()) | dict(whole.named_buffers())
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def peak(events: Any, mapped: int) -> int:
    """The most bytes that were allocated at once beyond those at the beginning. A file that is
    mapped is told like an allocation of its size, and is none."""
    held = most = 0
    memory = [e for e in events if e.name() == "[memory]" and abs(e.nbytes()) != mapped]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _divided(weights: InitialWeights | None, mapped: int) -> tuple[dict[str, Tensor], int]:
    """(values, bytes allocated at the peak) of the deep model divided between two ranks."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        if weights is None:  # as it is to be compared with: made whole, then divided
            torch.manual_seed(3)
            model = Transformer(DEEP)
        else:
            model = without_values(DEEP)
        shard(model, model, Ranks.here(1, CPU), bf16=False)
        if weights is not None:
            weights.fill(model)
    most = peak(watched.profiler.kineto_results.events(), mapped)
    return whole_tensors(model.state_dict()), most


def _rank(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    mapped = (folder / "model.safetensors").stat().st_size
    whole, most = _divided(None, mapped)
    ours, ours_most = _divided(InitialWeights(CPU, lambda: fresh(DEEP, 0, 3)), mapped)
    kept = dict(read_parameters(folder))
    theirs, theirs_most = _divided(InitialWeights(CPU, lambda: read_parameters(folder)), mapped)
    said = {
        "fresh": all(torch.equal(tensor, whole[name]) for name, tensor in ours.items()),
        "read": all(torch.equal(tensor, kept[name]) for name, tensor in theirs.items()),
        "peaks": [most, ours_most, theirs_most],
    }
    torch.distributed.destroy_process_group()
    end_rank(said)


def test_two_ranks_hold_their_parts_and_never_the_whole(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = Transformer(DEEP)
    save_directory(tmp_path, model, dtype=torch.bfloat16)  # so that reading must copy
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    for said in run_ranks(__file__, 2, str(tmp_path)):
        assert said["fresh"] and said["read"]
        before, *ours = said["peaks"]
        assert before > size  # what it is compared with held all of it
        # Half of it, and a parameter (or, read, a layer) on its way.
        assert all(most < 0.75 * size for most in ours), (size, said["peaks"])


def test_reading_says_what_is_wrong_with_a_directory(tmp_path: Path) -> None:
    save_directory(tmp_path, Transformer(ModelConfig(**SIZES)))
    text = (tmp_path / "config.json").read_text()
    for before, after, message in (
        (
            '"num_hidden_layers": 2',
            '"num_hidden_layers": 3',
            "lacks model.layers.2.input_lay",
        ),
        ('"num_hidden_layers": 2', '"num_hidden_layers": 1', "holds unknown model.layers.1"),
        ('"vocab_size": 96', '"vocab_size": 95', "embed_tokens.weight has shape (96, 32), config"),
    ):
        assert before in text
        (tmp_path / "config.json").write_text(text.replace(before, after))
        with pytest.raises(ValueError) as told:
            load_directory(tmp_path)
        assert message in str(told.value)


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
