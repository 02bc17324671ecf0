"""95% intervals of the scores, and of differences between two models on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054  # of a two-sided 95% interval
RESAMPLES = 2000


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


def wilson(successes: int, trials: int) -> Estimate:
    """A share with Wilson's score interval (1927), which holds near 0 and 1 and for few trials."""
    if trials == 0:
        return Estimate(0.0, 0.0, 1.0)
    share, z2 = successes / trials, Z * Z / trials
    centre = (share + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials))
    return Estimate(share, max(centre - half, 0.0), min(centre + half, 1.0))


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], seed: int = 0
) -> Estimate:
    """sum(numerators) / sum(denominators), resampling the items; the same numbers every time.

    With all denominators 1 it is the mean. A single item has no interval: both ends are its value.
    """
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if len(above) == 0:
        return Estimate(0.0, 0.0, 0.0)
    draw = np.random.Generator(np.random.PCG64(seed))
    ratios: list[NDArray[np.float64]] = []
    # In blocks, so that memory stays small for many items.
    for _ in range(0, RESAMPLES, 100):
        chosen = draw.integers(0, len(above), (100, len(above)))
        ratios.append(above[chosen].sum(1) / below[chosen].sum(1))
    low, high = np.quantile(np.concatenate(ratios), (0.025, 0.975))
    return Estimate(float(above.sum() / below.sum()), float(low), float(high))


def mean(values: Sequence[float]) -> Estimate:
    """A mean with its bootstrap interval."""
    return bootstrap_ratio(values, [1.0] * len(values))
