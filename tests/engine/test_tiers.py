"""Two tiers give the tokens of one: float32, real weights, frames for a quarter of the tokens,
given-up frames full of NaN.

The head makes keys from own states: a decode row's key is written when its pages have moved.
"""

from __future__ import annotations

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.retrieval.cache import head_key_dtype
from tests.conftest import CUDA
from tests.engine.asleep import sleep_over
from tests.engine.conftest import engine
from tests.engine.overflow import beside_an_overflow, check
from tests.engine.scenarios import OTHER_WAYS, SCENARIOS, by_another_way, ids, sampling, scenarios
from tests.engine.shared_runs import PAGES, SHAPE, without_kernels
from tests.poison import poisoned_tiers, times_poisoned

SETTINGS = {
    "budget": 64,
    "sink_tokens": 16,
    "recent_tokens": 16,
    "stickiness": 0,
}

# What 8-bit head keys save of the GPU's room, where they are the default: as many frames as with
# the model's dtype.
SAVED_GIB = (
    PAGES
    * 2
    * 16
    * 64
    * (4 - head_key_dtype("auto", torch.float32, torch.device("cuda" if CUDA else "cpu")).itemsize)
    / 2**30
)


def frames(worker) -> int | None:
    """Frames of a worker's arena, or None without tiers."""
    tiers = worker.model_runner.runtime.tiers
    return None if tiers is None else tiers.plan.frames


def after_pressure(llm, prompts) -> list[list[int]]:
    """Tokens of one request alone for a hundred steps: layers come back."""
    return ids(
        llm.generate([{"prompt_token_ids": prompts[3]}], sampling(max_tokens=100), use_tqdm=False)
    )


def run(prompts, head, **settings):
    settings = {**SETTINGS, "retrieval_head": str(head), **settings}
    with engine(**SHAPE, additional_config={"specontext": settings}) as llm:
        out = scenarios(llm, prompts)
        out["frames"], out["poisoned"] = (
            llm.collective_rpc(frames)[0],
            llm.collective_rpc(times_poisoned)[0],
        )
        out["metrics"] = [
            (metric.name, getattr(metric, "value", None))
            for metric in llm.get_metrics()
            if "specontext" in metric.name
        ]
        out["stats"] = llm.collective_rpc("specontext_stats", args=(True,))[0]
        out["after pressure"] = after_pressure(llm, prompts)
        out["late stats"] = llm.collective_rpc("specontext_stats")[0]
        out["overflow"] = beside_an_overflow(llm, prompts[4:7])
        out["without kernels"] = without_kernels(llm, prompts)
        if not CUDA:  # test_sleep.py
            out["asleep"] = sleep_over(llm, prompts)
        return out


@pytest.fixture(scope="module")
def one_tier(prompts, own_head):
    return run(prompts, own_head)


@pytest.fixture(scope="module")
def two_tiers(prompts, own_head):
    with poisoned_tiers():
        return run(prompts, own_head, host_kv_gib=0.25, gpu_kv_gib=0.0036 - SAVED_GIB)


def unsettle(worker) -> None:
    """Make the hot buffers of a worker change their size whenever the policy is asked, and count
    the steps in which a layer comes back.
    """
    tiers = worker.model_runner.runtime.tiers
    worker.slow_steps = 0
    apply = tiers.apply

    def count(changes):
        worker.slow_steps += changes.returning is not None
        apply(changes)

    tiers.apply = count
    assert tiers.plan.hot_pages > tiers.page_table(0).max_pages
    policy = tiers.hot_size

    def choose(ledger):
        policy.size = policy.smallest if policy.size == policy.largest else policy.largest
        worker.resized = getattr(worker, "resized", 0) + 1
        return policy.size

    policy.choose = choose


def engine_with_slow_returns(patch, settings):
    """An engine whose layers come back four pages a step."""
    page_bytes = 2 * PAGE_SIZE * 2 * 64 * 4
    patch.setattr("specontext_vllm.residency.tiers.RETURN_BYTES", 4 * page_bytes)
    return engine(**SHAPE, additional_config={"specontext": settings})


