"""95 % confidence intervals of the accuracy figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964
"""The standard normal's 97.5 % quantile."""


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a share ``right / count``; the whole unit interval without observations."""
    if count == 0:
        return 0.0, 1.0
    share = right / count
    centre = share + Z * Z / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap(scores: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """Percentile bootstrap of the mean of ``scores`` in 0..1, with a fixed seed; the unit interval without observations."""
    if not scores:
        return 0.0, 1.0
    values = np.asarray(scores, dtype=float)
    picks = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
