"""Blocks of 32, 64 and 128 tokens hold several pages; the tokens are those of blocks of one page:
float32, every way a request can go, one tier and two.
"""

from __future__ import annotations

import pytest
import torch

from tests.engine.conftest import engine
from tests.engine.scenarios import OTHER_WAYS, by_another_way, scenarios
from tests.engine.shared_runs import PAGES, SETTINGS, SHAPE, SMALL, WHOLE
from tests.engine.test_tiers import SAVED_GIB
from tests.poison import poisoned_tiers, times_poisoned

BLOCKS = {32: 50, 64: 26, 128: 12}
"""By their size: so many that the prompts of some requests fit at once and their answers do not,
and some are preempted.
"""
SAME_WHATEVER_THE_BLOCKS = [
    "plain",
    "prefix hit",
    "next turn",
    "next turn, cold",
    "chunk of one",
    "chunk of one behind a hit",
    "twins",
    "neighbour aborted",
]
"""Scenarios whose tokens do not depend on which requests are preempted."""
COLD = [scenario for scenario in SAME_WHATEVER_THE_BLOCKS if scenario != "next turn"]
"""Those that hit no generated pages, which are in the cache of the engine that is compared with."""


def blocks(size: int, count: int) -> dict[str, int]:
    """``count`` blocks, and vLLM's null block."""
    return {"block_size": size, "num_gpu_blocks_override": count + 1}


LARGEST = max(BLOCKS)
"""Only this one goes through all scenarios with the whole budget, too: what the others answer is
held to blocks of one page, and those to stock.
"""


def run(prompts, block_size: int) -> dict:
    def specontext(budget: int):
        return engine(
            **blocks(block_size, BLOCKS[block_size]),
            attention_backend="specontext",
            additional_config={"specontext": {**SETTINGS, "budget": budget}},
        )

    with specontext(SMALL) as llm:
        out = {"small": scenarios(llm, prompts)}
        out["stats"] = llm.collective_rpc("specontext_stats")[0]
        if block_size == LARGEST and not torch.cuda.is_available():
            llm.reset_prefix_cache()
            llm.collective_rpc("specontext_set", kwargs={"budget": WHOLE})
            out["whole"] = scenarios(llm, prompts)
    if block_size == LARGEST and "whole" not in out:
        # On a GPU the page table is as wide as the budget of the start.
        with specontext(WHOLE) as llm:
            out["whole"] = scenarios(llm, prompts)
    return out


@pytest.fixture(scope="module", params=BLOCKS)
def of_pages(request, prompts):
    return run(prompts, request.param)


@pytest.mark.parametrize("of_pages", [LARGEST], indirect=True)
def test_a_whole_budget_s_tokens_equal_stock(stock, of_pages):
    whole = of_pages["whole"]
    assert whole["preempted"] > 0 and whole["cached tokens"] >= 256
    for scenario in (*SAME_WHATEVER_THE_BLOCKS, "ragged"):
        assert whole[scenario] == stock[scenario], scenario


def test_a_small_budget_s_tokens_equal_those_of_blocks_of_one_page(both_budgets, of_pages):
    small = of_pages["small"]
    assert small["preempted"] > 0 and small["cached tokens"] >= 256
    for scenario in COLD:
        assert small[scenario] == both_budgets["small budget"][scenario], scenario
    for scenario in OTHER_WAYS:
        tokens, otherwise = by_another_way(small, scenario)
        assert tokens == otherwise, scenario
    # Else the comparison would say nothing.
    stats = of_pages["stats"]
    assert stats["pages_read"] < 0.6 * stats["pages_total"]
    assert small["plain"] != both_budgets["plain"]


def test_two_tiers_tokens_equal_those_of_one(prompts, both_budgets):
    block_size = 64
    shape = {**SHAPE, **blocks(block_size, 16 * (PAGES - 1) // block_size)}
    settings = {**SETTINGS, "host_kv_gib": 0.25, "gpu_kv_gib": 0.0040 - SAVED_GIB}
    with poisoned_tiers(), engine(**shape, additional_config={"specontext": settings}) as llm:
        two = scenarios(llm, prompts)
        poisoned = llm.collective_rpc(times_poisoned)[0]
        stats = llm.collective_rpc("specontext_stats")[0]
        audit = llm.collective_rpc("specontext_audit")[0]
    assert stats["layer_moves"] > 0 and poisoned > 0 and audit
    for scenario in COLD:
        assert two[scenario] == both_budgets["small budget"][scenario], scenario
    assert two["next turn"] == two["next turn, cold"]
