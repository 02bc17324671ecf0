"""The architectures of the outside world: one table of names and constants for each.

`Transformer` carries Llama's parameter names, so Llama, Mistral, Qwen and Gemma need no renaming at
all; GPT-2, BERT and DeepSeek's experts do. A family fits a config when every flag that it does not
let free has the value the family demands: nothing is exported as something near it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from model.config import ModelConfig

Value = Any
Derived = Callable[[ModelConfig], Value]


def _names(text: str) -> dict[str, str]:
    """Our settings on the left, theirs on the right; a family adds its own."""
    ours, theirs = text.split()[::2], text.split()[1::2]
    return dict(zip(ours, theirs, strict=True))


SIZES = _names("""
    vocab_size  vocab_size               layers           num_hidden_layers
    width       hidden_size              heads            num_attention_heads
    mlp_width   intermediate_size        context          max_position_embeddings
    norm_eps    rms_norm_eps             tied_embeddings  tie_word_embeddings
""")
GROUPED = SIZES | {"kv_heads": "num_key_value_heads"}
LLAMA = GROUPED | {"head_dim": "head_dim"}
GEMMA = LLAMA | {"sliding_window": "sliding_window", "logit_softcap": "final_logit_softcapping"}
LATENT = SIZES | _names("""
    kv_latent     kv_lora_rank           experts            n_routed_experts
    query_latent  q_lora_rank            experts_per_token  num_experts_per_tok
    rope_dim      qk_rope_head_dim       expert_width       moe_intermediate_size
    value_dim     v_head_dim             shared_experts     n_shared_experts
    expert_groups n_group                groups_per_token   topk_group
    dense_layers  first_k_dense_replace  routing_scale      routed_scaling_factor
