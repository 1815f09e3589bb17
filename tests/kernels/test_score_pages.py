"""The scoring kernel against the torch reference, itself checked against a dense softmax."""

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.retrieval.scoring import ScoreInputs, row_starts, score_row
from specontext_vllm.step_data import PageScores
from specontext_vllm.triton_kernels import score_pages as module
from specontext_vllm.triton_kernels.score_pages import score_pages
from tests.paging import assert_close, of_each_row, paged_rows, sliced_rows

SHAPES = [
    pytest.param([2, 17, 63, 161], 4, 2, 64, id="gqa-ragged"),
    pytest.param([33, 300], 4, 4, 32, id="mha"),
    pytest.param([129, 16, 48], 8, 1, 40, id="mqa-odd-head-dim"),
]


@pytest.mark.parametrize(("lengths", "queries", "heads", "width"), SHAPES)
def test_reference_is_the_softmax_over_the_row(lengths, queries, heads, width):
    rows = paged_rows(lengths, heads, width, torch.float32, torch.device("cpu"), seed=1)
    query = torch.randn(len(lengths), queries, width)
    for row, tokens in enumerate(lengths):
        page_max, page_lse = score_row(query[row], rows.cache, rows.block_table[row], tokens)
        keys = rows.dense[row].repeat_interleave(queries // heads, 0)[:, 1:]
        logits = torch.einsum("hd,htd->ht", query[row], keys) / width**0.5
        assert_close("lse", logits.logsumexp(-1), page_lse.logsumexp(-1), 1e-5)
        assert_close("max", logits.amax(-1), page_max.amax(-1), 1e-5)


@pytest.mark.parametrize(("lengths", "queries", "heads", "width"), SHAPES)
@pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter has no bf16 dot.
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("eight_bits", [False, True], ids=["keys-like-queries", "8-bit-keys"])
@pytest.mark.parametrize("keyless", [0, 1], ids=["all-keyed", "newest-keyless"])
def test_kernel_matches_reference(
    lengths, queries, heads, width, dtype, eight_bits, keyless, device
):
    rows = paged_rows(lengths, heads, width, dtype, device, seed=2)
    for row, tokens in enumerate(lengths if keyless else ()):
        block = rows.block_table[row, (tokens - 1) // PAGE_SIZE].long()
        # A stranger's key, or none.
        rows.cache[block, :, (tokens - 1) % PAGE_SIZE] = float("nan") if row % 2 else 300.0
    keys = rows.cache.to(torch.float8_e4m3fn) if eight_bits else rows.cache
    query = torch.randn(len(lengths), queries, width).to(dtype)
    scores = PageScores.allocate(queries, heads, sum(map(pages_for, lengths)) + 3, device)
    scores.page_max.fill_(float("nan"))
    scores.page_lse.fill_(float("nan"))
    score_pages(
        sliced_rows(query.to(device)),
        keys,
        rows.block_table,
        rows.seq_lens,
        row_starts(rows.seq_lens, range(len(lengths))),
        scores.page_max,
        scores.page_lse,
        first_row=0,
        num_rows=len(lengths),
        max_pages=pages_for(max(lengths)),
        min_pages=of_each_row(1, len(lengths), device),
        keyless=keyless,
    )
    start = 0
    for row, tokens in enumerate(lengths):
        count = pages_for(tokens)
        span = slice(start, start + count)
        start += count
        if count <= 1:
            assert scores.page_max[:, span].isnan().all(), "a row that is read whole was scored"
            continue
        page_max, page_lse = score_row(
            query[row], keys.cpu(), rows.block_table[row].cpu(), tokens, keyless=keyless
        )
        tolerance = 1e-5 if dtype == torch.float32 else 3e-3
        for name, wanted, buffer in (
            ("max", page_max, scores.page_max),
            ("lse", page_lse, scores.page_lse),
        ):
            found = buffer[:, span].cpu()
            # A newest page whose only token has no key.
            assert torch.equal(found.isneginf(), wanted.isneginf())
            assert bool(wanted[:, -1].isneginf().all()) == (tokens - keyless <= 16 * (count - 1))
            assert_close(name, wanted.clamp(min=-1e4), found.clamp(min=-1e4), tolerance)


@pytest.mark.parametrize("left_behind", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize(("lengths", "queries", "heads", "width"), SHAPES)
def test_what_lies_in_place_of_a_missing_key_does_not_show(
    lengths, queries, heads, width, left_behind
):
    rows = paged_rows(lengths, heads, width, torch.float32, torch.device("cpu"), seed=1)
    query = torch.randn(len(lengths), queries, width)
    for row, tokens in enumerate(lengths):
        block = rows.block_table[row, (tokens - 1) // PAGE_SIZE].long()
        rows.cache[block, :, (tokens - 1) % PAGE_SIZE] = left_behind
        table = rows.block_table[row]
        page_max, page_lse = score_row(query[row], rows.cache, table, tokens, keyless=1)
        keys = rows.dense[row].repeat_interleave(queries // heads, 0)[:, 1:-1]
        logits = torch.einsum("hd,htd->ht", query[row], keys) / width**0.5
        if tokens > 2:
            assert_close("lse", logits.logsumexp(-1), page_lse.logsumexp(-1), 1e-5)
            assert_close("max", logits.amax(-1), page_max.amax(-1), 1e-5)
        else:
            assert page_max.isneginf().all() and page_lse.isneginf().all()


def test_parts_of_a_batch_score_like_the_whole(device):
    lengths, heads, width = [100, 40, 260], 2, 32
    rows = paged_rows(lengths, heads, width, torch.float32, device, seed=3)
    query = torch.randn(3, 4, width, device=device)
    whole = PageScores.allocate(4, heads, 64, device)
    part = PageScores.allocate(4, heads, 64, device)
    arguments = dict(max_pages=pages_for(260), min_pages=of_each_row(0, 3, device))
    whole_args = (query, rows.cache, rows.block_table, rows.seq_lens)
    score_pages(
        *whole_args,
        row_starts(rows.seq_lens, range(3)),
        whole.page_max,
        whole.page_lse,
        first_row=0,
        num_rows=3,
        **arguments,
    )
    score_pages(
        *whole_args,
        row_starts(rows.seq_lens, range(1, 3)),
        part.page_max,
        part.page_lse,
        first_row=1,
        num_rows=2,
        **arguments,
    )
    skipped = pages_for(lengths[0])
    count = pages_for(40) + pages_for(260)
    assert torch.equal(whole.page_max[:, skipped : skipped + count], part.page_max[:, :count])


def test_scoring_keys_dispatches(device):
    """The engine's entry point agrees with the kernel on this device."""
    lengths = [50, 90]
    rows = paged_rows(lengths, 2, 32, torch.float32, device, seed=4)
    query = torch.randn(2, 4, 32, device=device)
    first, second = (PageScores.allocate(4, 2, 16, device) for _ in range(2))
    starts = row_starts(rows.seq_lens, range(2))
    inputs = ScoreInputs(
        rows.block_table,
        rows.seq_lens,
        starts,
        range(2),
        max_pages=6,
        min_pages=of_each_row(0, 2, device),
        queries=query,
        keys=rows.cache,
    )
    inputs.score_keys(first)
    score_pages(
        query,
        rows.cache,
        rows.block_table,
        rows.seq_lens,
        starts,
        second.page_max,
        second.page_lse,
        first_row=0,
        num_rows=2,
        max_pages=6,
        min_pages=of_each_row(0, 2, device),
    )
    used = sum(map(pages_for, lengths))
    assert used * PAGE_SIZE >= sum(lengths)
    assert_close("lse", first.page_lse[:, :used], second.page_lse[:, :used], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_no_context_is_too_long_for_a_grid(dtype, monkeypatch):
    """CUDA refuses more than 65,535 programs on a grid's second axis: 3 million tokens of 16-bit
    keys."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            launched.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(module, "_score_pages_kernel", Kernel())
    none = torch.empty(0)
    score_pages(
        torch.empty(2, 4, 32, dtype=torch.bfloat16),
        torch.empty(1, 2, PAGE_SIZE, 32, dtype=dtype),
        none,
        none,
        none,
        none,
        none,
        first_row=0,
        num_rows=2,
        max_pages=1 << 20,
        min_pages=none,
    )
    assert all(blocks <= 65_535 for _, blocks, _ in launched)
    assert sum(blocks for _, blocks, _ in launched) == (1 << 20) * dtype.itemsize // 8


def test_blocks_of_several_launches_score_like_one(device, monkeypatch):
    lengths = [100, 40, 260]
    rows = paged_rows(lengths, 2, 32, torch.float32, device, seed=3)
    query = torch.randn(3, 4, 32, device=device)
    found = []
    for limit in (module.MAX_BLOCKS, 3):
        monkeypatch.setattr(module, "MAX_BLOCKS", limit)
        scores = PageScores.allocate(4, 2, sum(map(pages_for, lengths)), device)
        score_pages(
            query,
            rows.cache,
            rows.block_table,
            rows.seq_lens,
            row_starts(rows.seq_lens, range(3)),
            scores.page_max,
            scores.page_lse,
            first_row=0,
            num_rows=3,
            max_pages=pages_for(260),
            min_pages=of_each_row(0, 3, device),
        )
        found.append(scores)
    assert torch.equal(found[0].page_max, found[1].page_max)
    assert torch.equal(found[0].page_lse, found[1].page_lse)
