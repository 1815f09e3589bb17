"""Which pages a decode step reads: sinks, recents and the best of the rest, per request and KV head
(paper C1), on a GPU, on a CPU and in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import specontext_vllm.cpu_kernels as cpu_kernels
from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.retrieval.reference import Budget, chosen_pages, page_scores
from specontext_vllm.step_data import (
    PageScores,
    PageTable,
    Selection,
    StepBatch,
    Stickiness,
    drafts_of,
)


@dataclass(frozen=True)
class Fallback:
    """Rows whose kept mass lies under ``threshold`` read ``totals [>= B]`` int32 pages instead,
    each no fewer than before.
    """

    threshold: float
    totals: Tensor


def select_rows(
    scores: PageScores,
    seq_lens: Tensor,
    starts: Tensor,
    block_table: Tensor,
    selection: Selection,
    totals: Tensor,
    *,
    sinks: int,
    recents: int,
    rows: range,
    fallback: Fallback | None = None,
    stickiness: Stickiness | None = None,
) -> None:
    """Fill ``rows`` of the selection from the workspace, on its device.

    A row with no more pages than the budget is read whole, and needs no scores. A score that is not
    finite counts as the worst, so that every row keeps as many pages whatever its scores are.

    Args:
        scores: the workspace, filled by a rule for the same rows.
        seq_lens: ``[>= B]`` int32; 0 for padding rows.
        starts: ``[>= len(rows)]`` int32, ``row_starts(seq_lens, rows)``; anything where no row has
            more pages than the budget.
        block_table: ``[>= B, W]`` int32: what the selection calls each page.
        totals: ``[>= B]`` int32, each row's budget in pages, on the selection's device.
        sinks, recents: pages from the start and at the end that are always among them.
        stickiness: pages that need no fetch score more by a margin.
    """
    num_kv_heads = selection.num_kv_heads
    assert stickiness is None or selection.groups == 1
    if selection.pages.is_cuda:
        from specontext_vllm.triton_kernels.select_pages import select_pages

        buffers = (
            scores.page_max,
            scores.page_lse,
            scores.order,
            seq_lens,
            starts,
            block_table,
            selection.pages,
            selection.lengths,
            selection.kept_mass,
        )

        def launch(pages: Tensor, threshold: float | None) -> None:
            select_pages(
                *buffers,
                page_size=PAGE_SIZE,
                num_kv_heads=num_kv_heads,
                groups=selection.groups,
                first_row=rows.start,
                num_rows=len(rows),
                max_pages=block_table.shape[1],
                totals=pages,
                sink_pages=sinks,
                recent_pages=recents,
                fallback_threshold=threshold,
                stickiness=stickiness,
            )

        launch(totals, None)
        if fallback is not None:
            launch(fallback.totals, fallback.threshold)
        return
    if selection.groups > 1:
        forced = sinks, recents
        arguments = scores, seq_lens, starts, block_table, selection
        _select_by_group(*arguments, totals, *forced, rows)
        if fallback is not None:
            mass = selection.kept_mass.clone()
            for place, row in enumerate(rows):
                if mass[row].mean() < fallback.threshold:
                    own = scores, seq_lens, starts[place:], block_table, selection
                    _select_by_group(*own, fallback.totals, *forced, range(row, row + 1))
            selection.kept_mass.copy_(mass)
        return
    if cpu_kernels.available():
        torch.ops.specontext_cpu.select_pages(
            scores.page_max,
            scores.page_lse,
            seq_lens,
            starts,
            block_table,
            selection.pages,
            selection.lengths,
            selection.kept_mass,
            rows.start,
            len(rows),
            totals,
            sinks,
            recents,
            None if fallback is None else fallback.totals,
            0.0 if fallback is None else fallback.threshold,
            None if stickiness is None else stickiness.lanes,
            None if stickiness is None else stickiness.slot_of,
            0.0 if stickiness is None else stickiness.margin,
        )
        return
    for row, start in zip(rows, starts[: len(rows)].tolist(), strict=True):
        tokens = int(seq_lens[row])
        count = pages_for(tokens)
        span = slice(start, start + count)
        row_scores = scores.page_max[:, span], scores.page_lse[:, span]
        bonus = None
        if stickiness is not None:
            needs_no_fetch = stickiness.slot_of[stickiness.lanes[row], :, :count] >= 0
            bonus = stickiness.margin * needs_no_fetch
        budget = Budget(int(totals[row]), sinks, recents)
        kept, mass = select_row(*row_scores, count, num_kv_heads, budget, bonus)
        if fallback is not None and mass.mean() < fallback.threshold:
            wider = replace(budget, total=int(fallback.totals[row]))
            kept, _ = select_row(*row_scores, count, num_kv_heads, wider, bonus)
        head = torch.arange(num_kv_heads, dtype=torch.int32)[:, None]
        block = slice(row * num_kv_heads, (row + 1) * num_kv_heads)
        selection.pages[block, : kept.shape[1]] = block_table[row][kept] * num_kv_heads + head
        selection.lengths[block] = tokens - (count - kept.shape[1]) * PAGE_SIZE
        selection.kept_mass[row] = mass


def _select_by_group(
    scores: PageScores,
    seq_lens: Tensor,
    starts: Tensor,
    block_table: Tensor,
    selection: Selection,
    totals: Tensor,
    sinks: int,
    recents: int,
    rows: range,
) -> None:
    """``select_rows`` for one group of layers after the other, on a CPU."""
    groups, heads = selection.groups, selection.num_kv_heads
    # The workspace is far larger than what a step has scored.
    used = int(starts[len(rows) - 1]) + pages_for(int(seq_lens[rows.stop - 1]))
    each = [
        part[:, :used].unflatten(0, (heads, groups, -1))
        for part in (scores.page_max, scores.page_lse)
    ]
    tables = zip(selection.pages.chunk(groups), selection.lengths.chunk(groups), strict=True)
    for group, (pages, lengths) in enumerate(tables):
        page_max, page_lse = (part[:, group].flatten(0, 1) for part in each)
        mass = selection.kept_mass[:, group::groups].contiguous()
        own = replace(scores, page_max=page_max, page_lse=page_lse)
        select_rows(
            own,
            seq_lens,
            starts,
            block_table,
            Selection(pages, lengths, mass),
            totals,
            sinks=sinks,
            recents=recents,
            rows=rows,
        )
        selection.kept_mass[:, group::groups] = mass


def fill_lengths(seq_lens: Tensor, selection: Selection, totals: Tensor) -> None:
    """Fill the selection's lengths, which depend on the contexts and budgets alone:
    ``seq_lens [B]``, ``totals [>= B]`` int32.
    """
    heads, total = selection.num_kv_heads, totals[: len(seq_lens)]
    beyond = (total - 1) * PAGE_SIZE + (seq_lens - 1) % PAGE_SIZE + 1
    kept = torch.where(seq_lens <= total * PAGE_SIZE, seq_lens, beyond)
    by_row = selection.lengths.view(selection.groups, -1, heads)
    by_row[:, : len(seq_lens)].copy_(kept[:, None])


def add_drafts(selection: Selection, batch: StepBatch) -> None:
    """Let rows that were selected for without their drafts read the drafts too: the lists grow by
    the drafts' tokens, and by the pages that these begin. Runs on the device alone, so a graph may
    hold it.
    """
    rows, heads = batch.table_rows, selection.num_kv_heads
    page_ids = batch.block_table if selection.page_ids is None else selection.page_ids
    drafts = drafts_of(batch.query_starts[: rows + 1])
    seq_lens = batch.seq_lens[:rows]
    newest = (seq_lens - drafts - 1) // PAGE_SIZE
    # [G, rows, H], [G, rows, H, K]
    lengths = selection.lengths.view(selection.groups, -1, heads)[:, :rows]
    pages = selection.pages.unflatten(0, (selection.groups, -1, heads))[:, :rows]
    last_column = (lengths + PAGE_SIZE - 1) // PAGE_SIZE - 1
    head = torch.arange(heads, dtype=torch.int32, device=pages.device)
    for ahead in range(1, pages_for(batch.max_queries - 1) + 1):
        page = newest + ahead
        begun = page * PAGE_SIZE < seq_lens
        ids = page_ids[:rows].gather(1, page.clamp(0, page_ids.shape[1] - 1).long()[:, None])
        column = (last_column + ahead).clamp(0, pages.shape[3] - 1).long()[..., None]
        ids = torch.where(begun[:, None], ids * heads + head, pages.gather(3, column)[..., 0])
        pages.scatter_(3, column, ids[..., None])
    lengths += drafts[:, None]


def name_pages(
    selection: Selection, block_tables: Sequence[Tensor], tables: Sequence[PageTable], rows: int
) -> None:
    """Write the first rows of a selection that counts pages from the request's start into the page
    table of each KV group, whose block table says what its pages are called. Runs on the device
    alone, so a graph may hold it.
    """
    groups, heads = selection.groups, selection.num_kv_heads
    counted = selection.pages.unflatten(0, (groups, -1, heads))[:, :rows]
    positions = (counted // heads).flatten(2).long()
    head = torch.arange(heads, dtype=torch.int32, device=counted.device)[:, None]
    lengths = selection.lengths.view(groups, -1, heads)[:, :rows]
    for block_table, table in zip(block_tables, tables, strict=True):
        # Tails beyond a row's pages may be stale.
        index = positions.clamp(0, block_table.shape[1] - 1)
        pages = block_table[:rows].expand(groups, -1, -1).gather(2, index).view_as(counted)
        table.pages.unflatten(0, (groups, -1, heads))[:, :rows] = pages * heads + head
        table.lengths.view(groups, -1, heads)[:, :rows] = lengths


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
        page_max, page_lse: ``[NQ, count]`` float32; see ``page_scores``.
        bonus: ``[H, count]`` added to the logarithms of the scores, or None.
    """
    if count <= budget.total:
        return torch.arange(count).expand(num_kv_heads, count), torch.ones(num_kv_heads)
    scores, mass = page_scores(
        page_max.unflatten(0, (num_kv_heads, -1)), page_lse.unflatten(0, (num_kv_heads, -1))
    )
    chosen = chosen_pages(scores if bonus is None else scores + bonus, count, budget)
    return chosen.nonzero()[:, 1].view(num_kv_heads, -1), (mass * chosen).sum(-1)
