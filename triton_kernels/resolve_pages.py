"""Match the selection against the hot buffers: hits keep their slots, misses take the least
recently used ones.
"""

import torch
import triton
import triton.language as tl

from specontext_vllm.step_data import Misses, Selection
from specontext_vllm.tier_data import DecodeRows, HotState
from specontext_vllm.triton_kernels import counters

_SELECTED, _MISSED = tl.constexpr(counters.SELECTED), tl.constexpr(counters.MISSED)
_RETURNED, _FETCHED = tl.constexpr(counters.RETURNED), tl.constexpr(counters.FETCHED)

# Sorts after every slot that may be reused.
_KEPT = 0x7FFFFFFFFFFFFFFF


@triton.jit
def _resolve_pages_kernel(
    p_selection,
    p_lengths,
    p_seq_lens,
    p_lanes,
    p_block_table,
    p_capacity,
    p_slot_of,
    p_page_of,
    p_source_of,
    p_stamp,
    p_slots,
    p_order,
    p_sources,
    p_targets,
    p_count,
    p_resident,
    p_counters,
    p_step,
    s_selection,
    s_table,
    max_pages,
    L: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    S_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    KEPT: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1)
    i_seq = i_row * H + i_head
    lane = tl.load(p_lanes + i_row).to(tl.int64)
    length = tl.load(p_lengths + i_seq)
    if (lane >= 0) & (length > 0):
        step = tl.load(p_step)
        seq_len = tl.load(p_seq_lens + i_row)
        p_of = p_slot_of + (lane * H + i_head) * max_pages
        buffer = (lane * H + i_head) * S
        # [K_PAD]
        o_k = tl.arange(0, K_PAD)
        m_k = o_k < (length + P - 1) // P
        b_page = tl.load(p_selection + i_seq * s_selection + o_k, mask=m_k, other=0) // H
        b_slot = tl.load(p_of + b_page, mask=m_k, other=0)
        m_hit = m_k & (b_slot >= 0)
        b_last = tl.load(p_stamp + buffer + b_slot, mask=m_hit, other=step - 1)
        tl.store(p_stamp + buffer + b_slot, step, mask=m_hit)
        tl.debug_barrier()
        # [S_PAD] slots in the order in which they may be reused
        o_s = tl.arange(0, S_PAD)
        b_stamp = tl.load(p_stamp + buffer + o_s, mask=o_s < S, other=0)
        m_free = (o_s < tl.load(p_capacity + lane)) & (b_stamp != step)
        b_key = tl.sort(tl.where(m_free, (b_stamp + 1) * S_PAD + o_s, KEPT))
        tl.store(p_order + i_seq * S_PAD + o_s, (b_key % S_PAD).to(tl.int32))
        tl.debug_barrier()
        m_miss = m_k & (b_slot < 0)
        b_rank = tl.cumsum(m_miss.to(tl.int32), axis=0) - 1
        b_new = tl.load(p_order + i_seq * S_PAD + b_rank, mask=m_miss, other=0)
        b_evicted = tl.load(p_page_of + buffer + b_new, mask=m_miss, other=-1)
        tl.store(p_of + b_evicted, -1, mask=m_miss & (b_evicted >= 0))
        b_source = (
            tl.load(p_block_table + i_row * s_table + b_page, mask=m_miss, other=0) * H + i_head
        )
        tl.store(p_page_of + buffer + b_new, b_page, mask=m_miss)
        tl.store(p_source_of + buffer + b_new, b_source, mask=m_miss)
        tl.store(p_stamp + buffer + b_new, step, mask=m_miss)
        tl.store(p_of + b_page, b_new, mask=m_miss)
        tl.store(p_slots + i_seq * s_selection + o_k, tl.where(m_miss, b_new, b_slot), mask=m_k)
        # The pages that this step begins hold nothing to fetch yet.
        m_fetch = m_miss & (b_page * P < seq_len - 1)
        b_fetch = m_fetch.to(tl.int32)
        missed = tl.sum(b_fetch)
        base = tl.atomic_add(p_count, missed)
        o_out = base + tl.cumsum(b_fetch, axis=0) - 1
        tl.store(p_sources + o_out, b_source, mask=m_fetch)
        tl.store(p_targets + o_out, ((lane * S + b_new) * H + i_head).to(tl.int32), mask=m_fetch)
        tl.atomic_add(p_counters + _SELECTED, tl.sum(m_k.to(tl.int64)))
        tl.atomic_add(p_counters + _MISSED, missed.to(tl.int64))
        tl.atomic_add(p_counters + _RETURNED, tl.sum((m_hit & (b_last != step - 1)).to(tl.int64)))
        tl.atomic_add(p_counters + _FETCHED, missed.to(tl.int64) * (L - tl.load(p_resident)))


def resolve_pages(
    selection: Selection,
    rows: DecodeRows,
    hot: HotState,
    misses: Misses,
    *,
    resident: torch.Tensor,
    counts: torch.Tensor,
    num_layers: int,
    num_rows: int,
    page_size: int,
) -> None:
    """Give every selected page a slot and list the misses.

    The reference is ``specontext_vllm.residency.hot_buffers.HotBuffers.resolve`` on a CPU.

    Args:
        selection: pages counted from the start of their request.
        rows: the step's decode rows.
        hot: read and written; ``hot.step`` is already the present step's.
        misses: written; ``misses.count`` must be 0 on entry.
        resident: ``[1]`` int32 number of resident layers, which fetch nothing.
        counts: ``[COUNTERS]`` int64 counters (module ``counters``), added to.
        num_layers: L.
        num_rows: rows to resolve, padding included.
    """
    _, heads, num_slots = hot.page_of.shape
    _resolve_pages_kernel[(num_rows, heads)](
        selection.pages,
        selection.lengths,
        rows.seq_lens,
        rows.lanes,
        rows.block_table,
        hot.capacity,
        hot.slot_of,
        hot.page_of,
        hot.source_of,
        hot.stamp,
        hot.slots,
        hot.order,
        misses.sources,
        misses.targets,
        misses.count,
        resident,
        counts,
        hot.step,
        selection.pages.stride(0),
        rows.block_table.stride(0),
        hot.slot_of.shape[2],
        L=num_layers,
        H=heads,
        P=page_size,
        S=num_slots,
        S_PAD=hot.order.shape[1],
        K_PAD=triton.next_power_of_2(selection.pages.shape[1]),
        KEPT=_KEPT,
        num_warps=4,
    )
