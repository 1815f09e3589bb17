"""The small sums of a step: where rows start in the workspace, and the kept mass."""

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.retrieval.counters import KEPT_MASS_EDGES, Counters
from specontext_vllm.triton_kernels import row_starts as module
from specontext_vllm.triton_kernels.kept_mass import add_kept_mass
from specontext_vllm.triton_kernels.row_starts import row_starts


@pytest.mark.parametrize("block", [1024, 4])
def test_rows_start_behind_one_another(block, monkeypatch, device):
    monkeypatch.setattr(module, "BLOCK", block)
    seq_lens = torch.randint(0, 9000, (13,), dtype=torch.int32)
    for first, rows in ((0, 13), (3, 1), (4, 9)):
        pages = (seq_lens[first : first + rows] + PAGE_SIZE - 1) // PAGE_SIZE
        assert (
            row_starts(seq_lens.to(device), first, rows, PAGE_SIZE).tolist()
            == (pages.cumsum(0) - pages).tolist()
        )


@pytest.mark.parametrize("rows, heads", [(1, 1), (7, 3), (300, 8)])
def test_kept_mass_is_added_up_without_the_padding(rows, heads, device):
    mass = torch.rand(rows, heads)
    seq_lens = torch.randint(0, 3, (rows + 3,), dtype=torch.int32)
    mass[seq_lens[:rows] == 0] = float("nan")
    reference = Counters(torch.device("cpu"))
    reference.count_choice(mass, seq_lens)
    edges = torch.tensor(KEPT_MASS_EDGES, device=device)
    cells = torch.full((1 + len(edges),), 5.0, dtype=torch.float64, device=device)
    add_kept_mass(mass.to(device), seq_lens.to(device), edges, cells[:1], cells[1:])
    torch.testing.assert_close(
        cells.cpu() - 5, torch.cat([reference.cells[:1], reference.cells[3:]]), rtol=1e-5, atol=1e-5
    )
