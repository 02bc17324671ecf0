"""What one worker of a pretraining holds in memory, by formula."""

from __future__ import annotations

from model.chunks import CHUNK_ROWS, CHUNK_ROWS_GPU, SLICE_ROWS, SLICE_ROWS_GPU
from model.config import ModelConfig
from model.flops import count_parameters
from tasks.training.pretrain import PretrainConfig


def memory_bytes(shape: ModelConfig, config: PretrainConfig, workers: int) -> float:
    """Of one worker, at the end of a forward pass: weights and all that belongs to them,
    activations of a micro-batch, and the loss.
    """
    slices = max(workers // config.run.tensor, 1)
    rows = min(config.run.micro_batch, -(-config.batch // slices))
    tokens = rows * config.sequence
    held = _state_bytes(shape, config, slices)
    return held + _activation_bytes(shape, config, tokens) + _loss_bytes(shape, config, tokens)


def _state_bytes(shape: ModelConfig, config: PretrainConfig, slices: int) -> float:
    """fp32 weights and gradients, optimiser state, and what bf16 and division add.

    Muon keeps one number for a weight in the blocks, AdamW two for any. With tensor parallelism a
    worker has its part of the matrices.
    """
    count, bf16 = count_parameters(shape), config.precision != "fp32"
    matrices = count.matrices / config.run.tensor
    weights = count.total - count.matrices + matrices
    states = 2 * weights
    if config.optimizer.kind == "muon":
        states -= matrices
    held = 4 * (2 * weights + states)
    if config.run.sharded:
        # Beside its share a worker holds the tables and their gradients; the weights of two blocks,
        # one of them on its way; and the gradients of one, as they are computed and as they are
        # added, in fp32.
        block = (3 * 2 + 4 if bf16 else 4 * 4) * matrices / shape.layers
        return held / slices + 8 * count.embedding + block
    return held + (2 * matrices if bf16 else 0)  # autocast keeps its casts until the step ends


def _activation_bytes(shape: ModelConfig, config: PretrainConfig, tokens: int) -> float:
    """Of a micro-batch: 34 bytes for each token, channel and layer where attention keeps no matrix
    (Korthikanti et al., arXiv:2205.05198, in bf16), 16 of them for a feed-forward twice as wide as
    the stream (ours is gated: 8 for each of its channels); with checkpointing 2, and one layer.

    On a CPU the attention matrix of short sequences is kept too (model/kernels.py). With tensor
    parallelism they are counted whole, and are less.
    """
    layer: float = tokens * (18 * shape.width + 8 * shape.mlp_size)
    if not config.run.gpu and config.sequence <= 1024:
        layer += tokens * shape.heads * config.sequence * 4
    if config.precision == "fp32":
        layer *= 2
    if config.run.activation_checkpointing:
        return layer + tokens * shape.width * 2 * shape.layers
    return layer * shape.layers


def _loss_bytes(shape: ModelConfig, config: PretrainConfig, tokens: int) -> float:
    """Of `model.losses`: the gradient of the output matrix in fp32, and either this matrix and a
    chunk's gradient in bf16 or the latter in fp32; the logits of a chunk; a slice of them in fp32.
    """
    gpu, size = config.run.gpu, 4 if config.precision == "fp32" else 2
    chunk = min(tokens, CHUNK_ROWS_GPU if gpu else CHUNK_ROWS)
    part = min(tokens, SLICE_ROWS_GPU if gpu else SLICE_ROWS)
    return shape.vocab_size * (8 * shape.width + size * chunk + 4 * part)
