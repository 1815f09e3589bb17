"""vLLM's FlashAttention (FA3 or FA2) over page tables: each (request, KV head) is a sequence of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext_vllm.attention.page_table import PageTable
from specontext_vllm.attention.provider import AttentionProvider, PrefillRows
from specontext_vllm.config import PAGE_SIZE

MAX_SPLITS = 32
"""Upper bound of the splits of one sequence; buffers inside captured graphs are sized for it (vLLM's own default)."""


def flash_attention_version(head_dim: int, dtype: torch.dtype) -> int | None:
    """3 or 2 where vLLM's FlashAttention runs this dtype and head size on this GPU, else None."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version, is_flash_attn_varlen_func_available

    if dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > 256 or not is_flash_attn_varlen_func_available():
        return None
    version = get_flash_attn_version(head_size=head_dim)
    return version if version in (2, 3) else None


class FlashAttentionProvider(AttentionProvider):
    """FlashAttention through ``vllm.vllm_flash_attn``; needs vLLM's CUDA build."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, scale: float, dtype: torch.dtype) -> None:
        super().__init__(num_heads, num_kv_heads, head_dim, scale, dtype)
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, reshape_and_cache_flash

        self._attend, self._cache = flash_attn_varlen_func, reshape_and_cache_flash
        self.version = flash_attention_version(head_dim, dtype)
        self._metadata: dict[int, Tensor] = {}
        self._processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        self._one: Tensor | None = None

    def _splits(self, sequences: int) -> int:
        """Most parts a sequence may be cut into. Enough sequences fill the GPU whole, and spare FA3 its combining kernel."""
        if self.version != 3:
            return 0
        return 1 if sequences >= 0.8 * self._processors else MAX_SPLITS

    def plan(self, table: PageTable, rows: int) -> None:
        """Compute FA3's schedule of this step once instead of once a layer, into buffers that graphs may point at."""
        sequences = rows * self.num_kv_heads
        if self.version != 3:
            return
        from vllm.v1.attention.backends.fa_utils import get_scheduler_metadata

        metadata = get_scheduler_metadata(
            batch_size=sequences, max_seqlen_q=1, max_seqlen_k=table.max_pages * PAGE_SIZE, num_heads_q=self.group, num_heads_kv=1,
            headdim=self.head_dim, cache_seqlens=table.lengths[:sequences], qkv_dtype=self.dtype,
            cu_seqlens_q=table.starts[: sequences + 1], page_size=PAGE_SIZE, causal=True, num_splits=self._splits(sequences),
        )  # fmt: skip
        kept = self._metadata.get(sequences)
        if kept is None:
            self._metadata[sequences] = metadata
        else:
            kept.copy_(metadata)

    def decode(self, query: Tensor, kv_cache: Tensor, table: PageTable, rows: int, output: Tensor) -> None:
        sequences, d = rows * self.num_kv_heads, self.head_dim
        # FA3 reads through TMA, which wants 16-byte strides even on the singleton head axis.
        shape = (kv_cache.shape[0] * self.num_kv_heads, PAGE_SIZE, 1, d)
        strides = (PAGE_SIZE * 2 * d, 2 * d, 2 * d, 1)
        keys = kv_cache.as_strided(shape, strides, kv_cache.storage_offset())
        values = kv_cache.as_strided(shape, strides, kv_cache.storage_offset() + d)
        self._attend(
            query.reshape(sequences, self.group, d), keys, values, out=output.view(sequences, self.group, d), max_seqlen_q=1,
            cu_seqlens_q=table.starts[: sequences + 1], max_seqlen_k=table.max_pages * PAGE_SIZE,
            seqused_k=table.lengths[:sequences], block_table=table.pages[:sequences], causal=True, softmax_scale=self.scale,
            fa_version=self.version, scheduler_metadata=self._metadata.get(sequences),
            num_splits=self._splits(sequences),
        )  # fmt: skip

    def prefill(self, query: Tensor, kv_cache: Tensor, rows: PrefillRows, output: Tensor) -> None:
        d = self.head_dim
        blocks, heads = kv_cache.shape[:2]
        shape = (blocks, PAGE_SIZE, heads, d)
        strides = (heads * PAGE_SIZE * 2 * d, 2 * d, PAGE_SIZE * 2 * d, 1)
        keys = kv_cache.as_strided(shape, strides, kv_cache.storage_offset())
        values = kv_cache.as_strided(shape, strides, kv_cache.storage_offset() + d)
        self._attend(
            query, keys, values, out=output, max_seqlen_q=rows.max_query_len, cu_seqlens_q=rows.starts,
            max_seqlen_k=rows.max_seq_len, seqused_k=rows.seq_lens, block_table=rows.block_table, causal=True,
            softmax_scale=self.scale, fa_version=self.version,
        )  # fmt: skip

    def write(self, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        if self._one is None:
            self._one = torch.ones(1, dtype=torch.float32, device=kv_cache.device)
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_dim, dim=-1)
        self._cache(key, value, key_cache, value_cache, slots, "auto", self._one, self._one)
