"""Attention through Triton, for GPUs and dtypes that FlashAttention does not take."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext_vllm.attention.page_table import PageTable
from specontext_vllm.attention.provider import AttentionProvider, PrefillRows, head_pages
from specontext_vllm.triton_kernels.sparse_decode import sparse_decode


class TritonProvider(AttentionProvider):
    """Our split-K kernel for page tables; vLLM's unified Triton attention for dense prefill rows."""

    def decode(self, query: Tensor, kv_cache: Tensor, table: PageTable, rows: int, output: Tensor) -> None:
        sequences = rows * self.num_kv_heads
        shape = (sequences, self.group, self.head_dim)
        sparse_decode(
            query.reshape(shape), head_pages(kv_cache), table.pages[:sequences], table.lengths[:sequences], output.view(shape), self.scale
        )

    def prefill(self, query: Tensor, kv_cache: Tensor, rows: PrefillRows, output: Tensor) -> None:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        keys, values = kv_cache.transpose(1, 2).split(self.head_dim, dim=-1)
        unified_attention(
            q=query, k=keys, v=values, out=output, cu_seqlens_q=rows.starts, max_seqlen_q=rows.max_query_len,
            seqused_k=rows.seq_lens, max_seqlen_k=rows.max_seq_len, softmax_scale=self.scale, causal=True, window_size=(-1, -1),
            block_table=rows.block_table, softcap=0.0, q_descale=None, k_descale=None, v_descale=None,
        )  # fmt: skip

    def write(self, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

        one = torch.ones(1, dtype=torch.float32, device=kv_cache.device)
        keys, values = kv_cache.transpose(1, 2).split(self.head_dim, dim=-1)
        triton_reshape_and_cache_flash(key, value, keys, values, slots, "auto", one, one)
