"""Rates and initialisation that were found at one width, used at another (µP, arXiv:2203.03466).

With r = base_width / width, at the base all is as without. Given in the form without multipliers in
the forward pass (table 3 there), so that every model that is trained so can be exported:

                          initial deviation       AdamW's rate      its decay    Muon's rate
    embeddings            0.02                    rate              decay
    norms, biases         1, 0                    rate              0
    matrices in blocks    0.02 · √r (· depth)     rate · r          decay / r    rate
    output, router        0.02 · r                rate · r          decay / r

Activations and their changes in a step then have the same scale at every width (the coordinate
check in `tests/model/test_width.py`), so that the best rate of a small model is near that of a
large one. Decay is divided so that rate · decay, what shrinks a matrix in a step, stays. Let the
number of heads grow with the width, not their size: scores are divided by √head_dim, which suits
one size.
"""

from model.config import ConfigError, ModelConfig


def width_ratio(config: ModelConfig, base_width: int) -> float:
    """r of a model; 1 without a base (0). Raises `ConfigError` for models that cannot follow."""
    if base_width == 0:
        return 1.0
    if config.tied_embeddings:
        raise ConfigError(
            "base_width needs tied_embeddings False: with the width, the output matrix wants lower "
            "rates and the embedding does not"
        )
    if config.scaled_embeddings:
        raise ConfigError(
            "base_width does not go with scaled_embeddings, which grow with the width; leave it out"
        )
    return base_width / config.width
