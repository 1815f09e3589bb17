"""Input of the retrieval head's projections for decode rows."""

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
    tl.store(p_out + i_row * (E + H) + o_e, b_x.to(p_out.dtype.element_ty) * b_w, mask=o_e < E)
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
    tl.store(p_out + i_row * (E + H) + E + o_h, b_f.to(p_out.dtype.element_ty) * b_w, mask=o_h < H)


def head_input(
    embeds: torch.Tensor,
    fused: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    embed_norm: torch.Tensor,
    feature_norm: torch.Tensor,
    eps: float,
    page_size: int,
) -> torch.Tensor:
    """``cat[rms_norm(embeds), rms_norm(fused aux of the token before)]`` of decode rows.

    Args:
        embeds: ``[B, E]`` embeddings of the rows' tokens.
        fused: ``[num_blocks + 1, H]`` fused aux of each page's latest token.
        block_table: ``[>= B, W]`` int32 block ids.
        positions: ``[B]`` int64 positions of the rows' tokens.
        embed_norm, feature_norm: ``[E]``, ``[H]`` norm weights.
    Returns:
        ``[B, E + H]`` in the dtype of ``embeds``.
    """
    rows, e = embeds.shape
    h = fused.shape[1]
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
        P=page_size,
        E_PAD=triton.next_power_of_2(e),
        H_PAD=triton.next_power_of_2(h),
        num_warps=8,
    )
    return out
