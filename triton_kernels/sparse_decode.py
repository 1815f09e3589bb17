"""Decode attention over per-(request, KV head) page tables for GPUs without FlashAttention: split over pages, then combined."""

import torch
import triton
import triton.language as tl

PAGES_PER_STEP = 4


@triton.jit
def _sparse_decode_kernel(
    p_query, p_kv, p_pages, p_lengths, p_partial, p_partial_lse,
    scale, s_pages, num_sequences,
    G: tl.constexpr, G_PAD: tl.constexpr, P: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, STEP: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_seq = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1)
    length = tl.load(p_lengths + i_seq)
    pages = (length + P - 1) // P
    per_split = (pages + SPLITS - 1) // SPLITS
    first = i_split * per_split
    last = tl.minimum(first + per_split, pages)
    o_g = tl.arange(0, G_PAD)
    o_d = tl.arange(0, D_PAD)
    m_q = (o_g < G)[:, None] & (o_d < D)[None, :]
    # [G_PAD, D_PAD]
    b_q = tl.load(p_query + (i_seq * G + o_g)[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
    b_acc = tl.zeros((G_PAD, D_PAD), tl.float32)
    b_top = tl.full((G_PAD,), float("-inf"), tl.float32)
    b_sum = tl.zeros((G_PAD,), tl.float32)
    o_t = tl.arange(0, STEP * P)
    for page in range(first, last, STEP):
        o_page = page + o_t // P
        m_t = (o_page < last) & (page * P + o_t < length)
        b_id = tl.load(p_pages + i_seq * s_pages + o_page, mask=m_t, other=0).to(tl.int64)
        # [STEP * P, D_PAD]; keys then values in the last axis
        p_k = p_kv + ((b_id * P + o_t % P) * 2 * D)[:, None] + o_d[None, :]
        m_kv = m_t[:, None] & (o_d < D)[None, :]
        b_k = tl.load(p_k, mask=m_kv, other=0.0)
        b_v = tl.load(p_k + D, mask=m_kv, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        b_s = tl.where(m_t[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, axis=1))
        b_p = tl.exp(b_s - b_new[:, None])
        b_scale = tl.exp(b_top - b_new)
        b_sum = b_sum * b_scale + tl.sum(b_p, axis=1)
        b_acc = b_acc * b_scale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_top = b_new
    empty = b_sum == 0.0
    b_safe = tl.where(empty, 1.0, b_sum)
    o_out = (i_split * num_sequences + i_seq) * G + o_g
    tl.store(p_partial + o_out[:, None] * D + o_d[None, :], b_acc / b_safe[:, None], mask=m_q)
    tl.store(p_partial_lse + o_out, tl.where(empty, float("-inf"), b_top + tl.log(b_safe)), mask=o_g < G)


@triton.jit
def _combine_kernel(
    p_partial, p_partial_lse, p_out, num_heads,
    D: tl.constexpr, D_PAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    i_head = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, D_PAD)
    # [SPLITS]
    o_s = tl.arange(0, SPLITS)
    b_lse = tl.load(p_partial_lse + o_s * num_heads + i_head)
    top = tl.max(b_lse)
    b_w = tl.exp(b_lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(b_w)
    # [SPLITS, D_PAD]
    b_x = tl.load(p_partial + ((o_s * num_heads + i_head) * D)[:, None] + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)
    b_o = tl.sum(b_x * b_w[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(p_out + i_head * D + o_d, b_o.to(p_out.dtype.element_ty), mask=o_d < D)


def sparse_decode(
    query: torch.Tensor, head_pages: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, output: torch.Tensor, scale: float,
    *, splits: int = 8,
) -> None:  # fmt: skip
    """Attention of one query token per sequence over its own list of pages.

    Args:
        query: ``[S, G, D]``, one sequence per (request, KV head), G query heads in its group.
        head_pages: ``[num_blocks * H, P, 2 * D]`` contiguous, keys then values in the last axis.
        pages: ``[S, K]`` int32 head-page ids; only the first ``ceil(length / P)`` of a row are read.
        lengths: ``[S]`` int32 tokens; the last page may be partly filled; 0 gives zeros.
        output: ``[S, G, D]``, written.
        scale: factor on ``q . k``.
        splits: parts a sequence is cut into, a power of two.
    """
    sequences, group, d = query.shape
    partial = torch.empty(splits, sequences, group, d, dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(splits, sequences, group, dtype=torch.float32, device=query.device)
    d_pad = max(16, triton.next_power_of_2(d))
    _sparse_decode_kernel[(sequences, splits)](
        query, head_pages, pages, lengths, partial, partial_lse, scale, pages.stride(0), sequences,
        G=group, G_PAD=max(16, triton.next_power_of_2(group)), P=head_pages.shape[1], D=d, D_PAD=d_pad, STEP=PAGES_PER_STEP,
        SPLITS=splits, PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    _combine_kernel[(sequences * group,)](
        partial, partial_lse, output, sequences * group, D=d, D_PAD=d_pad, SPLITS=splits, num_warps=1
    )
