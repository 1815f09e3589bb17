"""8-bit floats (e4m3), in which a KV cache and the head's keys may be kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


@dataclass(frozen=True)
class KVScales:
    """Scales of one layer's KV cache in 8-bit floats: what is stored times its scale is what was
    written. Float32 tensors of one element, read on the device, so that a captured graph stays
    valid when a value changes.

    Attributes:
        key, value: of keys and of values.
        query: of queries, for a kernel that takes them in 8-bit floats too.
    """

    key: Tensor
    value: Tensor
    query: Tensor


def to_float8(values: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """``values / scale`` in 8-bit floats. What is too large becomes the largest; NaN stays."""
    # Older torch makes NaN of what is too large.
    return (values.float() / scale).clamp(-LARGEST, LARGEST).to(FP8)


def as_bytes(values: Tensor) -> Tensor:
    """8-bit floats as the bytes that they are, since not every torch indexes 8-bit floats; others
    as they are.
    """
    return values.view(torch.uint8) if values.dtype == FP8 else values
