"""To and from Hugging Face's directories: config.json, model.safetensors, generation_config.json.

`Transformer` already carries Hugging Face's parameter names, so what is translated is the config:
one table of names, and for each family the flags it expresses and the constants it demands.
`export_config` and `import_config` are inverse. A model that no family expresses is refused, never
exported as something near it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ConfigError, ModelConfig
from model.transformer import Transformer

# Ours on the left, theirs on the right; the same for every family.
NAMES = (
    ("vocab_size", "vocab_size"),
    ("width", "hidden_size"),
    ("layers", "num_hidden_layers"),
    ("context", "max_position_embeddings"),
    ("heads", "num_attention_heads"),
    ("kv_heads", "num_key_value_heads"),
    ("head_dim", "head_dim"),
    ("mlp_width", "intermediate_size"),
    ("norm_eps", "rms_norm_eps"),
    ("tied_embeddings", "tie_word_embeddings"),
)


@dataclass(frozen=True)
class Family:
    """One architecture of the outside world.

    has: our flags that are on in this family; windowed: whether it may have a sliding window;
    constants: their settings that must hold, and are written.
    """

    model_type: str
    architecture: str
    has: frozenset[str] = frozenset()
    windowed: bool = False
    constants: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = (
    Family("llama", "LlamaForCausalLM", constants={"attention_bias": False, "mlp_bias": False}),
    Family("mistral", "MistralForCausalLM", windowed=True),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        has=frozenset({"qkv_bias"}),
        constants={"use_sliding_window": False},
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        has=frozenset({"qk_norm"}),
        constants={"attention_bias": False, "use_sliding_window": False},
    ),
)
FLAGS = ("qkv_bias", "qk_norm")


class FormatError(ValueError):
    """A directory or a model that cannot be translated. The message says what and why."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids a generator must know. eos: all ids that end generation, the document's end first, then
    the
    end of a chat turn. Padding must not be one of them, or the model would never learn to stop."""

    bos: int | None = None
    eos: Sequence[int] = ()
    pad: int | None = None

    def __post_init__(self) -> None:
        if self.pad is not None and self.pad in self.eos:
            raise FormatError(
                f"pad id {self.pad} is also an end-of-sequence id; give padding its own"
            )


def family_of(config: ModelConfig) -> Family:
    """The architecture that expresses `config`; raises `FormatError` when none does."""
    on = frozenset(flag for flag in FLAGS if getattr(config, flag))
    windowed = config.sliding_window is not None
    for family in FAMILIES:
        if family.has == on and family.windowed == windowed:
            if family.model_type == "qwen2" and config.head_dim != config.width // config.heads:
                raise FormatError(
                    f"head_dim {config.head_dim} with qkv_bias: qwen2 has no head_dim of its own, "
                    f"it must be width / heads = {config.width // config.heads}"
                )
            return family
    flags = sorted(on | ({"sliding_window"} if windowed else set()))
    raise FormatError(
        f"no Hugging Face architecture has {' and '.join(flags)} together; "
        f"drop one to export ({', '.join(f.model_type for f in FAMILIES)} are known)"
    )


def export_config(
    config: ModelConfig, tokens: SpecialTokens = SpecialTokens(), dtype: str = "float32"
) -> dict[str, Any]:
    """config.json of `config`. `rope_theta` stands where transformers 4 and where 5 looks."""
    family = family_of(config)
    theirs: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        **{their: getattr(config, our) for our, their in NAMES},
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_dropout": 0.0,
        **family.constants,
        "torch_dtype": dtype,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos[0] if tokens.eos else None,
        "pad_token_id": tokens.pad,
    }
    if family.windowed:
        theirs["sliding_window"] = config.sliding_window
    return theirs


def import_config(theirs: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `export_config`, for any config.json of a known family."""
    model_type = theirs.get("model_type")
    family = next((f for f in FAMILIES if f.model_type == model_type), None)
    if family is None:
        raise FormatError(
            f"model_type {model_type!r} is not one of {', '.join(f.model_type for f in FAMILIES)}"
        )
    if theirs.get("hidden_act", "silu") != "silu":
        raise FormatError(f"hidden_act {theirs['hidden_act']!r} is not supported, only 'silu' is")
    for name, value in family.constants.items():
        if theirs.get(name, value) != value:
            raise FormatError(f"{model_type} with {name}={theirs[name]!r} is not supported")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise FormatError(f"RoPE scaling {kind!r} is not supported, only plain RoPE is")
    missing = [their for our, their in NAMES if their not in theirs and our not in _OPTIONAL]
    if missing:
        raise FormatError(f"config.json lacks {missing[0]}")
    ours = {our: theirs[their] for our, their in NAMES if their in theirs}
    ours.setdefault("tied_embeddings", False)  # transformers' default
    ours["rope_theta"] = float(rope.get("rope_theta", theirs.get("rope_theta", 10_000.0)))
    ours.update(dict.fromkeys(family.has, True))
    window = theirs.get("sliding_window") if family.windowed else None
    return ModelConfig(**ours, sliding_window=window)


