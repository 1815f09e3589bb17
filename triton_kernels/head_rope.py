"""RoPE on the retrieval head's projections, and the write of its keys into their pages."""

import torch
import triton
import triton.language as tl


@triton.jit
def _rope_and_cache_kernel(
    p_qk,
    p_cos_sin,
    p_positions,
    p_slots,
    p_queries,
    p_keys,
    p_norm,
    eps,
    NQ: tl.constexpr,
    NKV: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    HALF_PAD: tl.constexpr,
    QK_NORM: tl.constexpr,
    LARGEST: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1)
    # [HALF_PAD] each: the two halves of a head, which rotate against one another
    o_d = tl.arange(0, HALF_PAD)
    m_d = o_d < D // 2
    p_x = p_qk + i_row * (NQ + NKV) * D + i_head * D
    b_a = tl.load(p_x + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_b = tl.load(p_x + D // 2 + o_d, mask=m_d, other=0.0).to(tl.float32)
    if QK_NORM:
        scale = tl.rsqrt((tl.sum(b_a * b_a) + tl.sum(b_b * b_b)) / D + eps)
        b_a = (b_a * scale).to(p_qk.dtype.element_ty).to(tl.float32)
        b_b = (b_b * scale).to(p_qk.dtype.element_ty).to(tl.float32)
        b_a *= tl.load(p_norm + i_head * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_b *= tl.load(p_norm + i_head * D + D // 2 + o_d, mask=m_d, other=0.0).to(tl.float32)
    position = tl.load(p_positions + i_row)
    # [HALF_PAD] each
    b_cos = tl.load(p_cos_sin + position * D + o_d, mask=m_d, other=0.0)
    b_sin = tl.load(p_cos_sin + position * D + D // 2 + o_d, mask=m_d, other=0.0)
    b_lo = b_a * b_cos - b_b * b_sin
    b_hi = b_b * b_cos + b_a * b_sin
    if i_head < NQ:
        p_out = p_queries + (i_row * NQ + i_head) * D
        tl.store(p_out + o_d, b_lo.to(p_queries.dtype.element_ty), mask=m_d)
        tl.store(p_out + D // 2 + o_d, b_hi.to(p_queries.dtype.element_ty), mask=m_d)
    else:
        slot = tl.load(p_slots + i_row).to(tl.int64)
        if slot >= 0:
            p_out = p_keys + (((slot // P) * NKV + i_head - NQ) * P + slot % P) * D
            if LARGEST > 0:
                # Rounded to the projections' dtype first, as the keys of prompts are.
                b_lo = tl.clamp(
                    b_lo.to(p_qk.dtype.element_ty).to(tl.float32),
                    -LARGEST,
                    LARGEST,
                    propagate_nan=tl.PropagateNan.ALL,
                )
                b_hi = tl.clamp(
                    b_hi.to(p_qk.dtype.element_ty).to(tl.float32),
                    -LARGEST,
                    LARGEST,
                    propagate_nan=tl.PropagateNan.ALL,
                )
            tl.store(p_out + o_d, b_lo.to(p_keys.dtype.element_ty), mask=m_d)
            tl.store(p_out + D // 2 + o_d, b_hi.to(p_keys.dtype.element_ty), mask=m_d)


def rope_and_cache(
    qk: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor | None,
    num_queries: int,
    norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Rotate projected queries and keys; write the keys into their pages.

    Args:
        qk: ``[B, (num_queries + nkv) * D]`` projections, queries first; ``num_queries`` may be 0.
        cos_sin: ``[max_position, D]`` float32, cosines then sines of the D/2 frequencies.
        positions, slots: ``[B]`` positions; slots in the paged cache, -1 to skip the write.
        keys: ``[num_blocks, nkv, P, D]`` the head's K cache, written in place; 8-bit
            floats are clamped to their range. None: ``qk`` has queries only.
        norm: ``[num_queries + nkv, D]`` RMSNorm weights of Qwen3-type heads, or None.
    Returns:
        ``[B, num_queries, D]`` rotated queries.
    """
    rows, d = qk.shape[0], cos_sin.shape[1]
    nkv, page_size = (0, 1) if keys is None else keys.shape[1:3]
    queries = torch.empty(rows, num_queries, d, dtype=qk.dtype, device=qk.device)
    _rope_and_cache_kernel[(rows, num_queries + nkv)](
        qk,
        cos_sin,
        positions,
        slots,
        queries,
        queries if keys is None else keys,
        qk if norm is None else norm,
        eps,
        NQ=num_queries,
        NKV=nkv,
        D=d,
        P=page_size,
        HALF_PAD=triton.next_power_of_2(d // 2),
        QK_NORM=norm is not None,
        LARGEST=0 if keys is None or keys.dtype.itemsize > 1 else torch.finfo(keys.dtype).max,
        num_warps=1,
    )
    return queries
