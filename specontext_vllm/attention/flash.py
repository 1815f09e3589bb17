"""vLLM's FlashAttention (FA3 or FA2) for prefill, and its cache kernel.

vLLM: its FlashAttention, and the kernel that writes the KV cache with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext_vllm.attention.provider import PrefillRows
from specontext_vllm.attention.triton import TritonProvider
from specontext_vllm.config import PAGE_SIZE


def flash_attention_takes(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether vLLM's FlashAttention runs this dtype and head size on any GPU."""
    return dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256


def flash_attention_version(
    head_dim: int, dtype: torch.dtype, *, has_sinks: bool = False
) -> int | None:
    """3 or 2 where vLLM's FlashAttention runs this dtype and head size on this GPU, else None.
    With sinks it is 3 alone.
    """
    from vllm.v1.attention.backends.fa_utils import (
        get_flash_attn_version,
        is_flash_attn_varlen_func_available,
    )

    if not flash_attention_takes(head_dim, dtype) or not is_flash_attn_varlen_func_available():
        return None
    version = get_flash_attn_version(head_size=head_dim, has_sinks=has_sinks)
    return version if version in ((3,) if has_sinks else (2, 3)) else None


class FlashAttentionProvider(TritonProvider):
    """Prefill with FlashAttention through ``vllm.vllm_flash_attn``, which needs vLLM's CUDA build.

    Decode is our kernel: FlashAttention reads page tables too, but is slower at the length of a
    budget (``python -m benchmarks attention``).
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        dtype: torch.dtype,
        soft_cap: float = 0.0,
    ) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim, scale, dtype, soft_cap)
        from vllm.v1.attention.backends.fa_utils import (
            flash_attn_varlen_func,
            reshape_and_cache_flash,
        )

        self._attend, self._cache = flash_attn_varlen_func, reshape_and_cache_flash
        self.version = flash_attention_version(head_dim, dtype)
        self._one: Tensor | None = None

    def prefill(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: PrefillRows,
        output: Tensor,
        sinks: Tensor | None = None,
    ) -> None:
        d = self.head_dim
        blocks, heads = kv_cache.shape[:2]
        shape = (blocks, PAGE_SIZE, heads, d)
        strides = (heads * PAGE_SIZE * 2 * d, 2 * d, PAGE_SIZE * 2 * d, 1)
        keys = kv_cache.as_strided(shape, strides, kv_cache.storage_offset())
        values = kv_cache.as_strided(shape, strides, kv_cache.storage_offset() + d)
        self._attend(
            query,
            keys,
            values,
            out=output,
            max_seqlen_q=rows.max_query_len,
            cu_seqlens_q=rows.starts,
            max_seqlen_k=rows.max_seq_len,
            seqused_k=rows.seq_lens,
            block_table=rows.block_table,
            causal=True,
            softmax_scale=self.scale,
            softcap=self.soft_cap,
            fa_version=self.version,
            # It takes them in no other dtype.
            s_aux=None if sinks is None else sinks.to(torch.bfloat16),
        )

    def write(self, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        if self._one is None:
            self._one = torch.ones(1, dtype=torch.float32, device=kv_cache.device)
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_dim, dim=-1)
        self._cache(key, value, key_cache, value_cache, slots, "auto", self._one, self._one)
