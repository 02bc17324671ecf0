"""Parameters and floating-point operations, by formula."""

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """embedding: input, position and, when untied, output matrices; matrices: all others; vectors:
    norms, biases; idle: of the matrices, those of experts that a token does not pass.
    """

    embedding: int
    matrices: int
    vectors: int
    idle: int = 0

    @property
    def total(self) -> int:
        return self.embedding + self.matrices + self.vectors

    @property
    def active(self) -> int:
        """Those one token is computed with."""
        return self.total - self.idle


def count_parameters(config: ModelConfig) -> ParameterCount:
    """With C the width, F the MLP width, V the vocabulary and H heads of D channels (values E):

    attention     C·H·D (query) + C·K·(D + E) (key and value of K kv_heads) + H·E·C (output)
    latent        queries C·H·D, or C·q + q·H·D through q channels; keys and values C·(l + R) down
                  to the latent l and the R channels that RoPE turns, l·H·(D - R + E) up; output
    feed-forward  3·C·F gated, 2·C·F not; with experts C·n (router) and 3·C·f for each of the n
                  experts and the shared ones, f wide
    outside       V·C for each embedding matrix, context·C for learned positions

    and for each norm its width (twice in a LayerNorm), for each biased matrix its outputs.
    """
    c, heads = config.width, config.heads
    q, k, v = (
        heads * config.head_size,
        config.kv_count * config.head_size,
        heads * config.value_size,
    )
    gates = 3 if config.gated_mlp else 2
    norm = 2 * c if config.norm == "layer" else c
    attention, vectors = v * c, norm * (4 if config.norm_placement == "both" else 2)
    if config.kv_latent is None:
        attention += c * q + 2 * c * k
    else:
        latent, up = config.kv_latent, config.head_size - config.rotary_size + config.value_size
        attention += c * (latent + config.rotary_size) + latent * heads * up
        attention += (c + q) * config.query_latent if config.query_latent else c * q
        vectors += latent + (config.query_latent or 0)
    vectors += 2 * config.head_size * config.qk_norm + (q + 2 * k) * config.qkv_bias
    dense = config.layers
    matrices = vectors_of_mlp = idle = 0
    if config.experts:
        dense = min(config.dense_layers, config.layers)
        one, sparse = 3 * c * config.expert_width, config.layers - dense
        matrices = sparse * (c * config.experts + one * (config.experts + config.shared_experts))
        idle = sparse * one * (config.experts - config.experts_per_token)
    if config.linear_bias:
        vectors_of_mlp = config.mlp_size * (gates - 1) + 2 * c  # and the attention's output
    tables = 1 if config.tied_embeddings else 2
    outside = config.context if config.positions == "learned" else 0
    head = config.masked_head
    return ParameterCount(
        embedding=c * (config.vocab_size * tables + outside + config.token_types),
        matrices=config.layers * attention
        + dense * gates * c * config.mlp_size
        + matrices
        + head * c * c,
        vectors=config.layers * (vectors + vectors_of_mlp)
        + norm
        + head * (c + norm + config.vocab_size),
        idle=idle,
    )


def forward_flops(config: ModelConfig, tokens: float, counted: float, keys: float) -> float:
    """Operations to process so many tokens, of which `counted` have a target in the loss.

    A matrix of P parameters costs 2·P per token (a multiply and an add each); of the experts only
    the chosen ones. The output matrix works, also when tied, on the tokens whose target counts;
    looking a row up in the input matrix is free. Attention adds for each key that a token sees in
    a layer (`keys`: of all tokens and layers) 2·H·D for its score and 2·H·E for its value's share.
    Norms, RoPE, softmax and activations are left out, as is usual (below one percent at any width
    worth training).
    """
    count = count_parameters(config)
    blocks = 2 * (count.matrices - count.idle) * tokens
    output = 2 * config.vocab_size * config.width * counted
    return blocks + output + 2 * config.heads * (config.head_size + config.value_size) * keys


def mean_keys(config: ModelConfig, layer: int, sequence: int) -> float:
    """Keys a token of a sequence of T looks at, on average: (T + 1)/2 when causal, T when not, less
    under a window: token i sees min(i + 1, W).
    """
    if not config.causal:
        return sequence
    window = min(config.window(layer) or sequence, sequence)
    return (window * (window + 1) / 2 + (sequence - window) * window) / sequence


def training_flops_per_token(config: ModelConfig, sequence: int, counted: float = 1.0) -> float:
    """Operations of one training token, the mean over a sequence that is one document: forward plus
    twice that for backward (Kaplan, arXiv:2001.08361), so 6·N + 12·layers·H·D·keys with N without
    the embedding, with the head. counted: share of the tokens whose target counts in the loss.

    PaLM's MFU formula (arXiv:2204.02311, appendix B) counts all T keys for every token; we count
    only what causality needs, so our MFU is the smaller, more honest one. What activation
    checkpointing computes again is not counted: it is no progress.
    """
    keys = sum(mean_keys(config, layer, sequence) for layer in range(config.layers))
    return 3 * forward_flops(config, 1, counted, keys)
