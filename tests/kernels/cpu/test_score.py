"""Scores of pages in C++ against the definition, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.retrieval.reference import reduce_to_pages
from specontext_vllm.retrieval.scoring import row_starts
from tests.guards import Guarded
from tests.paging import of_each_row, paged_rows, sliced_rows

FP8 = torch.float8_e4m3fn
KEYS = [torch.float32, torch.bfloat16, torch.float16, FP8]


def score(ops, lengths, heads, group, width, dtype, key_dtype, seed, **options):
    """Workspaces ``[2][NQ, pages]`` and what they should hold, NaN where nothing is written."""
    options = {"first_token": 1, "keyless": 0, "min_pages": 0, "strided": False} | options
    rows = paged_rows(
        [max(tokens, 1) for tokens in lengths],
        heads,
        2 * width if options["strided"] else width,
        torch.float32 if key_dtype is FP8 else key_dtype,
        torch.device("cpu"),
        seed,
    )
    keys = rows.cache[..., :width]
    if key_dtype is FP8:
        keys = keys.to(FP8)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    # Tails of the block table point at a block that there is not.
    for row, tokens in enumerate(lengths):
        rows.block_table[row, pages_for(tokens) :] = 2**30
    query = torch.randn(len(lengths), heads * group, width).to(dtype)
    capacity = sum(map(pages_for, lengths)) + 3
    shape = (heads * group, capacity)
    found = [Guarded.make(*shape, dtype=torch.float32, device=torch.device("cpu")) for _ in "ab"]
    for buffer in found:
        buffer.view.fill_(float("nan"))
    starts = row_starts(seq_lens, range(len(lengths)))
    # Each second row has a larger budget.
    budgets = [options["min_pages"] + 9 * (row % 2) for row in range(len(lengths))]
    min_pages = of_each_row(budgets, len(lengths))
    ops.score_pages(
        sliced_rows(query),
        keys,
        rows.block_table,
        seq_lens,
        starts,
        found[0].view,
        found[1].view,
        0,
        len(lengths),
        min_pages,
        options["first_token"],
        options["keyless"],
    )
    expected = [torch.full(shape, float("nan"), dtype=torch.float64) for _ in found]
    for row, (tokens, start) in enumerate(zip(lengths, starts.tolist(), strict=True)):
        count = pages_for(tokens)
        if count <= int(min_pages[row]):
            continue
        stored = keys[rows.block_table[row, :count].long()].float().double()
        logits = torch.einsum(
            "hgd,phtd->hgpt", query[row].view(heads, group, width).double(), stored
        ).flatten(0, 1).flatten(1) * float(width**-0.5)
        logits[:, : options["first_token"]] = float("-inf")
        logits[:, max(tokens - options["keyless"], 0) :] = float("-inf")
        for out, values in zip(expected, reduce_to_pages(logits, PAGE_SIZE), strict=True):
            out[:, start : start + count] = values
    for buffer in found:
        buffer.check()
    return [buffer.view for buffer in found], expected


def check(found, expected):
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("key_dtype", KEYS, ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "group", "width"),
    [
        pytest.param([1, 17, 64, 200], 2, 2, 64, id="gqa"),
        pytest.param([1500, 0, 31], 3, 3, 64, id="several-spans"),
        pytest.param([111], 1, 7, 40, id="odd"),
        pytest.param([90, 16], 1, 4, 256, id="wide"),
    ],
)
def test_scores_are_the_definition_s(ops, lengths, heads, group, width, key_dtype):
    check(*score(ops, lengths, heads, group, width, torch.float32, key_dtype, seed=2))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 1200), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    group=st.integers(1, 6),
    width=st.integers(1, 32).map(lambda eights: 8 * eights),
    dtype=st.sampled_from(KEYS[:3]),
    key_dtype=st.sampled_from(KEYS),
    first_token=st.sampled_from([0, 1, 20]),
    keyless=st.sampled_from([0, 1]),
    min_pages=st.sampled_from([0, 5]),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_scores_of_any_shape(ops, lengths, heads, group, width, dtype, key_dtype, seed, **options):
    check(*score(ops, lengths, heads, group, width, dtype, key_dtype, seed, **options))


def test_the_scores_do_not_depend_on_threads(ops, threads):
    results = []
    for number in (1, 2, 3):
        threads(number)
        torch.manual_seed(0)
        found, _ = score(ops, [3000, 900], 2, 3, 64, torch.bfloat16, torch.bfloat16, seed=4)
        results.append(torch.stack(found).nan_to_num())
    assert all(torch.equal(results[0], again) for again in results[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_leaves_its_page_no_finite_score(ops, value):
    """Selection then leaves the page out, as the definition has it."""
    width, tokens = 64, 100
    keys = torch.randn(7, 1, PAGE_SIZE, width)
    keys[3, 0, 5, 2] = value
    queries = torch.rand(1, 2, width) + 1
    queries[:, 1] *= -1
    found = torch.zeros(2, 2, 7)
    table = torch.arange(7, dtype=torch.int32)[None]
    lens, starts = torch.tensor([tokens], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    nothing = of_each_row(0, 1)
    ops.score_pages(queries, keys, table, lens, starts, *found, 0, 1, nothing, 1, 0)
    finite = found.isfinite().all(0)
    assert finite[:, [0, 1, 2, 4, 5, 6]].all()
    # An infinite logit of the other sign is no more than a token without weight.
    hurt = [True, True] if value != value else [value > 0, value < 0]
    assert finite[:, 3].tolist() == [not bad for bad in hurt]


def test_a_block_that_is_none_is_refused(ops):
    keys, queries = torch.zeros(4, 1, PAGE_SIZE, 32), torch.zeros(1, 1, 32)
    lens, starts = torch.tensor([40], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    table = torch.tensor([[0, 4, 1]], dtype=torch.int32)
    out, nothing = (torch.zeros(1, 3), torch.zeros(1, 3)), of_each_row(0, 1)
    with pytest.raises(RuntimeError, match="block_table: found a block that is none of the 4"):
        ops.score_pages(queries, keys, table, lens, starts, *out, 0, 1, nothing, 1, 0)
    with pytest.raises(RuntimeError, match="exceed the workspace of 2"):
        ops.score_pages(
            queries, keys, table, lens, starts, *(e[:, :2] for e in out), 0, 1, nothing, 1, 0
        )
