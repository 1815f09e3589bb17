"""Selection per layer: page bounds and their scores against loops, whatever way the tokens came in,
and pages that must not be read.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, SpeContextConfig, pages_for
from specontext_vllm.float8 import KVScales, to_float8
from specontext_vllm.retrieval.layer_selection import LayerSelector
from specontext_vllm.retrieval.rules.quest import score_bounds_row, update_bounds_reference
from specontext_vllm.triton_kernels.page_bounds import score_bounds, update_bounds
from tests.paging import assert_close, of_each_row, paged_rows, sliced_rows

SHAPES = [
    pytest.param([2, 17, 63, 161], 4, 2, 64, id="gqa-ragged"),
    pytest.param([33, 300], 4, 4, 32, id="mha"),
    pytest.param([129, 16, 700], 8, 1, 40, id="mqa-odd-head-dim"),
]


def kv_rows(lengths, heads, width, device, seed, dtype=torch.float32):
    """Rows whose keys and values stand side by side, as the engine's KV cache has them; ``dense``
    has keys, then values.
    """
    return paged_rows(lengths, heads, 2 * width, dtype, device, seed)


def slots_of(rows, row, positions):
    return (
        rows.block_table[row].cpu().long()[positions // PAGE_SIZE] * PAGE_SIZE
        + positions % PAGE_SIZE
    )


def dense_bounds(keys, tokens):
    """``[pages, H, 2, D]`` by a loop over pages."""
    pages = [
        keys[:, first : min(first + PAGE_SIZE, tokens)] for first in range(0, tokens, PAGE_SIZE)
    ]
    return torch.stack([torch.stack([page.amin(1), page.amax(1)], 1) for page in pages])


@pytest.mark.parametrize(
    "update", [update_bounds, update_bounds_reference], ids=["kernel", "reference"]
)
@pytest.mark.parametrize("chunk", [1, 7, 16, 1000], ids="chunk-{}".format)
@pytest.mark.parametrize(
    ("lengths", "heads", "width"),
    [pytest.param([2, 17, 35], 2, 40, id="ragged"), pytest.param([33], 1, 32, id="one")],
)
def test_bounds_hold_every_written_token_and_no_other(lengths, heads, width, chunk, update, device):
    """Chunks that end inside pages, rows side by side, padding at the end; the unwritten places of
    the cache are NaN.
    """
    rows = kv_rows(lengths, heads, width, device, seed=chunk)
    bounds = torch.full((rows.cache.shape[0], heads, 2, width), 7.0, device=device)
    for first in range(0, max(lengths), chunk):
        positions = [torch.arange(tokens)[first : first + chunk] for tokens in lengths]
        slots = torch.cat(
            [slots_of(rows, row, p) for row, p in enumerate(positions)] + [torch.full((3,), -1)]
        )
        cache = rows.cache.clone()
        for row, tokens in enumerate(lengths):
            # What comes later has not been written yet.
            later = slots_of(rows, row, torch.arange(tokens)[first + chunk :])
            cache[later.to(device) // PAGE_SIZE, :, later.to(device) % PAGE_SIZE] = float("nan")
        update(cache, slots.to(device), bounds)
    for row, tokens in enumerate(lengths):
        wanted = dense_bounds(rows.dense[row][..., :width], tokens)
        assert torch.equal(bounds[rows.block_table[row, : pages_for(tokens)].long()].cpu(), wanted)
    untouched = torch.ones(len(bounds), dtype=torch.bool)
    for row, tokens in enumerate(lengths):
        untouched[rows.block_table[row, : pages_for(tokens)].long().cpu()] = False
    assert (bounds.cpu()[untouched] == 7.0).all()


@pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter has no bf16 dot.
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(("lengths", "queries", "heads", "width"), SHAPES)
def test_bound_kernel_matches_reference_and_is_an_upper_bound(
    lengths, queries, heads, width, dtype, device
):
    rows = kv_rows(lengths, heads, width, device, seed=3, dtype=dtype)
    query = torch.randn(len(lengths), queries, width).to(dtype)
    bounds = torch.full((rows.cache.shape[0], heads, 2, width), float("nan"), dtype=dtype)
    for row, tokens in enumerate(lengths):
        bounds[rows.block_table[row, : pages_for(tokens)].long().cpu()] = dense_bounds(
            rows.dense[row][..., :width], tokens
        ).to(dtype)
    most = pages_for(max(lengths))
    starts = torch.arange(len(lengths), dtype=torch.int32) * most
    out = torch.full((queries, most * len(lengths)), float("nan"), device=device)
    score_bounds(
        sliced_rows(query.to(device)),
        bounds.to(device),
        rows.block_table,
        rows.seq_lens,
        starts.to(device),
        out,
        page_size=PAGE_SIZE,
        first_row=0,
        num_rows=len(lengths),
        max_pages=most,
        min_pages=of_each_row(1, len(lengths), device),
    )
    for row, tokens in enumerate(lengths):
        count = pages_for(tokens)
        got = out[:, row * most : row * most + count].cpu()
        if count <= 1:
            assert got.isnan().all(), "a row that is read whole was scored"
            continue
        wanted = score_bounds_row(query[row], bounds[rows.block_table[row, :count].long().cpu()])
        assert_close("bounds", wanted, got, 1e-5 if dtype == torch.float32 else 3e-3)
        keys = rows.dense[row][..., :width].repeat_interleave(queries // heads, 0)
        logits = torch.einsum("hd,htd->ht", query[row].float(), keys) / width**0.5
        for page in range(count):
            inside = logits[:, page * PAGE_SIZE : (page + 1) * PAGE_SIZE].amax(-1)
            assert (inside <= wanted[:, page] + 1e-3).all()


def make_selector(retriever, queries, heads, width, longest, totals, device, budget):
    config = SpeContextConfig(retriever=retriever, budget=budget, recent_tokens=17)
    selector = LayerSelector(
        config,
        num_heads=queries,
        num_kv_heads=heads,
        head_dim=width,
        max_pages=pages_for(longest),
        totals=totals,
        device=device,
    )
    return selector, config


@pytest.mark.parametrize(
    ("at_once", "key_scale"),
    [
        pytest.param(1, None, id="row-by-row"),
        pytest.param(100, None, id="all-at-once"),
        pytest.param(100, 2.7, id="8-bit"),
    ],
)
@pytest.mark.parametrize("retriever", ["oracle", "quest"])
@pytest.mark.parametrize(("lengths", "queries", "heads", "width"), SHAPES)
def test_selection_is_the_rule(
    lengths, queries, heads, width, retriever, at_once, key_scale, device
):
    """Sinks, recents and the pages of the largest share of a softmax, by a loop over rows and
    heads, each row with a budget of its own; padding rows get nothing.
    """
    budget = 5 * PAGE_SIZE
    totals = [5 + row % 2 for row in range(len(lengths))]
    rows, scales = kv_rows(lengths, heads, width, device, seed=5), None
    if key_scale is not None:
        dense = [to_float8(kv).float() * key_scale for kv in rows.dense]
        rows = replace(rows, cache=to_float8(rows.cache), dense=dense)
        scales = KVScales(*torch.tensor([key_scale, 9.0, 9.0], device=device))
    selector, config = make_selector(
        retriever,
        queries,
        heads,
        width,
        max(lengths),
        of_each_row([*totals, 5], len(lengths) + 1, device),
        device,
        budget,
    )
    selector.rows_at_once = min(at_once, selector.rows_at_once)
    selector.allocate(2, rows.cache.shape[0], torch.float32)
    if retriever == "quest":
        selector.page_vectors[1].fill_(float("nan"))
    for row, tokens in enumerate(lengths):
        selector.learn(1, rows.cache, slots_of(rows, row, torch.arange(tokens)).to(device))
    query = torch.randn(len(lengths) + 1, queries, width)
    table = torch.cat([rows.block_table, rows.block_table[:1]])
    seq_lens = torch.cat([rows.seq_lens, rows.seq_lens.new_zeros(1)])
    pages = torch.full(((len(lengths) + 1) * heads, 6), -7, dtype=torch.int32, device=device)
    lengths_out = torch.full(((len(lengths) + 1) * heads,), -7, dtype=torch.int32, device=device)
    selector.select(
        1, sliced_rows(query.to(device)), rows.cache, table, seq_lens, pages, lengths_out, scales
    )
    assert (lengths_out[-heads:] == 0).all() and (pages[-heads:] == -7).all()
    for row, tokens in enumerate(lengths):
        count, total = pages_for(tokens), totals[row]
        ids = rows.block_table[row, :count].cpu()
        keys = rows.dense[row][..., :width]
        for head in range(heads):
            got = pages[row * heads + head].cpu()
            if count <= total:
                assert got[:count].tolist() == (ids * heads + head).tolist()
                assert lengths_out[row * heads + head] == tokens
                continue
            group = query[row].view(heads, -1, width)[head]
            if retriever == "oracle":
                logits = group @ keys[head].T / width**0.5
                share = torch.stack(
                    [page.amax(-1) for page in logits.softmax(-1).split(PAGE_SIZE, -1)], -1
                )
            else:
                bound = dense_bounds(keys, tokens)[:, head]
                share = (
                    torch.maximum(group[:, None] * bound[:, 0], group[:, None] * bound[:, 1]).sum(
                        -1
                    )
                    / width**0.5
                ).softmax(-1)
            value = share.amax(0)
            value[: config.sink_pages] = value[count - config.recent_pages :] = 2.0
            best = ids[value.topk(total).indices.sort().values]
            assert got[:total].tolist() == (best * heads + head).tolist()
            kept = (total - 1) * PAGE_SIZE + (tokens - 1) % PAGE_SIZE + 1
            assert lengths_out[row * heads + head] == kept
