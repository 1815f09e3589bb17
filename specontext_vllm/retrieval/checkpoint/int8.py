"""Matrices in 8 bits, in heads of our own format: int8 values and one scale a row.

A matrix ``NAME`` of integers q has a tensor ``NAME.scale`` beside it and stands for q * scale. With
the scale max |row| / 127 and rounding to nearest no value is off by more than half a scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from specontext_vllm.retrieval.checkpoint.errors import HeadError

SCALE = ".scale"
LARGEST = 127
"""-128 is not used, so that both signs reach as far."""


def quantize(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are stored in 8 bits: of each matrix ``[rows, columns]`` the integers and
    the scales ``[rows]`` in float32, the rest in bfloat16.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            stored[name] = tensor.bfloat16()
            continue
        values = tensor.float()
        scale = values.abs().amax(1) / LARGEST
        # A row of zeros has the scale 0, by which nothing can be divided.
        steps = values / scale.where(scale > 0, 1.0)[:, None]
        stored[name] = steps.round().clamp(-LARGEST, LARGEST).to(torch.int8)
        stored[name + SCALE] = scale
    return stored


def dequantize(stored: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a head: matrices of integers with their scales as float32, the rest as it is.

    Args:
        stored: finite tensors, of names and shapes that are right.
    Raises:
        HeadError: a scale is negative.
    """
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(SCALE):
            if bad := int((tensor < 0).sum()):
                raise HeadError(
                    f"{path}: {name} holds {bad} of {tensor.numel()} scales that are negative: "
                    "copy the head in full, or prune it with --int8 again."
                )
        elif tensor.dtype == torch.int8:
            tensors[name] = tensor * stored[name + SCALE].float()[:, None]
        else:
            tensors[name] = tensor
    return tensors
