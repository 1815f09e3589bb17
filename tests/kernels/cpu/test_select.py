"""Selection in C++ against ``select_row``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.retrieval.reference import Budget
from specontext_vllm.retrieval.scoring import row_starts
from specontext_vllm.retrieval.selection import Fallback, select_row, select_rows
from specontext_vllm.step_data import PageScores, Selection, Stickiness
from tests.guards import NOT_FINITE, SENTINEL, Guarded, as_float
from tests.paging import of_each_row

CPU = torch.device("cpu")


def run(page_max, page_lse, lengths, heads, budget, *, more=0, fallback=None, stickiness=None):
    """Select; compare with the definition row by row; return pages and lengths.

    Args:
        more: what the budget of each row exceeds that of the row before by.
        fallback: the threshold, and pages beyond the row's budget.
    """
    rows, most = len(lengths), max(1, *map(pages_for, lengths), 1)
    totals = [budget.total + more * row for row in range(rows)]
    wider = [total + (0 if fallback is None else fallback[1]) for total in totals]
    width = max(wider) + 2
    table = torch.stack([torch.randperm(most + 3) for _ in lengths]).int()
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    starts = row_starts(seq_lens, range(rows))
    pages = Guarded.make(rows * heads, width, device=CPU)
    out = Guarded.make(rows * heads, device=CPU)
    mass = Guarded.make(rows, heads, dtype=torch.float32, device=CPU)
    scores = PageScores(page_max, page_lse, torch.empty(heads, 0, dtype=torch.int32))
    before = page_max.clone(), page_lse.clone()
    select_rows(
        scores,
        seq_lens,
        starts,
        table,
        Selection(pages.view, out.view, mass.view),
        of_each_row(totals, rows),
        sinks=budget.sinks,
        recents=budget.recents,
        rows=range(rows),
        fallback=None if fallback is None else Fallback(fallback[0], of_each_row(wider, rows)),
        stickiness=stickiness,
    )
    for buffer in (pages, out, mass):
        buffer.check()
    for was, found in zip(before, (page_max, page_lse), strict=True):
        torch.testing.assert_close(found, was, rtol=0, atol=0, equal_nan=True)
    for row, (tokens, start) in enumerate(zip(lengths, starts.tolist(), strict=True)):
        count = pages_for(tokens)
        span = slice(start, start + count)
        given_scores, bonus = (page_max[:, span], page_lse[:, span]), None
        if stickiness is not None:
            held = stickiness.slot_of[stickiness.lanes[row], :, :count] >= 0
            bonus = stickiness.margin * held
        own = replace(budget, total=totals[row])
        kept, kept_mass = select_row(*given_scores, count, heads, own, bonus)
        if fallback is not None and kept_mass.mean() < fallback[0]:
            fallen = replace(budget, total=wider[row])
            kept, _ = select_row(*given_scores, count, heads, fallen, bonus)
        for head in range(heads):
            named = table[row][kept[head]] * heads + head
            found = pages.view[row * heads + head]
            assert found[: len(named)].tolist() == named.tolist(), (row, head)
            assert (found[len(named) :] == SENTINEL).all(), "wrote beyond the selection"
        left_out = (count - kept.shape[1]) * PAGE_SIZE
        assert (out.view[row * heads : (row + 1) * heads] == tokens - left_out).all()
        torch.testing.assert_close(mass.view[row], kept_mass, rtol=1e-4, atol=1e-6)
    return pages.view, out.view


def spread_scores(queries, pages, generator, ties):
    """Values so far apart that rounding cannot change their order across query heads: those of a
    page are its own multiple of 1/64; or many that are equal.
    """
    if ties:
        page_max = torch.randint(-3, 3, (queries, pages), generator=generator).float()
        # Equal sums of each query head, so that its total is the same.
        return page_max, torch.zeros_like(page_max)
    order = torch.randperm(queries * pages, generator=generator).view(queries, pages)
    page_max = order / 64.0
    return page_max, torch.full_like(page_max, 3.0)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 1500), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    total=st.integers(4, 40),
    sinks=st.integers(1, 2),
    recents=st.integers(1, 2),
    more=st.sampled_from([0, 7]),
    ties=st.booleans(),
    extra=st.sampled_from(["nothing", "fallback", "stickiness", "both"]),
    seed=st.integers(0, 2**31),
)
def test_selection_is_the_definition_s(
    ops, lengths, heads, group, total, sinks, recents, more, ties, extra, seed
):
    generator = torch.Generator().manual_seed(seed)
    count = sum(map(pages_for, lengths))
    scores = spread_scores(heads * group, count + 2, generator, ties)
    fallback = stickiness = None
    if extra in ("fallback", "both"):
        # All pages have the same mass, and no such share of so few pages is 0.41.
        fallback = 0.41, 9
    if extra in ("stickiness", "both"):
        slot_of = torch.randint(-1, 2, (5, heads, 100), generator=generator).int()
        lanes = torch.randperm(5, generator=generator)[: len(lengths)].int()
        # No multiple of 1/64: rounding would say which of two pages is the better one.
        stickiness = Stickiness(lanes, slot_of, 2 + 1 / 128)
    budget = Budget(total, sinks, recents)
    run(*scores, lengths, heads, budget, more=more, fallback=fallback, stickiness=stickiness)


@pytest.mark.parametrize("name", NOT_FINITE)
@pytest.mark.parametrize("where", ["one page", "one page's sum", "one query head", "everything"])
def test_what_is_not_finite_selects_nothing(ops, name, where):
    """The row keeps sinks, recents and its number of pages."""
    if (where, name) == ("one page's sum", "-inf"):
        pytest.skip("a sum of -inf has no other maximum")
    heads, lengths, generator = 2, [1340, 900, 1340], torch.Generator().manual_seed(3)
    counts = list(map(pages_for, lengths))
    page_max, page_lse = spread_scores(4, sum(counts), generator, ties=False)
    span = slice(counts[0], counts[0] + counts[1])
    pages = slice(span.start + 7, span.start + 8) if where.startswith("one page") else span
    queries = slice(0, 1) if where == "one query head" else slice(None)
    if where != "one page's sum":
        page_max[queries, pages] = as_float(NOT_FINITE[name])
    page_lse[queries, pages] = as_float(NOT_FINITE[name])
    _, lens = run(page_max, page_lse, lengths, heads, Budget(8, 1, 2))
    assert lens.tolist() == [
        tokens - (count - 8) * PAGE_SIZE
        for tokens, count in zip(lengths, counts, strict=True)
        for _ in range(heads)
    ]


def test_the_selection_does_not_depend_on_threads(ops, threads):
    generator = torch.Generator().manual_seed(1)
    scores = spread_scores(6, 400, generator, ties=True)
    results = []
    for number in (1, 2, 3):
        threads(number)
        torch.manual_seed(0)
        results.append(run(*scores, [3000, 20, 2900], 3, Budget(30, 1, 4)))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_a_table_that_is_too_narrow_is_refused(ops):
    scores = torch.zeros(2, 10)
    lens = torch.tensor([160], dtype=torch.int32)
    starts, table = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 10, dtype=torch.int32)
    pages, out = torch.zeros(1, 7, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    mass, eight = torch.zeros(1, 1), of_each_row(8, 1)
    with pytest.raises(RuntimeError, match="pages: found 7 columns for 8 pages"):
        ops.select_pages(scores, scores, lens, starts, table, pages, out, mass, 0, 1, eight, 1, 1)
    assert not pages.any() and not out.any()