@pytest.fixture(scope="module")
def resizing(prompts, own_head):
    settings = {
        **SETTINGS,
        "retrieval_head": str(own_head),
        "host_kv_gib": 0.25,
        "gpu_kv_gib": 0.0042 - SAVED_GIB,
    }
    with (
        poisoned_tiers(),
        pytest.MonkeyPatch.context() as patch,
        engine_with_slow_returns(patch, settings) as llm,
    ):
        llm.collective_rpc(unsettle)
        out = scenarios(llm, prompts)
        out["after pressure"] = after_pressure(llm, prompts)
        out["resized"] = llm.collective_rpc(lambda worker: worker.resized)[0]
        out["slow steps"] = llm.collective_rpc(lambda worker: worker.slow_steps)[0]
        out["poisoned"] = llm.collective_rpc(times_poisoned)[0]
        stats = llm.collective_rpc("specontext_stats")[0]
        out["resident"], out["layers"] = stats["resident_layers"], stats["num_layers"]
        return out


@pytest.mark.parametrize(
    "scenario",
    ["plain", "ragged", "prefix hit", "next turn", "neighbour aborted", "after pressure"],
)
def test_tokens_survive_hot_buffers_that_change_their_size_and_layers_that_come_back_slowly(
    one_tier, resizing, scenario
):
    assert (
        resizing["resized"] > 10
        and resizing["slow steps"] > 5
        and resizing["resident"] == resizing["layers"]
        and resizing["poisoned"] > 100
    )
    assert resizing[scenario] == one_tier[scenario]


@pytest.mark.parametrize("scenario", [*SCENARIOS, "after pressure"])
def test_tokens_are_those_of_one_tier(one_tier, two_tiers, scenario):
    assert two_tiers[scenario] == one_tier[scenario]


@pytest.mark.parametrize("scenario", OTHER_WAYS)
def test_tokens_do_not_hang_on_a_request_s_way(one_tier, scenario):
    tokens, otherwise = by_another_way(one_tier, scenario)
    assert tokens == otherwise


@pytest.mark.parametrize("tiers", ["one_tier", "two_tiers"])
def test_tokens_do_not_hang_on_the_cpu_s_kernels(tiers, request):
    tokens = request.getfixturevalue(tiers)
    assert tokens["without kernels"] == tokens["plain"]


@pytest.mark.parametrize("tiers", ["one_tier", "two_tiers"])
def test_a_request_of_nan_changes_no_other(tiers, request):
    check(request.getfixturevalue(tiers)["overflow"])


@pytest.mark.skipif(CUDA, reason="test_sleep.py")
def test_a_request_that_sleeps_goes_on_and_those_after_it_answer_as_before(one_tier, two_tiers):
    """What an engine loses asleep is NaN meanwhile, and the host pool after it."""
    for found in (one_tier, two_tiers):
        assert found["asleep"]["after it"] == [found["plain"][i] for i in (5, -1)]
        assert len(found["asleep"]["slept"]) == 24
    assert two_tiers["asleep"]["slept"] == one_tier["asleep"]["slept"]


def test_the_scenarios_happened(one_tier, two_tiers):
    assert one_tier["preempted"] > 0 and two_tiers["preempted"] == one_tier["preempted"]
    assert two_tiers["cached tokens"] == one_tier["cached tokens"] > 0
    assert two_tiers["frames"] <= 1.05 * PAGES * 6 / 4 and two_tiers["poisoned"] > 100
    stats, late = two_tiers["stats"], two_tiers["late stats"]
    assert (
        stats["layer_moves"] > 0 and stats["fetched_bytes"] > 0 and stats["missed_head_pages"] > 0
    )
    assert stats["pages_read"] < 0.5 * stats["pages_total"]
    assert late["resident_layers"] == late["num_layers"], "layers did not come back"
    assert 0 < stats["hit_rate"] < 1


def test_an_engine_in_this_process_has_its_own_metrics_and_leaves_none(one_tier, two_tiers):
    for run, tiered in ((one_tier, False), (two_tiers, True)):
        names = [name for name, _ in run["metrics"]]
        # Engines before this one, in the same process, would show as further series or as more
        # rows.
        assert len(names) == len(set(names))
        assert (
            0 < dict(run["metrics"])["vllm:specontext_decode_rows"] <= run["stats"]["decode_rows"]
        )
        assert (
            ("vllm:specontext_hot_buffer_misses" in names)
            == ("vllm:specontext_host_pool_bytes" in names)
            == tiered
        )
