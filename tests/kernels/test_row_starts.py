"""Where each row's pages start in a workspace in which the rows lie behind one another."""

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.triton_kernels import row_starts as module
from specontext_vllm.triton_kernels.row_starts import row_starts


@pytest.mark.parametrize("block", [1024, 4], ids=["in-one-block", "in-several-blocks"])
@pytest.mark.parametrize(("first", "rows"), [(0, 13), (3, 1), (4, 9)])
def test_each_row_starts_behind_the_pages_before_it(first, rows, block, monkeypatch, device):
    monkeypatch.setattr(module, "BLOCK", block)
    seq_lens = torch.randint(0, 9000, (13,), dtype=torch.int32)
    starts, pages = [], 0
    for tokens in seq_lens[first : first + rows].tolist():
        starts.append(pages)
        pages += pages_for(tokens)
    found = row_starts(seq_lens.to(device), first, rows, PAGE_SIZE)
    assert found.dtype == torch.int32 and found.tolist() == starts
