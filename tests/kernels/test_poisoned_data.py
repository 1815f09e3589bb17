"""NaN and infinity in what comes from the model, as of a request whose hidden states overflow: no
kernel writes outside its buffers, and no other row changes.
"""

from dataclasses import replace

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.residency.hot_buffers import HotBuffers
from specontext_vllm.retrieval.rules.quest import score_bounds_row, update_bounds_reference
from specontext_vllm.retrieval.scoring import row_starts, score_row
from specontext_vllm.step_data import PageTable, Selection
from specontext_vllm.tier_data import DecodeRows, LayerMemory, TierTables
from specontext_vllm.triton_kernels import counters
from specontext_vllm.triton_kernels.fetch_pages import fetch_pages
from specontext_vllm.triton_kernels.head_input import head_input
from specontext_vllm.triton_kernels.head_rope import rope_and_cache
from specontext_vllm.triton_kernels.layer_tables import layer_tables
from specontext_vllm.triton_kernels.page_bounds import score_bounds, update_bounds
from specontext_vllm.triton_kernels.resolve_pages import resolve_pages
from specontext_vllm.triton_kernels.score_pages import score_pages
from specontext_vllm.triton_kernels.select_pages import select_pages
from specontext_vllm.triton_kernels.write_tiered import write_tiered
from tests.guards import NOT_FINITE, SENTINEL, Guarded, as_float, same_bits
from tests.paging import of_each_row, paged_rows

BAD_ROW = 1
"""Between two that are sound."""

LENGTHS, HEADS, GROUP, WIDTH = [115, 130, 200], 2, 2, 32
SOUND = [row for row in range(len(LENGTHS)) if row != BAD_ROW]
TOKEN = 100
"""Of the bad row: its key is bad, where not all of the query is."""

bad_values = pytest.mark.parametrize("bits", NOT_FINITE.values(), ids=NOT_FINITE)
bad_places = pytest.mark.parametrize("where", ["one key", "the query"])


def spans(lengths=LENGTHS):
    counts = [pages_for(n) for n in lengths]
    return [slice(sum(counts[:row]), sum(counts[: row + 1])) for row in range(len(counts))]


