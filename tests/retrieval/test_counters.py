"""Sums against a loop."""

from __future__ import annotations

import numpy as np
import torch

from specontext_vllm.retrieval.counters import (
    CHOOSING_ROWS,
    DECODE_ROWS,
    FALLBACK_PAGES,
    FALLBACK_ROWS,
    KEPT_MASS,
    KEPT_MASS_BUCKETS,
    KEPT_MASS_EDGES,
    OWN_BUDGET_ROWS,
    PAGES_HELD,
    PAGES_READ,
    STEPS,
    WHOLE_PAGES,
    Counters,
)
from specontext_vllm.step_data import WHOLE


def test_kept_mass_lands_in_the_buckets_of_a_loop(device):
    counters, means = Counters(device), []
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 7, 40):
        kept = torch.rand(rows, 3, generator=generator)
        kept[0] = 1.0
        seq_lens = torch.randint(0, 3, (rows + 2,), generator=generator, dtype=torch.int32)
        real = seq_lens[:rows] > 0
        ones = [1] * int(real.sum())
        counters.count_step(1, ones, ones, chooses=True, budgets=())
        counters.count_choice(kept.to(device), seq_lens.to(device))
        means += kept[real].mean(-1).tolist()
    counted = counters.since_reset(False)
    assert counted[CHOOSING_ROWS] == len(means) > 20
    assert counted[KEPT_MASS_BUCKETS].tolist() == [
        sum(mean <= edge for mean in means) for edge in KEPT_MASS_EDGES
    ]
    np.testing.assert_allclose(counted[KEPT_MASS], sum(means), rtol=1e-5)


def test_a_reset_leaves_the_sums_alone(device):
    counters = Counters(device)
    for _ in range(2):
        counters.count_step(2, [1, 2, 2], [5, 10, 10], chooses=False, budgets=())
        counters.count_fallback(
            torch.tensor([[0.2, 0.4], [0.5, 0.9], [0.0, 0.0]], device=device),
            torch.tensor([33, 48, 32, 32, 80, 48], dtype=torch.int32, device=device),
            torch.tensor([1, 2, 2], dtype=torch.int32, device=device),
            0.5,
        )
    places = [STEPS, DECODE_ROWS, PAGES_READ, PAGES_HELD, FALLBACK_ROWS, FALLBACK_PAGES]
    assert counters.since_reset(True)[places].tolist() == [2, 6, 20, 100, 4, 16]
    counters.count_step(1, [1], [1], chooses=False, budgets=())
    assert counters.since_reset(False)[places].tolist() == [1, 1, 1, 1, 0, 0]
    assert counters.host[[STEPS, DECODE_ROWS]].tolist() == [3, 7] and counters.cells[
        1:3
    ].tolist() == [4, 16]


def test_rows_with_budgets_of_their_own_are_counted_beside_those_that_read_all(device):
    counters = Counters(device)
    counters.count_step(2, [1, 2, 3, 4], [9] * 4, chooses=True, budgets=[None, 32, WHOLE, 64])
    assert counters.host[OWN_BUDGET_ROWS : WHOLE_PAGES + 1].tolist() == [2, 12, 1, 6]
    assert counters.host[[DECODE_ROWS, PAGES_READ, PAGES_HELD]].tolist() == [4, 20, 72]
