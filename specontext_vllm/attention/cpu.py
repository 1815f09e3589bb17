"""Attention on a CPU."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from specontext_vllm.attention.cpu_prefill import CpuPrefill, cpu_prefill_takes
from specontext_vllm.attention.provider import PrefillRows
from specontext_vllm.attention.reference import TorchProvider


class CpuProvider(TorchProvider):
    """What CPU engines run: the definition in torch, where nothing faster takes its place."""

    @cached_property
    def dense(self) -> CpuPrefill | None:
        """vLLM's own attention, for the dtypes and head sizes that it takes. Made on first use:
        every layer has a provider, but all share the first one's.
        """
        if not cpu_prefill_takes(self.head_dim, self.dtype):
            return None
        return CpuPrefill(self.num_heads, self.num_kv_heads, self.head_dim, self.scale, self.dtype)

    def prefill(self, query: Tensor, kv_cache: Tensor, rows: PrefillRows, output: Tensor) -> None:
        if self.dense is None:
            super().prefill(query, kv_cache, rows, output)
        else:
            self.dense.attend(query, kv_cache, rows, output)
