"""Two stages, each with half of the demo model's layers: the first selects, the second reads what
it is sent, and the tokens are one worker's.
"""

from __future__ import annotations

import pytest
import torch

from tests.engine.conftest import engine
from tests.engine.scenarios import OTHER_WAYS, SCENARIOS, by_another_way, ids, sampling, scenarios
from tests.engine.shared_runs import SETTINGS, SHAPE, SMALL, WHOLE

pytestmark = [
    pytest.mark.usefixtures("forked_workers", "served_on_a_gpu"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"
    ),
]
TWO = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
FOUR = TWO if 0 < torch.cuda.device_count() < 4 else {**TWO, "tensor_parallel_size": 2}
"""Two stages of two workers each, where there are so many GPUs, or none."""


@pytest.fixture(scope="module")
def two_stages(prompts):
    """What two stages answer in every scenario: with a budget over the context and with a small
    one.
    """
    settings = {**SETTINGS, "budget": WHOLE, "cache_generated": True}
    with engine(**SHAPE, **TWO, additional_config={"specontext": settings}) as llm:
        llm.collective_rpc("specontext_stats", args=(True,))
        out = scenarios(llm, prompts)
        llm.reset_prefix_cache()
        llm.collective_rpc("specontext_set", kwargs={"budget": SMALL})
        llm.collective_rpc("specontext_stats", args=(True,))
        small = scenarios(llm, prompts)
        small["stats"] = llm.collective_rpc("specontext_stats")
        return {**out, "small budget": small}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_stages_give_the_tokens_of_one(scenario, two_stages, both_budgets):
    assert two_stages[scenario] == both_budgets[scenario]


@pytest.mark.parametrize("scenario", ["plain", "prefix hit", "twins"])
def test_they_read_the_pages_that_one_selects(scenario, two_stages, both_budgets):
    small = two_stages["small budget"]
    assert small[scenario] == both_budgets["small budget"][scenario]
    first, second = small["stats"]
    assert first["pages_read"] == second["pages_read"] < 0.6 * first["pages_total"]


@pytest.mark.parametrize("scenario", OTHER_WAYS)
def test_whatever_is_beside_it_and_whatever_way_it_went(scenario, two_stages):
    ours, alone = by_another_way(two_stages["small budget"], scenario)
    assert ours == alone


def test_rules_that_select_in_each_layer_and_heads_that_read_own_states(own_head, prompts):
    """Stages select in their layers by themselves; what such a head needs is learned late. Here
    each stage has two workers, which select for their own KV heads.
    """
    settings = {
        **SETTINGS,
        "retrieval_head": str(own_head),
        "retriever": "quest",
        # A table as wide as the context, for `dense`.
        "max_budget": "full",
    }
    answers = {}
    for name, shape in (("one", {}), ("four", FOUR)):
        with engine(
            **{**SHAPE, "enforce_eager": True},
            **shape,
            additional_config={"specontext": settings},
        ) as llm:
            for retriever in ("quest", "dlm", "dense"):
                llm.collective_rpc("specontext_set", kwargs={"retriever": retriever})
                llm.reset_prefix_cache()
                asked = [{"prompt_token_ids": prompt} for prompt in prompts[4:]]
                answers[name, retriever] = ids(llm.generate(asked, sampling(), use_tqdm=False))
    for retriever in ("quest", "dlm", "dense"):
        assert answers["four", retriever] == answers["one", retriever]
    assert len({str(answers["one", retriever]) for retriever in ("quest", "dlm", "dense")}) == 3
