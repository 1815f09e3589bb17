"""Dense prefill with vLLM's own C++ attention for CPUs.

It reads keys in a packing of its own, in blocks of 32 tokens and more, where our cache has a
token's key and value side by side in pages of 16. So the contexts of a step's prompt rows are
copied into that packing, layer by layer: a copy of n tokens, against the attention of every new
token to all of them.

vLLM: its attention for CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

import specontext_vllm.cpu_kernels as cpu_kernels
from specontext_vllm.attention.provider import PrefillRows
from specontext_vllm.attention.reference import read_pages
from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.float8 import KVScales

BLOCK_SIZE = 128
"""Tokens of a block of the copy, as many as vLLM's own blocks hold on a CPU."""

GATHERED_PAGES = 256
"""Pages that are gathered at a time where vLLM's own operator packs them: few enough to be packed
while they are in the cores' caches.
"""

IN_PAIRS = {"vec": False, "vec16": False, "amx": True}
"""The packings that our operator knows, by vLLM's names, and whether elements lie in pairs."""

COPY_BYTES = 64 * 2**20
"""What the rows that attend at once may take in the copy; a longer row is alone in it."""

PLANS = 16
"""Steps, or with two tiers groups of rows of a step, whose plan is kept."""


@dataclass(frozen=True)
class _Group:
    """Rows whose contexts are in the copy together.

    Attributes:
        tokens: their query tokens, counted from the first row's.
        starts: ``[R + 1]`` int32 offsets of the rows' query tokens, from 0.
        seq_lens: ``[R]`` int32 context lengths.
        table: ``[R, W]`` int32, the rows' blocks of the copy.
        schedule: how vLLM divides the work among its threads.
        page_rows, page_columns: ``[N]`` int64, where each page stands in the step's block table.
        page_tokens: ``[N]`` int32, tokens of each page.
        places: ``[N]`` int32, the copy's place of each page, in pages.
        slots: ``[N * P]`` int64, the copy's place of each token of these pages; -1 behind a row's
            end.
        last_blocks: ``[R]`` int64, the last block of each row.
        num_blocks: blocks of all rows.
    """

    tokens: slice
    starts: Tensor
    seq_lens: Tensor
    table: Tensor
    schedule: Tensor
    page_rows: Tensor
    page_columns: Tensor
    page_tokens: Tensor
    places: Tensor
    slots: Tensor
    last_blocks: Tensor
    num_blocks: int


