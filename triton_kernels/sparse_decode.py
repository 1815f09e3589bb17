"""Decode attention over page tables with one row per (request, KV head). Each sequence is split
into parts; the part that ends last combines them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MAX_SPLITS = 64
"""Maximum number of parts of a sequence."""

STEP_BYTES = 16384
"""Bytes of keys, and as many of values, that a program has in flight. Four programs on a processor
then hide the memory's latency.
"""

MAX_STEP_PAGES = 4
"""Maximum number of pages of a step: with more, four programs would not fit into a processor's
registers.
"""

MIN_STEPS = 2
"""Minimum number of steps of a part: combining smaller parts takes longer than reading them."""

COMBINED = 8
"""Parts that are loaded at a time when they are combined."""

LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["num_kv_heads", "splits"])
def _sparse_decode_kernel(
    p_query,
    p_kv,
    p_pages,
    p_lengths,
    p_out,
    p_partial,
    p_lse,
    p_ended,
    scale,
    s_query,
    s_pages,
    num_kv_heads,
    splits,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    STEP: tl.constexpr,
    MIN_STEPS: tl.constexpr,
    G_OUT: tl.constexpr,
    COMBINED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    # A grid of one axis: the others are limited to 65,535 programs.
    i_split = tl.program_id(0) % splits
    i_seq = (tl.program_id(0) // splits).to(tl.int64)
    length = tl.load(p_lengths + i_seq)
    pages = (length + P - 1) // P
    per_split = tl.maximum(tl.cdiv(tl.cdiv(pages, splits), STEP), MIN_STEPS) * STEP
    parts = tl.maximum((pages + per_split - 1) // per_split, 1)
    if i_split >= parts:
        return
    first = i_split * per_split
    last = tl.minimum(first + per_split, pages)
    o_g = tl.arange(0, G_PAD)
    o_d = tl.arange(0, D_PAD)
    m_q = (o_g < G)[:, None] & (o_d < D)[None, :]
    # [G_PAD, D_PAD]
    p_q = p_query + (i_seq // num_kv_heads) * s_query + (i_seq % num_kv_heads) * G * D
    b_q = tl.load(p_q + o_g[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
    b_acc = tl.zeros((G_PAD, D_PAD), tl.float32)
    b_top = tl.full((G_PAD,), float("-inf"), tl.float32)
    # Summed over tokens only once, at the end: a sum across warps would synchronize them in every
    # step.
    b_sums = tl.zeros((G_PAD, STEP * P), tl.float32)
    o_t = tl.arange(0, STEP * P)
    for page in tl.range(first, last, STEP, num_stages=STAGES):
        # [STEP * P]
        o_page = page + o_t // P
        m_t = (o_page < last) & (page * P + o_t < length)
        b_id = tl.load(p_pages + i_seq * s_pages + o_page, mask=m_t, other=0).to(tl.int64)
        # [STEP * P, D_PAD]; keys then values in the last axis
        p_k = p_kv + ((b_id * P + o_t % P) * 2 * D)[:, None] + o_d[None, :]
        m_kv = m_t[:, None] & (o_d < D)[None, :]
        b_k = tl.load(p_k, mask=m_kv, other=0.0)
        b_v = tl.load(p_k + D, mask=m_kv, other=0.0)
        # [G_PAD, STEP * P] logits in powers of two: the scale includes log2(e).
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        b_s = tl.where(m_t[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, axis=1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_scale = tl.exp2(b_top - b_new)
        b_sums = b_sums * b_scale[:, None] + b_p
        b_acc = b_acc * b_scale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_top = b_new
    b_sum = tl.sum(b_sums, axis=1)
    # A padding row has no token; its output is 0.
    b_acc = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    p_o = p_out + i_seq * G * D + o_g[:, None] * D + o_d[None, :]
    if parts == 1:
        tl.store(p_o, b_acc.to(p_out.dtype.element_ty), mask=m_q)
        return
    o_part = (i_seq * splits + i_split) * G + o_g
    tl.store(p_partial + o_part[:, None] * D + o_d[None, :], b_acc, mask=m_q)
    tl.store(p_lse + o_part, b_top + tl.log2(b_sum), mask=o_g < G)
    # All threads have stored the part before one of them counts it.
    tl.debug_barrier()
    ended = tl.atomic_add(p_ended + i_seq, 1, sem="acq_rel", scope="gpu")
    if ended == parts - 1:
        tl.store(p_ended + i_seq, 0)
        o_c = tl.arange(0, G_OUT)
        c_top = tl.full((G_OUT,), float("-inf"), tl.float32)
        c_sum = tl.zeros((G_OUT,), tl.float32)
        # [G_OUT, D_PAD]; each thread adds up its own elements of all parts
        c_acc = tl.zeros((G_OUT, D_PAD), tl.float32)
        for part in range(0, parts, COMBINED):
            for i in tl.static_range(COMBINED):
                o_all = (i_seq * splits + part + i) * G + o_c
                m_all = o_c < tl.where(part + i < parts, G, 0)
                # [G_OUT] and [G_OUT, D_PAD]; .cg skips the L1 cache, which does not see other
                # programs' stores.
                b_lse = tl.load(
                    p_lse + o_all, mask=m_all, other=float("-inf"), cache_modifier=".cg"
                )
                b_x = tl.load(
                    p_partial + o_all[:, None] * D + o_d[None, :],
                    mask=m_all[:, None] & (o_d < D)[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
                c_new = tl.maximum(c_top, b_lse)
                # -inf in rows of padding.
                c_safe = tl.where(c_new == float("-inf"), 0.0, c_new)
                b_w = tl.exp2(b_lse - c_safe)
                c_scale = tl.exp2(c_top - c_safe)
                c_sum = c_sum * c_scale + b_w
                c_acc = c_acc * c_scale[:, None] + b_x * b_w[:, None]
                c_top = c_new
        p_c = p_out + (i_seq * G + o_c)[:, None] * D + o_d[None, :]
        m_c = (o_c < G)[:, None] & (o_d < D)[None, :]
        tl.store(
            p_c,
            (c_acc / tl.where(c_sum == 0.0, 1.0, c_sum)[:, None]).to(p_out.dtype.element_ty),
            mask=m_c,
        )


@dataclass(frozen=True)
class SplitWorkspace:
    """Partial results, which the last part of a sequence combines. Calls that share a workspace
    must not overlap.

    Attributes:
        parts: number of parts of all sequences together that a launch aims for.
        partial: float32, outputs of the parts.
        lse: float32, logarithms of their softmax sums, base 2.
        ended: ``[parts]`` int32, parts of each sequence that have ended; 0 between calls.
    """

    parts: int
    partial: torch.Tensor
    lse: torch.Tensor
    ended: torch.Tensor

    @classmethod
    def allocate(
        cls, parts: int, group: int, head_dim: int, device: torch.device
    ) -> SplitWorkspace:
        """For any number of sequences of ``group`` query heads."""
        # With two parts or more each, there are at most parts / 1.5 sequences, and rounding adds
        # at most half a part to each.
        size = 2 * parts * group
        return cls(
            parts,
            torch.empty(size * head_dim, dtype=torch.float32, device=device),
            torch.empty(size, dtype=torch.float32, device=device),
            torch.zeros(parts, dtype=torch.int32, device=device),
        )

    def splits(self, sequences: int) -> int:
        """Number of parts of each sequence."""
        return min(max(round(self.parts / sequences), 1), MAX_SPLITS)


def sparse_decode(
    query: torch.Tensor,
    head_pages: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    workspace: SplitWorkspace,
) -> None:
    """Attention of one query token a row; each KV head of a row is a sequence with its own list of
    pages.

    Args:
        query: ``[R, H * G, D]``; the row stride is free; copied if its rows are not contiguous.
        head_pages: ``[num_blocks * H, P, 2 * D]`` contiguous, keys then values in the last axis.
        pages: ``[R * H, K]`` int32 head-page ids; only the first ``ceil(length / P)`` of a sequence
            are read.
        lengths: ``[R * H]`` int32 tokens; the last page may be partly filled; 0 gives zeros.
        output: ``[R, H * G, D]`` contiguous, written.
        scale: factor on ``q . k``.
    """
    rows, heads, d = query.shape
    if query.stride()[1:] != (d, 1):
        query = query.contiguous()
    sequences = lengths.shape[0]
    num_kv_heads = sequences // rows
    group, page_size = heads // num_kv_heads, head_pages.shape[1]
    d_pad = max(16, triton.next_power_of_2(d))
    step = min(max(STEP_BYTES // (page_size * d_pad * query.element_size()), 1), MAX_STEP_PAGES)
    # No more than the longest list can be cut into: even programs that end at once cost time.
    splits = min(workspace.splits(sequences), triton.cdiv(pages.shape[1], MIN_STEPS * step))
    _sparse_decode_kernel[(splits * sequences,)](
        query,
        head_pages,
        pages,
        lengths,
        output,
        workspace.partial,
        workspace.lse,
        workspace.ended,
        scale * LOG2_E,
        query.stride(0),
        pages.stride(0),
        num_kv_heads,
        splits,
        G=group,
        G_PAD=max(16, triton.next_power_of_2(group)),
        P=page_size,
        D=d,
        D_PAD=d_pad,
        STEP=step,
        MIN_STEPS=MIN_STEPS,
        G_OUT=triton.next_power_of_2(group),
        COMBINED=COMBINED,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        STAGES=3,
        num_warps=4,
    )
