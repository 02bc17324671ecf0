"""Rotary positions: the angles of every position, plain or stretched to a longer context."""

import math

import torch
from torch import Tensor

from model.rope_scaling import RopeScaling


def rope_table(
    positions: int, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (positions, head_dim) in float32, of rotary embeddings
    (arXiv:2104.09864).

    Both halves of the head hold the same angles: the rotate-half layout of Hugging Face's
    checkpoints, not the interleaved pairs of the paper.
    """
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is not None:
        frequencies = scaled_frequencies(scaling, frequencies, theta)
    angles = torch.outer(torch.arange(positions).float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    if scaling is None:
        return angles.cos(), angles.sin()
    return angles.cos() * scaling.magnitude, angles.sin() * scaling.magnitude


def scaled_frequencies(scaling: RopeScaling, plain: Tensor, theta: float) -> Tensor:
    """The radians a position adds in each pair of channels, (D/2,), from plain RoPE's."""
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        share = _llama3_share(scaling, plain)
    elif scaling.kind == "yarn":
        share = _yarn_share(scaling, len(plain), theta)
    else:
        return plain
    return plain / scaling.factor * (1 - share) + plain * share


def _llama3_share(scaling: RopeScaling, plain: Tensor) -> Tensor:
    """How much of its plain frequency each pair of channels keeps, by its turns."""
    low, high = scaling.low_freq_factor or 0.0, scaling.high_freq_factor or 0.0
    turns = (scaling.original_context or 0) * plain / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_share(scaling: RopeScaling, pairs: int, theta: float) -> Tensor:
    """The same by a ramp over channels."""
    channels = 2 * pairs

    def channel(turns: float) -> float:
        """The channel that turns so often within the original context."""
        ratio = (scaling.original_context or 0) / (turns * 2 * math.pi)
        return channels * math.log(ratio) / (2 * math.log(theta))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    ramp = (torch.arange(pairs) - first) / (last - first if last != first else 0.001)
    return 1 - ramp.clamp(0, 1)
