"""Rotary position table of the retrieval head.

Draft heads are trained on some 2k tokens and asked about 128k. The paper extends them with YaRN
(arXiv 2309.00071), without training, and gives no factor. Here it is max_position / trained_length,
the smallest that covers every position.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.retrieval.checkpoint import HeadError, HeadSpec

# Frequencies are divided by these, or q and k multiplied with them: zero or less makes a table of
# NaN, of infinities, or one in which all positions are the same.
_POSITIVE = (
    "factor",
    "attention_factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
)
_LONGROPE = ("short_factor", "long_factor")


def rope_parameters(spec: HeadSpec, max_position: int) -> dict[str, Any]:
    """The RoPE settings in force, in transformers' terms (`rope_type`, `rope_theta`, ...).

    A checkpoint's own scaling is taken as it is. Without one, YaRN extends the head to positions
    beyond `spec.trained_length`.
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


def rope_frequencies(spec: HeadSpec, max_position: int) -> tuple[Tensor, float]:
    """Angle per position of each pair (float32 [D / 2]), and the factor on cosines and sines.

    The frequencies are transformers' own (`ROPE_INIT_FUNCTIONS`). Types whose frequencies depend on
    the sequence length ("dynamic", "longrope") use max_position, since keys are stored rotated.

    Raises:
        HeadError: a rope_type that transformers does not know, or settings that are incomplete or
            give no finite angles.
    """
    parameters = rope_parameters(spec, max_position)
    if spec.rope_scaling is not None:
        _check_scaling(spec.rope_scaling, spec.rotary_dim)
    if parameters["rope_type"] == "default":
        exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
        frequencies, attention_factor = spec.rope_theta**-exponents, 1.0
    else:
        frequencies, attention_factor = _scaled_frequencies(spec, parameters, max_position)
    fits = frequencies.shape == (spec.rotary_dim // 2,) and frequencies.is_floating_point()
    # Angles grow with the position: if the last one is finite, all are.
    finite = fits and bool(torch.isfinite(frequencies.float() * max_position).all())
    if not finite or not 0 < attention_factor <= torch.finfo(torch.float32).max:
        raise HeadError(
            f"No finite rotary angles can be made with the head's {_settings(spec)}: correct the "
            "head's config.json."
        )
    # The other pairs are not turned.
    unturned = (spec.head_dim - spec.rotary_dim) // 2
    return F.pad(frequencies.float(), (0, unturned)), attention_factor


def rope_table(spec: HeadSpec, max_position: int, device: torch.device | str) -> Tensor:
    """Cosines, then sines, of every position, times the scaling's attention factor: float32
    [max_position, D].

    The factor multiplies q and k, so scores are multiplied with its square, as in transformers.

    Raises:
        HeadError: as ``rope_frequencies``.
    """
    frequencies, attention_factor = rope_frequencies(spec, max_position)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), frequencies)
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * attention_factor).to(device)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in NeoX's form, in which the two halves of D rotate against each other.

    Args:
        x: [..., D]. cos, sin: broadcastable to [..., D / 2].
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def apply_rope(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """``x [N, heads, D]`` rotated by its positions [N] int64, computed in float32; in x's dtype.

    Args:
        table: of `rope_table`.
    """
    cos, sin = table[positions].unsqueeze(1).chunk(2, dim=-1)
    return rotate_halves(x.float(), cos, sin).to(x.dtype)


def _settings(spec: HeadSpec) -> str:
    return (
        f"rope_theta {spec.rope_theta:g}"
        if spec.rope_scaling is None
        else f"rope_theta {spec.rope_theta:g} and rope_scaling {spec.rope_scaling}"
    )


def _check_scaling(scaling: dict[str, Any], rotary_dim: int) -> None:
    """Refuses, naming the field, a number that no frequency can be made with; transformers refuses
    a field that is missing.

    Raises:
        HeadError: there is one.
    """
    for field, value in scaling.items():
        positive = field in _POSITIVE + _LONGROPE
        for number in value if isinstance(value, list) else (value,):
            if positive and number is not None:
                usable = isinstance(number, int | float) and 0 < number < math.inf
            else:
                usable = not isinstance(number, float) or math.isfinite(number)
            if not usable:
                kind = "a finite number above 0" if positive else "a finite number"
                raise HeadError(
                    f"The head's rope_scaling has {field} {value!r} where {kind} is needed: "
                    "correct it in the head's config.json."
                )
    if scaling["rope_type"] == "longrope":
        for field in _LONGROPE:
            found = scaling.get(field)
            if not isinstance(found, list) or len(found) != rotary_dim // 2:
                count = len(found) if isinstance(found, list) else "no list"
                raise HeadError(
                    f"The head's rope_scaling has {count} of the {rotary_dim // 2} numbers that "
                    f"{field} must hold: correct it in the head's "
                    "config.json."
                )


def _scaled_frequencies(
    spec: HeadSpec, parameters: dict[str, Any], max_position: int
) -> tuple[Tensor, float]:
    # transformers is slow to import, and heads without scaling do not need it.
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = parameters["rope_type"]
    if not isinstance(rope_type, str) or rope_type not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(sorted(ROPE_INIT_FUNCTIONS))
        raise HeadError(
            f"The head's rope_scaling has rope_type {rope_type!r}, and transformers knows only "
            f"{known}."
        )
    try:
        config = LlamaConfig(
            hidden_size=spec.num_heads * spec.rotary_dim,
            num_attention_heads=spec.num_heads,
            num_key_value_heads=spec.num_kv_heads,
            head_dim=spec.rotary_dim,
            max_position_embeddings=spec.trained_length,
            rope_parameters=parameters,
        )
        return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=max_position)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise HeadError(
            f"No rotary angles can be made with the head's {_settings(spec)} ({reason}): correct "
            "or complete the head's config.json."
        ) from error
