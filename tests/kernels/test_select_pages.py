"""The selection kernel against the torch reference, and both against the rule they implement."""

from dataclasses import replace

import pytest
import torch

import specontext_vllm.cpu_kernels as cpu_kernels
from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.retrieval.reference import Budget
from specontext_vllm.retrieval.scoring import row_starts
from specontext_vllm.retrieval.selection import Fallback, add_drafts, select_row, select_rows
from specontext_vllm.step_data import PageScores, PageTable, Selection, StepBatch, Stickiness
from specontext_vllm.triton_kernels.select_pages import select_pages
from tests.guards import NOT_FINITE, SENTINEL, Guarded, as_float
from tests.paging import of_each_row


def random_scores(queries, heads, counts, device, seed, ties=False):
    generator = torch.Generator().manual_seed(seed)
    scores = PageScores.allocate(queries, heads, sum(counts) + 5, device)
    scores.page_max.fill_(float("nan"))
    scores.page_lse.fill_(float("nan"))
    values = torch.randn(queries, sum(counts), generator=generator) * 3
    if ties:
        values = values.round()
    scores.page_max[:, : sum(counts)] = values.to(device)
    extra = torch.rand(queries, sum(counts), generator=generator) * (0 if ties else 1)
    scores.page_lse[:, : sum(counts)] = (values + extra).to(device)
    return scores


def run_kernel(scores, lengths, heads, budget, device, width, totals=None, **extra):
    rows = len(lengths)
    most = max(map(pages_for, lengths))
    table = torch.stack([torch.randperm(most + 3) for _ in range(rows)]).to(torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    pages = torch.full((rows * heads, width), -7, dtype=torch.int32, device=device)
    out = torch.full((rows * heads,), -7, dtype=torch.int32, device=device)
    mass = torch.zeros(rows, heads, device=device)
    arguments = dict(
        page_size=PAGE_SIZE,
        num_kv_heads=heads,
        first_row=0,
        num_rows=rows,
        max_pages=most,
        sink_pages=budget.sinks,
        recent_pages=budget.recents,
    )
    starts = row_starts(seq_lens, range(rows)).to(device)
    buffers = (
        scores.page_max,
        scores.page_lse,
        scores.order,
        seq_lens.to(device),
        starts,
        table.to(device),
        pages,
        out,
        mass,
    )
    totals = budget.total if totals is None else totals
    select_pages(*buffers, totals=of_each_row(totals, rows, device), **arguments)
    if extra:
        select_pages(
            *buffers,
            totals=of_each_row(extra["fallback_pages"], rows, device),
            fallback_threshold=extra["threshold"],
            **arguments,
        )
    return table, pages.cpu(), out.cpu(), mass.cpu()


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    ("lengths", "queries", "heads", "budget"),
    [
        pytest.param([5, 100, 333, 1000], 4, 2, Budget(8, 1, 2), id="gqa"),
        pytest.param([0, 161, 16 * 9], 2, 2, Budget(9, 2, 3), id="mha-padding-row"),
        pytest.param([16 * 70 + 1], 6, 1, Budget(33, 1, 5), id="mqa-odd-group"),
    ],
)
def test_kernel_matches_reference(lengths, queries, heads, budget, ties, device):
    counts = [pages_for(n) for n in lengths]
    scores = random_scores(queries, heads, counts, device, seed=len(lengths), ties=ties)
    # Each row has a budget of its own.
    totals = [budget.total + 2 * (row % 2) for row in range(len(lengths))]
    table, pages, out, mass = run_kernel(
        scores, lengths, heads, budget, device, width=max(totals) + 2, totals=totals
    )
    start = 0
    for row, (tokens, count) in enumerate(zip(lengths, counts)):
        own = replace(budget, total=totals[row])
        span = slice(start, start + count)
        start += count
        kept, reference_mass = select_row(
            scores.page_max[:, span].cpu(), scores.page_lse[:, span].cpu(), count, heads, own
        )
        for head in range(heads):
            n = kept.shape[1]
            expected = table[row, kept[head]] * heads + head
            assert torch.equal(pages[row * heads + head, :n], expected.int())
            assert (pages[row * heads + head, n:] == -7).all(), "wrote beyond the selection"
            assert out[row * heads + head] == tokens - (count - n) * PAGE_SIZE
        torch.testing.assert_close(mass[row], reference_mass, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["kernel", "cpu", "torch"])
