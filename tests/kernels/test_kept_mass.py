"""The sums of a step's kept attention mass against a loop, and against the host's counters."""

import pytest
import torch

from specontext_vllm.retrieval.counters import KEPT_MASS_EDGES, Counters
from specontext_vllm.triton_kernels.kept_mass import add_kept_mass

SHAPES = pytest.mark.parametrize(("rows", "heads"), [(1, 1), (7, 3), (300, 8)])


def random_masses(rows, heads):
    """``[rows, heads]`` masses, NaN in padding rows, and the lengths of more rows than these."""
    mass = torch.rand(rows, heads)
    seq_lens = torch.randint(0, 3, (rows + 3,), dtype=torch.int32)
    mass[seq_lens[:rows] == 0] = float("nan")
    return mass, seq_lens


def add(mass, seq_lens, before, device):
    """What the kernel adds to a total and buckets that are ``before``: ``[1 + edges]`` float64."""
    edges = torch.tensor(KEPT_MASS_EDGES, device=device)
    cells = torch.full((1 + len(edges),), before, dtype=torch.float64, device=device)
    add_kept_mass(mass.to(device), seq_lens.to(device), edges, cells[:1], cells[1:])
    return cells.cpu() - before


@SHAPES
def test_the_mean_mass_of_each_row_is_added_up_without_the_padding(rows, heads, device):
    mass, seq_lens = random_masses(rows, heads)
    means = [float(mass[row].double().mean()) for row in range(rows) if int(seq_lens[row]) > 0]
    wanted = [sum(means)] + [sum(mean <= edge for mean in means) for edge in KEPT_MASS_EDGES]
    torch.testing.assert_close(
        add(mass, seq_lens, 5.0, device),
        torch.tensor(wanted, dtype=torch.float64),
        rtol=1e-5,
        atol=1e-5,
    )


@SHAPES
def test_it_adds_what_the_host_s_counters_add(rows, heads, device):
    mass, seq_lens = random_masses(rows, heads)
    reference = Counters(torch.device("cpu"))
    reference.count_choice(mass, seq_lens)
    torch.testing.assert_close(
        add(mass, seq_lens, 5.0, device),
        torch.cat([reference.cells[:1], reference.cells[3:]]),
        rtol=1e-5,
        atol=1e-5,
    )