""")
# Settings without a plain counterpart, translated in `model.huggingface`.
ROPE = frozenset({"rope_theta", "rope_scaling"})
GEMMA_OWN = ROPE | {"query_scale", "full_attention_every"}


class FormatError(ValueError):
    """A directory or a model that cannot be translated. The message says what and why."""


@dataclass(frozen=True)
class Rule:
    """Which of their modules holds which of ours; `{n}` is a layer. Several of ours lie one below
    the other in theirs. transposed: their matrices map columns to rows (GPT-2's `Conv1D`).
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False

    def of_layers(self, layers: int) -> Iterator["Rule"]:
        """The rule for each layer, or itself when it is not about layers."""
        for n in map(str, range(layers if "{n}" in self.theirs else 1)):
            ours = tuple(name.replace("{n}", n) for name in self.ours)
            yield Rule(self.theirs.replace("{n}", n), ours, self.transposed)


def _rules(text: str) -> tuple[Rule, ...]:
    """A rule a line: theirs, ours; a T at the end where theirs are transposed. What ends in `:`
    stands before all names (theirs, ours) of the lines after it."""
    rules, before = [], ("", "")
    for line in text.strip().splitlines():
        theirs, *ours = line.split()
        if theirs.endswith(":"):
            before = theirs[:-1], ours[0][:-1]
            continue
        transposed = ours[-1] == "T"
        names = tuple(before[1] + name for name in ours[: -1 if transposed else None])
        rules.append(Rule(before[0] + theirs, names, transposed))
    return tuple(rules)


GPT2_RULES = _rules("""
    transformer.:         model.:
    wte                   embed_tokens
    wpe                   embed_positions
    ln_f                  norm
    transformer.h.{n}.:   model.layers.{n}.:
    ln_1                  input_layernorm
    attn.c_attn           self_attn.q_proj self_attn.k_proj self_attn.v_proj T
    attn.c_proj           self_attn.o_proj T
    ln_2                  post_attention_layernorm
    mlp.c_fc              mlp.up_proj T
    mlp.c_proj            mlp.down_proj T
""")
BERT_RULES = _rules("""
    bert.embeddings.:           model.:
    word_embeddings             embed_tokens
    position_embeddings         embed_positions
    token_type_embeddings       embed_token_types
    LayerNorm                   norm
    bert.encoder.layer.{n}.:    model.layers.{n}.:
    attention.self.query        self_attn.q_proj
    attention.self.key          self_attn.k_proj
    attention.self.value        self_attn.v_proj
    attention.output.dense      self_attn.o_proj
    attention.output.LayerNorm  post_attention_layernorm
    intermediate.dense          mlp.up_proj
    output.dense                mlp.down_proj
    output.LayerNorm            post_feedforward_layernorm
    cls.predictions.:           model.head.:
    transform.dense             dense
    transform.LayerNorm         norm
    bias                        output_bias
""")


@dataclass(frozen=True, eq=False)
class Family:
    """One architecture of the outside world.

    names: our settings that are free in it, and what they are called there; own: ours that are free
    and need more than another name; fixed: ours that must have this value (or the value computed
    from the config), all others their default; needs: ours that must be set; constants: their
    settings that must hold, and are written; writes: theirs that are written but not demanded;
    defaults: what a setting of theirs means when it is not there; ignores: beginnings of names of
    tensors that say what others say; omits: of those that serve something we lack, and are left
    out; within: beginnings that their names have when the model is the text part of a larger one.
    """

    model_type: str
    architecture: str
    names: Mapping[str, str] = field(default_factory=lambda: LLAMA)
    own: frozenset[str] = ROPE
    fixed: Mapping[str, Value | Derived] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    constants: Mapping[str, Value] = field(default_factory=lambda: {"hidden_act": "silu"})
    writes: Mapping[str, Value] = field(default_factory=lambda: {"attention_dropout": 0.0})
    defaults: Mapping[str, Value] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    ignores: tuple[str, ...] = ()
    omits: tuple[str, ...] = ()
    within: Mapping[str, str] = field(default_factory=dict)
    layer_patterns: tuple[int, ...] | None = None  # values of full_attention_every; None: any
    even_heads: bool = False  # transformers refuses a width that is no multiple of the heads

    def misfits(self, config: ModelConfig) -> dict[str, Value]:
        """Our settings that stand in the way, with the value this family would need."""
        wrong = {}
        for setting in fields(config):
            name, value = setting.name, getattr(config, setting.name)
            if name in self.needs and not value:
                wrong[name] = "a value"
            if name in self.names or name in self.own:
                continue
            wanted = self.fixed.get(name, setting.default)
            if callable(wanted):
                wanted = wanted(config)
            if value != wanted:
                wrong[name] = wanted
        if self.even_heads and config.width % config.heads:
            wrong["width"] = f"a multiple of heads {config.heads}"
        return wrong


def _per_head(config: ModelConfig) -> int:
    return config.width // config.heads


TIED = {"tie_word_embeddings": True}
ONE_SIZE = {"head_dim": _per_head, "kv_heads": lambda config: config.heads}
GEMMA_FLAGS = {
    "norm": "rms+1",
    "norm_placement": "both",
    "activation": "gelu_tanh",
    "scaled_embeddings": True,
}
# What the text part of a larger model leaves unsaid.
GEMMA3_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}
DEEPSEEK_CONSTANTS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
}
DEEPSEEK_NEEDS = ("kv_latent", "experts", "shared_experts")

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        constants={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        even_heads=True,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        names=LLAMA | {"sliding_window": "sliding_window"},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        names=GROUPED,
        fixed={"qkv_bias": True, "head_dim": _per_head},
        constants={"hidden_act": "silu", "use_sliding_window": False},
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        fixed={"qk_norm": True},
        constants={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        names=_names("""
            vocab_size  vocab_size  width     n_embd              layers           n_layer
            heads       n_head      context   n_positions         mlp_width        n_inner
            norm_eps    layer_norm_epsilon    tied_embeddings     tie_word_embeddings
        """),
        own=frozenset(),
        fixed={
            **ONE_SIZE,
            "positions": "learned",
            "norm": "layer",
            "activation": "gelu_tanh",
            "gated_mlp": False,
            "qkv_bias": True,
            "linear_bias": True,
        },
        constants={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        writes={"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        defaults=TIED | {"n_inner": None},
        rules=GPT2_RULES,
        even_heads=True,
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        names=GEMMA | {"attention_softcap": "attn_logit_softcapping"},
        own=GEMMA_OWN,
        fixed=GEMMA_FLAGS,
        needs=("sliding_window", "full_attention_every"),
        defaults=TIED,
        constants={
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "use_bidirectional_attention": None,
        },
        layer_patterns=(2,),
        even_heads=True,
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        names=GEMMA,
        own=GEMMA_OWN | {"window_rope_theta"},
        fixed=GEMMA_FLAGS | {"qk_norm": True},
        needs=("sliding_window", "full_attention_every", "window_rope_theta"),
        defaults=TIED | GEMMA3_DEFAULTS,
        omits=(
            *("vision_tower.", "multi_modal_projector."),
            *("model.vision_tower.", "model.multi_modal_projector."),
        ),
        within={
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
            "model.language_model.": "model.",
        },
        constants={
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "use_bidirectional_attention": False,
            "attn_logit_softcapping": None,
        },
        even_heads=True,
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        names=LATENT,
        own=ROPE | {"head_dim"},
        fixed={"kv_heads": ONE_SIZE["kv_heads"]},
        needs=DEEPSEEK_NEEDS,
        constants=DEEPSEEK_CONSTANTS | {"scoring_func": "softmax", "mlp_bias": False},
        even_heads=True,
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        names=LATENT | {"normalised_routing": "norm_topk_prob"},
        own=ROPE | {"head_dim"},
        fixed={"kv_heads": ONE_SIZE["kv_heads"], "routing": "sigmoid"},
        needs=DEEPSEEK_NEEDS,
        constants={
            **{k: v for k, v in DEEPSEEK_CONSTANTS.items() if k != "norm_topk_prob"},
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "rope_interleave": True,
        },
        writes={"attention_dropout": 0.0, "num_nextn_predict_layers": 0},
    ),
    Family(
        "bert",
        "BertForMaskedLM",
        names={name: their for name, their in SIZES.items() if name != "norm_eps"}
        | {"norm_eps": "layer_norm_eps", "token_types": "type_vocab_size"},
        own=frozenset(),
        fixed={
            **ONE_SIZE,
            "causal": False,
            "positions": "learned",
            "norm": "layer",
            "norm_placement": "post",
            "activation": "gelu",
            "gated_mlp": False,
            "qkv_bias": True,
            "linear_bias": True,
            "masked_head": True,
        },
        needs=("token_types",),
        defaults=TIED,
        constants={"hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False},
        writes={"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
        rules=BERT_RULES,
        ignores=("cls.predictions.decoder.", "bert.embeddings.position_ids"),
        omits=("bert.pooler.", "cls.seq_relationship."),  # of another objective
        even_heads=True,
    ),
)


def family_of(config: ModelConfig) -> Family:
    """The architecture that expresses `config`; raises `FormatError` when none does."""
    misfits = {family: family.misfits(config) for family in FAMILIES}
    nearest = min(FAMILIES, key=lambda family: len(misfits[family]))
    if not misfits[nearest]:
        return nearest
    default = ModelConfig()
    flags = [
        name
        for name in ModelConfig.__dataclass_fields__
        if name in FLAGS and getattr(config, name) != getattr(default, name)
    ]
    wanted = ", ".join(f"{name} = {value}" for name, value in misfits[nearest].items())
    raise FormatError(
        f"no Hugging Face architecture has {' and '.join(flags) or 'these sizes'} together; the "
        f"nearest, {nearest.model_type}, needs {wanted}"
    )


PLAIN = ("vocab_size", "width", "layers", "context", "heads", "kv_heads", "head_dim", "mlp_width")
FLAGS = frozenset(ModelConfig.__dataclass_fields__) - {*PLAIN, "norm_eps", "tied_embeddings"}