@pytest.mark.parametrize("threshold", [None, 0.8])
def test_groups_of_layers_select_for_themselves(path, threshold, device, monkeypatch):
    """As if each group's queries were all there are; a fallback is one for all groups."""
    if path != "kernel" and device.type != "cpu":
        pytest.skip("selects in the kernel on a GPU")
    if path == "cpu" and not cpu_kernels.available():
        pytest.skip("no C++ kernels here")
    if path == "torch":
        monkeypatch.setattr(cpu_kernels, "available", lambda: False)
    lengths, heads, groups, each = [5, 333, 0, 1000, 700], 2, 3, 2
    budget, wide = Budget(8, 1, 2), 30
    # Of each row.
    totals, wides = [8, 9, 8, 12, 8], [30, 28, 30, 25, 27]
    counts = [pages_for(n) for n in lengths]
    scores = random_scores(heads * groups * each, heads * groups, counts, device, seed=8)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    names = torch.stack([torch.randperm(80) for _ in lengths]).int().to(device)
    starts = row_starts(seq_lens, range(len(lengths)))
    page_max, page_lse = scores.page_max.clone(), scores.page_lse.clone()

    table = PageTable.allocate(len(lengths), heads, wide + 1, device, groups)
    table.pages.fill_(-7)
    found = Selection.into(table)
    budgets, wider = (of_each_row(pages, len(lengths), device) for pages in (totals, wides))
    fallback = None if threshold is None else Fallback(threshold, wider)
    if path == "kernel":
        arguments = scores.page_max, scores.page_lse, scores.order, seq_lens, starts, names
        for pages, under in [(budgets, None)] + ([(wider, threshold)] if threshold else []):
            select_pages(
                *arguments,
                found.pages,
                found.lengths,
                found.kept_mass,
                page_size=PAGE_SIZE,
                num_kv_heads=heads,
                groups=groups,
                first_row=0,
                num_rows=len(lengths),
                max_pages=max(counts),
                totals=pages,
                sink_pages=budget.sinks,
                recent_pages=budget.recents,
                fallback_threshold=under,
            )
    else:
        select_rows(
            scores,
            seq_lens,
            starts,
            names,
            found,
            budgets,
            sinks=budget.sinks,
            recents=budget.recents,
            rows=range(len(lengths)),
            fallback=fallback,
        )

    fell_back = []
    for row, (tokens, count) in enumerate(zip(lengths, counts, strict=True)):
        span = slice(int(starts[row]), int(starts[row]) + count)
        own = [
            part[:, span].cpu().view(heads, groups, each, count) for part in (page_max, page_lse)
        ]

        def select(group, total, own=own, count=count):
            parts = (part[:, group].flatten(0, 1) for part in own)
            return select_row(*parts, count, heads, replace(budget, total=total))

        mass = torch.stack([select(group, totals[row])[1] for group in range(groups)], 1)
        torch.testing.assert_close(
            found.kept_mass[row].cpu(), mass.flatten() if count else mass.flatten() * 0 + 1
        )
        falls = threshold is not None and bool(mass.mean() < threshold)
        fell_back.append(falls)
        for group in range(groups):
            kept, _ = select(group, wides[row] if falls else totals[row])
            part = table.of_group(group)
            for head in range(heads):
                sequence = row * heads + head
                wanted = names[row].cpu()[kept[head]] * heads + head
                assert torch.equal(part.pages[sequence, : len(wanted)].cpu(), wanted.int())
                assert (part.pages[sequence, len(wanted) :] == -7).all()
                assert part.lengths[sequence] == tokens - (count - len(wanted)) * PAGE_SIZE
    if threshold is not None:
        assert any(fell_back) and not all(fell_back)


