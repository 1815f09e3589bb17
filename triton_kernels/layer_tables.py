"""The page tables of all layers from one selection: frames of resident layers, hot slots of
offloaded ones.
"""

import torch
import triton
import triton.language as tl


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
    selection: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    lanes: torch.Tensor,
    block_table: torch.Tensor,
    frames: torch.Tensor,
    hot: torch.Tensor,
    resident: torch.Tensor,
    tables: torch.Tensor,
    *,
    num_rows: int,
    num_kv_heads: int,
    page_size: int,
) -> None:
    """Write where each layer reads the selected head pages.

    Args:
        selection: ``[B * H, K]`` int32 ``page * H + head`` with the page's position in its request.
        slots: ``[B * H, K]`` int32 hot slots of the same pages.
        lengths: ``[B * H]`` int32 tokens; 0 for padding rows.
        lanes: ``[B]`` int32, -1 for padding rows.
        block_table: ``[>= B, W]`` int32 logical pages.
        frames: ``[L, T]`` int32. hot: ``[L, lanes, S]`` int32. resident: ``[1]`` int32.
        tables: ``[L, B * H, K]`` int32 head pages of the arena (``frame * H + head``), written.
    """
    layers, _, width = tables.shape
    _layer_tables_kernel[(num_rows, num_kv_heads, layers)](
        selection,
        slots,
        lengths,
        lanes,
        block_table,
        frames,
        hot,
        resident,
        tables,
        selection.stride(0),
        block_table.stride(0),
        tables.stride(0),
        frames.shape[1],
        hot.stride(0),
        H=num_kv_heads,
        P=page_size,
        S=hot.shape[2],
        K_PAD=triton.next_power_of_2(width),
        num_warps=1,
    )
