"""Sums over a step's kept attention mass, in one launch."""

import torch
import triton
import triton.language as tl

BLOCK = 128


@triton.jit(do_not_specialize=["num_rows"])
def _add_kept_mass_kernel(
    p_mass,
    p_seq_lens,
    p_edges,
    p_sum,
    p_buckets,
    num_rows,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    N: tl.constexpr,
    N_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_h, o_n = tl.arange(0, H_PAD), tl.arange(0, N_PAD)
    # [N_PAD]
    b_edges = tl.load(p_edges + o_n, mask=o_n < N, other=0.0)
    total = tl.full((), 0.0, tl.float64)
    b_counts = tl.zeros((N_PAD,), tl.int32)
    for first in range(0, num_rows, BLOCK):
        # [BLOCK]
        o_row = first + tl.arange(0, BLOCK)
        m_row = o_row < num_rows
        m_row = m_row & (tl.load(p_seq_lens + o_row, mask=m_row, other=0) > 0)
        # [BLOCK, H_PAD]
        b_mass = tl.load(
            p_mass + o_row[:, None] * H + o_h[None, :],
            mask=m_row[:, None] & (o_h < H)[None, :],
            other=0.0,
        )
        # [BLOCK]
        b_mean = tl.sum(b_mass, axis=1) / H
        total += tl.sum(b_mean.to(tl.float64))
        # [BLOCK, N_PAD] -> [N_PAD]
        b_counts += tl.sum(
            (m_row[:, None] & (b_mean[:, None] <= b_edges[None, :])).to(tl.int32), axis=0
        )
    tl.store(p_sum, tl.load(p_sum) + total)
    tl.store(
        p_buckets + o_n,
        tl.load(p_buckets + o_n, mask=o_n < N, other=0.0) + b_counts.to(tl.float64),
        mask=o_n < N,
    )


def add_kept_mass(
    kept_mass: torch.Tensor,
    seq_lens: torch.Tensor,
    edges: torch.Tensor,
    total: torch.Tensor,
    buckets: torch.Tensor,
) -> None:
    """Add the rows' mean mass to ``total`` and, for each edge, the rows of at most that much to
    ``buckets``.

    Args:
        kept_mass: ``[B, H]`` float32.
        seq_lens: ``[>= B]`` int32; rows of 0 tokens are padding and do not count.
        edges: ``[N]`` float32.
        total, buckets: ``[1]``, ``[N]`` float64, added to.
    """
    rows, heads = kept_mass.shape
    count = edges.shape[0]
    _add_kept_mass_kernel[(1,)](
        kept_mass,
        seq_lens,
        edges,
        total,
        buckets,
        rows,
        H=heads,
        H_PAD=triton.next_power_of_2(heads),
        N=count,
        N_PAD=triton.next_power_of_2(count),
        BLOCK=BLOCK,
        num_warps=4,
    )
