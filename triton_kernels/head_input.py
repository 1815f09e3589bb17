"""Inputs of the retrieval head's projections for decode rows: before the model runs, and what keys
from own states need besides after it.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["s_table"])
def _head_input_kernel(
    p_embeds,
    p_fused,
    p_block_table,
    p_positions,
    p_embed_norm,
    p_feature_norm,
    p_out,
    eps,
    s_table,
    E: tl.constexpr,
    H: tl.constexpr,
    S_OUT: tl.constexpr,
    P: tl.constexpr,
    E_PAD: tl.constexpr,
    H_PAD: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    # [E_PAD] the embedding
    o_e = tl.arange(0, E_PAD)
    b_x = tl.load(p_embeds + i_row * E + o_e, mask=o_e < E, other=0.0).to(tl.float32)
    b_x = b_x * tl.rsqrt(tl.sum(b_x * b_x) / E + eps)
    b_w = tl.load(p_embed_norm + o_e, mask=o_e < E, other=0.0)
    tl.store(p_out + i_row * S_OUT + o_e, b_x.to(p_out.dtype.element_ty) * b_w, mask=o_e < E)
    # The page that holds position - 1 keeps the fused aux of its latest token; token 0 has none.
    position = tl.load(p_positions + i_row)
    before = tl.maximum(position - 1, 0)
    block = tl.load(p_block_table + i_row * s_table + before // P).to(tl.int64)
    # [H_PAD] the fused aux
    o_h = tl.arange(0, H_PAD)
    b_f = tl.load(p_fused + block * H + o_h, mask=o_h < H, other=0.0).to(tl.float32)
    b_f = tl.where(position > 0, b_f, 0.0)
    b_f = b_f * tl.rsqrt(tl.sum(b_f * b_f) / H + eps)
    b_w = tl.load(p_feature_norm + o_h, mask=o_h < H, other=0.0)
    tl.store(p_out + i_row * S_OUT + E + o_h, b_f.to(p_out.dtype.element_ty) * b_w, mask=o_h < H)


def head_input(
    embeds: torch.Tensor,
    fused: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    embed_norm: torch.Tensor,
    feature_norm: torch.Tensor,
    eps: float,
    page_size: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``cat[rms_norm(embeds), rms_norm(fused aux of the token before)]`` of decode rows.

    Args:
        embeds: ``[B, E]`` embeddings of the rows' tokens.
        fused: ``[num_blocks + 1, H]`` fused aux of each page's latest token.
        block_table: ``[>= B, W]`` int32 block ids.
        positions: ``[B]`` int64 positions of the rows' tokens.
        embed_norm, feature_norm: ``[E]``, ``[H]`` norm weights.
        out: ``[B, >= E + H]`` rows, of which the first ``E + H`` values are written; None: new.
    Returns:
        ``[B, E + H]`` in the dtype of ``embeds``, in ``out``.
    """
    rows, e = embeds.shape
    h = fused.shape[1]
    if out is None:
        out = torch.empty(rows, e + h, dtype=embeds.dtype, device=embeds.device)
    _head_input_kernel[(rows,)](
        embeds,
        fused,
        block_table,
        positions,
        embed_norm,
        feature_norm,
        out,
        eps,
        block_table.stride(0),
        E=e,
        H=h,
        S_OUT=out.stride(0),
        P=page_size,
        E_PAD=triton.next_power_of_2(e),
        H_PAD=triton.next_power_of_2(h),
        num_warps=8,
    )
    return out[:, : e + h]


@triton.jit
def _add_own_states_kernel(
    p_fused,
    p_slots,
    p_feature_norm,
    p_cached,
    p_out,
    nowhere,
    eps,
    H: tl.constexpr,
    S_OUT: tl.constexpr,
    P: tl.constexpr,
    H_PAD: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    # [H_PAD] the fused aux
    o_h = tl.arange(0, H_PAD)
    m_h = o_h < H
    b_f = tl.load(p_fused + i_row * H + o_h, mask=m_h, other=0.0)
    slot = tl.load(p_slots + i_row).to(tl.int64)
    block = tl.where(slot < 0, nowhere, slot // P).to(tl.int64)
    tl.store(p_cached + block * H + o_h, b_f, mask=m_h)
    b_f = b_f.to(tl.float32)
    b_f = b_f * tl.rsqrt(tl.sum(b_f * b_f) / H + eps)
    b_w = tl.load(p_feature_norm + o_h, mask=m_h, other=0.0)
    tl.store(p_out + i_row * S_OUT + o_h, b_f.to(p_out.dtype.element_ty) * b_w, mask=m_h)


def add_own_states(
    fused: torch.Tensor,
    slots: torch.Tensor,
    feature_norm: torch.Tensor,
    cached: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    page_size: int,
) -> None:
    """``rms_norm`` of the fused aux of decode rows' own tokens, which their pages keep besides.

    Args:
        fused: ``[B, H]``.
        slots: ``[B]`` of the tokens in the paged caches; -1 for padding rows.
        feature_norm: ``[H]`` norm weights.
        cached: ``[num_blocks + 1, H]`` fused aux of each page's latest token, written; what padding
            rows have goes to the last row.
        out: ``[B, H]`` rows that may be part of wider ones, written.
    """
    h = fused.shape[1]
    _add_own_states_kernel[(len(fused),)](
        fused,
        slots,
        feature_norm,
        cached,
        out,
        cached.shape[0] - 1,
        eps,
        H=h,
        S_OUT=out.stride(0),
        P=page_size,
        H_PAD=triton.next_power_of_2(h),
        num_warps=8,
    )
