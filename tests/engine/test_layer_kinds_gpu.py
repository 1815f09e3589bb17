"""Models whose layers differ on a GPU: vLLM's V2 runner, CUDA graphs, bfloat16.

In 16 bits two kernels may part ways at a near-tie, and what follows differs; a layer that reads
other pages parts at once.
"""

from __future__ import annotations

from itertools import takewhile

import pytest

from tests.engine import scripted
from tests.engine.families import CHUNKED, HYBRID, PLAIN, WINDOWED, serving, write
from tests.engine.test_layer_kinds import BUDGET, PROMPTS, SETTINGS, TOKENS

pytestmark = pytest.mark.gpu
FAMILIES = WINDOWED | HYBRID | PLAIN | CHUNKED
AGREED = 4
"""Leading tokens that answers share on average, at least."""


def agreed(first: list[list[int]], second: list[list[int]]) -> float:
    """Leading tokens that two engines' answers to each prompt share, on average."""
    pairs = (zip(one, other, strict=True) for one, other in zip(first, second, strict=True))
    shared = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pair)) for pair in pairs]
    return sum(shared) / len(shared)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_budget_s_tokens_begin_as_stock_s(family, tmp_path):
    if family == "gemma4":
        pytest.importorskip("cutlass", reason="stock vLLM's attention for Gemma 4 wants it")
    write(tmp_path, FAMILIES[family]())
    # Blocks of 16 tokens for every group of layers that vLLM makes.
    shape = {"dtype": "bfloat16", "num_gpu_blocks_override": 400}
    with serving(tmp_path, **shape) as stock:
        expected = stock.answer(PROMPTS, TOKENS)
    settings = {**SETTINGS, "retriever": "recent"}
    with serving(tmp_path, settings=settings, **shape) as ours:
        assert agreed(ours.answer(PROMPTS, TOKENS), expected) >= AGREED
        # Again, behind prefix hits.
        assert agreed(ours.answer(PROMPTS, TOKENS), expected) >= AGREED
    small = {**settings, "budget": BUDGET + 16}
    with serving(tmp_path, settings=small, **shape) as ours:
        sparse = ours.answer(PROMPTS, TOKENS)
        assert sparse[-1] != expected[-1]
        assert 0 < ours.stats["pages_read"] < 0.5 * ours.stats["pages_total"]


def test_drafts_where_full_layers_are_in_several_groups_begin_as_stock_s(tmp_path):
    write(tmp_path, WINDOWED["olmo3"]())
    shape = {"dtype": "bfloat16", "num_gpu_blocks_override": 400}
    with serving(tmp_path, **shape) as stock:
        expected = stock.answer(PROMPTS, TOKENS)
    settings = {**SETTINGS, "retriever": "recent"}
    shape["speculative_config"] = scripted.CONFIG
    with serving(tmp_path, settings=settings, **shape) as ours:
        assert len(ours.runner.runtime.kv_groups) > 1
        assert agreed(ours.answer(PROMPTS, TOKENS), expected) >= AGREED


@pytest.mark.parametrize(("family", "blocks"), [("granite_hybrid", 40), ("gemma4", 160)])
def test_two_tiers_beside_states_and_shared_kv_begin_as_one_tier(family, blocks, tmp_path):
    write(tmp_path, FAMILIES[family]())
    shape = {"max_num_seqs": 3, "num_gpu_blocks_override": blocks}
    settings = {**SETTINGS, "budget": 64, "retriever": "recent", "stickiness": 0}
    with serving(tmp_path, dtype="bfloat16", settings=settings, **shape) as ours:
        expected = ours.answer(PROMPTS, TOKENS)
    # All layers of attention offloaded.
    tiered = {**settings, "host_kv_gib": 0.05, "gpu_kv_gib": 0.5, "loading": "elastic"}
    with serving(tmp_path, dtype="bfloat16", settings=tiered, **shape) as ours:
        assert agreed(ours.answer(PROMPTS, TOKENS), expected) >= AGREED
        assert agreed(ours.answer(PROMPTS, TOKENS), expected) >= AGREED
        assert ours.stats["missed_head_pages"] > 0


@pytest.mark.parametrize("drafts", [None, scripted.CONFIG], ids=["", "drafts"])
def test_two_tiers_beside_windows_begin_as_one_tier(drafts, tmp_path):
    write(tmp_path, WINDOWED["llama"]())
    shape = {"max_num_seqs": 3, "max_model_len": 704, "num_gpu_blocks_override": 200}
    shape["speculative_config"] = drafts
    settings = {**SETTINGS, "budget": 192, "retriever": "recent", "stickiness": 0}
    with serving(tmp_path, dtype="bfloat16", settings=settings, **shape) as ours:
        expected = ours.answer(PROMPTS, TOKENS)
    # Frames for some 180 of 200 pages, beside what the windows have.
    tiered = {**settings, "host_kv_gib": 0.05, "gpu_kv_gib": 0.0017}
    with serving(tmp_path, dtype="bfloat16", settings=tiered, **shape) as ours:
        tiers = ours.runner.runtime.tiers
        assert tiers.plan.host_layers > 0 and tiers.plan.frames < 200
        assert agreed(ours.answer(PROMPTS, TOKENS), expected) >= AGREED
        # Again, behind prefix hits, which come from the host pool.
        assert agreed(ours.answer(PROMPTS, TOKENS), expected) >= AGREED
        assert ours.stats["missed_head_pages"] > 0
