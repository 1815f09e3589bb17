"""Write new keys and values into frames and, in mirrored layers, into the host pool."""

import torch
import triton
import triton.language as tl

from specontext_vllm.float8 import LARGEST, KVScales
from specontext_vllm.step_data import RowQueries
from specontext_vllm.tier_data import LayerMemory


@triton.jit
def _divided(values, scale, LARGEST: tl.constexpr):
    """Rounded as vLLM's C++ divides; cut off at the largest 8-bit float."""
    return tl.clamp(
        tl.div_rn(values.to(tl.float32), scale),
        -LARGEST,
        LARGEST,
        propagate_nan=tl.PropagateNan.ALL,
    )


@triton.jit(
    do_not_specialize=["decode_tokens", "rows", "layer"],
    do_not_specialize_on_alignment=["p_tables", "p_frames", "p_starts"],
)
def _write_tiered_kernel(
    p_key,
    p_value,
    p_slots,
    p_starts,
    p_tables,
    p_lengths,
    p_frames,
    p_resident,
    p_k_scale,
    p_v_scale,
    p_arena,
    p_host,
    decode_tokens,
    rows,
    s_key,
    s_value,
    s_table,
    layer,
    H: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
    MIRRORED: tl.constexpr,
    LARGEST: tl.constexpr,
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
        if LARGEST > 0:
            b_k = _divided(b_k, tl.load(p_k_scale), LARGEST).to(p_arena.dtype.element_ty)
            b_v = _divided(b_v, tl.load(p_v_scale), LARGEST).to(p_arena.dtype.element_ty)
        place = (slot // P * H + i_head) * P + slot % P
        target = tl.full((), -1, tl.int64)
        if i_token < decode_tokens:
            # A row's new tokens are the last ones in its list.
            i_row, from_end = i_token, tl.full((), 1, tl.int64)
            if R_PAD:
                # [R_PAD] ends of the rows' tokens: as many lie at or before the token as there are
                # rows before its own.
                o_r = tl.arange(0, R_PAD)
                b_end = tl.load(p_starts + 1 + o_r, mask=o_r < rows, other=0x7FFFFFFF)
                i_row = tl.sum((b_end <= i_token).to(tl.int64))
                from_end = tl.load(p_starts + 1 + i_row) - i_token
            i_seq = i_row * H + i_head
            at = tl.load(p_lengths + i_seq) - from_end
            head_page = tl.load(p_tables + i_seq * s_table + at // P).to(tl.int64)
            target = head_page * P + at % P
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
    decode_tokens: int,
    queries: RowQueries | None = None,
    scales: KVScales | None = None,
) -> None:
    """Write one layer's new tokens.

    Args:
        key, value: ``[>= N, H, D]``, the last two axes contiguous.
        slots: ``[N]`` int64 logical slots, ``page * P + offset``; negative ones are padding.
        memory: where the layer writes.
        decode_tokens: leading tokens that belong to decode rows.
        queries: which of these are whose; None: one a row.
        scales: of memory in 8-bit floats; None: it has the dtype of ``key``.
    """
    rows = 0 if queries is None else queries.starts.shape[0] - 1
    arena, mirror = memory.arena, memory.mirror
    _, heads, page_size, width = arena.shape
    _write_tiered_kernel[(slots.shape[0], heads)](
        key,
        value,
        slots,
        slots if queries is None else queries.starts,
        memory.table.pages,
        memory.table.lengths,
        memory.frames,
        memory.resident,
        slots if scales is None else scales.key,
        slots if scales is None else scales.value,
        arena,
        arena if mirror is None else mirror,
        decode_tokens,
        rows,
        key.stride(0),
        value.stride(0),
        memory.table.pages.stride(0),
        memory.layer,
        H=heads,
        P=page_size,
        D=width // 2,
        D_PAD=triton.next_power_of_2(width // 2),
        R_PAD=triton.next_power_of_2(rows) if rows else 0,
        MIRRORED=mirror is not None,
        LARGEST=0 if scales is None else LARGEST,
        num_warps=1,
    )
