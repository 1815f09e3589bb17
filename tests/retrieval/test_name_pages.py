"""Page tables of several KV groups from one selection."""

from __future__ import annotations

import pytest
import torch

from specontext_vllm.retrieval.selection import name_pages
from specontext_vllm.step_data import PageTable, Selection

ROWS, HEADS, PAGES, WIDTH = 5, 2, 7, 11


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_each_group_s_table_names_the_chosen_pages_by_its_own_blocks(groups, device):
    generator = torch.Generator().manual_seed(0)

    def numbers(high, *shape):
        return torch.randint(high, shape, generator=generator, dtype=torch.int32).to(device)

    chosen = Selection.into(
        PageTable.allocate(ROWS, HEADS, PAGES, device, groups), count_from_start=WIDTH
    )
    counted = numbers(WIDTH, groups, ROWS, HEADS, PAGES)
    head = torch.arange(HEADS, dtype=torch.int32, device=device)[:, None]
    chosen.pages.copy_((counted * HEADS + head).flatten(0, 2))
    chosen.lengths.copy_(numbers(PAGES * 16, groups * ROWS * HEADS))
    # Taller than the tables, as vLLM's are.
    block_tables = [numbers(1000, ROWS + 3, WIDTH) for _ in range(2)]
    tables = [PageTable.allocate(ROWS, HEADS, PAGES, device, groups) for _ in range(2)]
    rows = ROWS - 1
    name_pages(chosen, block_tables, tables, rows)
    for block_table, table in zip(block_tables, tables):
        pages = table.pages.view(groups, ROWS, HEADS, PAGES)
        for group in range(groups):
            for row in range(rows):
                for h in range(HEADS):
                    named = block_table[row, counted[group, row, h].long()] * HEADS + h
                    assert torch.equal(pages[group, row, h], named)
        lengths = table.lengths.view(groups, ROWS, HEADS)
        assert torch.equal(lengths[:, :rows], chosen.lengths.view_as(lengths)[:, :rows])
        assert not pages[:, rows:].any() and not lengths[:, rows:].any()
