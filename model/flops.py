"""Parameters and floating-point operations, by formula."""

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """embedding: input and, when untied, output matrices; matrices: all others; vectors: norms,
    biases.
    """

    embedding: int
    matrices: int
    vectors: int

    @property
    def total(self) -> int:
        return self.embedding + self.matrices + self.vectors


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Per layer, with C the width, Q = heads·head_dim, K = kv_heads·head_dim and F the MLP width:

    attention  C·Q (query) + 2·C·K (key, value) + Q·C (output);  MLP  3·C·F;  norms  2·C
    (+ 2·head_dim with qk_norm, + Q + 2·K with qkv_bias); outside the layers V·C per embedding
    matrix, C.
    """
    c, q, k = config.width, config.heads * config.head_size, config.kv_count * config.head_size
    vectors = 2 * c
    if config.qk_norm:
        vectors += 2 * config.head_size
    if config.qkv_bias:
        vectors += q + 2 * k
    return ParameterCount(
        embedding=config.vocab_size * c * (1 if config.tied_embeddings else 2),
        matrices=config.layers * (2 * c * q + 2 * c * k + 3 * c * config.mlp_size),
        vectors=config.layers * vectors + c,
    )


def forward_flops_per_token(config: ModelConfig, context: float) -> float:
    """Operations to process one token that looks at `context` keys (itself included).

    A matrix of P parameters costs 2·P per token (a multiply and an add each). The output matrix
    works on every token even when tied; looking a row up in the input matrix is free. Attention
    adds, per layer, 2·Q for each key's score and 2·Q for each value's share: 4·Q·context. Norms,
    RoPE, softmax and activations are left out, as is usual (below one percent at any width worth
    training).
    """
    if config.sliding_window is not None:
        context = min(context, config.sliding_window)
    matmul = 2 * (count_parameters(config).matrices + config.vocab_size * config.width)
    return matmul + 4 * config.layers * config.heads * config.head_size * context


def training_flops_per_token(config: ModelConfig, sequence: int) -> float:
    """Operations of one training token: forward plus twice that for backward (Kaplan,
    arXiv:2001.08361).

    The mean number of keys of a causal sequence of T tokens is (T + 1)/2, or less under a window:
    token i sees min(i + 1, W). PaLM's MFU formula (arXiv:2204.02311, appendix B) counts all T keys
    for every token; we count only what causality needs, so our MFU is the smaller, more honest one.
    """
    window = min(config.sliding_window or sequence, sequence)
    mean_keys = (window * (window + 1) / 2 + (sequence - window) * window) / sequence
    return 3 * forward_flops_per_token(config, mean_keys)
