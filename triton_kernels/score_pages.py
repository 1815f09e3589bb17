"""Scores of KV pages: the retrieval head's query against its paged keys, reduced to two numbers a
page.
"""

import torch
import triton
import triton.language as tl

WIDTH_TIMES_PAGES = 8
"""Bytes of a key element times pages of a program; the fastest for 8-bit and for 16-bit keys."""

MAX_BLOCKS = 65_535
"""CUDA's limit of a grid's second axis."""


@triton.jit(do_not_specialize=["first_row", "first_block", "s_table"])
def _score_pages_kernel(
    p_queries,
    p_keys,
    p_block_table,
    p_seq_lens,
    p_starts,
    p_min_pages,
    p_max,
    p_lse,
    scale,
    s_queries,
    s_table,
    s_scores,
    first_row,
    first_block,
    NQ: tl.constexpr,
    NKV: tl.constexpr,
    G_PAD: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    S: tl.constexpr,
    FIRST: tl.constexpr,
    KEYLESS: tl.constexpr,
    PAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    HALF: tl.constexpr,
):
    i_local = tl.program_id(0)
    i_block = first_block + tl.program_id(1)
    i_kv = tl.program_id(2)
    G: tl.constexpr = NQ // NKV
    LN2: tl.constexpr = 0.6931471805599453
    i_row = (first_row + i_local).to(tl.int64)
    seq_len = tl.load(p_seq_lens + i_row)
    pages = (seq_len + P - 1) // P
    if (i_block * PAGES < pages) & (pages > tl.load(p_min_pages + i_row)):
        start = tl.load(p_starts + i_local)
        # [PAGES * P]
        o_t = tl.arange(0, PAGES * P)
        o_page = i_block * PAGES + o_t // P
        o_token = i_block * PAGES * P + o_t
        m_token = o_token < seq_len - KEYLESS
        b_block = tl.load(p_block_table + i_row * s_table + o_page, mask=m_token, other=0).to(
            tl.int64
        )
        # [PAGES * P, D_PAD]
        o_d = tl.arange(0, D_PAD)
        b_k = tl.load(
            p_keys + (((b_block * NKV + i_kv) * P + o_t % P) * S)[:, None] + o_d[None, :],
            mask=m_token[:, None] & (o_d < D)[None, :],
            other=0.0,
        )
        # [D_PAD, G_PAD]
        o_g = tl.arange(0, G_PAD)
        b_q = tl.load(
            p_queries + i_row * s_queries + (i_kv * G + o_g)[None, :] * D + o_d[:, None],
            mask=(o_g < G)[None, :] & (o_d < D)[:, None],
            other=0.0,
        )
        if HALF:
            b_q = tl.clamp(
                b_q.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL
            ).to(tl.float16)
        b_s = tl.dot(b_k.to(b_q.dtype), b_q, input_precision=PRECISION)
        b_s = tl.where((m_token & (o_token >= FIRST))[:, None], b_s, float("-inf"))
        # [PAGES, P, G_PAD] -> [PAGES, G_PAD]; in powers of two, for which the GPU has an
        # instruction.
        b_s = tl.reshape(b_s, (PAGES, P, G_PAD))
        b_max = tl.max(b_s, axis=1)
        scale2 = scale / LN2
        b_safe = tl.where(b_max == float("-inf"), 0.0, b_max) * scale2
        b_sum = tl.sum(tl.exp2(b_s * scale2 - b_safe[:, None, :]), axis=1)
        # tl.max ignores NaN; the sum does not.
        b_max = tl.where(b_sum == b_sum, b_max, b_sum)
        o_p = i_block * PAGES + tl.arange(0, PAGES)
        o_out = (i_kv * G + o_g)[None, :].to(tl.int64) * s_scores + start + o_p[:, None]
        m_out = (o_g < G)[None, :] & (o_p < pages)[:, None]
        tl.store(p_max + o_out, b_max * scale, mask=m_out)
        tl.store(p_lse + o_out, (b_safe + tl.log2(b_sum)) * LN2, mask=m_out)


def score_pages(
    queries: torch.Tensor,
    keys: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor,
    page_max: torch.Tensor,
    page_lse: torch.Tensor,
    *,
    first_row: int,
    num_rows: int,
    max_pages: int,
    min_pages: torch.Tensor,
    first_token: int = 1,
    keyless: int = 0,
) -> None:
    """Maximum and log-sum-exp of ``q . k / sqrt(D)`` over each page's tokens, per query head; both
    NaN where a token's is NaN or +inf.

    Args:
        queries: ``[B, NQ, D]``; the row stride is free, so that it may be a slice of a fused
            projection.
        keys: ``[num_blocks, NKV, P, D]``, contiguous or the first D of each token's row in a wider
            cache; the queries' dtype or 8-bit floats.
        block_table: ``[>= B, W]`` int32.
        seq_lens: ``[>= B]`` int32 tokens per row, the new one included.
        starts: ``[num_rows]`` int32, where each scored row's pages start in the workspace.
        page_max, page_lse: ``[NQ, C]`` float32, written.
        first_row, num_rows: the rows to score.
        max_pages: upper bound of a row's pages.
        min_pages: ``[>= B]`` int32: rows with no more pages are skipped, since they are read whole.
        first_token: earlier tokens are ignored.
        keyless: newest tokens of each row that have no key yet; what lies in their place is not
            read.
    """
    nq, d = queries.shape[1:]
    nkv, page_size = keys.shape[1:3]
    # 8-bit keys are multiplied in IEEE float16, which represents them exactly, and bfloat16 queries
    # but for very large ones, which are clamped, and very small ones. Converting the keys to
    # bfloat16 would be slower than reading them from memory.
    half = keys.dtype.itemsize == 1 and queries.dtype != torch.float32
    pages_per_program = WIDTH_TIMES_PAGES // keys.dtype.itemsize
    blocks = triton.cdiv(max_pages, pages_per_program)
    for first_block in range(0, blocks, MAX_BLOCKS):
        _score_pages_kernel[(num_rows, min(blocks - first_block, MAX_BLOCKS), nkv)](
            queries,
            keys,
            block_table,
            seq_lens,
            starts,
            min_pages,
            page_max,
            page_lse,
            d**-0.5,
            queries.stride(0),
            block_table.stride(0),
            page_max.stride(0),
            first_row,
            first_block,
            NQ=nq,
            NKV=nkv,
            G_PAD=max(8, triton.next_power_of_2(nq // nkv)),
            P=page_size,
            D=d,
            D_PAD=max(16, triton.next_power_of_2(d)),
            S=keys.stride(2),
            FIRST=first_token,
            KEYLESS=keyless,
            PAGES=pages_per_program,
            PRECISION="ieee" if queries.dtype == torch.float32 else "tf32",
            HALF=half,
            num_warps=2,
        )
