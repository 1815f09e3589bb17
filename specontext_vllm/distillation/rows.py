"""Rows of sequences at sampled positions."""

from __future__ import annotations

from torch import Tensor


def rows_at(x: Tensor, at: Tensor) -> Tensor:
    """Rows ``[B, S, H]`` of ``x [B, T, H]`` at positions ``at [B, S]``."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