_OPTIONAL = {"kv_heads", "head_dim", "tied_embeddings"}


def save_directory(
    directory: Path,
    model: Transformer,
    tokens: SpecialTokens = SpecialTokens(),
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `model` as a Hugging Face directory (tokenizer files are the caller's to add)."""
    for token in (*tokens.eos, tokens.bos, tokens.pad):
        if token is not None and not 0 <= token < model.config.vocab_size:
            raise FormatError(
                f"special token id {token} is outside the vocabulary of {model.config.vocab_size}"
            )
    theirs = export_config(model.config, tokens, str(dtype).removeprefix("torch."))
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    generation = {
        "bos_token_id": tokens.bos,
        "eos_token_id": list(tokens.eos),
        "pad_token_id": tokens.pad,
    }
    _write_json(directory / "config.json", theirs)
    _write_json(
        directory / "generation_config.json",
        {name: value for name, value in generation.items() if value not in (None, [])},
    )


def load_directory(directory: Path, *, dtype: torch.dtype = torch.float32) -> Transformer:
    """A `Transformer` from a Hugging Face directory, its weights checked name by name and shape by
    shape.
    """
    config = load_config(directory)
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {name: parameter.shape for name, parameter in model.state_dict().items()}
    weights = {
        name: tensor.to(dtype)
        for name, tensor in load_weights(directory).items()
        if not name.endswith(
            "rotary_emb.inv_freq"
        )  # old exports store what config.json already says
    }
    if config.tied_embeddings:
        weights.pop("lm_head.weight", None)
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights or name not in wanted:
            problem = "lacks" if name not in weights else "holds unknown"
            raise FormatError(f"{directory.name}: model.safetensors {problem} {name}")
        if weights[name].shape != wanted[name]:
            raise FormatError(
                f"{directory.name}: {name} has shape {tuple(weights[name].shape)}, "
                f"config.json asks for {tuple(wanted[name])}"
            )
    model.to_empty(device="cpu")
    model.load_state_dict(weights, assign=True)
    return model


def load_config(directory: Path) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face directory."""
    try:
        return import_config(json.loads((directory / "config.json").read_text()))
    except FileNotFoundError:
        raise FormatError(f"{directory} holds no config.json: not a model directory") from None
    except (json.JSONDecodeError, ConfigError, TypeError) as error:
        raise FormatError(f"{directory.name}/config.json: {error}") from error


def load_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files its index names."""
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in files:
        if "/" in name or not (directory / name).exists():
            raise FormatError(f"{directory} holds no {name}")
        try:
            weights.update(load_file(directory / name))
        except SafetensorError as error:
            raise FormatError(f"{directory.name}/{name} is damaged: {error}") from error
    return weights


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
