"""Write new keys and values into frames and, in mirrored layers, into the host pool."""

import torch
import triton
import triton.language as tl

from specontext_vllm.tier_data import LayerMemory


@triton.jit(
    do_not_specialize=["num_decodes", "layer"],
    do_not_specialize_on_alignment=["p_tables", "p_frames"],
)
def _write_tiered_kernel(
    p_key,
    p_value,
    p_slots,
    p_tables,
    p_lengths,
    p_frames,
    p_resident,
    p_arena,
    p_host,
    num_decodes,
    s_key,
    s_value,
    s_table,
    layer,
    H: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    MIRRORED: tl.constexpr,
):
    i_token = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1)
    slot = tl.load(p_slots + i_token)
    if slot >= 0:
        # [D_PAD]
        o_d = tl.arange(0, D_PAD)
        m_d = o_d < D
        b_k = tl.load(p_key + i_token * s_key + i_head * D + o_d, mask=m_d, other=0.0)
        b_v = tl.load(p_value + i_token * s_value + i_head * D + o_d, mask=m_d, other=0.0)
        place = (slot // P * H + i_head) * P + slot % P
        target = tl.full((), -1, tl.int64)
        if i_token < num_decodes:
            # The newest page is the last one in the row's page table.
            i_seq = i_token * H + i_head
            length = tl.load(p_lengths + i_seq)
            head_page = tl.load(p_tables + i_seq * s_table + (length - 1) // P).to(tl.int64)
            target = head_page * P + (length - 1) % P
        elif layer < tl.load(p_resident):
            frame = tl.load(p_frames + slot // P).to(tl.int64)
            target = (frame * H + i_head) * P + slot % P
        if target >= 0:
            tl.store(p_arena + target * 2 * D + o_d, b_k, mask=m_d)
            tl.store(p_arena + target * 2 * D + D + o_d, b_v, mask=m_d)
        if MIRRORED:
            tl.store(p_host + place * 2 * D + o_d, b_k, mask=m_d)
            tl.store(p_host + place * 2 * D + D + o_d, b_v, mask=m_d)


def write_tiered(
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    memory: LayerMemory,
    *,
    num_decodes: int,
) -> None:
    """Write one layer's new tokens.

    Args:
        key, value: ``[>= N, H, D]``, the last two axes contiguous.
        slots: ``[N]`` int64 logical slots, ``page * P + offset``; negative ones are padding.
        memory: where the layer writes.
        num_decodes: leading tokens that belong to decode rows.
    """
    arena, mirror = memory.arena, memory.mirror
    _, heads, page_size, width = arena.shape
    _write_tiered_kernel[(slots.shape[0], heads)](
        key,
        value,
        slots,
        memory.table.pages,
        memory.table.lengths,
        memory.frames,
        memory.resident,
        arena,
        arena if mirror is None else mirror,
        num_decodes,
        key.stride(0),
        value.stride(0),
        memory.table.pages.stride(0),
        memory.layer,
        H=heads,
        P=page_size,
        D=width // 2,
        D_PAD=triton.next_power_of_2(width // 2),
        MIRRORED=mirror is not None,
        num_warps=1,
    )
