"""Bounds of pages' keys, and the scores they give, against loops."""

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.float8 import FP8
from specontext_vllm.triton_kernels.page_bounds import score_bounds, update_bounds
from tests.paging import assert_close, of_each_row, sliced_rows

BLOCKS = 40


def naive_bounds(keys):
    """``[H, 2, D]`` of a page's keys ``[tokens, H, D]``."""
    low, high = keys[0].clone(), keys[0].clone()
    for key in keys[1:]:
        low, high = low.minimum(key), high.maximum(key)
    return torch.stack([low, high], 1)


def naive_score(query, bounds):
    """Largest ``q . k / sqrt(D)`` of any key within the bounds ``[2, D]``: of each element the
    better one of its two ends.
    """
    low, high = bounds
    return float(torch.maximum(query * low, query * high).sum()) / len(query) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=["fp32", "8-bit"])
@pytest.mark.parametrize(
    ("heads", "width"), [pytest.param(2, 32, id="gqa"), pytest.param(3, 40, id="odd")]
)
def test_a_page_s_bounds_hold_its_tokens_so_far(heads, width, dtype, device):
    # Two requests side by side and padding: one fills a page and begins another, one adds a token.
    cache = torch.randn(BLOCKS, heads, PAGE_SIZE, 2 * width)
    pages = torch.randperm(BLOCKS)[:3].tolist()
    last = {pages[0]: PAGE_SIZE - 1, pages[1]: 4, pages[2]: 9}
    for page, offset in last.items():
        # Not written yet.
        cache[page, :, offset + 1 :] = float("nan")
    slots = [
        *(pages[0] * PAGE_SIZE + offset for offset in range(11, PAGE_SIZE)),
        *(pages[1] * PAGE_SIZE + offset for offset in range(5)),
        pages[2] * PAGE_SIZE + 9,
        -1,
        -1,
    ]
    bounds = torch.full((BLOCKS, heads, 2, width), 7.0, device=device)
    cache = cache.to(dtype)
    update_bounds(cache.to(device), torch.tensor(slots, device=device), bounds)
    cache = cache.float()
    wanted = torch.full((BLOCKS, heads, 2, width), 7.0)
    for page, offset in last.items():
        wanted[page] = naive_bounds(cache[page, :, : offset + 1, :width].transpose(0, 1))
    assert torch.equal(bounds.cpu(), wanted)


@pytest.mark.parametrize(
    ("lengths", "heads", "group", "width"),
    [
        # A row of one page, which is read whole and not scored; more pages than a program takes.
        pytest.param([5, 100, 600], 2, 2, 64, id="gqa"),
        pytest.param([33, 130], 1, 6, 40, id="mqa-odd"),
    ],
)
def test_a_page_s_score_is_the_best_that_its_bounds_allow(lengths, heads, group, width, device):
    rows, first_row = len(lengths), 1
    widest = max(map(pages_for, lengths))
    # A row before those that are scored.
    table = torch.stack([torch.randperm(BLOCKS)[:widest] for _ in range(1 + rows)]).int()
    seq_lens = torch.tensor([77, *lengths], dtype=torch.int32)
    bounds = torch.randn(BLOCKS, heads, 2, width).sort(2).values
    query = torch.randn(1 + rows, heads * group, width)
    starts = torch.arange(rows, dtype=torch.int32) * widest
    out = torch.full((heads * group, rows * widest), float("nan"), device=device)
    score_bounds(
        sliced_rows(query.to(device)),
        bounds.to(device),
        table.to(device),
        seq_lens.to(device),
        starts.to(device),
        out,
        page_size=PAGE_SIZE,
        first_row=first_row,
        num_rows=rows,
        max_pages=widest,
        min_pages=of_each_row(1, first_row + rows, device),
    )
    for row, tokens in enumerate(lengths):
        pages = pages_for(tokens)
        found = out[:, row * widest : (row + 1) * widest].cpu()
        scored = pages if pages > 1 else 0
        assert found[:, scored:].isnan().all(), "scored what no row has, or what is read whole"
        wanted = [
            [
                naive_score(query[first_row + row, q], bounds[page, q // group])
                for page in table[first_row + row, :scored].tolist()
            ]
            for q in range(heads * group)
        ]
        assert_close("scores", torch.tensor(wanted), found[:, :scored], 1e-5)
