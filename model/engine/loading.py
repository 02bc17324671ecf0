"""A model directory made ready to generate."""

from pathlib import Path
from typing import NamedTuple

import torch

from model.chat import Tokenizer
from model.config import ModelConfig
from model.huggingface import FormatError, load_config, load_directory
from model.transformer import Transformer


class LoadedModel(NamedTuple):
    """What a model directory holds."""

    config: ModelConfig
    model: Transformer
    tokenizer: Tokenizer


def load_model(
    directory: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> LoadedModel:
    """Read config.json, model.safetensors and the tokenizer of a directory; the engine works where
    the model is.

    Raises ValueError for a device that is not there, FormatError or TokenizerError naming the file
    that is missing or wrong, or what the engine cannot generate with.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: no GPU is to be seen here; use cpu")
    beyond = load_config(directory).not_generated()
    if beyond:
        raise FormatError(
            f"{directory.name}: the engine serves Llama, Mistral, Qwen, Gemma, GPT-2 and DeepSeek "
            f"models, not those with {', '.join(beyond)}; use transformers or vLLM with this "
            f"directory"
        )
    model = load_directory(directory, dtype=dtype).eval().requires_grad_(False).to(device)
    tokenizer = Tokenizer.load(directory)
    if len(tokenizer) > model.config.vocab_size:
        raise FormatError(
            f"{directory.name}: {tokenizer.file_name} has {len(tokenizer)} tokens, "
            f"the model's vocabulary only {model.config.vocab_size}"
        )
    return LoadedModel(model.config, model, tokenizer)
