"""How close two tokens must be for rounding to decide between them."""

from __future__ import annotations

from typing import Any

NEAR_TIE_CPU, NEAR_TIE_GPU = 1e-4, 0.05
"""Distance of the two likeliest tokens' log-probabilities under which either may come out of
another order of the same sums: in float32 on a CPU, and on a GPU, where vLLM's Triton attention
    multiplies float32 in tf32 (some three digits) and our decode kernel does not."""


def gap(logprobs: dict[int, Any]) -> float:
    """Between the two likeliest of a step's tokens."""
    best, second = sorted((entry.logprob for entry in logprobs.values()), reverse=True)[:2]
    return best - second
