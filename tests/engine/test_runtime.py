"""Changing settings between steps, without an engine."""

from types import SimpleNamespace

import pytest
from vllm.config import CUDAGraphMode

from specontext_vllm.config import ConfigError, SpeContextConfig
from specontext_vllm.engine import runtime as runtime_module
from specontext_vllm.engine.runtime import Runtime, asked_host_bytes, recommended_host_bytes
from specontext_vllm.retrieval.local import LocalRetriever


@pytest.fixture
def runtime(device):
    """One without a model, with a retriever that has no head and a page table of 512 tokens;
    nothing is captured.
    """
    config = SpeContextConfig(retriever="recent", budget=256)
    retriever = LocalRetriever(
        config,
        None,
        lambda ids: ids,
        num_kv_heads=2,
        max_model_len=1024,
        table_pages=32,
        device=device,
    )
    bare = object.__new__(Runtime)
    bare.config, bare.retriever, bare.selector, bare._max_model_len = config, retriever, None, 1024
    bare.vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE)
    )
    return bare


def test_what_is_not_named_stays(runtime):
    runtime.set(confidence_threshold=0.25, fallback_budget=512)
    found = runtime.set("random", 128, recent_tokens=32)
    assert (found["retriever"], found["budget"], found["recent_tokens"]) == ("random", 128, 32)
    assert (found["confidence_threshold"], found["fallback_budget"], found["stickiness"]) == (
        0.25,
        512,
        1.0,
    )
    assert runtime.retriever.config.model_dump() == found
    assert runtime.set(confidence_threshold=0.0)["confidence_threshold"] == 0.0


def test_a_budget_below_the_one_of_the_start_is_said_to_leave_the_prefix_cache_as_it_was(
    runtime, monkeypatch
):
    told = []
    monkeypatch.setattr(
        runtime_module.logger, "warning", lambda text, *values: told.append(text % values)
    )
    runtime.set(budget=256)
    assert not told
    runtime.set(budget=128)
    assert (
        len(told) == 1
        and "over 128 tokens are read in part now" in told[0]
        and "up to 256" in told[0]
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"confidence_threshold": 1.5}, "confidence_threshold: found 1.5"),
        ({"fallback_budget": 128}, "fallback_budget: found 128"),
        # Four budgets of 256 tokens do not fit the table.
        ({"confidence_threshold": 0.5}, "page table holds 512 tokens"),
        ({"recent_tokens": 256}, "budget: found 256"),
        ({"retriever": "dlm"}, "needs a retrieval head"),
        ({"retriever": "quest"}, "start the engine with it"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_leave_the_old_ones_in_force(runtime, changes, named):
    before = runtime.retriever.config
    with pytest.raises(ConfigError, match=named):
        runtime.set(**changes)
    assert runtime.retriever.config is before


def test_graphs_that_hold_a_selection_hold_on_to_its_settings(runtime):
    runtime.vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    with pytest.raises(ConfigError, match="CUDA graphs hold the selection"):
        runtime.set("oracle")
    assert runtime.set("random")["retriever"] == "random"


def test_auto_leaves_a_reserve_and_takes_no_more_than_requests_can_fill():
    gib = 2**30
    assert recommended_host_bytes(20 * gib, 500 * gib) == 12 * gib
    assert recommended_host_bytes(500 * gib, 1000 * gib) == 450 * gib
    assert recommended_host_bytes(500 * gib, 80 * gib) == 80 * gib
    with pytest.raises(
        ConfigError,
        match=r"host_kv_gib: found 'auto', but this machine has 7\.00 GiB of memory free, all within the 8\.00 GiB that auto leaves alone",
    ):
        recommended_host_bytes(7 * gib, 80 * gib)


def test_engines_on_one_machine_share_what_was_asked_for():
    assert asked_host_bytes(40, 41 << 30, 1) == asked_host_bytes(40, 20 << 30, 2) == 40 << 30
    with pytest.raises(
        ConfigError,
        match=r"host_kv_gib: found 40, of which this engine takes 20\.00 GiB, but this machine has 19\.00 GiB of memory free; lower it",
    ):
        asked_host_bytes(40, 19 << 30, 2)
    with pytest.raises(
        ConfigError, match=r"takes 20\.00000 GiB, but this machine has 19\.99999 GiB"
    ):
        asked_host_bytes(40, (20 << 30) - 10_000, 2)
