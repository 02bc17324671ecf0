"""To and from Hugging Face's directories: config.json, model.safetensors, generation_config.json.

`model.families` has the tables; here are the functions that read them, in pairs that are inverse:
`export_config` and `import_config`, `export_weights` and `import_weights`. Weights are renamed,
joined, split and reordered, never computed with, so both ways are lossless to the bit. A model that
no family expresses is refused, never exported as something near it.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig
from model.families import FAMILIES, Family, FormatError, Rule, family_of
from model.huggingface_rope import export_rope, import_rope
from model.transformer import Transformer

Weights = dict[str, Tensor]
AHEAD = "eh_proj|enorm|hnorm|shared_head"  # what only layers that predict further tokens have


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


def export_config(
    config: ModelConfig, tokens: SpecialTokens = SpecialTokens(), dtype: str = "float32"
) -> dict[str, Any]:
    """config.json of `config`."""
    family = family_of(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{their: getattr(config, our) for our, their in family.names.items()},
        **_export_own(family, config),
        **family.writes,
        **family.constants,
        "torch_dtype": dtype,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos[0] if tokens.eos else None,
        "pad_token_id": tokens.pad,
    }


def import_config(theirs: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `export_config`, for any config.json of a known family; of a model of text and
    pictures (Gemma 3) that of its text part."""
    text = theirs.get("text_config")
    theirs = text if text and isinstance(text, Mapping) else theirs
    model_type = theirs.get("model_type")
    family = next((f for f in FAMILIES if f.model_type == model_type), None)
    if family is None:
        raise FormatError(
            f"model_type {model_type!r} is not one of {', '.join(f.model_type for f in FAMILIES)}"
        )
    theirs = {**family.defaults, **theirs}
    for name, value in family.constants.items():
        if (theirs.get(name, value) or None) != (value or None):  # null, false and 0 are one
            raise FormatError(f"{model_type} with {name}={theirs[name]!r} is not supported")
    missing = [t for our, t in family.names.items() if t not in theirs and our not in _OPTIONAL]
    if missing:
        raise FormatError(f"config.json lacks {missing[0]}")
    ours = {our: theirs[their] for our, their in family.names.items() if their in theirs}
    ours.setdefault("tied_embeddings", False)  # transformers' default
    if "mlp_width" in ours and ours["mlp_width"] is None:
        ours["mlp_width"] = 4 * ours["width"]  # GPT-2's default
    fixed = {name: value for name, value in family.fixed.items() if not callable(value)}
    ours |= fixed | _import_own(family, theirs)
    for our, their in family.names.items():
        if our in ours:
            _require_kind(their, ours[our], _KINDS[our])
    return ModelConfig(**ours)


_OPTIONAL = {"kv_heads", "head_dim", "tied_embeddings", "sliding_window", "query_latent"}
_KINDS = get_type_hints(ModelConfig)


def _require_kind(name: str, value: Any, kind: Any) -> None:
    """kind: bool, int or float, or one of them and None."""
    fraction = isinstance(0.5, kind)
    if not isinstance(value, kind | int if fraction else kind):
        words = "true or false" if kind is bool else f"a {'' if fraction else 'whole '}number"
        raise FormatError(f"{name} {value!r} is not {words}")


