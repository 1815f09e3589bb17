"""Blocks of 32, 64 and 128 tokens hold several pages; the tokens are those of blocks of one page:
float32, every way a request can go, one tier and two.
"""

from __future__ import annotations

import pytest
import torch

from tests.engine import test_tiers
from tests.engine.conftest import DEMO_MODEL, STOCK, engine
from tests.engine.test_exactness import OTHER_WAYS, by_another_way, scenarios
from tests.poison import poisoned_tiers, times_poisoned

SMALL = {
    "retrieval_head": str(DEMO_MODEL / "retrieval_head"),
    "budget": 64,
    "sink_tokens": 16,
    "recent_tokens": 16,
}
WHOLE = 2048
"""A budget over every context."""
BLOCKS = {16: 100, 32: 50, 64: 26, 128: 12}
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


def blocks(size: int, count: int) -> dict[str, int]:
    """``count`` blocks, and vLLM's null block."""
    return {"block_size": size, "num_gpu_blocks_override": count + 1}


def run(prompts, block_size: int) -> dict:
    def specontext(budget: int):
        return engine(
            **blocks(block_size, BLOCKS[block_size]),
            attention_backend="specontext",
            additional_config={"specontext": {**SMALL, "budget": budget}},
        )

    with specontext(SMALL["budget"]) as llm:
        out = {"small": scenarios(llm, prompts)}
        out["stats"] = llm.collective_rpc("specontext_stats")[0]
        if not torch.cuda.is_available():
            llm.reset_prefix_cache()
            llm.collective_rpc("specontext_set", kwargs={"budget": WHOLE})
            out["whole"] = scenarios(llm, prompts)
    if "whole" not in out:
        # On a GPU the page table is as wide as the budget of the start.
        with specontext(WHOLE) as llm:
            out["whole"] = scenarios(llm, prompts)
    return out


@pytest.fixture(scope="module")
def stock(prompts):
    with engine(**STOCK) as llm:
        return scenarios(llm, prompts)


@pytest.fixture(scope="module")
def of_one_page(prompts):
    return run(prompts, 16)


@pytest.fixture(scope="module", params=[32, 64, 128])
def of_pages(request, prompts):
    return run(prompts, request.param)


def test_a_whole_budget_s_tokens_equal_stock(stock, of_pages):
    whole = of_pages["whole"]
    assert whole["preempted"] > 0 and whole["cached tokens"] >= 256
    for scenario in (*SAME_WHATEVER_THE_BLOCKS, "ragged"):
        assert whole[scenario] == stock[scenario], scenario


def test_a_small_budget_s_tokens_equal_those_of_blocks_of_one_page(of_one_page, of_pages):
    small = of_pages["small"]
    assert small["preempted"] > 0 and small["cached tokens"] >= 256
    for scenario in SAME_WHATEVER_THE_BLOCKS:
        assert small[scenario] == of_one_page["small"][scenario], scenario
    for scenario in OTHER_WAYS:
        tokens, otherwise = by_another_way(small, scenario)
        assert tokens == otherwise, scenario
    # Else the comparison would say nothing.
    stats = of_pages["stats"]
    assert stats["pages_read"] < 0.6 * stats["pages_total"]
    assert small["plain"] != of_pages["whole"]["plain"]


@pytest.mark.parametrize("block_size", [32, 128])
def test_two_tiers_tokens_equal_those_of_one(prompts, block_size):
    shape = {**test_tiers.SHAPE, **blocks(block_size, 16 * (test_tiers.PAGES - 1) // block_size)}

    def run_tiers(**settings):
        settings = {**test_tiers.SETTINGS, **settings}
        with engine(**shape, additional_config={"specontext": settings}) as llm:
            out = scenarios(llm, prompts)
            out["poisoned"] = llm.collective_rpc(times_poisoned)[0]
            out["stats"] = llm.collective_rpc("specontext_stats")[0]
            out["audit"] = llm.collective_rpc("specontext_audit")[0]
            return out

    one = run_tiers()
    with poisoned_tiers():
        two = run_tiers(host_kv_gib=0.25, gpu_kv_gib=0.0040 - test_tiers.SAVED_GIB)
    assert two["stats"]["layer_moves"] > 0 and two["poisoned"] > 0 and two["audit"]
    for scenario in SAME_WHATEVER_THE_BLOCKS:
        assert two[scenario] == one[scenario], scenario
