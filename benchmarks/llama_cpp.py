"""llama.cpp as a peer: our model written as GGUF, run in this process by the package xllamacpp."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from model.transformer import Transformer
from tasks.export.gguf_file import CONTROL, NORMAL, UNKNOWN, begin, finish


def write_numbers(model: Transformer, path: Path, eight_bits: bool = False) -> None:
    """The model with a vocabulary of numbers: only ids are exchanged. eight_bits: its matrices in
    llama.cpp's own 8-bit format, Q8_0.
    """
    size = model.config.vocab_size
    writer = begin(path, model.config, "peer")
    if eight_bits:
        writer.add_tensor = functools.partial(_add_quantized, writer.add_tensor)
    writer.add_tokenizer_model("llama")
    special = [b"<unk>", b"<s>", b"</s>"]
    writer.add_token_list(special + [f"\u2581{number}".encode() for number in range(3, size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([UNKNOWN, CONTROL, CONTROL] + [NORMAL] * (size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    finish(writer, model)


def _add_quantized(add_tensor: Any, name: str, tensor: Any) -> None:
    import gguf

    if tensor.ndim < 2:
        add_tensor(name, tensor)
        return
    kind = gguf.GGMLQuantizationType.Q8_0
    add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)


class LlamaCpp:
    """A GGUF file in this process: one thread, one sequence."""

    def __init__(self, path: Path, context: int) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = context
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = 1
        parameters.cpuparams_batch.n_threads = 1
        parameters.warmup = False
        self.server = xllamacpp.Server(parameters)

    @classmethod
    def of(cls, model: Transformer, eight_bits: bool = False) -> LlamaCpp:
        folder = Path(tempfile.mkdtemp(prefix="gristmill-gguf-"))
        write_numbers(model, folder / "model.gguf", eight_bits)
        return cls(folder / "model.gguf", model.config.context)

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """`count` greedy tokens."""
        answer = self.server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": count,
                "temperature": 0,
                "top_k": 1,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        text = answer["choices"][0]["text"]
        return [int(number) for number in str(text).split()]
