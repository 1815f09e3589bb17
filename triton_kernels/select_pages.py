"""Top-K pages of every (request, KV head) and attention's page table, in one kernel."""

import torch
import triton
import triton.language as tl

from specontext_vllm.step_data import Stickiness

# Above the order-preserving integer of +inf: sinks and recents beat every score.
_ALWAYS = 0x7F800001


@triton.jit(do_not_specialize=["first_row", "s_table"])
def _select_pages_kernel(
    p_max,
    p_lse,
    p_order,
    p_seq_lens,
    p_starts,
    p_totals,
    p_block_table,
    p_pages,
    p_lengths,
    p_mass,
    p_lanes,
    p_slot_of,
    s_table,
    s_scores,
    s_pages,
    s_slots,
    s_group,
    first_row,
    sinks,
    recents,
    threshold,
    margin,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    GROUPS: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
    ALWAYS: tl.constexpr,
    FALLBACK: tl.constexpr,
    STICKY: tl.constexpr,
):
    i_local = tl.program_id(0)
    i_head = tl.program_id(1)
    i_row = (first_row + i_local).to(tl.int64)
    seq_len = tl.load(p_seq_lens + i_row)
    pages = (seq_len + P - 1) // P
    budget = tl.load(p_totals + i_row)
    p_table = p_block_table + i_row * s_table
    # Of H heads, each KV head has one for each group of layers. What it is called, and its row
    # among all groups' ones:
    KV: tl.constexpr = H // GROUPS
    i_kv = i_head // GROUPS
    i_out = (i_head % GROUPS).to(tl.int64) * s_group + i_row * KV + i_kv
    p_out = p_pages + i_out * s_pages
    active = True
    if FALLBACK:
        # [H_PAD]
        o_h = tl.arange(0, H_PAD)
        b_mass = tl.load(p_mass + i_row * H + o_h, mask=o_h < H, other=0.0)
        active = tl.sum(b_mass) / H < threshold
    # [BLOCK]
    o_block = tl.arange(0, BLOCK)
    if active:
        if pages <= budget:
            for first in range(0, pages, BLOCK):
                o_p = first + o_block
                b_id = tl.load(p_table + o_p, mask=o_p < pages, other=0)
                tl.store(p_out + o_p, b_id * KV + i_kv, mask=o_p < pages)
            tl.store(p_lengths + i_out, seq_len)
            if not FALLBACK:
                tl.store(p_mass + i_row * H + i_head, 1.0)
        else:
            start = tl.load(p_starts + i_local)
            o_g = tl.arange(0, G_PAD)
            m_g = o_g < G
            # [G_PAD, BLOCK]
            o_tile = (i_head * G + o_g)[:, None].to(tl.int64) * s_scores + start + o_block[None, :]
            # [G_PAD] log of the softmax denominator of each query head
            b_top = tl.full((G_PAD,), float("-inf"), tl.float32)
            b_sum = tl.zeros((G_PAD,), tl.float32)
            for first in range(0, pages, BLOCK):
                m_tile = m_g[:, None] & (first + o_block < pages)[None, :]
                b_lse = tl.load(p_lse + o_tile + first, mask=m_tile, other=float("-inf"))
                b_lse = tl.where(m_g[:, None], b_lse, 0.0)
                b_new = tl.maximum(b_top, tl.max(b_lse, axis=1))
                b_sum = b_sum * tl.exp(b_top - b_new) + tl.sum(
                    tl.exp(b_lse - b_new[:, None]), axis=1
                )
                b_top = b_new
            b_total = b_top + tl.log(b_sum)
            # NaN if a score is NaN or infinite. Such a score must have no weight: replace it and
            # sum the row again.
            if tl.max((b_total != b_total).to(tl.int32), axis=0) > 0:
                b_top = tl.full((G_PAD,), float("-inf"), tl.float32)
                b_sum = tl.zeros((G_PAD,), tl.float32)
                # Small tiles, so that this rare loop needs no more registers than the others.
                for first in range(0, pages, FEW):
                    # [G_PAD, FEW]
                    o_p = first + tl.arange(0, FEW)
                    m_tile = m_g[:, None] & (o_p < pages)[None, :]
                    o_few = (
                        (i_head * G + o_g)[:, None].to(tl.int64) * s_scores + start + o_p[None, :]
                    )
                    b_m = tl.load(p_max + o_few, mask=m_tile, other=0.0)
                    b_lse = tl.load(p_lse + o_few, mask=m_tile, other=float("-inf"))
                    m_finite = (tl.abs(b_m) < float("inf")) & (tl.abs(b_lse) < float("inf"))
                    b_lse = tl.where(m_finite, b_lse, float("-inf"))
                    tl.store(p_max + o_few, float("-inf"), mask=m_tile & (m_finite == 0))
                    tl.store(p_lse + o_few, float("-inf"), mask=m_tile & (m_finite == 0))
                    b_new = tl.maximum(b_top, tl.max(b_lse, axis=1))
                    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
                    b_sum = b_sum * tl.exp(b_top - b_safe) + tl.sum(
                        tl.exp(b_lse - b_safe[:, None]), axis=1
                    )
                    b_top = b_new
                # A query head without a finite score has no weight.
                b_total = tl.where(b_sum > 0.0, b_top + tl.log(b_sum), float("inf"))
                # Threads read below what others have stored above.
                tl.debug_barrier()
            # [BLOCK] score of a page: the largest attention weight (as a logarithm) over its tokens
            # and the group's query heads, stored as an integer of the same order.
            p_row_order = p_order + i_head.to(tl.int64) * s_scores + start
            lowest = tl.full((), ALWAYS, tl.int64)
            for first in range(0, pages, BLOCK):
                o_p = first + o_block
                m_tile = m_g[:, None] & (o_p < pages)[None, :]
                b_m = tl.load(p_max + o_tile + first, mask=m_tile, other=float("-inf"))
                b_m = tl.where(m_tile, b_m - b_total[:, None], float("-inf"))
                b_best = tl.max(b_m, axis=0)
                if STICKY:
                    lane = tl.maximum(tl.load(p_lanes + i_row), 0).to(tl.int64)
                    b_slot = tl.load(
                        p_slot_of + (lane * H + i_head) * s_slots + o_p, mask=o_p < pages, other=-1
                    )
                    b_best += tl.where(b_slot >= 0, margin, 0.0)
                # As an integer, NaN would be above the sinks.
                b_best = tl.where(b_best == b_best, b_best, float("-inf"))
                b_bits = b_best.to(tl.int32, bitcast=True)
                b_order = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
                b_order = tl.where((o_p < sinks) | (o_p >= pages - recents), ALWAYS, b_order)
                tl.store(p_row_order + o_p, b_order, mask=o_p < pages)
                lowest = tl.minimum(
                    lowest, tl.min(tl.where(o_p < pages, b_order, ALWAYS)).to(tl.int64)
                )
            # Threads read below what others have stored above.
            tl.debug_barrier()
            # The largest threshold that at least `budget` pages reach.
            low = lowest
            high = tl.full((), ALWAYS, tl.int64)
            while low < high:
                middle = low + (high - low + 1) // 2
                count = tl.full((), 0, tl.int32)
                for first in range(0, pages, BLOCK):
                    o_p = first + o_block
                    b_order = tl.load(p_row_order + o_p, mask=o_p < pages, other=-0x80000000)
                    count += tl.sum(((b_order.to(tl.int64) >= middle) & (o_p < pages)).to(tl.int32))
                low = tl.where(count >= budget, middle, low)
                high = tl.where(count >= budget, high, middle - 1)
                high = tl.where(count == budget, middle, high)
            above = tl.full((), 0, tl.int32)
            for first in range(0, pages, BLOCK):
                o_p = first + o_block
                b_order = tl.load(p_row_order + o_p, mask=o_p < pages, other=-0x80000000)
                above += tl.sum(((b_order.to(tl.int64) > low) & (o_p < pages)).to(tl.int32))
            # Pages in ascending order, so that the partly filled newest page comes last; ties go to
            # the older page.
            taken = tl.full((), 0, tl.int32)
            tied = tl.full((), 0, tl.int32)
            b_kept = tl.zeros((G_PAD,), tl.float32)
            for first in range(0, pages, BLOCK):
                o_p = first + o_block
                m_p = o_p < pages
                b_order = tl.load(p_row_order + o_p, mask=m_p, other=-0x80000000).to(tl.int64)
                b_tie = ((b_order == low) & m_p).to(tl.int32)
                m_keep = ((b_order > low) & m_p) | (
                    (b_tie > 0) & (tied + tl.cumsum(b_tie, axis=0) <= budget - above)
                )
                b_keep = m_keep.to(tl.int32)
                b_id = tl.load(p_table + o_p, mask=m_keep, other=0)
                # Never beyond the row, whatever the scores are.
                o_out = taken + tl.cumsum(b_keep, axis=0) - 1
                tl.store(p_out + o_out, b_id * KV + i_kv, mask=m_keep & (o_out < budget))
                taken += tl.sum(b_keep)
                tied += tl.sum(b_tie)
                b_lse = tl.load(
                    p_lse + o_tile + first, mask=m_g[:, None] & m_keep[None, :], other=float("-inf")
                )
                b_kept += tl.sum(
                    tl.where(m_g[:, None] & m_keep[None, :], tl.exp(b_lse - b_total[:, None]), 0.0),
                    axis=1,
                )
            tl.store(p_lengths + i_out, (budget - 1) * P + (seq_len - 1) % P + 1)
            if not FALLBACK:
                tl.store(p_mass + i_row * H + i_head, tl.sum(tl.where(m_g, b_kept, 0.0)) / G)


