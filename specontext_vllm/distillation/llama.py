"""Llama's parts in plain torch, differentiable: of the draft model and the demo model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def linear(width: int, rows: int) -> nn.Linear:
    """A layer without bias whose outputs are of unit size at first, whatever its width."""
    layer = nn.Linear(width, rows, bias=False)
    nn.init.normal_(layer.weight, 0.0, width**-0.5)
    return layer


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Grouped-query attention ``[B, nh, T, D]`` of ``q [B, nh, T, D]``, ``k, v [B, nkv, T, D]``."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """``[B, T, heads * D]`` -> ``[B, heads, T, D]``."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def gated_mlp(x: Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> Tensor:
    """Llama's MLP."""
    return down(F.silu(gate(x)) * up(x))
