"""The page tables of all layers from one selection: frames in resident layers, hot slots in
offloaded ones.
"""

import torch
import triton
import triton.language as tl

from specontext_vllm.step_data import Selection
from specontext_vllm.tier_data import DecodeRows, TierTables


@triton.jit
def _layer_tables_kernel(
    p_selection,
    p_slots,
    p_lengths,
    p_lanes,
    p_block_table,
    p_frames,
    p_hot,
    p_resident,
    p_tables,
    s_selection,
    s_table,
    s_layer,
    num_pages,
    s_hot,
    H: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    K_PAD: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1)
    i_layer = tl.program_id(2).to(tl.int64)
    i_seq = i_row * H + i_head
    lane = tl.load(p_lanes + i_row).to(tl.int64)
    length = tl.load(p_lengths + i_seq)
    if lane >= 0:
        # [K_PAD]
        o_k = tl.arange(0, K_PAD)
        m_k = o_k < (length + P - 1) // P
        if i_layer < tl.load(p_resident):
            b_page = tl.load(p_selection + i_seq * s_selection + o_k, mask=m_k, other=0) // H
            b_block = tl.load(p_block_table + i_row * s_table + b_page, mask=m_k, other=0)
            b_frame = tl.load(p_frames + i_layer * num_pages + b_block, mask=m_k, other=0)
        else:
            b_slot = tl.load(p_slots + i_seq * s_selection + o_k, mask=m_k, other=0)
            b_frame = tl.load(p_hot + i_layer * s_hot + lane * S + b_slot, mask=m_k, other=0)
        tl.store(
            p_tables + i_layer * s_layer + i_seq * s_selection + o_k, b_frame * H + i_head, mask=m_k
        )


def layer_tables(
    selection: Selection,
    slots: torch.Tensor,
    rows: DecodeRows,
    tables: TierTables,
    *,
    num_rows: int,
    num_kv_heads: int,
    page_size: int,
) -> None:
    """Write where each layer reads the selected head pages.

    Args:
        selection: pages counted from the start of their request.
        slots: ``[rows * H, K]`` int32 hot slots of the same pages.
        rows: the step's decode rows.
        tables: ``tables.pages`` is written.
        num_rows: rows to write, padding included.
    """
    layers, _, width = tables.pages.shape
    _layer_tables_kernel[(num_rows, num_kv_heads, layers)](
        selection.pages,
        slots,
        selection.lengths,
        rows.lanes,
        rows.block_table,
        tables.frames,
        tables.hot_frames,
        tables.resident,
        tables.pages,
        selection.pages.stride(0),
        rows.block_table.stride(0),
        tables.pages.stride(0),
        tables.frames.shape[1],
        tables.hot_frames.stride(0),
        H=num_kv_heads,
        P=page_size,
        S=tables.hot_frames.shape[2],
        K_PAD=triton.next_power_of_2(width),
        num_warps=1,
    )
