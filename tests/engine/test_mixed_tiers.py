"""Two tiers beside layers with windows, which vLLM keeps on the GPU in blocks of their own: the
tokens are those of one tier and of stock vLLM, in float32, with NaN in frames that were given up.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from specontext_vllm.distillation.head_shape import HeadShape
from specontext_vllm.engine import other_blocks
from specontext_vllm.retrieval.checkpoint import random_checkpoint, save_head
from tests.engine.families import HYBRID, WINDOWED, Asked, serving, write
from tests.engine.scenarios import preemptions
from tests.engine.test_layer_kinds import PROMPTS, SETTINGS, scenarios
from tests.poison import poisoned_tiers, times_poisoned

BUDGET, BLOCKS = 192, 50
"""Tokens, more than the first two prompts and their answers have; blocks of 32 tokens."""
SHAPE = {"max_num_seqs": 3, "max_model_len": 704, "num_gpu_blocks_override": BLOCKS}
HOST = {"host_kv_gib": 0.05, "gpu_kv_gib": 0.005}
"""Room for the layers with windows, the head's caches, and frames for four fifths of the pages."""
CROWD = [PROMPTS[-1][start : start + 90] for start in (0, 100, 200)]
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="float32 products on a GPU differ from stock vLLM's in their last digits",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Windows in three of five layers, which vLLM keeps in two groups; and a random head."""
    folder = tmp_path_factory.mktemp("llama")
    config = WINDOWED["llama"]()
    write(folder, config)
    spec = HeadShape.for_target(config, max_position=1024).head_spec()
    save_head(folder / "retrieval_head", spec, random_checkpoint(spec, seed=3).tensors)
    return folder


def ours(
    folder: Path, settings: dict[str, Any] | None = None, **shape: Any
) -> AbstractContextManager[Asked]:
    given = {**SETTINGS, "budget": BUDGET, "stickiness": 0, **(settings or {})}
    given["retrieval_head"] = str(folder / "retrieval_head")
    return serving(folder, settings=given, **SHAPE, **shape)


def answers(asked: Asked) -> dict[str, Any]:
    """All scenarios; and a crowd whose answers stay within the budget, so that preempted ones go on
    as they would have.
    """
    return {**scenarios(asked), "crowd": asked.answer(CROWD, 100)}


@pytest.fixture(scope="module")
def one_tier(folder) -> dict[str, Any]:
    with ours(folder) as asked:
        return answers(asked)


@pytest.fixture(scope="module")
def two_tiers(folder) -> dict[str, Any]:
    with poisoned_tiers(), ours(folder, HOST) as asked:
        out = answers(asked)
        out["stats"] = asked.stats
        out["poisoned"] = asked.llm.collective_rpc(times_poisoned)[0]
        out["audit"] = asked.llm.collective_rpc("specontext_audit")[0]
        context = asked.runner.vllm_config.compilation_config.static_forward_context
        out["places"] = {name: layer.kv_cache.shape[0] for name, layer in context.items()}
        out["frames"] = 1 + asked.runner.runtime.tiers.plan.frames
        return out


@pytest.mark.parametrize("scenario", ["first", "again", "hits", "next turn", "crowd"])
def test_tokens_are_those_of_one_tier(one_tier, two_tiers, scenario):
    assert two_tiers[scenario] == one_tier[scenario]
    assert max(one_tier["hits"]) > 300


def test_the_layers_with_windows_have_blocks_for_the_requests_alone(two_tiers):
    places, frames = two_tiers["places"], two_tiers["frames"]
    # Of a request with a step's prompt tokens, of what three that decode hold, twice, and vLLM's
    # null block; in each of the two groups.
    blocks = 1 + 2 * (11 + 2 * 3 * 4)
    windows = ("0", "3", "4")
    assert places == {
        f"model.layers.{i}.self_attn.attn": blocks if str(i) in windows else frames
        for i in range(5)
    }
    stats = two_tiers["stats"]
    assert frames < 2 * 2 * BLOCKS and stats["host_pool_bytes"] > 0
    assert stats["missed_head_pages"] > 0 and stats["loaded_bytes"] > 0
    assert two_tiers["poisoned"] > 0 and two_tiers["audit"]


def test_within_the_budget_tokens_are_stock_s(folder, two_tiers):
    with serving(folder, **SHAPE) as stock:
        expected = scenarios(stock)["first"]
    assert two_tiers["first"][:2] == expected[:2] and two_tiers["first"][2] != expected[2]


def test_where_the_windows_blocks_run_out_requests_wait_and_answer_the_same(
    folder, one_tier, monkeypatch
):
    monkeypatch.setattr(other_blocks, "OTHERS_KEPT", 0)
    # Ten blocks, of which each of three requests wants four to six.
    less = {**HOST, "gpu_kv_gib": 0.0033}
    with ours(folder, less, max_num_batched_tokens=64) as asked:
        assert asked.answer(CROWD, 100) == one_tier["crowd"]
        assert preemptions(asked.llm) > 0
        assert asked.answer(PROMPTS[-1:], 20) == one_tier["first"][-1:]


def test_beside_layers_that_keep_a_state_tokens_are_those_of_one_tier(tmp_path):
    """Mamba 2, which vLLM runs on a CPU without a prefix cache; blocks of three pages."""
    write(tmp_path, HYBRID["granite_hybrid"]())
    settings = {**SETTINGS, "budget": 64, "stickiness": 0, "retriever": "recent"}
    shape = {"max_num_seqs": 3, "num_gpu_blocks_override": 40, "enable_prefix_caching": False}
    with serving(tmp_path, settings=settings, **shape) as asked:
        expected = scenarios(asked)
    tiered = {**settings, "host_kv_gib": 0.05, "gpu_kv_gib": 0.002}
    with poisoned_tiers(), serving(tmp_path, settings=tiered, **shape) as asked:
        assert scenarios(asked) == expected
        context = asked.runner.vllm_config.compilation_config.static_forward_context
        states = {layer.kv_cache[0].shape[0] for name, layer in context.items() if "mixer" in name}
        # One of a request, twice those of three more, and vLLM's null block.
        assert states == {1 + 1 + 2 * 3}
        assert asked.stats["missed_head_pages"] > 0
        assert asked.llm.collective_rpc(times_poisoned)[0] > 0
