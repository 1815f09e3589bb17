"""Made-up scores, against their definition in torch."""

import torch

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.retrieval.rules.driven import redrawn
from specontext_vllm.triton_kernels.driven_scores import driven_scores
from tests.paging import of_each_row

HEADS, GROUP, BLOCKS = 3, 5, 400


def test_scores_are_those_of_the_definition_whichever_row_has_the_page(device):
    # A row before those that are scored, one that is read whole, more pages than a program takes,
    # padding, and a row with pages of another one.
    lengths = [700, 60, 200 * PAGE_SIZE - 3, 0, 150]
    table = torch.stack([torch.randperm(BLOCKS)[:200] for _ in lengths]).int()
    table[4, :5] = table[2, :5]
    first_row, min_pages, widest = 1, [0, 4, 4, 0, 10], 200
    rows = len(lengths) - first_row
    starts = torch.arange(rows, dtype=torch.int32) * widest
    chances = torch.tensor([2**30, 2**31])
    drawn = torch.full((BLOCKS, HEADS), -1.0)
    on_device = drawn.to(device)
    for number in range(4):
        step = torch.tensor([number])
        out = torch.full((HEADS * GROUP, rows * widest), float("nan"), device=device)
        driven_scores(
            on_device,
            step.to(device),
            chances.to(device),
            table.to(device),
            torch.tensor(lengths, dtype=torch.int32, device=device),
            starts.to(device),
            out,
            page_size=PAGE_SIZE,
            first_row=first_row,
            num_rows=rows,
            max_pages=widest,
            min_pages=of_each_row(min_pages, len(lengths), device),
        )
        wanted = torch.full((HEADS, rows * widest), float("nan"))
        for row, tokens in enumerate(lengths[first_row:]):
            pages = pages_for(tokens)
            if pages > min_pages[first_row + row]:
                blocks = table[first_row + row, :pages].long()
                drawn[blocks] = redrawn(drawn, blocks, step, chances)
                wanted[:, row * widest : row * widest + pages] = drawn[blocks].T
        wanted = wanted.repeat_interleave(GROUP, 0)
        torch.testing.assert_close(out.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(on_device.cpu(), drawn)
