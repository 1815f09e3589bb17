"""When rounding alone decides between two tokens."""

from __future__ import annotations

from typing import Any

NEAR_TIE_CPU, NEAR_TIE_GPU = 1e-4, 0.05
"""Greatest distance of the two likeliest tokens' log-probabilities at which another order of the
same sums may give either token. On a CPU that is float32 rounding; on a GPU vLLM's Triton attention
multiplies float32 in tf32 (some three digits), which our decode kernel does not.
"""


def gap(logprobs: dict[int, Any]) -> float:
    """Between the two likeliest of a step's tokens."""
    best, second = sorted((entry.logprob for entry in logprobs.values()), reverse=True)[:2]
    return best - second
