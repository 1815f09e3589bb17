"""95 % confidence intervals of the accuracy figures, and of differences over the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964
"""The standard normal's 97.5 % quantile."""


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a share ``right / count``; 0 to 1 without observations."""
    if count == 0:
        return 0.0, 1.0
    share = right / count
    centre = share + Z * Z / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap(scores: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """Percentile bootstrap of the mean of ``scores`` in 0..1, with a fixed seed; the unit interval
    without observations.
    """
    if not scores:
        return 0.0, 1.0
    values = np.asarray(scores, dtype=float)
    picks = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def of_scores(scores: Sequence[float], right_or_wrong: bool) -> tuple[float, float]:
    """Of the mean of scores in 0..1: Wilson where each is right or wrong, else bootstrap."""
    return wilson(round(sum(scores)), len(scores)) if right_or_wrong else bootstrap(scores)


def paired(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences in -1..1: Agresti and Min (2005), Wald's interval after two more
    pairs are added, one without a difference and half a one each way. The whole range without
    observations.

    For right or wrong it is theirs; for shares, the squares of the differences take the place of
    the number of discordant pairs. Student's t and the bootstrap have no width where all pairs are
    equal, as a dozen often are here: tests/benchmarks/test_report.py counts how often each interval
    covers the truth.
    """
    if not differences:
        return -1.0, 1.0
    count, total = len(differences) + 2, sum(differences)
    squares = sum(d * d for d in differences) + 1
    half = Z * math.sqrt(squares - total * total / count) / count
    return max(-1.0, total / count - half), min(1.0, total / count + half)


def student(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences without bounds: Student's t, wider than the bootstrap for so few.
    Everything for less than two.
    """
    if len(differences) < 2:
        return -math.inf, math.inf
    values = np.asarray(differences, dtype=float)
    half = t_quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t with ``freedom`` >= 1 degrees of freedom, by bisection of its
    distribution.
    """

    def within(t: float) -> float:
        # Abramowitz and Stegun 26.7.3 and 26.7.4: the share between -t and t.
        angle = math.atan(t / math.sqrt(freedom))
        odd = freedom % 2
        term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
        for k in range(1 + odd, freedom, 2):
            total += term
            term *= k / (k + 1) * math.cos(angle) ** 2
        return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 0.95 else (low, middle)
    return high
