"""Export and import are inverse, refuse what has no name, and agree with transformers to 1e-5."""

import json
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.huggingface import (
    FormatError,
    SpecialTokens,
    export_config,
    import_config,
    load_directory,
    save_directory,
)
from model.transformer import Transformer

FAMILIES = {
    "llama": {"kv_heads": 2, "tied_embeddings": False},
    "llama_tied": {"head_dim": 24, "rope_theta": 5e5},
    "mistral": {"kv_heads": 2, "sliding_window": 5, "tied_embeddings": False},
    "qwen2": {"kv_heads": 2, "qkv_bias": True},
    "qwen3": {"kv_heads": 1, "qk_norm": True, "head_dim": 32, "norm_eps": 1e-6},
}


def tiny(**flags) -> ModelConfig:
    return ModelConfig(vocab_size=97, width=64, layers=3, context=48, heads=4, **flags)


def scrambled(config: ModelConfig) -> Transformer:
    """A model in which every parameter matters: norms and biases not at their initial 1 and 0."""
    torch.manual_seed(1)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
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


def test_no_family_is_a_refusal() -> None:
    with pytest.raises(FormatError, match="qk_norm and sliding_window together"):
        export_config(tiny(qk_norm=True, sliding_window=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
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


@pytest.mark.peer
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits_from_our_export(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = scrambled(tiny(**FAMILIES[family]))
    save_directory(tmp_path, model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(theirs).__name__.lower().startswith(family.split("_")[0])
    tokens = torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)).abs().max() <= 1e-5


@pytest.mark.peer
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_we_compute_the_same_logits_from_their_export(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=64,
        intermediate_size=120,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        head_dim=16,
        **({"sliding_window": 7} if family == "mistral" else {}),
    )
    torch.manual_seed(2)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_directory(tmp_path).eval()
    tokens = torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        assert (theirs(tokens).logits - ours(tokens)).abs().max() <= 1e-5
