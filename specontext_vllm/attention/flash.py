"""vLLM's FlashAttention (FA3 or FA2) for prefill, and its cache kernel.

vLLM: its FlashAttention, and the kernel that writes the KV cache with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext_vllm.attention.provider import PrefillRows
from specontext_vllm.attention.triton import TritonProvider
from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.float8 import KVScales


def flash_attention_takes(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether vLLM's FlashAttention runs this dtype and head size on any GPU."""
    return dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256


def flash_attention_version(
    head_dim: int, dtype: torch.dtype, *, has_sinks: bool = False, float8_kv: bool = False
) -> int | None:
    """3 or 2 where vLLM's FlashAttention runs this dtype and head size on this GPU, else None.
    With sinks, or with keys and values in 8-bit floats, it is 3 alone.
    """
    from vllm.v1.attention.backends.fa_utils import (
        get_flash_attn_version,
        is_flash_attn_varlen_func_available,
    )

    if not flash_attention_takes(head_dim, dtype) or not is_flash_attn_varlen_func_available():
        return None
    # Of 8-bit floats it makes bfloat16 alone.
    if float8_kv and (head_dim % 16 or dtype != torch.bfloat16):
        return None
    version = get_flash_attn_version(head_size=head_dim, has_sinks=has_sinks)
    return version if version in ((3,) if has_sinks or float8_kv else (2, 3)) else None


class FlashAttentionProvider(TritonProvider):
    """Prefill with FlashAttention through ``vllm.vllm_flash_attn``, which needs vLLM's CUDA build.
    With keys in 8-bit floats queries are quantised for it, too, as vLLM's own backend does.

    Decode is our kernel: FlashAttention reads page tables too, but is slower at the length of a
    budget (``python -m benchmarks attention``).
    """

    def load(self) -> None:
        """See ``AttentionProvider.load``."""
        from vllm._custom_ops import scaled_fp8_quant
        from vllm.v1.attention.backends.fa_utils import (
            flash_attn_varlen_func,
            reshape_and_cache_flash,
        )

        self._attend, self._cache = flash_attn_varlen_func, reshape_and_cache_flash
        self._quantise = scaled_fp8_quant
        self.version = flash_attention_version(self.head_dim, self.dtype)

    def prefill(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: PrefillRows,
        output: Tensor,
        sinks: Tensor | None = None,
        scales: KVScales | None = None,
    ) -> None:
        d = self.head_dim
        blocks, heads = kv_cache.shape[:2]
        shape = (blocks, PAGE_SIZE, heads, d)
        strides = (heads * PAGE_SIZE * 2 * d, 2 * d, PAGE_SIZE * 2 * d, 1)
        keys = kv_cache.as_strided(shape, strides, kv_cache.storage_offset())
        values = kv_cache.as_strided(shape, strides, kv_cache.storage_offset() + d)
        descales: dict[str, Tensor] = {}
        if scales is not None:
            # It multiplies queries of the keys' dtype alone.
            query, _ = self._quantise(query.reshape(len(query), -1), scales.query)
            query = query.view(-1, self.num_heads, d)
            each = (len(rows.seq_lens), heads)
            descales = {
                "q_descale": scales.query.expand(each),
                "k_descale": scales.key.expand(each),
                "v_descale": scales.value.expand(each),
            }
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
            **descales,
        )

    def write(
        self,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slots: Tensor,
        scales: KVScales | None = None,
    ) -> None:
        self._store(self._cache, key, value, kv_cache, slots, scales)