def poisoned_rows(bits, where, device, dtype=torch.float32, key_dtype=None):
    """Rows ``(cache, rows, query)`` of which one has a bad key, or a bad query; and the same
    without.
    """
    rows = paged_rows(LENGTHS, HEADS, WIDTH, dtype, device, seed=3)
    query = (
        torch.randn(len(LENGTHS), HEADS * GROUP, WIDTH, generator=torch.Generator().manual_seed(4))
        .to(dtype)
        .to(device)
    )
    value = as_float(bits).to(dtype).to(device)
    cache, bad_query = rows.cache.clone(), query.clone()
    if where == "one key":
        cache[rows.block_table[BAD_ROW, TOKEN // PAGE_SIZE].long(), :, TOKEN % PAGE_SIZE] = value
    else:
        bad_query[BAD_ROW] = value
    return rows, cache.to(key_dtype or dtype), bad_query, rows.cache.to(key_dtype or dtype), query


@bad_values
@bad_places
@pytest.mark.parametrize(
    ("dtype", "key_dtype"),
    # Triton's interpreter has no bf16 dot, and makes numbers of 8-bit NaN.
    [
        pytest.param(torch.float32, torch.float32, id="fp32"),
        pytest.param(torch.bfloat16, torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, torch.float8_e4m3fn, id="8-bit-keys", marks=pytest.mark.gpu),
    ],
)
def test_scores_are_not_finite_where_the_reference_is_not(bits, where, dtype, key_dtype, device):
    rows, cache, query, sound_cache, sound_query = poisoned_rows(
        bits, where, device, dtype, key_dtype
    )
    starts, total = row_starts(rows.seq_lens, range(len(LENGTHS))), spans()[-1].stop

    def run(keys, queries):
        found = [
            Guarded.make(HEADS * GROUP, total, dtype=torch.float32, device=device) for _ in range(2)
        ]
        score_pages(
            queries,
            keys,
            rows.block_table,
            rows.seq_lens,
            starts,
            found[0].view,
            found[1].view,
            first_row=0,
            num_rows=len(LENGTHS),
            max_pages=pages_for(max(LENGTHS)),
            min_pages=of_each_row(1, len(LENGTHS), device),
        )
        for buffer in found:
            buffer.check()
        return [buffer.view.cpu() for buffer in found]

    sound, bad = run(sound_cache, sound_query), run(cache, query)
    for row, span in enumerate(spans()):
        for one, other in zip(bad, sound, strict=True):
            assert row == BAD_ROW or same_bits(one[:, span], other[:, span])
    # An infinite query is cut off where the keys have 8 bits.
    if key_dtype == dtype or torch.isnan(as_float(bits)).item():
        reference = score_row(
            query[BAD_ROW].cpu(), cache.cpu(), rows.block_table[BAD_ROW].cpu(), LENGTHS[BAD_ROW]
        )
        for one, wanted in zip(bad, reference, strict=True):
            assert torch.equal(one[:, spans()[BAD_ROW]].isfinite(), wanted.isfinite())
        assert not torch.stack(reference).isfinite().all()


@bad_values
@bad_places
def test_page_bounds_are_not_finite_where_the_reference_is_not(bits, where, device):
    rows, cache, query, sound_cache, sound_query = poisoned_rows(bits, where, device)
    # The last token of each page.
    last = [
        torch.tensor([*range(PAGE_SIZE - 1, n - 1, PAGE_SIZE), n - 1], device=device)
        for n in LENGTHS
    ]
    slots = torch.cat(
        [
            rows.block_table[row].long()[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
            for row, at in enumerate(last)
        ]
    )
    starts, total = row_starts(rows.seq_lens, range(len(LENGTHS))), spans()[-1].stop

    def run(keys, queries):
        kv = torch.cat([keys, torch.zeros_like(keys)], -1)
        bounds = Guarded.make(kv.shape[0], HEADS, 2, WIDTH, dtype=torch.float32, device=device)
        out = Guarded.make(HEADS * GROUP, total, dtype=torch.float32, device=device)
        update_bounds(kv, slots, bounds.view)
        score_bounds(
            queries,
            bounds.view,
            rows.block_table,
            rows.seq_lens,
            starts,
            out.view,
            page_size=PAGE_SIZE,
            first_row=0,
            num_rows=len(LENGTHS),
            max_pages=pages_for(max(LENGTHS)),
            min_pages=of_each_row(1, len(LENGTHS), device),
        )
        bounds.check()
        out.check()
        reference = torch.full_like(bounds.view.cpu(), SENTINEL)
        update_bounds_reference(kv.cpu(), slots.cpu(), reference)
        torch.testing.assert_close(bounds.view.cpu(), reference, rtol=0, atol=0, equal_nan=True)
        return bounds.view.cpu(), out.view.cpu()

    (_, sound), (bounds, bad) = run(sound_cache, sound_query), run(cache, query)
    for row, span in enumerate(spans()):
        assert row == BAD_ROW or same_bits(bad[:, span], sound[:, span])
    blocks = rows.block_table[BAD_ROW, : pages_for(LENGTHS[BAD_ROW])].long().cpu()
    wanted = score_bounds_row(query[BAD_ROW].cpu(), bounds[blocks])
    assert (
        torch.equal(bad[:, spans()[BAD_ROW]].isfinite(), wanted.isfinite())
        and not wanted.isfinite().all()
    )


@bad_values
@pytest.mark.parametrize("key_dtype", [torch.float32, torch.float8_e4m3fn], ids=["fp32", "fp8"])
def test_the_heads_projections_of_other_rows_and_all_other_keys_are_left_alone(
    bits, key_dtype, device
):
    hidden, positions = 48, torch.tensor([33, 40, 57], device=device)
    generator = torch.Generator().manual_seed(6)
    table = torch.randperm(12, generator=generator).view(3, 4).int().to(device)
    slots = (
        table.gather(1, (positions // PAGE_SIZE)[:, None]).squeeze(1).long() * PAGE_SIZE
        + positions % PAGE_SIZE
    )
    embeds, fused = (
        torch.randn(3, hidden, generator=generator).to(device),
        torch.randn(13, hidden, generator=generator).to(device),
    )
    weight, cos_sin = (
        torch.randn(3 * HEADS * WIDTH, 2 * hidden, generator=generator).to(device),
        torch.rand(64, WIDTH, generator=generator).to(device),
    )
    ones, norm = torch.ones(hidden, device=device), torch.ones(3 * HEADS, WIDTH, device=device)

    def run(embeds, fused):
        inputs = head_input(embeds, fused, table, positions, ones, ones, 1e-5, PAGE_SIZE)
        keys = Guarded.make(12, HEADS, PAGE_SIZE, WIDTH, dtype=key_dtype, device=device)
        queries = rope_and_cache(
            inputs @ weight.T, cos_sin, positions, slots, keys.view, 2 * HEADS, norm, 1e-5
        )
        keys.check()
        return inputs, queries, keys.view

    sound = run(embeds, fused)
    value = as_float(bits).to(device)
    for of_embedding in (True, False):
        bad_embeds, bad_fused = embeds.clone(), fused.clone()
        if of_embedding:
            bad_embeds[BAD_ROW] = value
        else:
            bad_fused[table[BAD_ROW, (positions[BAD_ROW] - 1) // PAGE_SIZE].long()] = value
        inputs, queries, keys = run(bad_embeds, bad_fused)
        assert same_bits(inputs[SOUND], sound[0][SOUND]) and same_bits(
            queries[SOUND], sound[1][SOUND]
        )
        assert not queries[BAD_ROW].isfinite().all()
        rest = torch.ones(12 * PAGE_SIZE, dtype=torch.bool, device=device)
        rest[slots[BAD_ROW]] = False
        mine, theirs = (
            k.view(torch.uint8).transpose(1, 2).reshape(12 * PAGE_SIZE, -1)
            for k in (keys, sound[2])
        )
        assert torch.equal(mine[rest], theirs[rest])


@bad_values
def test_what_follows_a_selection_of_bad_scores_stays_in_its_buffers(bits, device):
    """Hot slots, misses, page tables, the new tokens and the copies of misses: the sound rows' are
    the same with a bad row between them and without.
    """
    slots, lanes, kept, layers, resident, pages = 8, 3, 6, 3, 1, 40
    widest, total = pages_for(max(LENGTHS)), spans()[-1].stop
    generator = torch.Generator().manual_seed(7)
    page_max = torch.randn(HEADS * GROUP, total, generator=generator)
    seq_lens = torch.tensor(LENGTHS, dtype=torch.int32)
    table = torch.randperm(pages, generator=generator)[: 3 * widest].view(3, widest).int()
    value = as_float(bits)
    new = torch.randn(2, 3, HEADS, WIDTH, generator=generator)
    pool = torch.randn(layers, pages, HEADS, PAGE_SIZE, 2 * WIDTH, generator=generator)
    frames = 1 + torch.randperm(layers * (pages + lanes * slots), generator=generator).int()
    framed, hot_frames = (
        frames[: layers * pages].view(layers, pages),
        frames[layers * pages :].view(layers, lanes, slots),
    )

    def cell(number):
        return torch.tensor([number], dtype=torch.int32, device=device)

    def run(spoil):
        scores, key, value_, host = page_max.clone(), new[0].clone(), new[1].clone(), pool.clone()
        if spoil:
            scores[:, spans()[BAD_ROW]] = value
            key[BAD_ROW] = value_[BAD_ROW] = value
            host[:, table[BAD_ROW].long()] = value
        guards = []

        def made(*shape, fill=SENTINEL, dtype=torch.int32):
            guards.append(Guarded.make(*shape, dtype=dtype, device=device))
            return guards[-1].view.fill_(fill)

        scores, key, value_, lens, block_table = (
            t.to(device) for t in (scores, key, value_, seq_lens, table)
        )
        selection, lengths, mass = (
            made(3 * HEADS, kept),
            made(3 * HEADS),
            made(3, HEADS, dtype=torch.float32),
        )
        select_pages(
            scores,
            scores,
            made(HEADS, total),
            lens,
            row_starts(lens, range(3)),
            torch.arange(widest, dtype=torch.int32, device=device).expand(3, -1),
            selection,
            lengths,
            mass,
            page_size=PAGE_SIZE,
            num_kv_heads=HEADS,
            first_row=0,
            num_rows=3,
            max_pages=widest,
            totals=of_each_row(kept, 3, device),
            sink_pages=1,
            recent_pages=2,
        )
        hot = HotBuffers(
            lanes,
            HEADS,
            slots,
            widest,
            max_rows=3,
            table_pages=kept,
            num_layers=layers,
            resident=cell(resident),
            counts=made(counters.COUNTERS, fill=0, dtype=torch.int64),
            device=device,
        )
        hot.state, hot.misses = (
            replace(
                group,
                **{
                    name: made(*tensor.shape, fill=-1, dtype=tensor.dtype)
                    for name, tensor in vars(group).items()
                    if name not in ("capacity", "step", "count")
                },
            )
            for group in (hot.state, hot.misses)
        )
        hot.state.capacity.fill_(slots)
        hot.state.step.fill_(1)
        lane = torch.arange(3, dtype=torch.int32, device=device)
        selected = Selection(selection, lengths, mass)
        rows = DecodeRows(lane, lens, block_table)
        resolve_pages(
            selected,
            rows,
            hot.state,
            hot.misses,
            resident=hot.resident,
            counts=hot.counts,
            num_layers=layers,
            num_rows=3,
            page_size=PAGE_SIZE,
        )
        tables = TierTables(
            resident=hot.resident,
            frames=framed.to(device),
            hot_frames=hot_frames.to(device),
            pages=made(layers, 3 * HEADS, kept),
        )
        layer_tables(
            selected,
            hot.state.slots,
            rows,
            tables,
            num_rows=3,
            num_kv_heads=HEADS,
            page_size=PAGE_SIZE,
        )
        arena = made(1 + len(frames), HEADS, PAGE_SIZE, 2 * WIDTH, dtype=torch.float32)
        pinned = host.to(device) if device.type == "cpu" else host.pin_memory()
        words = PAGE_SIZE * 2 * WIDTH
        fetch_pages(
            pinned.view(torch.int32).view(-1, words),
            arena.view(torch.int32).view(-1, words),
            hot.misses,
            hot_frames.flatten(1).to(device),
            hot.resident,
            layers=range(layers),
            first_source=0,
            layer_sources=pages * HEADS,
            num_kv_heads=HEADS,
            done=made(layers, fill=0),
            programs=2,
            tile_bytes=8192,
        )
        last = (
            block_table.gather(1, (lens.long() - 1)[:, None] // PAGE_SIZE).squeeze(1).long()
            * PAGE_SIZE
            + (lens.long() - 1) % PAGE_SIZE
        )
        mirror = made(pages, HEADS, PAGE_SIZE, 2 * WIDTH, dtype=torch.float32)
        write_tiered(
            key,
            value_,
            last,
            LayerMemory(
                layer=2,
                table=PageTable(tables.pages[2], lengths, HEADS),
                frames=tables.frames[2],
                resident=hot.resident,
                arena=arena,
                mirror=mirror,
            ),
            decode_tokens=3,
        )
        for guard in guards:
            guard.check()
        return {
            name: t.cpu()
            for name, t in (
                ("selection", selection),
                ("slots", hot.state.slots),
                ("tables", tables.pages),
                ("arena", arena),
                ("mirror", mirror),
            )
        }

    bad, sound = run(True), run(False)
    rows = [row * HEADS + head for row in SOUND for head in range(HEADS)]
    for name in ("selection", "slots"):
        assert torch.equal(bad[name][rows], sound[name][rows])
    assert torch.equal(bad["tables"][:, rows], sound["tables"][:, rows])
    for sequence in range(BAD_ROW * HEADS, (BAD_ROW + 1) * HEADS):
        chosen = (bad["selection"][sequence] // HEADS).tolist()
        last = pages_for(LENGTHS[BAD_ROW]) - 1
        assert sorted(set(chosen)) == chosen and {0, last - 1, last} <= set(chosen)
    # What the sound rows read is what it would be: their frames' bits, for copied pages and new
    # tokens.
    for layer in range(resident, layers):
        for sequence in rows:
            read = bad["tables"][layer, sequence].long()
            one, other = (run["arena"].view(-1, PAGE_SIZE, 2 * WIDTH)[read] for run in (bad, sound))
            assert same_bits(one, other)