def select_pages(
    page_max: torch.Tensor,
    page_lse: torch.Tensor,
    order: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor,
    block_table: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    kept_mass: torch.Tensor,
    *,
    page_size: int,
    num_kv_heads: int,
    groups: int = 1,
    first_row: int,
    num_rows: int,
    max_pages: int,
    totals: torch.Tensor,
    sink_pages: int,
    recent_pages: int,
    fallback_threshold: float | None = None,
    stickiness: Stickiness | None = None,
) -> None:
    """Select each (row, KV head)'s sinks, recents and best pages, as
    ``specontext_vllm.retrieval.reference`` defines them.

    Args:
        page_max, page_lse: ``[NQ, C]`` of the same rows, from ``score_pages`` or another rule. A
            page for which one of the two is not finite counts as the worst, and the kernel may set
            both to -inf. It looks for such pages only where a sum is NaN or +inf: so a finite sum
            must have a finite maximum, and a sum of -inf a maximum of -inf.
        order: ``[H * G, C]`` int32 scratch.
        starts: ``[num_rows]`` int32, where each row's pages start in the workspace; not read for
            rows that are kept whole.
        max_pages: upper bound of a row's pages in this engine. It sets the tile size, so that an
            engine compiles one kernel.
        totals: ``[>= B]`` int32, pages that each row reads at the most.
        seq_lens, block_table: ``[>= B]`` int32, ``[>= B, W]`` int32.
        groups: G, groups of layers with a selection each; a KV head's queries are those of one
            group after the other.
        pages: ``[G * B * H, K]`` int32 head pages, written in ascending order of position.
        lengths: ``[G * B * H]`` int32 tokens in them, written.
        kept_mass: ``[B, H * G]`` float32 attention mass kept, written; read only when
            ``fallback_threshold`` is given, which rewrites the rows whose mean mass lies under it
            with ``totals`` pages.
        stickiness: pages with a slot score ``margin`` more; None: no page does. With one group.
    """
    heads = num_kv_heads * groups
    group = page_max.shape[0] // heads
    # Not read without stickiness, but a kernel needs some pointer.
    sticky = stickiness or Stickiness(seq_lens, seq_lens, 0.0)
    _select_pages_kernel[(num_rows, heads)](
        page_max,
        page_lse,
        order,
        seq_lens,
        starts,
        totals,
        block_table,
        pages,
        lengths,
        kept_mass,
        sticky.lanes,
        sticky.slot_of,
        block_table.stride(0),
        page_max.stride(0),
        pages.stride(0),
        sticky.slot_of.shape[-1],
        pages.shape[0] // groups,
        first_row,
        sink_pages,
        recent_pages,
        0.0 if fallback_threshold is None else fallback_threshold,
        sticky.margin,
        H=heads,
        GROUPS=groups,
        H_PAD=triton.next_power_of_2(heads),
        G=group,
        G_PAD=triton.next_power_of_2(group),
        P=page_size,
        BLOCK=min(4096, max(64, triton.next_power_of_2(max_pages))),
        FEW=64,
        ALWAYS=_ALWAYS,
        FALLBACK=fallback_threshold is not None,
        STICKY=stickiness is not None,
        num_warps=8,
    )
