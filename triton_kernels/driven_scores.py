"""Made-up scores of pages, each drawn anew with a given chance in a step; for benchmarks."""

import torch
import triton
import triton.language as tl

PAGES_PER_PROGRAM = 128


@triton.jit
def _mix(number):
    # As ``specontext_vllm.retrieval.rules.driven.mix``.
    number = number & 0xFFFFFFFF
    number = ((number ^ (number >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    number = ((number ^ (number >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return number ^ (number >> 16)


@triton.jit(do_not_specialize=["first_row", "s_table", "num_chances"])
def _driven_scores_kernel(
    p_drawn,
    p_step,
    p_chances,
    p_block_table,
    p_seq_lens,
    p_starts,
    p_min_pages,
    p_out,
    s_table,
    s_scores,
    first_row,
    num_chances,
    NQ: tl.constexpr,
    H: tl.constexpr,
    G_PAD: tl.constexpr,
    P: tl.constexpr,
    PAGES: tl.constexpr,
):
    i_local = tl.program_id(0)
    i_block = tl.program_id(1)
    i_head = tl.program_id(2)
    G: tl.constexpr = NQ // H
    i_row = (first_row + i_local).to(tl.int64)
    pages = (tl.load(p_seq_lens + i_row) + P - 1) // P
    if (i_block * PAGES < pages) & (pages > tl.load(p_min_pages + i_row)):
        step = tl.load(p_step)
        chance = tl.load(p_chances + step % num_chances)
        start = tl.load(p_starts + i_local)
        # [PAGES]
        o_p = i_block * PAGES + tl.arange(0, PAGES)
        m_p = o_p < pages
        b_block = tl.load(p_block_table + i_row * s_table + o_p, mask=m_p, other=0).to(tl.int64)
        b_page = b_block * H + i_head
        b_old = tl.load(p_drawn + b_page, mask=m_p, other=0.0)
        b_dice = _mix(_mix(b_page) + step * 0x9E3779B1)
        b_new = _mix(b_dice + 0x7F4A7C15).to(tl.float32) * (10 * 2.0**-32)
        # Another row that has the page finds what this one does, whichever is first.
        b_score = tl.where((b_dice < chance) | (b_old < 0), b_new, b_old)
        tl.store(p_drawn + b_page, b_score, mask=m_p)
        # [G_PAD, PAGES]
        o_g = tl.arange(0, G_PAD)
        o_out = (i_head * G + o_g)[:, None].to(tl.int64) * s_scores + start + o_p[None, :]
        b_out = tl.broadcast_to(b_score[None, :], (G_PAD, PAGES))
        tl.store(p_out + o_out, b_out, mask=(o_g < G)[:, None] & m_p[None, :])


def driven_scores(
    drawn: torch.Tensor,
    step: torch.Tensor,
    chances: torch.Tensor,
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
    """Draw scores from 0 to 10 for the pages of the rows, the same for all query heads of a KV
    head.

    The reference is ``specontext_vllm.retrieval.rules.driven.redrawn``.

    Args:
        drawn: ``[num_blocks, H]`` float32 scores of the step before, negative where there is none;
            read and written.
        step: ``[1]`` int64.
        chances: ``[steps]`` int64: a score is drawn anew in step i with the chance
            ``chances[i % steps] / 2 ** 32``.
        block_table, seq_lens: ``[>= B, W]`` int32, ``[>= B]`` int32.
        starts: ``[num_rows]`` int32, where each row's pages start in ``out``.
        out: ``[NQ, C]`` float32, written.
        first_row, num_rows: the rows to score.
        max_pages: upper bound of a row's pages.
        min_pages: ``[>= B]`` int32: rows with no more pages are skipped.
    """
    nq, heads = out.shape[0], drawn.shape[1]
    grid = (num_rows, triton.cdiv(max_pages, PAGES_PER_PROGRAM), heads)
    _driven_scores_kernel[grid](
        drawn,
        step,
        chances,
        block_table,
        seq_lens,
        starts,
        min_pages,
        out,
        block_table.stride(0),
        out.stride(0),
        first_row,
        chances.shape[0],
        NQ=nq,
        H=heads,
        G_PAD=triton.next_power_of_2(nq // heads),
        P=page_size,
        PAGES=PAGES_PER_PROGRAM,
        num_warps=4,
    )
