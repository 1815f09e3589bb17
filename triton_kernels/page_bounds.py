"""Element-wise minimum and maximum of each page's keys, and the bound they give on any query's
logits (Quest, arXiv 2406.10774).
"""

import torch
import triton
import triton.language as tl

PAGES_PER_PROGRAM = 32


@triton.jit
def _update_bounds_kernel(
    p_kv, p_slots, p_bounds, num_slots, P: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr
):
    i_token = tl.program_id(0)
    i_head = tl.program_id(1)
    H = tl.num_programs(1)
    slot = tl.load(p_slots + i_token)
    following = tl.load(p_slots + i_token + 1, mask=i_token + 1 < num_slots, other=-1)
    # The last of a step's tokens in a page updates its bounds. Padding has slot -1.
    if (slot >= 0) & ((following < 0) | (following // P != slot // P)):
        i_page = (slot // P) * H + i_head
        # [P, D_PAD]
        o_t = tl.arange(0, P)
        o_d = tl.arange(0, D_PAD)
        m_k = (o_t <= slot % P)[:, None] & (o_d < D)[None, :]
        p_k = p_kv + (i_page * P + o_t)[:, None] * 2 * D + o_d[None, :]
        # Infinity is none of the 8-bit floats.
        b_k = tl.load(p_k, mask=m_k, other=0.0).to(tl.float32)
        b_low = tl.min(tl.where(m_k, b_k, float("inf")), axis=0)
        b_high = tl.max(tl.where(m_k, b_k, float("-inf")), axis=0)
        # tl.min and tl.max ignore NaN, but a key with NaN has no bound.
        m_nan = tl.max((b_k != b_k).to(tl.int32), axis=0) > 0
        b_low = tl.where(m_nan, float("nan"), b_low)
        b_high = tl.where(m_nan, float("nan"), b_high)
        tl.store(p_bounds + i_page * 2 * D + o_d, b_low, mask=o_d < D)
        tl.store(p_bounds + (i_page * 2 + 1) * D + o_d, b_high, mask=o_d < D)


@triton.jit(do_not_specialize=["first_row"])
def _score_bounds_kernel(
    p_queries,
    p_bounds,
    p_block_table,
    p_seq_lens,
    p_starts,
    p_min_pages,
    p_out,
    scale,
    s_queries,
    s_table,
    s_scores,
    first_row,
    NQ: tl.constexpr,
    H: tl.constexpr,
    G_PAD: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_local = tl.program_id(0)
    i_block = tl.program_id(1)
    i_head = tl.program_id(2)
    G: tl.constexpr = NQ // H
    i_row = (first_row + i_local).to(tl.int64)
    pages = (tl.load(p_seq_lens + i_row) + P - 1) // P
    if (i_block * PAGES < pages) & (pages > tl.load(p_min_pages + i_row)):
        start = tl.load(p_starts + i_local)
        # [PAGES]
        o_p = i_block * PAGES + tl.arange(0, PAGES)
        m_p = o_p < pages
        b_block = tl.load(p_block_table + i_row * s_table + o_p, mask=m_p, other=0).to(tl.int64)
        # [PAGES, D_PAD]
        o_d = tl.arange(0, D_PAD)
        p_low = p_bounds + ((b_block * H + i_head) * 2 * D)[:, None] + o_d[None, :]
        m_b = m_p[:, None] & (o_d < D)[None, :]
        b_low = tl.load(p_low, mask=m_b, other=0.0)
        b_high = tl.load(p_low + D, mask=m_b, other=0.0)
        # [G_PAD, D_PAD]
        o_g = tl.arange(0, G_PAD)
        b_q = tl.load(
            p_queries + i_row * s_queries + (i_head * G + o_g)[:, None] * D + o_d[None, :],
            mask=(o_g < G)[:, None] & (o_d < D)[None, :],
            other=0.0,
        )
        # max(q * low, q * high) is q * high where q is positive, else q * low.
        b_up = tl.maximum(b_q, 0.0, propagate_nan=tl.PropagateNan.ALL).to(b_q.dtype)
        b_down = tl.minimum(b_q, 0.0, propagate_nan=tl.PropagateNan.ALL).to(b_q.dtype)
        b_s = tl.dot(b_up, tl.trans(b_high), input_precision=PRECISION)
        b_s = tl.dot(b_down, tl.trans(b_low), b_s, input_precision=PRECISION) * scale
        o_out = (i_head * G + o_g)[:, None].to(tl.int64) * s_scores + start + o_p[None, :]
        tl.store(p_out + o_out, b_s, mask=(o_g < G)[:, None] & m_p[None, :])


def update_bounds(kv_cache: torch.Tensor, slots: torch.Tensor, bounds: torch.Tensor) -> None:
    """Update the bounds of the pages that a step has written to.

    Args:
        kv_cache: ``[num_blocks, H, P, 2 * D]`` contiguous, keys then values in the last axis, the
            step's tokens included; of the bounds' dtype, or 8-bit floats.
        slots: ``[N]`` int64 of the step's tokens, each request's in ascending order of position and
            side by side; negative: padding.
        bounds: ``[num_blocks, H, 2, D]`` minima then maxima over the page's tokens so far, written;
            NaN where one of them is.
    """
    heads, page_size, d = bounds.shape[1], kv_cache.shape[2], bounds.shape[3]
    _update_bounds_kernel[(slots.shape[0], heads)](
        kv_cache,
        slots,
        bounds,
        slots.shape[0],
        P=page_size,
        D=d,
        D_PAD=triton.next_power_of_2(d),
        num_warps=1,
    )


def score_bounds(
    queries: torch.Tensor,
    bounds: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    *,
    page_size: int,
    first_row: int,
    num_rows: int,
    max_pages: int,
    min_pages: torch.Tensor,
) -> None:
    """Upper bound of ``q . k / sqrt(D)`` over each page's keys, per query head.

    Args:
        queries: ``[B, NQ, D]``; the row stride is free, so that it may be a slice of a fused
            projection.
        bounds: ``[num_blocks, H, 2, D]`` from ``update_bounds``.
        block_table, seq_lens: ``[>= B, W]`` int32, ``[>= B]`` int32.
        starts: ``[num_rows]`` int32, where each scored row's pages start in ``out``.
        out: ``[NQ, C]`` float32, written.
        first_row, num_rows: the rows to score.
        max_pages: upper bound of a row's pages.
        min_pages: ``[>= B]`` int32: rows with no more pages are skipped.
    """
    nq, d = queries.shape[1:]
    heads = bounds.shape[1]
    grid = (num_rows, triton.cdiv(max_pages, PAGES_PER_PROGRAM), heads)
    _score_bounds_kernel[grid](
        queries,
        bounds,
        block_table,
        seq_lens,
        starts,
        min_pages,
        out,
        d**-0.5,
        queries.stride(0),
        block_table.stride(0),
        out.stride(0),
        first_row,
        NQ=nq,
        H=heads,
        G_PAD=max(16, triton.next_power_of_2(nq // heads)),
        P=page_size,
        D=d,
        D_PAD=max(16, triton.next_power_of_2(d)),
        PAGES=PAGES_PER_PROGRAM,
        PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
        num_warps=4,
    )
