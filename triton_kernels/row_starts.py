"""Where each row's pages start in a workspace that holds the rows' pages one after the other: a
running sum over the batch, in one launch.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def _row_starts_kernel(
    p_seq_lens, p_starts, first_row, num_rows, P: tl.constexpr, BLOCK: tl.constexpr
):
    # [BLOCK]
    o_row = tl.arange(0, BLOCK)
    before = tl.full((), 0, tl.int32)
    for first in range(0, num_rows, BLOCK):
        m_row = first + o_row < num_rows
        b_pages = (
            tl.load(p_seq_lens + first_row + first + o_row, mask=m_row, other=0) + P - 1
        ) // P
        tl.store(
            p_starts + first + o_row, before + tl.cumsum(b_pages, axis=0) - b_pages, mask=m_row
        )
        before += tl.sum(b_pages)


def row_starts(
    seq_lens: torch.Tensor, first_row: int, num_rows: int, page_size: int
) -> torch.Tensor:
    """For each row from ``first_row`` on, the number of pages of the rows between ``first_row`` and
    it.

    Args:
        seq_lens: ``[>= first_row + num_rows]`` int32 tokens of each row.
    Returns:
        ``[num_rows]`` int32.
    """
    starts = torch.empty(num_rows, dtype=torch.int32, device=seq_lens.device)
    _row_starts_kernel[(1,)](
        seq_lens, starts, first_row, num_rows, P=page_size, BLOCK=BLOCK, num_warps=4
    )
    return starts
