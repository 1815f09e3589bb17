"""Layers of full attention that vLLM keeps in several groups, each with blocks of its own: drafts
and the lossless mode. The demo model, two of whose layers are said to have a window, of more tokens
than any context here: the tokens are the demo model's own.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch.testing import assert_close

from tests.conftest import CUDA
from tests.engine.conftest import DEMO_MODEL, engine
from tests.engine.families import FULL, SLIDING
from tests.engine.poison import poison_unread
from tests.engine.scenarios import ids, preemptions, sampling
from tests.engine.shared_runs import SETTINGS, SHAPE, SMALL, WHOLE
from tests.engine.test_drafts import HEAD, Watched
from tests.engine.test_lossless import CLOSE, Drafting

pytestmark = pytest.mark.skipif(CUDA, reason="a GPU's float32 products are rounded")
LAYERS = {"layer_types": [FULL, FULL, SLIDING] * 2, "sliding_window": 2048}
EAGLE = {"method": "eagle3", "model": HEAD, "num_speculative_tokens": 3}


def sized(blocks: int, **arguments: Any) -> dict[str, Any]:
    """Blocks of 32 tokens, for layers with windows too."""
    shape = {**SHAPE, "block_size": None, "num_gpu_blocks_override": blocks}
    return {**shape, "model": str(DEMO_MODEL), "hf_overrides": LAYERS, **arguments}


def answers(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """All prompts at once; a prefix hit, and a turn behind it."""

    def answer(*chosen: list[int], count: int = 16) -> list[list[int]]:
        asked = [{"prompt_token_ids": prompt} for prompt in chosen]
        return ids(llm.generate(asked, sampling(max_tokens=count), use_tqdm=False))

    llm.reset_prefix_cache()
    out = {"ragged": answer(*prompts[::-1], count=90)}
    answer(prompts[-1], count=1)
    (hit,) = out["prefix hit"] = answer(prompts[-1])
    out["next turn"] = answer(prompts[-1] + hit + prompts[4][:40])
    return out


def of_stock(stock: dict[str, Any]) -> dict[str, Any]:
    return {name: stock[name] for name in ("ragged", "prefix hit", "next turn")}


def test_lossless_mode_is_that_of_dense_attention(stock, prompts):
    settings = {**SETTINGS, "budget": SMALL, "mode": "lossless"}
    with engine(**sized(170), additional_config={"specontext": settings}) as llm:
        drafting = Drafting(llm)
        assert [len(group.layer_names) for group in drafting.runtime.kv_groups] == [2, 2]
        drafting.draft(3, 1, 6, 0, 2, 4)
        assert answers(llm, prompts) == of_stock(stock) and preemptions(llm) > 0
        drafting.draft(0)
        tokens = drafting.answer(prompts[-1], 60)
        length = len(prompts[-1]) + 59
        drafting.answer(prompts[-1] + tokens[:-1], 1)
        kv, keys = drafting.kv(length).clone(), drafting.head_keys(length)[1:].clone()
        drafting.draft(4)
        # Over all pages drafts are the model's own tokens, if each group's KV is where it belongs.
        drafting.set(budget=WHOLE)
        assert drafting.answer(prompts[-1], 60) == tokens and set(drafting.accepted[:-1]) == {4}
        drafting.set(budget=SMALL)
        found = []
        for is_poisoned in (False, True):
            if is_poisoned:
                seen: dict[str, Any] = {}
                poison_unread(drafting.runner, seen)
            assert drafting.answer(prompts[-1], 60) == tokens
            found.append(list(drafting.accepted))
            assert_close(drafting.kv(length), kv, atol=CLOSE, rtol=CLOSE)
            assert_close(drafting.head_keys(length)[1:], keys, atol=CLOSE, rtol=CLOSE)
        assert found[0] == found[1] and seen["poisoned pages"] > 0
        assert sum(found[0]) > 0.4 * 4 * len(found[0])


def test_drafts_are_verified_over_the_pages_of_each_group(stock, prompts):
    """Of a drafter whose layer is in one of the groups, or in one of its own."""
    settings = {**SETTINGS, "budget": WHOLE}
    options = {"additional_config": {"specontext": settings}, "speculative_config": EAGLE}
    with engine(**sized(230), **options) as llm:
        watched = Watched(llm)
        assert len(watched.runner.runtime.kv_groups) > 1
        found, counts = watched.counting(lambda: answers(llm, prompts))
        assert found == of_stock(stock) and preemptions(llm) > 0
        # The demo's head drafts the first token well, and none behind it.
        assert counts["accepted_tokens"] > 0.25 * counts["draft_tokens"]
        watched.set(budget=SMALL)
        sparse = watched.answer(prompts[-1], 60)
        seen: dict[str, Any] = {}
        poison_unread(watched.runner, seen)
        assert watched.answer(prompts[-1], 60) == sparse and seen["poisoned pages"] > 0
