"""Export and import are inverse, refuse what has no name, and agree with transformers to 1e-5."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.config import ModelConfig
from model.engine.loading import load_model
from model.flops import count_parameters
from model.huggingface import (
    FormatError,
    SpecialTokens,
    export_config,
    import_config,
    load_directory,
    load_weights,
    save_directory,
)
from model.transformer import Transformer

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
DEEPSEEK = {
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
FAMILIES = {
    "llama": {"kv_heads": 2, "tied_embeddings": False},
    "llama_tied": {"head_dim": 24, "rope_theta": 5e5},
    "mistral": {"kv_heads": 2, "sliding_window": 5, "tied_embeddings": False},
    "qwen2": {"kv_heads": 2, "qkv_bias": True},
    "qwen3": {"kv_heads": 1, "qk_norm": True, "head_dim": 32, "norm_eps": 1e-6},
    "gpt2": GPT2,
    "gpt2_untied": GPT2 | {"tied_embeddings": False, "mlp_width": 100},
    "gemma2": GEMMA
    | {
        "full_attention_every": 2,
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "query_scale": 40.0,
    },
    "gemma3": GEMMA
    | {
        "qk_norm": True,
        "full_attention_every": 3,
        "rope_theta": 1e6,
        "window_rope_theta": 1e4,
        "query_scale": 40.0,
    },
    "deepseekv2": DEEPSEEK,
    "deepseekv2_groups": DEEPSEEK
    | {"expert_groups": 4, "groups_per_token": 2, "query_latent": 28, "routing_scale": 2.5},
    "deepseekv3": DEEPSEEK
    | {
        "routing": "sigmoid",
        "normalised_routing": True,
        "expert_groups": 4,
        "groups_per_token": 2,
        "query_latent": 28,
        "routing_scale": 2.5,
    },
    "deepseekv3_plain": DEEPSEEK | {"routing": "sigmoid"},
    "bert": GPT2
    | {
        "activation": "gelu",
        "causal": False,
        "norm_placement": "post",
        "token_types": 2,
        "masked_head": True,
        "norm_eps": 1e-12,
    },
}


def tiny(**flags) -> ModelConfig:
    return ModelConfig(vocab_size=97, width=64, layers=3, context=48, heads=4, **flags)


def scrambled(config: ModelConfig) -> Transformer:
    """A model in which every parameter matters: norms and biases not at their initial 1 and 0."""
    torch.manual_seed(1)
    model = Transformer(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.add_(torch.randn_like(tensor) * (0.01 if "score_correction" in name else 0.1))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_export_and_import_are_inverse(family: str, tmp_path: Path) -> None:
    model = scrambled(tiny(**FAMILIES[family]))
    save_directory(tmp_path, model, SpecialTokens(bos=1, eos=(2, 5), pad=0))
    back = load_directory(tmp_path)
    assert back.config == model.config
    assert import_config(export_config(model.config)) == model.config
    tokens = torch.randint(0, 97, (2, 20))
    assert torch.equal(back(tokens), model(tokens))
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_counted_parameters_are_the_parameters_of_every_family(family: str) -> None:
    model = Transformer(tiny(**FAMILIES[family]))
    counted = count_parameters(model.config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.active < counted.total or not model.config.experts


def test_the_engine_says_which_models_it_does_not_serve(tmp_path: Path) -> None:
    save_directory(tmp_path, Transformer(tiny(**FAMILIES["gemma2"])))
    with pytest.raises(FormatError, match="not those with norm, norm_placement, activation"):
        load_model(tmp_path)


def test_no_family_is_a_refusal() -> None:
    with pytest.raises(FormatError, match="qk_norm and sliding_window together; the nearest"):
        export_config(tiny(qk_norm=True, sliding_window=4))
    with pytest.raises(FormatError, match="the nearest, llama, needs qkv_bias = False"):
        export_config(tiny(qkv_bias=True, head_dim=24))
    with pytest.raises(FormatError, match=r"full_attention_every 3: gemma2 has \(2,\)"):
        export_config(tiny(**FAMILIES["gemma2"] | {"full_attention_every": 3}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type 't5' is not one of llama, mistral,"),
        ({"hidden_act": "gelu"}, "llama with hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "RoPE scaling 'yarn'"),
    ],
)
def test_unsupported_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        import_config(export_config(tiny()) | change)


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    save_directory(tmp_path, Transformer(tiny()))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 98}))
    with pytest.raises(FormatError, match=r"embed_tokens.weight has shape \(97, 64\)"):
        load_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(FormatError, match=r"unknown model\.layers\.2"):
        load_directory(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="is damaged"):
        load_directory(tmp_path)


def test_special_tokens_are_checked(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="pad id 2"):
        SpecialTokens(eos=(2,), pad=2)
    with pytest.raises(FormatError, match="id 97 is outside"):
        save_directory(tmp_path, Transformer(tiny()), SpecialTokens(eos=(97,)))


PEERS = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 7},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 48},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 24, "sliding_window": 7},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 24, "sliding_window": 7},
    "deepseek_v2": {
        "kv_lora_rank": 20,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "first_k_dense_replace": 1,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 20,
        "q_lora_rank": 28,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 16,
        "moe_intermediate_size": 40,
        "first_k_dense_replace": 1,
    },
    "bert": {},
}


def peer(family: str, **more):
    """A random model of transformers' own making."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 120,
        "num_hidden_layers": 7 if family == "gemma3_text" else 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 48,
    }
    flags = PEERS[family] if family == "gpt2" else sizes | PEERS[family]
    flags = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | flags
    config = transformers.AutoConfig.for_model(family, **flags, **more)
    torch.manual_seed(2)
    model = auto_model(family).from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * (0.01 if "correction" in name else 0.1))
    return model.eval()


