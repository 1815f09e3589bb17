"""The page table that decode attention reads: one sequence of head pages per (request, KV head)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PageTable:
    """Persistent buffers, so that captured CUDA graphs may point at them.

    Attributes:
        pages: ``[rows * H, K]`` int32 head pages (``block * H + head``) in ascending order of
            position.
        lengths: ``[rows * H]`` int32 tokens in them; only the last page may be partly filled; 0 for
            padding rows.
        num_kv_heads: H.
    """

    pages: Tensor
    lengths: Tensor
    num_kv_heads: int

    @classmethod
    def allocate(
        cls, rows: int, num_kv_heads: int, max_pages: int, device: torch.device
    ) -> PageTable:
        """An empty table for ``rows`` requests of up to ``max_pages`` pages a head."""
        sequences = rows * num_kv_heads
        return cls(
            torch.zeros(sequences, max_pages, dtype=torch.int32, device=device),
            torch.zeros(sequences, dtype=torch.int32, device=device),
            num_kv_heads,
        )

    @property
    def rows(self) -> int:
        """Requests the buffers hold."""
        return self.lengths.shape[0] // self.num_kv_heads

    @property
    def max_pages(self) -> int:
        """Most pages one sequence may read."""
        return self.pages.shape[1]
