"""GGUF, the format of llama.cpp, written with its own Python library.

Families without an entry in `ARCHITECTURES` are refused: llama.cpp may know them, but nothing here
has compared the tokens. Weights stay float32; `llama-quantize` makes smaller files of this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.chat import BYTE_TOKENS, CHAT_TEMPLATE, SPECIAL_TOKENS, Tokenizer
from model.config import ModelConfig
from model.huggingface import FormatError, export_weights, family_of
from model.rope import scaled_frequencies
from model.rope_scaling import RopeScaling
from model.transformer import Transformer

# Hugging Face's model_type → llama.cpp's. Where llama.cpp calls both llama, it turns neighbouring
# channels instead of the halves of a head.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6  # llama.cpp's types of tokens


def write_gguf(
    path: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    name: str,
    template: str = CHAT_TEMPLATE,
) -> None:
    """The model, its tokenizer and its chat template as one file. Raises FormatError for what
    llama.cpp lacks."""
    writer = begin(path, model.config, name)
    add_vocabulary(writer, tokenizer, model.config.vocab_size)
    writer.add_chat_template(template)
    finish(writer, model)


def begin(path: Path, config: ModelConfig, name: str) -> Any:
    """A `gguf.GGUFWriter` that knows the model's sizes."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture(config))
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    # llama.cpp's llama has no window; below its width there is no difference.
    writer.add_context_length(min(config.context, config.sliding_window or config.context))
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_count)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None:
        add_scaling(writer, config, config.rope_scaling)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    return writer


def architecture(config: ModelConfig) -> str:
    """What llama.cpp calls the model's family."""
    family = family_of(config).model_type
    if family not in ARCHITECTURES:
        raise FormatError(
            f"a {family} model is not written as GGUF, only {', '.join(ARCHITECTURES)} are; use "
            f"--format hf"
        )
    return ARCHITECTURES[family]


def add_scaling(writer: Any, config: ModelConfig, scaling: RopeScaling) -> None:
    """How positions are stretched. Raises FormatError for what llama.cpp computes otherwise."""
    import gguf

    plain = RopeScaling("yarn", 1.0)
    own = ("attention_factor", "mscale", "mscale_all_dim", "truncate")
    other = [name for name in own if getattr(scaling, name) != getattr(plain, name)]
    if scaling.kind == "llama3" and architecture(config) == "llama":
        usual = config.rope_theta ** -(torch.arange(0, config.head_size, 2) / config.head_size)
        divisors = usual / scaled_frequencies(scaling, usual, config.rope_theta)
        writer.add_tensor("rope_freqs.weight", divisors.float().numpy())
    elif scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    elif scaling.kind == "yarn" and not other:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
    else:
        raise FormatError(
            f"a {family_of(config).model_type} model with rope_scaling {scaling.kind} "
            f"{' '.join(other)} is not written as GGUF; use --format hf"
        )


def add_vocabulary(writer: Any, tokenizer: Tokenizer, size: int) -> None:
    """SentencePiece's pieces and scores; rows of the model beyond them are marked as unused."""
    if tokenizer.kind == "byte-level":
        raise FormatError(
            "llama.cpp knows the regular expressions of byte-level BPE by the names of published "
            "tokenizers, and this one's ids are in another order; use --format hf"
        )
    if tokenizer.kind == "unigram":
        raise FormatError(
            "llama.cpp writes what a Unigram vocabulary lacks as unknown, not as bytes; use "
            "--format hf"
        )
    pieces = [tokenizer.piece(token).encode() for token in range(len(tokenizer))]
    unused = size - len(pieces)
    learned = len(pieces) - SPECIAL_TOKENS - BYTE_TOKENS
    kinds = [UNKNOWN] + [CONTROL] * (SPECIAL_TOKENS - 1) + [BYTE] * BYTE_TOKENS + [NORMAL] * learned
    scores = [tokenizer.score(token) for token in range(len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces + [f"[unused {number}]".encode() for number in range(unused)])
    writer.add_token_scores(scores + [0.0] * unused)
    writer.add_token_types(kinds + [UNUSED] * unused)
    writer.add_unk_token_id(tokenizer.unknown)
    writer.add_bos_token_id(tokenizer.begin)
    writer.add_eos_token_id(tokenizer.end_of_document)
    writer.add_eot_token_id(tokenizer.end_of_turn)
    writer.add_pad_token_id(tokenizer.pad)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def finish(writer: Any, model: Transformer) -> None:
    """Add the weights and write the file."""
    import gguf

    config = model.config
    kind = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture(config)]
    names = gguf.get_tensor_name_map(kind, config.layers)
    neighbours = architecture(config) == "llama"
    for name, tensor in export_weights(config, model.state_dict()).items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if neighbours and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _neighbours(tensor, config.head_size)
        writer.add_tensor(target, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _neighbours(weight: torch.Tensor, head: int) -> torch.Tensor:
    """The rows of each head from halves turned together to neighbours turned together."""
    width = weight.shape[1]
    return weight.view(-1, 2, head // 2, width).transpose(1, 2).reshape(weight.shape)