def _export_own(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The settings that need more than another name."""
    theirs: dict[str, Any] = {}
    if "rope_theta" in family.own:
        theirs |= export_rope(config)
    if "query_scale" in family.own:
        scale = config.query_scale or config.head_size
        if scale != int(scale):
            raise FormatError(f"query_scale {scale}: {family.model_type} takes whole numbers only")
        theirs["query_pre_attn_scalar"] = int(scale)
    if config.full_attention_every is not None:
        if config.full_attention_every not in (
            family.layer_patterns or (config.full_attention_every,)
        ):
            raise FormatError(
                f"full_attention_every {config.full_attention_every}: {family.model_type} has "
                f"{family.layer_patterns}"
            )
        theirs["layer_types"] = _layer_types(config.layers, config.full_attention_every)
        theirs["sliding_window_pattern"] = config.full_attention_every
    if config.kv_latent is not None:
        theirs["qk_nope_head_dim"] = config.head_size - config.rotary_size
        theirs["num_key_value_heads"] = config.heads
    if config.experts and config.routing == "softmax":
        limited = config.groups_per_token < config.expert_groups
        theirs["topk_method"] = "group_limited_greedy" if limited else "greedy"
    return theirs


def _import_own(family: Family, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_export_own`."""
    ours: dict[str, Any] = {}
    if "rope_theta" in family.own:
        ours |= import_rope(theirs, local="window_rope_theta" in family.own)
    if "query_scale" in family.own:
        scale = theirs.get("query_pre_attn_scalar", 256)
        ours["query_scale"] = None if scale == theirs.get("head_dim") else float(scale)
    if "full_attention_every" in family.own:
        ours["full_attention_every"] = _pattern(family, theirs)
    if "qk_nope_head_dim" in theirs:
        ours["head_dim"] = theirs["qk_nope_head_dim"] + theirs["qk_rope_head_dim"]
    if theirs.get("n_group") is None and "expert_groups" in family.names:
        ours |= {"expert_groups": 1, "groups_per_token": 1}
    elif theirs.get("topk_method") == "greedy":
        ours |= {"groups_per_token": theirs["n_group"]}
    return ours


def _layer_types(layers: int, every: int) -> list[str]:
    kinds = ("sliding_attention", "full_attention")
    return [kinds[(layer + 1) % every == 0] for layer in range(layers)]


def _pattern(family: Family, theirs: Mapping[str, Any]) -> int:
    """How often a layer sees everything, from the list of layers or the older number."""
    layers = theirs["num_hidden_layers"]
    usual = theirs.get("sliding_window_pattern") or (family.layer_patterns or (6,))[0]
    kinds = theirs.get("layer_types") or _layer_types(layers, usual)
    every = (
        kinds.index("full_attention") + 1 if "full_attention" in kinds else max(usual, layers + 1)
    )
    if len(kinds) != layers or kinds != _layer_types(layers, every):
        raise FormatError(f"layer_types {kinds} do not repeat evenly; that is not supported")
    return usual if kinds == _layer_types(layers, usual) else every


def export_weights(config: ModelConfig, state: Mapping[str, Tensor]) -> Weights:
    """The state of a `Transformer` under the names, and in the layout, of its family."""
    rest, theirs = dict(state), {}
    for rule in _expanded(config):
        for leaf in ("", ".weight", ".bias"):
            if rule.ours[0] + leaf in rest:
                tensor = torch.cat([rest.pop(our + leaf) for our in rule.ours])
                turned = rule.transposed and leaf == ".weight"
                theirs[rule.theirs + leaf] = tensor.mT if turned else tensor
    for name, tensor in rest.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            kinds = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
            for expert, matrix in enumerate(tensor):
                for kind, part in zip(kinds, matrix.chunk(len(kinds)), strict=True):
                    theirs[f"{name.rpartition('.')[0]}.{expert}.{kind}.weight"] = part
        else:
            theirs[name] = _interleave(config, name, tensor)
    return theirs


def import_weights(config: ModelConfig, theirs: Mapping[str, Tensor]) -> Weights:
    """The inverse of `export_weights`; also of older files, with other names for the same."""
    family = family_of(config)
    rest = _modern_names(config, family, theirs)
    ours: Weights = {}
    for rule in _expanded(config):
        for leaf in ("", ".weight", ".bias"):
            tensor = rest.pop(rule.theirs + leaf, None)
            if tensor is not None:
                tensor = tensor.mT if rule.transposed and leaf == ".weight" else tensor
                parts = tensor.chunk(len(rule.ours))
                ours |= {our + leaf: part for our, part in zip(rule.ours, parts, strict=True)}
    for name in [name for name in rest if ".experts.0." in name]:
        stem, kind = name.split(".experts.0.")
        found = [rest.pop(f"{stem}.experts.{e}.{kind}", None) for e in range(config.experts)]
        experts = [part for part in found if part is not None]
        if len(experts) < len(found):
            raise FormatError(f"an expert of {stem} is missing: {config.experts} are expected")
        ours[f"{stem}.experts.{kind.removesuffix('.weight')}"] = torch.stack(experts)
    for name in [name for name in ours if name.endswith(".experts.gate_proj")]:
        up = name.replace("gate_proj", "up_proj")
        if up in ours:
            ours[name.replace("gate_proj", "gate_up_proj")] = torch.cat(
                (ours.pop(name), ours.pop(up)), 1
            )
    ours |= {name: _interleave(config, name, tensor, back=True) for name, tensor in rest.items()}
    return ours


def _modern_names(config: ModelConfig, family: Family, theirs: Mapping[str, Tensor]) -> Weights:
    """Their tensors without those that say nothing new, under the names of today."""
    weights = {}
    omitted = _omitted(config, family, theirs)
    for name, tensor in theirs.items():
        if name in omitted:
            continue
        for before, after in family.within.items():
            if name.startswith(before):
                name = after + name.removeprefix(before)
        # Old exports store what config.json says, or a mask.
        said = (*family.ignores, *(("lm_head.weight",) if config.tied_embeddings else ()))
        if name.startswith(said) or name.endswith(
            ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
        ):
            continue
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if family.model_type == "gpt2" and re.match(r"(wte|wpe|h|ln_f)\.", name):
            name = f"transformer.{name}"
        weights[name] = tensor
    return weights


def _omitted(config: ModelConfig, family: Family, names: Collection[str]) -> dict[str, str]:
    """Of tensors of a checkpoint that the model does not have, the part that they belong to."""
    parts = list(family.omits)
    if "num_nextn_predict_layers" in family.writes:
        # DeepSeek's prediction of the tokens after the next: layers behind the last, told from
        # those of a deeper model by what only they have.
        found = (re.match(rf"(model\.layers\.(\d+)\.)({AHEAD})", name) for name in names)
        parts += {layer[1] for layer in found if layer and int(layer[2]) >= config.layers}
    whose = {name: next(filter(name.startswith, parts), "").rstrip(".") for name in names}
    return {name: part for name, part in whose.items() if part}


def left_out(directory: Path) -> list[str]:
    """The parts of a Hugging Face directory that the model does not have, each with its number of
    tensors: what sees pictures, predicts further tokens, or served another objective."""
    config = load_config(directory)
    family = family_of(config)
    parts = Counter(_omitted(config, family, load_weights(directory).keys()).values())
    return [f"{part} ({n} tensor{'s' * (n > 1)})" for part, n in sorted(parts.items())]


def _expanded(config: ModelConfig) -> list[Rule]:
    rules = family_of(config).rules
    return [each for rule in rules for each in rule.of_layers(config.layers)]


def _interleave(config: ModelConfig, name: str, tensor: Tensor, back: bool = False) -> Tensor:
    """DeepSeek's files keep the channels that RoPE turns as neighbours (0, 1), (2, 3), …; ours keep
    them as halves, like every other family's. back: from theirs to ours.
    """
    turning = ("q_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight")
    if config.kv_latent is None or not name.endswith(turning):
        return tensor
    one = "kv_a" in name  # one key for all heads, below the latent
    still = config.kv_latent if one else config.head_size - config.rotary_size
    rows = tensor.view(1 if one else config.heads, -1, tensor.shape[-1])
    half = config.rotary_size // 2
    rotary = rows[:, still:].unflatten(1, (half, 2) if back else (2, half))
    rotary = rotary.transpose(1, 2).flatten(1, 2)
    return torch.cat((rows[:, :still], rotary), dim=1).view(tensor.shape)


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
        for name, tensor in export_weights(model.config, model.state_dict()).items()
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
    """A `Transformer` from a Hugging Face directory, checked as `read_parameters` does."""
    with torch.device("meta"):
        model = Transformer(load_config(directory))
    weights = dict(read_parameters(directory, dtype=dtype))
    model.to_empty(device="cpu")
    model.load_state_dict(weights, assign=True)
    return model


def read_parameters(
    directory: Path, *, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """The state of the `Transformer` of a Hugging Face directory, checked name by name and shape by
    shape, of which no more than a layer is in memory at a time.
    """
    for name, tensor in _parameters(directory, load_weights(directory)):
        yield name, tensor.to(dtype).contiguous()


def require_parameters(directory: Path) -> None:
    """Raises `FormatError` where `read_parameters` would. Of the weights it reads names and shapes
    only, however large they are."""
    named = {name: tensor.to("meta") for name, tensor in load_weights(directory).items()}
    for _ in _parameters(directory, named):
        pass


def _parameters(directory: Path, theirs: Weights) -> Iterator[tuple[str, Tensor]]:
    config = load_config(directory)
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    wanted = {name: parameter.shape for name, parameter in state.items()}
    for part in _by_layer(theirs):
        for name, tensor in import_weights(config, part).items():
            if name not in wanted:
                raise FormatError(f"{directory.name}: model.safetensors holds unknown {name}")
            shape = wanted.pop(name)
            if tensor.shape != shape:
                raise FormatError(
                    f"{directory.name}: {name} has shape {tuple(tensor.shape)}, config.json asks "
                    f"for {tuple(shape)}"
                )
            yield name, tensor
    if wanted:
        raise FormatError(f"{directory.name}: model.safetensors lacks {min(wanted)}")


def load_config(directory: Path) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face directory."""
    file = directory / "config.json"
    if not file.exists():
        raise FormatError(f"{directory} holds no config.json: not a model directory")
    theirs = read_settings(file)
    try:
        return import_config(theirs)
    except ValueError as error:  # `FormatError` and `ConfigError` among them
        raise FormatError(f"{directory.name}/config.json: {error}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise FormatError(
            f"{directory.name}/config.json has a setting of the wrong kind: {error}"
        ) from error


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON object. Raises `FormatError` for anything else."""
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:  # of JSON and of UTF-8
        raise FormatError(f"{file.parent.name}/{file.name}: {error}") from error
    if not isinstance(settings, dict):
        raise FormatError(f"{file.parent.name}/{file.name} is no JSON object of settings")
    return settings


def load_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files its index names. The files are mapped: a
    tensor takes memory when it is read, and gives it back when it is wanted elsewhere."""
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        named = read_settings(index).get("weight_map")
        if not isinstance(named, dict):
            raise FormatError(f"{directory.name}/{index.name} has no weight_map: copy it again")
        files = sorted({str(file) for file in named.values()})
    weights: dict[str, Tensor] = {}
    for name in files:
        if "/" in name or not (directory / name).exists():
            raise FormatError(f"{directory} holds no {name}")
        try:
            weights.update(load_file(directory / name))
        except SafetensorError as error:
            raise FormatError(f"{directory.name}/{name} is damaged: {error}") from error
    return weights


def _by_layer(theirs: Mapping[str, Tensor]) -> list[Weights]:
    """The tensors of each layer, and those outside the layers, apart."""
    parts: dict[str, Weights] = {}
    for name, tensor in theirs.items():
        layer = re.search(r"(?:^|\.)(?:layers|layer|h)\.(\d+)\.", name)
        parts.setdefault(layer[1] if layer else "", {})[name] = tensor
    return list(parts.values())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
