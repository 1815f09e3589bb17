"""Rotary position table of the retrieval head.

Draft heads are trained on 2k tokens and asked about 128k. The paper extends them with YaRN (arXiv 2309.00071) and no
training; it gives no factor. Here it is max_position / trained_length, the least that covers every position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checkpoint import HeadError, HeadSpec


def rope_parameters(spec: HeadSpec, max_position: int) -> dict[str, Any]:
    """The RoPE settings in force, in transformers' terms (`rope_type`, `rope_theta`, ...).

    A checkpoint's own scaling is taken as it is. Without one, positions beyond `spec.trained_length` bring YaRN.
    """
    if spec.rope_scaling is not None:
        return {**spec.rope_scaling, "rope_theta": spec.rope_theta}
    if max_position <= spec.trained_length:
        return {"rope_type": "default", "rope_theta": spec.rope_theta}
    return {
        "rope_type": "yarn",
        "rope_theta": spec.rope_theta,
        "factor": max_position / spec.trained_length,
        "original_max_position_embeddings": spec.trained_length,
    }


def rope_table(spec: HeadSpec, max_position: int, device: torch.device | str) -> Tensor:
    """Cosines then sines of every position, times the scaling's attention factor: float32 [max_position, D].

    The factor multiplies q and k alike, so scores carry its square, as in transformers. The frequencies are transformers'
    own (`ROPE_INIT_FUNCTIONS`); the types whose frequencies depend on the sequence length ("dynamic", "longrope") are
    fixed at max_position, since a key is stored rotated.

    Raises:
        HeadError: a rope_type that transformers does not know, or one whose settings are incomplete.
    """
    parameters = rope_parameters(spec, max_position)
    rope_type = parameters["rope_type"]
    if rope_type == "default":
        exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
        inv_freq, attention_factor = spec.rope_theta**-exponents, 1.0
    else:
        inv_freq, attention_factor = _scaled_frequencies(spec, parameters, max_position)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inv_freq.float())
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * attention_factor).to(device)


def apply_rope(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Rotates x [N, heads, D] by its positions [N] int64 in float32 (NeoX halves) and returns x's dtype."""
    cos, sin = table[positions].unsqueeze(1).chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _scaled_frequencies(spec: HeadSpec, parameters: dict[str, Any], max_position: int) -> tuple[Tensor, float]:
    # transformers is slow to import, and heads without scaling do not need it.
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = parameters["rope_type"]
    if rope_type not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(sorted(ROPE_INIT_FUNCTIONS))
        raise HeadError(f"The head's rope_scaling has rope_type {rope_type!r}, and transformers knows only {known}.")
    try:
        config = LlamaConfig(
            hidden_size=spec.num_heads * spec.head_dim,
            num_attention_heads=spec.num_heads,
            num_key_value_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            max_position_embeddings=spec.trained_length,
            rope_parameters=parameters,
        )
        return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=max_position)
    except (KeyError, TypeError, ValueError) as error:
        raise HeadError(
            f"The head's rope_scaling of type {rope_type!r} is incomplete ({error}): complete it in the head's config.json."
        ) from error