def auto_model(family: str):
    transformers = pytest.importorskip("transformers")
    masked = family.startswith("bert")
    return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM


@pytest.mark.peer
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits_from_our_export(family: str, tmp_path: Path) -> None:
    model = scrambled(tiny(**FAMILIES[family]))
    save_directory(tmp_path / "ours", model)
    theirs, loading = auto_model(family).from_pretrained(
        tmp_path / "ours",
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(loading.values()), loading
    assert type(theirs).__name__.lower().startswith(family.split("_")[0])
    tokens = torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        assert (theirs.eval()(tokens).logits - model(tokens)).abs().max() <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_directory(tmp_path / "theirs")
    assert back.config == model.config
    same_tensors(back.state_dict(), model.state_dict())


@pytest.mark.peer
@pytest.mark.parametrize("family", PEERS)
def test_we_compute_the_same_logits_from_their_export(family: str, tmp_path: Path) -> None:
    theirs = peer(family)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_directory(tmp_path / "theirs").eval()
    tokens = torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        assert (theirs(tokens).logits - ours(tokens)).abs().max() <= 1e-5
    save_directory(tmp_path / "ours", ours)
    same_tensors(load_weights(tmp_path / "ours"), load_weights(tmp_path / "theirs"))


def same_tensors(ours: dict, theirs: dict) -> None:
    """Name by name and bit by bit."""
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.peer
def test_the_published_spellings_of_gpt2_and_bert_are_read(tmp_path: Path) -> None:
    renames = {
        "gpt2": lambda name: name.removeprefix("transformer."),
        "bert": lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ),
    }
    more = {
        "gpt2": {"h.0.attn.bias": torch.ones(1, 1, 4, 4)},
        "bert": {
            "cls.seq_relationship.bias": torch.zeros(2),
            "bert.pooler.dense.bias": torch.ones(3),
        },
    }
    tokens = torch.randint(0, 97, (2, 40))
    for family, rename in renames.items():
        theirs, folder = peer(family), tmp_path / family
        theirs.save_pretrained(folder)
        old = {rename(name): tensor for name, tensor in load_weights(folder).items()}
        save_file(old | more[family], folder / "model.safetensors")
        with torch.no_grad():
            assert (theirs(tokens).logits - load_directory(folder)(tokens)).abs().max() <= 1e-5
