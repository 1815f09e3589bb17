"""What the retrieval head remembers: its keys, and the fused aux of each page's latest token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specontext_vllm.config import CONFIG_KEY, PAGE_SIZE, ConfigError, HeadKeyDtype
from specontext_vllm.cpu_kernels.huge_pages import use_huge_pages
from specontext_vllm.float8 import FP8, as_bytes, to_float8

FP8_CAPABILITY = (9, 0)
"""Compute capability from which on keys may be 8-bit floats. 8.9 has them, but cannot convert them
into bfloat16 the way that Triton 3.6 does.
"""


def head_key_dtype(setting: HeadKeyDtype, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the head's keys are kept in on ``device``; see ``key_dtype``."""
    if device.type != "cuda":
        return key_dtype(setting, dtype, None, device.type)
    return key_dtype(
        setting, dtype, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    )


def key_dtype(
    setting: HeadKeyDtype, dtype: torch.dtype, capability: tuple[int, int] | None, device_name: str
) -> torch.dtype:
    """What the head's keys are kept in: ``dtype`` is the model's. "auto": 8-bit floats on a GPU of
    ``FP8_CAPABILITY``.

    Args:
        capability: of the GPU; None on a CPU.
    Raises:
        ConfigError: 8-bit floats on an older GPU.
    """
    if setting == "fp8" and capability is not None and capability < FP8_CAPABILITY:
        raise ConfigError(
            f"additional_config.{CONFIG_KEY}.head_key_dtype: found 'fp8', but {device_name} cannot "
            "multiply them with the head's queries "
            f"(compute capability {capability[0]}.{capability[1]}, needed "
            f"{FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]}); use model."
        )
    on_gpu = capability is not None and capability >= FP8_CAPABILITY
    return FP8 if setting == "fp8" or (setting == "auto" and on_gpu) else dtype


@dataclass(frozen=True)
class HeadCache:
    """The head's paged K cache, addressed by the same slots as the target's KV.

    Attributes:
        keys: ``[num_blocks, nkv, P, D]`` rotated keys, in the head's dtype or as 8-bit floats
            (e4m3, cut off at 448); the key of the pair (token p+1, aux p) is stored in the slot of
            token p+1.
        fused: ``[num_blocks + 1, H]`` fc(aux) of the latest token in each page. A chunk, a prefix
            hit or a resumed request that starts at position p reads the page of p - 1: within a
            page that is the request's own latest token, and at a page boundary the full (perhaps
            shared) page's last token. The extra row takes writes that nobody reads.
    """

    keys: Tensor
    fused: Tensor

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        hidden_size: int,
        dtype: torch.dtype,
        key_dtype: torch.dtype,
        device: torch.device,
    ) -> HeadCache:
        """Zero-filled caches for ``num_blocks`` pages."""
        keys = torch.zeros(
            num_blocks, num_kv_heads, PAGE_SIZE, head_dim, dtype=key_dtype, device=device
        )
        fused = torch.zeros(num_blocks + 1, hidden_size, dtype=dtype, device=device)
        if device.type == "cpu":
            use_huge_pages((keys, fused))
        return cls(keys, fused)

    @staticmethod
    def bytes_per_block(
        num_kv_heads: int,
        head_dim: int,
        hidden_size: int,
        dtype: torch.dtype,
        key_dtype: torch.dtype,
    ) -> int:
        """Bytes one page adds to the caches."""
        return (
            num_kv_heads * PAGE_SIZE * head_dim * key_dtype.itemsize + hidden_size * dtype.itemsize
        )

    def clear(self) -> None:
        """Zeros everywhere, as at first."""
        self._stored.zero_()
        self.fused.zero_()

    def write_keys(self, keys: Tensor, slots: Tensor) -> None:
        """Store ``keys [N, nkv, D]`` at ``slots [N]`` (none negative)."""
        if self.keys.dtype == FP8 and keys.dtype != FP8:
            keys = to_float8(keys)
        self._stored[slots // PAGE_SIZE, :, slots % PAGE_SIZE] = as_bytes(keys)

    def keys_at(self, slots: Tensor) -> Tensor:
        """The keys ``[N, nkv, D]`` at ``slots [N]``, in the cache's dtype."""
        return self._stored[slots // PAGE_SIZE, :, slots % PAGE_SIZE].view(self.keys.dtype)

    def write_pages(self, blocks: Tensor, keys: Tensor, fused: Tensor) -> None:
        """Overwrite the pages ``blocks [n]`` with ``keys [n, nkv, P, D]`` of the cache's dtype and
        ``fused [n, H]``.
        """
        self._stored[blocks] = as_bytes(keys)
        self.fused[blocks] = fused

    def as_layers(self) -> tuple[Tensor, Tensor]:
        """Keys and fused aux as two layers of KV: ``[num_blocks, nkv, P, bytes]`` and
        ``[num_blocks, 1, P, bytes]`` uint8, views of the caches. A page's row of fused aux is dealt
        out to its tokens, which only ever move together.
        """
        pages, size = len(self.keys), self.fused[0].nbytes // PAGE_SIZE
        rows = self.fused[:pages].view(torch.uint8).view(pages, 1, PAGE_SIZE, size)
        return self.keys.view(torch.uint8), rows

    @property
    def _stored(self) -> Tensor:
        return as_bytes(self.keys)

    def previous(self, block_table: Tensor, positions: Tensor) -> Tensor:
        """Fused aux of the token before ``positions [B]`` of rows ``block_table [B, W]``:
        ``[B, H]``, zeros at position 0.
        """
        before = (positions - 1).clamp(min=0)
        blocks = block_table.gather(1, (before // PAGE_SIZE)[:, None]).squeeze(1).long()
        return torch.where((positions > 0)[:, None], self.fused[blocks], 0.0)

    def remember(self, fused: Tensor, slots: Tensor, keep: Tensor) -> None:
        """Keep the fused aux ``[N, H]`` of the tokens at ``slots [N]`` where ``keep [N]`` holds:
        one token a page.
        """
        trash = self.fused.shape[0] - 1
        self.fused[torch.where(keep, slots // PAGE_SIZE, trash)] = fused