def test_drafts_join_the_lists_of_each_group(device):
    """As if each group's lists were all there are."""
    rows, heads, groups, starts, lengths = 3, 2, 2, [0, 4, 5, 9], [1000, 300, 97]
    batch = StepBatch(
        token_ids=torch.zeros(9, dtype=torch.int64, device=device),
        positions=torch.zeros(9, dtype=torch.int64, device=device),
        slots=torch.zeros(9, dtype=torch.int64, device=device),
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table=torch.stack([torch.randperm(80) for _ in range(rows)]).int().to(device),
        seq_lens_bound=lengths,
        num_decodes=rows,
        table_rows=rows,
        num_tokens=9,
        max_queries=4,
    )
    table = PageTable.allocate(rows + 2, heads, 12, device, groups)
    table.pages.random_(1000)
    drafts = torch.tensor([3, 0, 3])
    before = torch.tensor(lengths) - drafts
    for group in range(groups):
        part = table.of_group(group).lengths.view(-1, heads)[:rows]
        # Eight pages, of which the last ends where the context does.
        part.copy_((7 * PAGE_SIZE + (before - 1) % PAGE_SIZE + 1)[:, None])
    alone = []
    for group in range(groups):
        own = table.of_group(group)
        copy = PageTable(own.pages.clone(), own.lengths.clone(), heads)
        add_drafts(Selection.into(copy), batch)
        alone.append(copy)
    untouched = table.pages.clone()
    add_drafts(Selection.into(table), batch)
    for group, copy in enumerate(alone):
        assert torch.equal(table.of_group(group).pages, copy.pages)
        assert torch.equal(table.of_group(group).lengths, copy.lengths)
    # The third row's drafts begin a page, in each group.
    assert (table.pages != untouched).sum() == heads * groups


@pytest.mark.parametrize("sums", ["unrelated", "all the same", "-inf where the maximum is"])
def test_maxima_may_lie_above_their_sums(sums, device):
    """As those of the rule `recent` do."""
    heads, tokens, budget = 2, 1000, Budget(8, 1, 2)
    count = pages_for(tokens)
    scores = random_scores(4, heads, [count], device, seed=6)
    if sums == "all the same":
        scores.page_lse.zero_()
    else:
        scores.page_lse[:, :count].normal_(-3.0)
    if sums.startswith("-inf"):
        for part in (scores.page_max, scores.page_lse):
            part[:2, 10:50] = part[:, 20] = float("-inf")
    assert (scores.page_max > scores.page_lse).any()
    page_max, page_lse = scores.page_max[:, :count].cpu(), scores.page_lse[:, :count].cpu()
    kept, reference_mass = select_row(page_max, page_lse, count, heads, budget)
    table, pages, _, mass = run_kernel(scores, [tokens], heads, budget, device, width=8)
    for head in range(heads):
        assert torch.equal(pages[head], (table[0, kept[head]] * heads + head).int())
    torch.testing.assert_close(mass[0], reference_mass, rtol=1e-4, atol=1e-5)


def test_sums_that_stand_for_the_maxima_select_by_mass(device):
    """As the rule `mass` has them: one tensor for both, pages without a finite score included."""
    heads, tokens, budget = 2, 1000, Budget(8, 1, 2)
    count = pages_for(tokens)
    scores = random_scores(4, heads, [count], device, seed=5)
    scores.page_lse[:, 20] = float("nan")
    by_mass = replace(scores, page_max=scores.page_lse)
    page_lse = scores.page_lse[:, :count].cpu()
    kept, reference_mass = select_row(page_lse, page_lse, count, heads, budget)
    table, pages, _, mass = run_kernel(by_mass, [tokens], heads, budget, device, width=8)
    for head in range(heads):
        assert torch.equal(pages[head], (table[0, kept[head]] * heads + head).int())
    assert 20 not in kept
    torch.testing.assert_close(mass[0], reference_mass, rtol=1e-4, atol=1e-5)


WHERE = ["one page", "one page's sum", "one query head", "the whole query"]


