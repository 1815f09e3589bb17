"""Drafts beside layers with windows on two tiers: the demo model, half of whose layers are given a
window, with the demo's head as drafter. Its layer is in one group of blocks with ours.
"""

from __future__ import annotations

from typing import Any

import pytest

from specontext_vllm.config import PAGE_SIZE, SpeContextConfig
from tests.conftest import CUDA
from tests.engine.conftest import DEMO_MODEL, engine
from tests.engine.families import FULL, SLIDING
from tests.engine.scenarios import ids, sampling
from tests.engine.shared_runs import SETTINGS, SHAPE, SMALL
from tests.engine.test_drafts import HEAD, Watched
from tests.poison import poisoned_tiers, times_poisoned

pytestmark = pytest.mark.skipif(CUDA, reason="a GPU's float32 products are rounded")
LAYERS = {"layer_types": [SLIDING, FULL] * 3, "sliding_window": 128}
EAGLE = {"method": "eagle3", "model": HEAD, "num_speculative_tokens": 3}
BLOCKS = 130
"""Of 32 tokens, more than three prompts have in both groups of one tier."""
HOST = {"host_kv_gib": 0.1, "gpu_kv_gib": 0.0135}


def answers(asked: Watched, prompts: list[list[int]]) -> dict[str, Any]:
    """All prompts at once, a prefix hit and a turn behind it; and what became of the drafts."""

    def answer(*chosen: list[int]) -> list[list[int]]:
        texts = [{"prompt_token_ids": prompt} for prompt in chosen]
        outputs = asked.llm.generate(texts, sampling(), use_tqdm=False)
        asked.hits = outputs[-1].num_cached_tokens
        return ids(outputs)

    def ask() -> dict[str, Any]:
        out: dict[str, Any] = {"together": answer(*prompts)}
        (hit,) = out["prefix hit"] = answer(prompts[-1])
        out["next turn"] = answer(prompts[-1] + hit + prompts[4][:40])
        return out

    out, counts = asked.counting(ask)
    return out | {"counts": counts}


@pytest.fixture(scope="module")
def served(prompts) -> dict[str, Any]:
    """What an engine with one tier and one with two answer."""
    out: dict[str, Any] = {}
    shape = {**SHAPE, "block_size": None, "num_gpu_blocks_override": BLOCKS}
    shape |= {"model": str(DEMO_MODEL), "hf_overrides": LAYERS, "speculative_config": EAGLE}
    with pytest.MonkeyPatch.context() as patch:
        # As wide as with two tiers, which is what a drafter reads after a prompt.
        patch.setattr(
            SpeContextConfig,
            "allocated_table_pages",
            lambda config, length, device, drafts=0: config.table_pages(length, drafts),
        )
        with engine(**shape, additional_config={"specontext": SETTINGS}) as llm:
            out["one"] = answers(Watched(llm), prompts)
    with (
        poisoned_tiers(),
        engine(**shape, additional_config={"specontext": SETTINGS | HOST}) as llm,
    ):
        watched = Watched(llm)
        out["two"] = answers(watched, prompts)
        out["hits"], runtime = watched.hits, watched.runner.runtime
        out["stats"] = llm.collective_rpc("specontext_stats")[0]
        out["poisoned"] = llm.collective_rpc(times_poisoned)[0]
        out["audit"] = llm.collective_rpc("specontext_audit")[0]
        context = watched.runner.vllm_config.compilation_config.static_forward_context
        out["places"] = {name: layer.kv_cache.shape[0] for name, layer in context.items()}
        out["plan"], out["ours"] = runtime.tiers.plan, runtime.layers.names
    return out


@pytest.mark.parametrize("scenario", ["together", "prefix hit", "next turn"])
def test_tokens_are_those_of_one_tier(served, scenario):
    assert served["two"][scenario] == served["one"][scenario]
    assert served["hits"] > 300


def test_within_the_budget_tokens_are_stock_s(served, stock, prompts):
    short = [place for place, prompt in enumerate(prompts) if len(prompt) + 16 <= SMALL]
    assert len(short) == 4
    for place in short:
        assert served["two"]["together"][place] == stock["plain"][place]


def test_the_drafter_s_layer_has_a_place_for_each_block_of_ours(served):
    """Else it would draft from other requests' tokens."""
    one, two = served["one"]["counts"], served["two"]["counts"]
    assert two == one and two["accepted_tokens"] > 0.25 * two["draft_tokens"] > 0
    plan, windows = served["plan"], {f"model.layers.{i}.self_attn.attn" for i in (0, 2, 4)}
    (drafter,) = set(served["places"]) - set(served["ours"]) - windows
    assert served["places"][drafter] == BLOCKS * 32 // PAGE_SIZE == plan.num_pages
    assert plan.parts["drafter's KV"] > 0
    assert {served["places"][name] for name in served["ours"]} == {1 + plan.frames}
    assert max(served["places"][name] for name in windows) < BLOCKS


def test_pages_came_from_the_host_and_nothing_reads_what_was_given_up(served):
    stats = served["stats"]
    assert stats["missed_head_pages"] > 0 and stats["fetched_bytes"] > 0
    assert stats["layer_moves"] > 0 and served["poisoned"] > 0 and served["audit"]
