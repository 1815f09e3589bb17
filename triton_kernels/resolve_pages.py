"""The selection against the hot buffers: hits keep their slot, misses take the least recently used
ones.
"""

import torch
import triton
import triton.language as tl

from specontext_vllm.triton_kernels import counters

_SELECTED, _MISSED = tl.constexpr(counters.SELECTED), tl.constexpr(counters.MISSED)
_RETURNED, _FETCHED = tl.constexpr(counters.RETURNED), tl.constexpr(counters.FETCHED)

# Sorts behind every slot that may be given up.
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
        # [S_PAD] slots in the order in which they may be given up
        o_s = tl.arange(0, S_PAD)
        b_stamp = tl.load(p_stamp + buffer + o_s, mask=o_s < S, other=0).to(tl.int64)
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
        # A page whose first token this step writes has nothing to fetch.
        begun = tl.where((seq_len - 1) % P == 0, (seq_len - 1) // P, -1)
        m_fetch = m_miss & (b_page != begun)
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
    selection: torch.Tensor,
    lengths: torch.Tensor,
    seq_lens: torch.Tensor,
    lanes: torch.Tensor,
    block_table: torch.Tensor,
    capacity: torch.Tensor,
    slot_of: torch.Tensor,
    page_of: torch.Tensor,
    source_of: torch.Tensor,
    stamp: torch.Tensor,
    slots: torch.Tensor,
    order: torch.Tensor,
    sources: torch.Tensor,
    targets: torch.Tensor,
    count: torch.Tensor,
    resident: torch.Tensor,
    counts: torch.Tensor,
    step: torch.Tensor,
    *,
    num_layers: int,
    num_rows: int,
    page_size: int,
) -> None:
    """See ``specontext_vllm.residency.hot_buffers.HotBuffers.resolve``, whose torch path is the
    reference.

    Args:
        order: ``[rows * H, next_power_of_2(S)]`` int32 scratch.
        count: ``[1]`` int32, zero on entry.
        resident: ``[1]`` int32 layers whose pages are all on the GPU; the others fetch the misses.
        counts: int64 counters (module ``counters``), added to.
        step: ``[1]`` int32, the number of this step.
    """
    _, heads, hot = page_of.shape
    _resolve_pages_kernel[(num_rows, heads)](
        selection,
        lengths,
        seq_lens,
        lanes,
        block_table,
        capacity,
        slot_of,
        page_of,
        source_of,
        stamp,
        slots,
        order,
        sources,
        targets,
        count,
        resident,
        counts,
        step,
        selection.stride(0),
        block_table.stride(0),
        slot_of.shape[2],
        L=num_layers,
        H=heads,
        P=page_size,
        S=hot,
        S_PAD=order.shape[1],
        K_PAD=triton.next_power_of_2(selection.shape[1]),
        KEPT=_KEPT,
        num_warps=4,
    )
