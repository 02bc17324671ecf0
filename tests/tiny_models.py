"""Model directories small enough for tests: real tokenizer, real format, random weights."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import string
import textwrap
from pathlib import Path
from typing import Any

import torch

from model.chat import Tokenizer
from model.config import ModelConfig
from model.huggingface import SpecialTokens, save_directory
from model.transformer import Transformer
from tasks.tokenizer.train import train_sentencepiece

VOCABULARY = 512

# What makes a small model one of a family, beside Llama.
GPT2 = {
    "positions": "learned",
    "norm": "layer",
    "activation": "gelu_tanh",
    "gated_mlp": False,
    "qkv_bias": True,
    "linear_bias": True,
}
GEMMA = {
    "norm": "rms+1",
    "norm_placement": "both",
    "activation": "gelu_tanh",
    "scaled_embeddings": True,
    "kv_heads": 2,
    "head_dim": 24,
    "sliding_window": 5,
}
GEMMA2 = GEMMA | {
    "full_attention_every": 2,
    "attention_softcap": 2.0,
    "logit_softcap": 3.0,
    "query_scale": 40.0,
}
GEMMA3 = GEMMA | {
    "qk_norm": True,
    "full_attention_every": 3,
    "rope_theta": 1e6,
    "window_rope_theta": 1e4,
    "query_scale": 40.0,
}
BERT = GPT2 | {
    "activation": "gelu",
    "causal": False,
    "norm_placement": "post",
    "token_types": 2,
    "masked_head": True,
}
DEEPSEEK2 = {
    "tied_embeddings": False,
    "head_dim": 24,
    "kv_latent": 20,
    "rope_dim": 8,
    "value_dim": 12,
    "experts": 8,
    "experts_per_token": 3,
    "expert_width": 40,
    "shared_experts": 2,
    "dense_layers": 1,
}
DEEPSEEK3 = DEEPSEEK2 | {
    "query_latent": 28,
    "routing": "sigmoid",
    "normalised_routing": True,
    "expert_groups": 4,
    "groups_per_token": 2,
    "routing_scale": 2.5,
}


@functools.cache
def tokenizer() -> Tokenizer:
    texts = [inspect.getsource(module) for module in (argparse, json, string, textwrap)]
    return Tokenizer(train_sentencepiece(texts, VOCABULARY))


def transformer(seed: int = 0, context: int = 128, **flags: Any) -> Transformer:
    """Random weights, larger than at the start of training so that logits are far apart."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "width": 64, "heads": 2, "layers": 2} | flags
    model = Transformer(ModelConfig(context=context, **sizes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(4)
        elif parameter.numel():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    return model


def model_directory(path: Path, seed: int = 0, context: int = 128, **flags: Any) -> Path:
    """A directory that `load_model` and transformers read."""
    names = tokenizer()
    special = SpecialTokens(bos=names.begin, eos=names.stop_ids, pad=names.pad)
    save_directory(path, transformer(seed, context, **flags), special)
    (path / names.file_name).write_bytes(names.data)
    return path