def poison(scores, where, value, span):
    """Put ``value`` into the scores of the pages of ``span``: of one of them, of all for one query
    head, or of all.
    """
    queries = slice(0, 1) if where == "one query head" else slice(None)
    pages = slice(span.start + 7, span.start + 8) if where.startswith("one page") else span
    if where != "one page's sum":
        scores.page_max[queries, pages] = value
    scores.page_lse[queries, pages] = value


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["nothing else", "fallback", "stickiness"])
def test_scores_that_are_not_finite_select_nothing_and_no_store_leaves_its_row(extra, device):
    """Every second request has such scores. It keeps sinks, recents and exactly its count; the
    others have what they would have alone.
    """
    heads, budget, wider = 2, Budget(8, 1, 2), 12
    # A sum of -inf has no other maximum.
    kinds = [
        (where, bits)
        for where in WHERE
        for name, bits in NOT_FINITE.items()
        if (where, name) != ("one page's sum", "-inf")
    ]
    bad = [None] + [entry for kind in kinds for entry in (kind, None)]
    lengths = [1340 - 7 * row for row in range(len(bad))]
    counts = [pages_for(n) for n in lengths]
    spans = [slice(sum(counts[:row]), sum(counts[: row + 1])) for row in range(len(bad))]
    scores = random_scores(4, heads, counts, device, seed=11)
    for entry, span in zip(bad, spans, strict=True):
        if entry is not None:
            poison(scores, entry[0], as_float(entry[1]).to(device), span)
    rows = len(bad)
    table = torch.stack([torch.randperm(87) for _ in lengths]).int()
    slot_of = torch.where(
        torch.rand(rows, heads, 87, generator=torch.Generator().manual_seed(9)) < 0.3, 5, -1
    ).int()
    lanes, seq_lens = (
        torch.arange(rows - 1, -1, -1, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
    )
    before = [found.cpu().clone() for found in (scores.page_max, scores.page_lse)]
    pages, out = (
        Guarded.make(rows * heads, wider, device=device),
        Guarded.make(rows * heads, device=device),
    )
    mass, order = (
        Guarded.make(rows, heads, dtype=torch.float32, device=device),
        Guarded.make(*scores.order.shape, device=device),
    )
    for threshold, total in (
        ((None, budget.total), (1e-6, wider)) if extra == "fallback" else ((None, budget.total),)
    ):
        select_pages(
            scores.page_max,
            scores.page_lse,
            order.view,
            seq_lens.to(device),
            row_starts(seq_lens, range(rows)).to(device),
            table.to(device),
            pages.view,
            out.view,
            mass.view,
            page_size=PAGE_SIZE,
            num_kv_heads=heads,
            first_row=0,
            num_rows=rows,
            max_pages=87,
            totals=of_each_row(total, rows, device),
            sink_pages=1,
            recent_pages=2,
            fallback_threshold=threshold,
            stickiness=Stickiness(lanes.to(device), slot_of.to(device), 0.7)
            if extra == "stickiness"
            else None,
        )
    for buffer in (pages, out, mass, order):
        buffer.check()
    finite = before[0].isfinite() & before[1].isfinite()
    for was, found in zip(before, (scores.page_max.cpu(), scores.page_lse.cpu()), strict=True):
        assert torch.equal(found[finite], was[finite]) and found[:, sum(counts) :].isnan().all()
    for row, (entry, span, count) in enumerate(zip(bad, spans, counts, strict=True)):
        where = entry and entry[0]
        bonus = 0.7 * (slot_of[lanes[row], :, :count] >= 0) if extra == "stickiness" else None
        # Such a row has no confidence at all.
        falls_back = extra == "fallback" and where == "the whole query"
        total = wider if falls_back else budget.total
        kept, kept_mass = select_row(
            before[0][:, span],
            before[1][:, span],
            count,
            heads,
            Budget(total, budget.sinks, budget.recents),
            bonus,
        )
        for head in range(heads):
            found, chosen = pages.view[row * heads + head].tolist(), kept[head].tolist()
            assert found == (table[row, chosen] * heads + head).tolist() + [SENTINEL] * (
                wider - total
            ), (row, entry)
            assert len(set(chosen)) == total and {0, count - 2, count - 1} <= set(chosen)
            assert where not in ("one page", "one page's sum") or 7 not in chosen
        assert (
            out.view[row * heads : (row + 1) * heads].tolist()
            == [lengths[row] - (count - total) * PAGE_SIZE] * heads
        )
        torch.testing.assert_close(mass.view[row].cpu(), kept_mass, rtol=1e-4, atol=1e-6)
        assert (
            (kept_mass == 0).all()
            if where == "the whole query"
            else ((0 < kept_mass) & (kept_mass <= 1)).all()
        )


def test_reference_keeps_sinks_recents_and_the_best():
    count, heads = 50, 2
    page_max = torch.randn(4, count)
    kept, _ = select_row(page_max, page_max, count, heads, Budget(10, 2, 3))
    weight = page_max.softmax(-1).view(heads, 2, count).amax(1)
    for head in range(heads):
        chosen = set(kept[head].tolist())
        assert {0, 1, 47, 48, 49} <= chosen and len(chosen) == 10
        free = [p for p in range(2, 47)]
        best = sorted(free, key=lambda p: -weight[head, p])[:5]
        assert chosen == {0, 1, 47, 48, 49, *best}
        assert kept[head].tolist() == sorted(chosen)


def test_low_confidence_rows_read_more(device):
    heads, lengths = 2, [640, 640]
    counts = [40, 40]
    scores = random_scores(2, heads, counts, device, seed=5)
    # Row 0 has all its mass on one page, row 1 spreads it evenly.
    scores.page_max[:, :40] = -20.0
    scores.page_max[:, 7] = 5.0
    scores.page_max[:, 40:80] = 0.0
    scores.page_lse[:, :80] = scores.page_max[:, :80]
    _, pages, out, mass = run_kernel(
        scores, lengths, heads, Budget(8, 1, 2), device, width=24, threshold=0.5, fallback_pages=20
    )
    assert mass[0].min() > 0.9 and mass[1].max() < 0.5
    assert out.view(2, heads)[0].tolist() == [8 * PAGE_SIZE] * heads
    assert out.view(2, heads)[1].tolist() == [20 * PAGE_SIZE] * heads


def test_fallback_that_covers_the_context_reads_it_all(device):
    scores = random_scores(2, 2, [40], device, seed=6)
    scores.page_max[:, :40] = 0.0
    scores.page_lse[:, :40] = 0.0
    table, pages, out, _ = run_kernel(
        scores, [635], 2, Budget(8, 1, 2), device, width=48, threshold=0.9, fallback_pages=48
    )
    assert out.tolist() == [635, 635]
    assert pages[1, :40].tolist() == (table[0, :40] * 2 + 1).tolist()


def test_select_rows_agrees_with_the_kernel(device):
    """The engine's entry point, on this device's path, with a fallback."""
    heads, lengths, budget = 2, [300, 20, 500], Budget(6, 1, 2)
    counts = [pages_for(n) for n in lengths]
    scores = random_scores(4, heads, counts, device, seed=7)
    table, pages, out, mass = run_kernel(
        scores, lengths, heads, budget, device, width=12, threshold=0.6, fallback_pages=12
    )
    mine, mine_out, mine_mass = (
        torch.full_like(pages, -7),
        torch.full_like(out, -7),
        torch.zeros_like(mass),
    )
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    selection = Selection(mine.to(device), mine_out.to(device), mine_mass.to(device))
    rows = [t.to(device) for t in (seq_lens, row_starts(seq_lens, range(3)), table)]
    own, wider = (of_each_row(pages, 3, device) for pages in (budget.total, 12))
    select_rows(
        scores,
        *rows,
        selection,
        own,
        sinks=budget.sinks,
        recents=budget.recents,
        rows=range(3),
        fallback=Fallback(0.6, wider),
    )
    assert torch.equal(selection.lengths.cpu(), out)
    for sequence, tokens in enumerate(out.tolist()):
        kept = pages_for(tokens)
        assert torch.equal(selection.pages.cpu()[sequence, :kept], pages[sequence, :kept])


def test_held_pages_win_by_the_margin_and_the_kernel_agrees(device):
    heads, lengths, budget = 2, [640, 640], Budget(8, 1, 2)
    scores = random_scores(4, heads, [40, 40], device, seed=8)
    lanes = torch.tensor([2, 0], dtype=torch.int32)
    slot_of = torch.where(
        torch.rand(3, heads, 64, generator=torch.Generator().manual_seed(9)) < 0.3, 5, -1
    ).int()
    table = torch.arange(40, dtype=torch.int32).expand(2, 40).contiguous()
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    pages, out = torch.full((4, 8), -7, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    for margin in (0.0, 1.5, 100.0):
        arguments = [t.to(device) for t in (seq_lens, table, pages, out, torch.zeros(2, heads))]
        stickiness = Stickiness(lanes.to(device), slot_of.to(device), margin)
        select_pages(
            scores.page_max,
            scores.page_lse,
            scores.order,
            arguments[0],
            row_starts(seq_lens, range(2)).to(device),
            *arguments[1:],
            page_size=PAGE_SIZE,
            num_kv_heads=heads,
            first_row=0,
            num_rows=2,
            max_pages=40,
            sink_pages=1,
            recent_pages=2,
            totals=of_each_row(8, 2, device),
            stickiness=stickiness,
        )
        for row in range(2):
            span = slice(40 * row, 40 * row + 40)
            is_held = slot_of[lanes[row], :, :40] >= 0
            kept, _ = select_row(
                scores.page_max[:, span].cpu(),
                scores.page_lse[:, span].cpu(),
                40,
                heads,
                budget,
                margin * is_held,
            )
            for head in range(heads):
                assert (
                    arguments[2].cpu()[row * heads + head].tolist()
                    == (kept[head] * heads + head).tolist()
                )
                if margin == 100.0:
                    free = [p for p in kept[head].tolist() if p not in (0, 38, 39)]
                    assert all(is_held[head, p] for p in free)
