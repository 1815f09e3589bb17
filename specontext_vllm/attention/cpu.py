"""Attention on a CPU: our C++ kernels for decode and cache writes, vLLM's for prefill."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

import specontext_vllm.cpu_kernels as cpu_kernels
from specontext_vllm.attention.cpu_prefill import CpuPrefill, cpu_prefill_takes, factors
from specontext_vllm.attention.provider import PrefillRows, head_pages
from specontext_vllm.attention.reference import TorchProvider
from specontext_vllm.float8 import KVScales
from specontext_vllm.step_data import PageTable, RowQueries


class CpuProvider(TorchProvider):
    """What CPU engines run: the definition in torch, where nothing faster takes its place."""

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
        if not cpu_kernels.available():
            super().decode(query, kv_cache, table, rows, output, queries, sinks, scales)
            return
        sequences = rows * self.num_kv_heads
        torch.ops.specontext_cpu.sparse_decode(
            query,
            head_pages(kv_cache),
            table.pages[:sequences],
            table.lengths[:sequences],
            output,
            self.scale,
            self.soft_cap,
            sinks,
            starts=None if queries is None else queries.starts,
            **factors(scales),
        )

    @cached_property
    def dense(self) -> CpuPrefill | None:
        """vLLM's own attention, for the dtypes and head sizes that it takes. Made on first use:
        every layer has a provider, but all share the first one's.
        """
        if not cpu_prefill_takes(self.head_dim, self.dtype):
            return None
        return CpuPrefill(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.scale,
            self.dtype,
            self.soft_cap,
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
        if self.dense is None:
            super().prefill(query, kv_cache, rows, output, sinks, scales)
        else:
            self.dense.attend(query, kv_cache, rows, output, sinks, scales)

    def write(
        self,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slots: Tensor,
        scales: KVScales | None = None,
    ) -> None:
        if not cpu_kernels.available():
            super().write(key, value, kv_cache, slots, scales)
            return
        torch.ops.specontext_cpu.write_kv(key, value, kv_cache, slots, **factors(scales))
