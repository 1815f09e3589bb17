"""What the retrieval head remembers: its keys, and the fused aux of each page's latest token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE


@dataclass(frozen=True)
class HeadCache:
    """The head's paged K cache, addressed by the same slots as the target's KV.

    Attributes:
        keys: ``[num_blocks, nkv, P, D]`` rotated keys; the pair (token p+1, aux p) is stored in the slot of token p+1.
        fused: ``[num_blocks + 1, H]`` fc(aux) of the latest token in each page. A chunk, a prefix hit or a resumed request
            that starts at position p reads the page of p - 1: within a page that is the request's own latest token, and at
            a page boundary the full (perhaps shared) page's last token. The extra row takes writes that nobody reads.
    """

    keys: Tensor
    fused: Tensor

    @classmethod
    def allocate(cls, num_blocks: int, num_kv_heads: int, head_dim: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> HeadCache:
        """Zero-filled caches for ``num_blocks`` pages."""
        return cls(
            torch.zeros(num_blocks, num_kv_heads, PAGE_SIZE, head_dim, dtype=dtype, device=device),
            torch.zeros(num_blocks + 1, hidden_size, dtype=dtype, device=device),
        )

    @staticmethod
    def bytes_per_block(num_kv_heads: int, head_dim: int, hidden_size: int, dtype: torch.dtype) -> int:
        """Bytes one page adds to the caches."""
        return (num_kv_heads * PAGE_SIZE * head_dim + hidden_size) * dtype.itemsize

    def write_keys(self, keys: Tensor, slots: Tensor) -> None:
        """Store ``keys [N, nkv, D]`` at ``slots [N]`` (none negative)."""
        self.keys[slots // PAGE_SIZE, :, slots % PAGE_SIZE] = keys

    def previous(self, block_table: Tensor, positions: Tensor) -> Tensor:
        """Fused aux of the token before ``positions [B]`` of rows ``block_table [B, W]``: ``[B, H]``, zeros at position 0."""
        before = (positions - 1).clamp(min=0)
        blocks = block_table.gather(1, (before // PAGE_SIZE)[:, None]).squeeze(1).long()
        return torch.where((positions > 0)[:, None], self.fused[blocks], 0.0)

    def remember(self, fused: Tensor, slots: Tensor, keep: Tensor) -> None:
        """Keep the fused aux ``[N, H]`` of the tokens at ``slots [N]`` where ``keep [N]`` holds: one token a page."""
        trash = self.fused.shape[0] - 1
        self.fused[torch.where(keep, slots // PAGE_SIZE, trash)] = fused
