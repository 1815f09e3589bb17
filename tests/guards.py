"""Buffers with a margin on both sides that nothing may write to, and the values that a request
whose hidden states overflow leaves behind.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 256
SENTINEL = -7

NOT_FINITE = {
    "NaN": 0x7FC00000,
    "the largest NaN": 0x7FFFFFFF,
    "negative NaN": 0xFFC00000,
    "inf": 0x7F800000,
    "-inf": 0xFF800000,
}
"""Bits of float32 values."""


def as_float(bits: int) -> Tensor:
    """A float32 of just these bits; as a Python number a NaN might lose its sign."""
    return torch.frombuffer(bytearray(struct.pack("<I", bits)), dtype=torch.float32)


@dataclass(frozen=True)
class Guarded:
    """A tensor full of ``SENTINEL`` inside a larger one of the same.

    Attributes:
        view: the tensor to be written.
    """

    view: Tensor
    _whole: Tensor

    @classmethod
    def make(cls, *shape: int, dtype: torch.dtype = torch.int32, device: torch.device) -> Guarded:
        count = torch.Size(shape).numel()
        whole = (
            torch.full((count + 2 * MARGIN,), SENTINEL, dtype=torch.float32).to(dtype).to(device)
        )
        return cls(whole[MARGIN : MARGIN + count].view(shape), whole)

    def check(self) -> None:
        """Raise where the margins were written to."""
        whole = self._whole.float()
        assert (
            torch.cat([whole[:MARGIN], whole[-MARGIN:]])
            == torch.tensor(SENTINEL).to(self._whole.dtype).float()
        ).all(), "wrote outside the buffer"


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit by bit, NaN included."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
