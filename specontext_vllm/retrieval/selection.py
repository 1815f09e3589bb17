"""Which pages a decode step reads: sinks, recents and the best of the rest, per request and KV head
(paper C1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.step_data import PageScores, Stickiness


@dataclass(frozen=True)
class Budget:
    """Pages per (request, KV head): ``total`` in all, ``sinks`` from the start and ``recents`` at
    the end among them.
    """

    total: int
    sinks: int
    recents: int


def select_rows(
    scores: PageScores,
    seq_lens: Tensor,
    starts: Tensor,
    block_table: Tensor,
    pages: Tensor,
    lengths: Tensor,
    kept_mass: Tensor,
    budget: Budget,
    *,
    rows: range,
    fallback: tuple[float, int] | None = None,
    stickiness: Stickiness | None = None,
) -> None:
    """Fill the page table of ``rows`` from the workspace, on the device of ``pages``.

    The score of a page for a KV head is the largest attention weight over its tokens and the
    group's query heads (element-wise max, paper C1 "Mapping"). A row with no more pages than the
    budget is read whole, and needs no scores. A score that is not finite, as of a request whose
    hidden states overflow, counts as the worst, so that every row keeps as many pages whatever its
    scores are.

    Args:
        scores: workspace of ``score_rows`` for the same rows.
        seq_lens: ``[>= B]`` int32; 0 for padding rows.
        starts: ``[>= len(rows)]`` int32, ``row_starts(seq_lens, rows)``; anything where no row has
            more pages than the budget.
        block_table: ``[>= B, W]`` int32.
        pages: ``[B * H, K]`` int32, written: ids ``block * H + head`` of the head pages in
            ascending order of position.
        lengths: ``[B * H]`` int32, written: tokens in them.
        kept_mass: ``[B, H]`` float32, written: attention mass of the head on the kept pages, mean
            over the group.
        fallback: ``(threshold, pages)``: rows whose mean kept mass lies under the threshold read
            that many pages instead.
        stickiness: pages that need no fetch score more by a margin.
    """
    num_kv_heads = kept_mass.shape[1]
    if pages.is_cuda:
        from specontext_vllm.triton_kernels.select_pages import select_pages

        arguments = dict(
            page_size=PAGE_SIZE,
            num_kv_heads=num_kv_heads,
            first_row=rows.start,
            num_rows=len(rows),
            widest=block_table.shape[1],
            sink_pages=budget.sinks,
            recent_pages=budget.recents,
            held=(
                None
                if stickiness is None
                else (stickiness.lanes, stickiness.slot_of, stickiness.margin)
            ),
        )
        buffers = (
            scores.page_max,
            scores.page_lse,
            scores.order,
            seq_lens,
            starts,
            block_table,
            pages,
            lengths,
            kept_mass,
        )
        select_pages(*buffers, budget_pages=budget.total, **arguments)
        if fallback is not None:
            threshold, fallback_pages = fallback
            select_pages(
                *buffers, budget_pages=fallback_pages, fallback_threshold=threshold, **arguments
            )
        return
    for row, start in zip(rows, starts[: len(rows)].tolist(), strict=True):
        tokens = int(seq_lens[row])
        count = pages_for(tokens)
        span = slice(start, start + count)
        table_row = block_table[row, :count]
        page_max, page_lse = scores.page_max[:, span], scores.page_lse[:, span]
        bonus = (
            None
            if stickiness is None
            else stickiness.margin * (stickiness.slot_of[stickiness.lanes[row], :, :count] >= 0)
        )
        kept, mass = select_row(page_max, page_lse, count, num_kv_heads, budget, bonus)
        if fallback is not None and mass.mean() < fallback[0]:
            wider = Budget(fallback[1], budget.sinks, budget.recents)
            kept, _ = select_row(page_max, page_lse, count, num_kv_heads, wider, bonus)
        head = torch.arange(num_kv_heads, dtype=torch.int32)[:, None]
        block = slice(row * num_kv_heads, (row + 1) * num_kv_heads)
        pages[block, : kept.shape[1]] = table_row[kept] * num_kv_heads + head
        lengths[block] = tokens - (count - kept.shape[1]) * PAGE_SIZE
        kept_mass[row] = mass


def fill_lengths(seq_lens: Tensor, lengths: Tensor, num_kv_heads: int, budget: Budget) -> None:
    """Fill the page table's lengths, which depend on the contexts alone: ``seq_lens [B]`` int32 ->
    ``lengths [>= B * H]`` int32.
    """
    beyond = (budget.total - 1) * PAGE_SIZE + (seq_lens - 1) % PAGE_SIZE + 1
    kept = torch.where(seq_lens <= budget.total * PAGE_SIZE, seq_lens, beyond)
    lengths[: len(seq_lens) * num_kv_heads].view(-1, num_kv_heads).copy_(kept[:, None])


def select_row(
    page_max: Tensor,
    page_lse: Tensor,
    count: int,
    num_kv_heads: int,
    budget: Budget,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Kept page positions ``[H, min(count, total)]`` int64 ascending, and kept mass ``[H]``, of one
    row.

    Args:
        page_max, page_lse: ``[NQ, count]`` float32. A page for which one of the two is not finite
            counts as the worst and has no mass; a query head without a finite score has no say.
        bonus: ``[H, count]`` added to the logarithms of the scores, or None.
    """
    if count <= budget.total:
        return torch.arange(count).expand(num_kv_heads, count), torch.ones(num_kv_heads)
    finite = page_max.isfinite() & page_lse.isfinite()
    page_max, page_lse = (scores.where(finite, float("-inf")) for scores in (page_max, page_lse))
    total = page_lse.logsumexp(-1, keepdim=True)
    total = total.where(total.isfinite(), float("inf"))
    score = (page_max - total).view(num_kv_heads, -1, count).amax(1)
    if bonus is not None:
        score = score + bonus
    score[:, : budget.sinks] = float("inf")
    score[:, count - budget.recents :] = float("inf")
    # A stable sort gives ties to the older page, as the kernel does.
    kept = (
        score.sort(dim=-1, descending=True, stable=True)
        .indices[:, : budget.total]
        .sort(dim=-1)
        .values
    )
    weight = (page_lse - total).exp().view(num_kv_heads, -1, count).mean(1)
    return kept, weight.gather(1, kept).sum(-1)
