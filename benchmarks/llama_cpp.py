"""llama.cpp as a peer: our model written as GGUF, run in this process by the package xllamacpp."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from model.transformer import Transformer


def write_gguf(model: Transformer, path: Path) -> None:
    """The weights in llama.cpp's format, with a vocabulary of numbers: only ids are exchanged."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_count)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    special = [b"<unk>", b"<s>", b"</s>"]
    numbers = [f"\u2581{number}".encode() for number in range(3, config.vocab_size)]
    writer.add_token_list(special + numbers)
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3] + [1] * (config.vocab_size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)

    def add(name: str, tensor: torch.Tensor) -> None:
        writer.add_tensor(name, tensor.detach().float().numpy())

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output.weight", model.output_weight)
    add("output_norm.weight", model.model.norm.weight)
    state = model.state_dict()
    names = {
        "attn_norm": "input_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(config.layers):
        ours = f"model.layers.{layer}."
        for theirs, name in names.items():
            add(f"blk.{layer}.{theirs}.weight", state[f"{ours}{name}.weight"])
        for theirs, name, heads in (
            ("attn_q", "self_attn.q_proj", config.heads),
            ("attn_k", "self_attn.k_proj", config.kv_count),
        ):
            weight = state[f"{ours}{name}.weight"]
            add(f"blk.{layer}.{theirs}.weight", interleaved(weight, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """From halves of a head turned together to neighbouring channels, as llama.cpp turns them."""
    width = weight.shape[1]
    return weight.view(heads, 2, -1, width).transpose(1, 2).reshape(weight.shape).contiguous()


class LlamaCpp:
    """One thread, one sequence."""

    def __init__(self, model: Transformer) -> None:
        import xllamacpp

        folder = Path(tempfile.mkdtemp(prefix="gristmill-gguf-"))
        write_gguf(model, folder / "model.gguf")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(folder / "model.gguf")
        parameters.n_ctx = model.config.context
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = 1
        parameters.cpuparams_batch.n_threads = 1
        parameters.warmup = False
        self._server = xllamacpp.Server(parameters)

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """`count` greedy tokens."""
        answer = self._server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": count,
                "temperature": 0,
                "top_k": 1,
                "ignore_eos": True,
                "cache_prompt": False,
                "return_tokens": True,
            }
        )
        if isinstance(answer, list):
            answer = answer[0]
        if answer.get("tokens"):
            return list(answer["tokens"])
        return [int(number) for number in str(answer["content"]).split()]
