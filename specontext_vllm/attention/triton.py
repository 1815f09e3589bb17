"""Attention in Triton: our kernel for decode, vLLM's kernels for prefill and cache writes.

vLLM: its Triton attention, and the kernel that writes the KV cache with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from specontext_vllm.attention.provider import AttentionProvider, PrefillRows, head_pages
from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.float8 import FP8, KVScales, as_bytes
from specontext_vllm.step_data import PageTable, RowQueries
from specontext_vllm.triton_kernels.sparse_decode import SplitWorkspace, sparse_decode

PARTS_PER_PROCESSOR = 3
"""Parts of a launch for each of the GPU's processors, each of which runs up to four at a time
(`python -m benchmarks attention`).
"""

INTERPRETED_PARTS = 16
"""Parts of a launch in Triton's interpreter, which runs them one after the other."""


class TritonProvider(AttentionProvider):
    """Decode: our split kernel; prefill: vLLM's unified Triton attention, for GPUs and dtypes that
    FlashAttention does not take.
    """

    _one: Tensor | None = None

    @cached_property
    def workspace(self) -> SplitWorkspace:
        """Allocated on first use: every layer has a provider, but all share the first one's."""
        device, parts = torch.device("cpu"), INTERPRETED_PARTS
        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
            parts = (
                PARTS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
            )
        return SplitWorkspace.allocate(parts, self.group * self.max_queries, self.head_dim, device)

    def warm_up(self, table: PageTable) -> None:
        """Run one row that reads nothing: Triton compiles the decode kernel, for rows with drafts
        too, and the workspace is allocated outside any captured graph.
        """
        device = table.pages.device
        query = torch.zeros(1, self.num_heads, self.head_dim, dtype=self.dtype, device=device)
        page, scales = (1, self.num_kv_heads, PAGE_SIZE, 2 * self.head_dim), None
        kv_cache = torch.zeros(page, dtype=self.dtype, device=device)
        if self.float8_kv:
            kv_cache = kv_cache.to(FP8)
            one = torch.ones(1, device=device)
            scales = KVScales(one, one, one)
        table.lengths.zero_()
        output = torch.empty_like(query)
        self.decode(query, kv_cache, table, 1, output, scales=scales)
        if self.max_queries > 1:
            starts = torch.arange(2, dtype=torch.int32, device=device)
            queries = RowQueries(starts, self.max_queries)
            self.decode(query, kv_cache, table, 1, output, queries, scales=scales)

    def decode(
        self,
        query: Tensor,
        kv_cache: Tensor,
        table: PageTable,
        rows: int,
        output: Tensor,
        queries: RowQueries | None = None,
        sinks: Tensor | None = None,
        scales: KVScales | None = None,
    ) -> None:
        sequences = rows * self.num_kv_heads
        sparse_decode(
            query,
            head_pages(kv_cache),
            table.pages[:sequences],
            table.lengths[:sequences],
            output,
            self.scale,
            self.workspace,
            queries,
            self.soft_cap,
            sinks,
            scales,
        )

    def prefill(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: PrefillRows,
        output: Tensor,
        sinks: Tensor | None = None,
        scales: KVScales | None = None,
    ) -> None:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
        from vllm.v1.kv_cache_interface import KVQuantMode

        keys, values = kv_cache.transpose(1, 2).split(self.head_dim, dim=-1)
        unified_attention(
            q=query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=rows.starts,
            max_seqlen_q=rows.max_query_len,
            seqused_k=rows.seq_lens,
            max_seqlen_k=rows.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=rows.block_table,
            softcap=self.soft_cap,
            q_descale=None,
            k_descale=None if scales is None else scales.key,
            v_descale=None if scales is None else scales.value,
            kv_quant_mode=KVQuantMode.NONE if scales is None else KVQuantMode.FP8_PER_TENSOR,
            sinks=sinks,
        )

    def write(
        self,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slots: Tensor,
        scales: KVScales | None = None,
    ) -> None:
        from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
            triton_reshape_and_cache_flash,
        )

        self._store(triton_reshape_and_cache_flash, key, value, kv_cache, slots, scales)

    def _store(
        self,
        store: Callable[..., None],
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slots: Tensor,
        scales: KVScales | None,
    ) -> None:
        """Call vLLM's function that stores keys and values."""
        if scales is None:
            one = self._one_on(kv_cache.device)
            dtype, by = "auto", (one, one)
        else:
            dtype, by = "fp8", (scales.key, scales.value)
        keys, values = as_bytes(kv_cache).transpose(1, 2).split(self.head_dim, dim=-1)
        store(key, value, keys, values, slots, dtype, *by)

    def _one_on(self, device: torch.device) -> Tensor:
        """A scale that changes nothing, kept, since a captured graph reads it."""
        if self._one is None or self._one.device != device:
            self._one = torch.ones(1, dtype=torch.float32, device=device)
        return self._one
