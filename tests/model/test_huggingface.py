"""Export and import are inverse, refuse what has no name, and agree with transformers to 1e-5."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.config import ConfigError, ModelConfig
from model.flops import count_parameters
from model.huggingface import (
    FormatError,
    SpecialTokens,
    export_config,
    import_config,
    left_out,
    load_directory,
    load_weights,
    require_parameters,
    save_directory,
)
from model.rope import scaled_frequencies
from model.rope_scaling import RopeScaling
from model.transformer import Transformer
from tests.tiny_models import BERT, DEEPSEEK2, DEEPSEEK3, GEMMA, GEMMA2, GEMMA3, GPT2

# Trained on a third of the test's 48 tokens, so that every regime of frequencies occurs.
LLAMA3 = RopeScaling("llama3", 8.0, original_context=16, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = RopeScaling("yarn", 4.0, original_context=16, beta_fast=4.0, beta_slow=0.5)
FAMILIES = {
    "llama": {"kv_heads": 2, "tied_embeddings": False},
    "llama_tied": {"head_dim": 24, "rope_theta": 5e5},
    "llama_llama3": {"kv_heads": 2, "rope_theta": 5e5, "rope_scaling": LLAMA3},
    "llama_linear": {"rope_scaling": RopeScaling("linear", 4.0)},
    "llama_dynamic": {"rope_scaling": RopeScaling("dynamic", 2.0)},
    "mistral": {"kv_heads": 2, "sliding_window": 5, "tied_embeddings": False},
    "mistral_yarn": {"sliding_window": 5, "rope_scaling": replace(YARN, attention_factor=1.3)},
    "qwen2": {"kv_heads": 2, "qkv_bias": True},
    "qwen3": {"kv_heads": 1, "qk_norm": True, "head_dim": 32, "norm_eps": 1e-6},
    "qwen2_yarn": {"kv_heads": 2, "qkv_bias": True, "rope_scaling": YARN},
    "qwen3_yarn": {"qk_norm": True, "rope_scaling": replace(YARN, truncate=False)},
    "gpt2": GPT2,
    "gpt2_untied": GPT2 | {"tied_embeddings": False, "mlp_width": 100},
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma2_linear": GEMMA
    | {"full_attention_every": 2, "rope_scaling": RopeScaling("linear", 4.0)},
    "gemma3_linear": GEMMA3 | {"rope_scaling": RopeScaling("linear", 8.0)},
    "deepseekv2": DEEPSEEK2,
    "deepseekv2_yarn": DEEPSEEK2
    | {"rope_scaling": replace(YARN, factor=40.0, mscale=0.707, mscale_all_dim=0.707)},
    "deepseekv3_yarn": DEEPSEEK2
    | {
        "routing": "sigmoid",
        "normalised_routing": True,
        "query_latent": 28,
        "rope_scaling": replace(YARN, factor=40.0, mscale=1.0, mscale_all_dim=0.8),
    },
    "deepseekv2_groups": DEEPSEEK2
    | {"expert_groups": 4, "groups_per_token": 2, "query_latent": 28, "routing_scale": 2.5},
    "deepseekv3": DEEPSEEK3,
    "deepseekv3_plain": DEEPSEEK2 | {"routing": "sigmoid"},
    "bert": BERT | {"norm_eps": 1e-12},
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
        ({"rope_parameters": {"rope_type": "longrope"}}, "RoPE scaling 'longrope' is not supp"),
        ({"rope_parameters": {"rope_type": "linear"}}, "RoPE scaling linear lacks factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "finetuned": True}}, "yarn with finetuned"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_scaling": "yarn"}, "RoPE scaling 'yarn' is no object of settings"),
        ({"rope_scaling": [8]}, r"RoPE scaling \[8\] is no object of settings"),
        ({"rope_parameters": {"full_attention": 8}}, "RoPE scaling 8 is no object of settings"),
        ({"rope_theta": "x"}, "rope_theta 'x' is not a number"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor '2' is not a number"),
        ({"hidden_size": "64"}, "hidden_size '64' is not a whole number"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers 2.5 is not a whole number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps '1e-5' is not a number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings 'no' is not true or false"),
    ],
)
def test_unsupported_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        import_config({**export_config(tiny()), "rope_parameters": None} | change)


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


def test_files_that_hold_something_else_are_named(tmp_path: Path) -> None:
    save_directory(tmp_path, Transformer(tiny()))
    index, config = tmp_path / "model.safetensors.index.json", tmp_path / "config.json"
    for body, message in (
        (b"{", rf"{index.name}: Expecting"),
        (b"\xff\xfe", rf"{index.name}: 'utf-8' codec"),
        (b"[]", f"{index.name} is no JSON object"),
        (b"{}", f"{index.name} has no weight_map"),
        (b'{"weight_map": [1]}', f"{index.name} has no weight_map"),
        (b'{"weight_map": {"a": 5}}', "holds no 5"),
    ):
        index.write_bytes(body)
        for read in (load_directory, require_parameters):
            with pytest.raises(FormatError, match=message):
                read(tmp_path)
    index.unlink()
    gemma = export_config(tiny(**FAMILIES["gemma2"])) | {"layer_types": 3}
    for body, message in (
        (b"[]", "config.json is no JSON object"),
        (b"\xff\xfe", "config.json: 'utf-8' codec"),
        (json.dumps(gemma).encode(), "config.json has a setting of the wrong kind: 'int'|config"),
    ):
        config.write_bytes(body)
        with pytest.raises(FormatError, match=message):
            load_directory(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_checked_by_their_names_and_shapes_alone(family: str, tmp_path: Path) -> None:
    save_directory(tmp_path, Transformer(tiny(**FAMILIES[family])))
    require_parameters(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_weights(tmp_path)
    name = max(weights, key=lambda name: weights[name].numel())
    for changed, message in (
        ({name: weights[name][:-1].clone()}, "config.json asks for|multiple|mismatch|expert"),
        ({"model.other": torch.ones(2)}, "holds unknown model.other"),
    ):
        save_file({n: t.clone() for n, t in weights.items()} | changed, file)
        for read in (load_directory, require_parameters):
            with pytest.raises(FormatError, match=message):
                read(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FormatError, match="is damaged"):
        require_parameters(tmp_path)
    file.unlink()
    with pytest.raises(FormatError, match=r"holds no model\.safetensors"):
        require_parameters(tmp_path)


def test_special_tokens_are_checked(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="pad id 2"):
        SpecialTokens(eos=(2,), pad=2)
    with pytest.raises(FormatError, match="id 97 is outside"):
        save_directory(tmp_path, Transformer(tiny()), SpecialTokens(eos=(97,)))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (RopeScaling("linear", 0.5), "factor 0.5 must be at least 1"),
        (RopeScaling("linear", 2.0, mscale=1.0), "mscale means nothing for linear"),
        (RopeScaling("yarn", 2.0), "needs original_context"),
        (replace(LLAMA3, low_freq_factor=4.0), "below high_freq_factor 4.0"),
        (replace(YARN, beta_slow=9.0), "at most beta_fast 4.0"),
    ],
)
def test_impossible_stretches_of_positions_are_named(scaling: RopeScaling, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(rope_scaling=scaling)
    with pytest.raises(ConfigError, match="means nothing with positions 'learned'"):
        tiny(**GPT2, rope_scaling=YARN)


PUBLISHED = {  # as config.json of these models says it
    "llama 3.1": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
        RopeScaling("llama3", 8.0, 8192, 1.0, 4.0),
    ),
    "qwen 2.5": (
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        RopeScaling("yarn", 4.0, 32768),
    ),
    "deepseek": (
        {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
        | {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_spellings_of_stretched_positions_are_read(model: str) -> None:
    theirs, ours = PUBLISHED[model]
    config = export_config(tiny()) | {"rope_scaling": theirs, "rope_theta": 5e5}
    del config["rope_parameters"]
    assert import_config(config).rope_scaling == ours
    assert import_config(config).rope_theta == 5e5


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


@pytest.mark.peer
def test_of_a_model_of_text_and_pictures_the_text_part_is_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 120, "head_dim": 24}
    text |= {"num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"max_position_embeddings": 48, "sliding_window": 7, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=96
    )
    torch.manual_seed(2)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path)
    saved = load_weights(tmp_path)
    layers = [name for name in saved if "language_model." in name and "layers.3.mlp.up" in name]
    before = layers[0].partition("layers.")[0]  # which of the two spellings this version writes
    tokens = torch.randint(0, 96, (2, 40))
    for spelling in ("language_model.model.", "model.language_model."):
        renamed = {name.replace(before, spelling): tensor.clone() for name, tensor in saved.items()}
        save_file(renamed, tmp_path / "model.safetensors")
        ours = load_directory(tmp_path).eval()
        with torch.no_grad():
            assert (theirs(tokens).logits - ours(tokens)).abs().max() <= 1e-5
    parts = [part.partition(" (")[0].removeprefix("model.") for part in left_out(tmp_path)]
    assert parts == ["multi_modal_projector", "vision_tower"]


@pytest.mark.parametrize("text", ["of a model", 3, ["model_type"]])
def test_a_text_part_that_is_none_is_passed_over(text: object) -> None:
    with pytest.raises(FormatError, match="model_type 'llava'"):
        import_config({"model_type": "llava", "text_config": text})


def test_what_a_checkpoint_has_beyond_the_model_is_named(tmp_path: Path) -> None:
    more = {
        "bert": ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.seq_relationship.bias"],
        "deepseekv3": ["model.layers.3.eh_proj.weight", "model.layers.4.shared_head.norm.weight"],
        "llama": [],
    }
    for family, names in more.items():
        model, folder = scrambled(tiny(**FAMILIES[family])), tmp_path / family
        save_directory(folder, model)
        assert left_out(folder) == []
        weights = load_weights(folder) | {name: torch.ones(3) for name in names}
        save_file(
            {name: each.clone() for name, each in weights.items()}, folder / "model.safetensors"
        )
        same_tensors(load_directory(folder).state_dict(), model.state_dict())
    assert left_out(tmp_path / "bert") == [
        "bert.pooler (2 tensors)",
        "cls.seq_relationship (1 tensor)",
    ]
    assert left_out(tmp_path / "deepseekv3") == [
        "model.layers.3 (1 tensor)",
        "model.layers.4 (1 tensor)",
    ]
    config = tmp_path / "deepseekv3" / "config.json"  # and a model is not cut short unasked
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2')
    )
    with pytest.raises(FormatError, match=r"holds unknown model\.layers\.2"):
        load_directory(config.parent)


@pytest.mark.peer
@pytest.mark.parametrize("draw", range(12))
def test_stretched_angles_are_transformers_at_real_sizes(draw: int) -> None:
    """Heads of 64 to 128 channels, contexts of thousands: each channel's angle a position."""
    modeling = pytest.importorskip("transformers.modeling_rope_utils")
    pick = random.Random(draw)
    theta, head = pick.choice([1e4, 5e5, 1e6]), pick.choice([64, 80, 128])
    factor, before = pick.choice([2.0, 8.0, 40.0]), pick.choice([2048, 4096, 8192])
    kinds = [
        RopeScaling("linear", factor),
        RopeScaling("llama3", factor, before, pick.uniform(0.5, 2), pick.uniform(3, 8)),
        RopeScaling("yarn", factor, before, mscale=pick.uniform(0.5, 1), mscale_all_dim=1.0),
        RopeScaling("yarn", factor, before, beta_fast=pick.uniform(2, 40), truncate=False),
    ]
    scaling = pick.choice(kinds) if draw >= len(kinds) else kinds[draw]
    flags = {"width": 2 * head, "heads": 2, "context": 16384, "rope_theta": theta}
    ours = ModelConfig(layers=1, rope_scaling=scaling, **flags)
    theirs = pytest.importorskip("transformers").LlamaConfig.from_dict(export_config(ours))
    angles, magnitude = modeling.ROPE_INIT_FUNCTIONS[scaling.kind](theirs, "cpu")
    usual = theta ** -(torch.arange(0, head, 2) / head)
    torch.testing.assert_close(scaled_frequencies(scaling, usual, theta), angles, rtol=1e-5, atol=0)
    assert scaling.magnitude == pytest.approx(magnitude)