class CpuPrefill:
    """vLLM's attention over a copy of the rows' contexts, for layers of one shape, which take turns
    at the copy.

    The copy grows to ``COPY_BYTES`` or the longest context that was seen, whichever is more, in one
    layer's keys and values.

    Uses: vllm.v1.attention.backends.cpu_attn._get_attn_isa
    Symptom: the keys' packing is not the one that the attention reads.
    Reason: which packing vLLM's operators use on this CPU is said by this private function alone.
    Remove when: the operators choose it themselves.
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
        from vllm import _custom_ops as ops
        from vllm import envs
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self.num_heads, self.num_kv_heads, self.head_dim, self.scale, self.dtype = (
            num_heads,
            num_kv_heads,
            head_dim,
            scale,
            dtype,
        )
        self.soft_cap = soft_cap
        self._ops, self._split_kv = ops, envs.VLLM_CPU_ATTN_SPLIT_KV
        self.isa = _get_attn_isa(dtype, BLOCK_SIZE, head_dim, "auto")
        if self.isa == "amx":
            # Linux hands out the matrix units on demand; else their first use ends the process.
            torch.cpu._init_amx()
        self._copy = torch.empty(0, num_kv_heads, 2 * BLOCK_SIZE, head_dim, dtype=dtype)
        self._gathered = torch.empty(
            GATHERED_PAGES, PAGE_SIZE, num_kv_heads, 2 * head_dim, dtype=dtype
        )
        # All layers of a step ask for the same.
        self._groups = lru_cache(PLANS)(self._make_groups)

    def attend(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: PrefillRows,
        output: Tensor,
        sinks: Tensor | None = None,
        scales: KVScales | None = None,
    ) -> None:
        """``AttentionProvider.prefill``."""
        for group in self._groups(tuple(rows.offsets), tuple(rows.seq_lens.tolist())):
            keys, values = self._copy_context(kv_cache, rows.block_table, group, scales)
            self._ops.cpu_attention_with_kv_cache(
                query=query[group.tokens],
                key_cache=keys,
                value_cache=values,
                output=output[group.tokens],
                query_start_loc=group.starts,
                seq_lens=group.seq_lens,
                scale=self.scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=group.table,
                softcap=self.soft_cap,
                scheduler_metadata=group.schedule,
                s_aux=sinks,
            )

    def _copy_context(
        self,
        kv_cache: Tensor,
        block_table: Tensor,
        group: _Group,
        scales: KVScales | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The rows' keys and values ``[blocks, H, BLOCK_SIZE, D]`` as vLLM packs them, in the
        queries' dtype.
        """
        if len(self._copy) < group.num_blocks:
            self._copy = self._copy.new_empty(group.num_blocks, *self._copy.shape[1:])
        keys, values = self._copy.chunk(2, dim=2)
        # What lies behind a row's end has no weight, but must be finite.
        self._copy[group.last_blocks] = 0
        pages = block_table[group.page_rows, group.page_columns]
        if self.isa in IN_PAIRS and cpu_kernels.available():
            torch.ops.specontext_cpu.pack_pages(
                kv_cache,
                pages,
                group.page_tokens,
                group.places,
                self._copy,
                IN_PAIRS[self.isa],
                **factors(scales),
            )
            return keys, values
        by_token = kv_cache.transpose(1, 2)
        for first in range(0, len(pages), GATHERED_PAGES):
            piece = pages[first : first + GATHERED_PAGES]
            gathered = self._gathered[: len(piece)]
            if scales is None:
                torch.index_select(by_token, 0, piece, out=gathered)
            else:
                gathered.copy_(read_pages(by_token, piece, scales))
            tokens = gathered.flatten(0, 1)
            self._ops.cpu_attn_reshape_and_cache(
                tokens[..., : self.head_dim],
                tokens[..., self.head_dim :],
                keys,
                values,
                group.slots[first * PAGE_SIZE :][: len(tokens)],
                self.isa,
            )
        return keys, values

    def _make_groups(
        self, offsets: tuple[int, ...], lengths: tuple[int, ...]
    ) -> tuple[_Group, ...]:
        """Consecutive rows that have query tokens, in groups that fit the copy."""
        block_bytes = self.num_kv_heads * 2 * BLOCK_SIZE * self.head_dim * self.dtype.itemsize
        room, taken = max(1, COPY_BYTES // block_bytes), 0
        members: list[list[int]] = []
        for row, length in enumerate(lengths):
            if offsets[row + 1] == offsets[row]:
                continue
            blocks = -(-length // BLOCK_SIZE)
            if not members or taken + blocks > room:
                members.append([])
                taken = 0
            members[-1].append(row)
            taken += blocks
        return tuple(self._make_group(rows, offsets, lengths) for rows in members)

    def _make_group(
        self, rows: list[int], offsets: tuple[int, ...], lengths: tuple[int, ...]
    ) -> _Group:
        counts = torch.tensor([pages_for(lengths[row]) for row in rows])
        blocks = [-(-lengths[row] // BLOCK_SIZE) for row in rows]
        ends = torch.tensor(blocks).cumsum(0)
        first_blocks = ends - torch.tensor(blocks)
        owner = torch.arange(len(rows)).repeat_interleave(counts)
        columns = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
        positions = columns[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)
        seq_lens = torch.tensor([lengths[row] for row in rows], dtype=torch.int32)
        slots = first_blocks[owner, None] * BLOCK_SIZE + positions
        first = offsets[rows[0]]
        # Rows without query tokens, which are in no group, begin where they end.
        starts = [offsets[row] - first for row in rows] + [offsets[rows[-1] + 1] - first]
        query_starts = torch.tensor(starts, dtype=torch.int32)
        schedule = self._ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(rows),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=query_starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=self._split_kv,
        )
        return _Group(
            tokens=slice(first, offsets[rows[-1] + 1]),
            starts=query_starts,
            seq_lens=seq_lens,
            table=(first_blocks[:, None] + torch.arange(max(blocks))).int(),
            schedule=schedule,
            page_rows=torch.tensor(rows)[owner],
            page_columns=columns,
            page_tokens=(seq_lens[owner] - positions[:, 0]).clamp(max=PAGE_SIZE).int(),
            places=(first_blocks[owner] * (BLOCK_SIZE // PAGE_SIZE) + columns).int(),
            slots=slots.masked_fill(positions >= seq_lens[owner, None], -1).flatten(),
            last_blocks=ends - 1,
            num_blocks=int(ends[-1]),
        )


def cpu_prefill_takes(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether vLLM was built for a CPU, and its attention there runs this dtype and head size."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return (
        current_platform.is_cpu()
        and dtype in CPUAttentionBackend.supported_dtypes
        and head_dim in CPUAttentionBackend.get_supported_head_sizes()
    )


def factors(scales: KVScales | None) -> dict[str, float]:
    """The scales as our C++ kernels take them."""
    if scales is None:
        return {}
    return {"key_scale": float(scales.key), "value_scale": float(scales.value)}
