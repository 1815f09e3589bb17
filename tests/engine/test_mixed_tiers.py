"""Two tiers beside layers with windows, which vLLM keeps on the GPU in blocks of their own, and
where layers read the KV of another one: the tokens are those of one tier and of stock vLLM, in
float32, with NaN in frames that were given up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from specontext_vllm.engine import other_blocks
from specontext_vllm.retrieval.checkpoint import save_head
from tests.engine.families import HYBRID, WINDOWED, Asked, gemma4, serving, write
from tests.engine.planned import planned_as_served
from tests.engine.scenarios import preemptions, sampling
from tests.engine.test_layer_kinds import PROMPTS, SETTINGS, scenarios
from tests.poison import poisoned_tiers, times_poisoned
from tests.retrieval.own_heads import make_own

SHAPE = {"max_num_seqs": 3, "max_model_len": 704}
CROWD = [PROMPTS[-1][start : start + 90] for start in (0, 100, 200)]
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="float32 products on a GPU differ from stock vLLM's in their last digits",
)


@dataclass(frozen=True)
class Case:
    """A model, and an engine's sizes.

    Attributes:
        config: makes the model's.
        budget: tokens, more than the first two prompts and their answers have.
        blocks: of the layers of full attention.
        gpu_kv_gib: room for the layers with windows, the head's caches, and frames for some of the
            pages in all layers.
    """

    config: Callable[[], Any]
    budget: int
    blocks: int
    gpu_kv_gib: float

    @property
    def host(self) -> dict[str, Any]:
        return {"host_kv_gib": 0.05, "gpu_kv_gib": self.gpu_kv_gib}

    @property
    def shape(self) -> dict[str, Any]:
        return {**SHAPE, "num_gpu_blocks_override": self.blocks}


CASES = {
    # Windows in three of five layers, which vLLM keeps in two groups; blocks of 32 tokens.
    "llama": Case(WINDOWED["llama"], 192, 50, 0.0038),
    # Of five layers of full attention the last two read the KV of the third.
    "gemma4": Case(lambda: gemma4(pairs=5, readers=4), 160, 160, 0.0053),
}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory) -> Path:
    """The model, and a random head."""
    folder = tmp_path_factory.mktemp("model")
    write(folder, case.config())
    head = make_own(
        hidden_size=128,
        target_hidden_size=128,
        embed_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        aux_layer_ids=(1, 2, 3),
        num_aux=3,
        target_vocab_size=97,
        trained_length=1024,
    )
    save_head(folder / "retrieval_head", head.spec, head.tensors, dtype=None)
    return folder


def ours(
    folder: Path, case: Case, settings: dict[str, Any] | None = None, **shape: Any
) -> AbstractContextManager[Asked]:
    given = {**SETTINGS, "budget": case.budget, "stickiness": 0, **(settings or {})}
    given["retrieval_head"] = str(folder / "retrieval_head")
    return serving(folder, settings=given, **case.shape, **shape)


def answers(asked: Asked) -> dict[str, Any]:
    """All scenarios; a crowd whose answers stay within the budget of the first case, so that
    preempted ones go on as they would have; and requests that are all preempted at once.
    """
    return {
        **scenarios(asked),
        "crowd": asked.answer(CROWD, 100),
        "all preempted": all_preempted(asked),
    }


def all_preempted(asked: Asked) -> dict[str, list[int]]:
    """Tokens of requests that are preempted while they decode."""
    asked.llm.reset_prefix_cache()
    core, prompts = asked.llm.llm_engine, (PROMPTS[0], PROMPTS[-1])
    for name, prompt in enumerate(prompts):
        core.add_request(str(name), {"prompt_token_ids": prompt}, sampling(max_tokens=20))
    before, tokens, steps = preemptions(asked.llm), {}, 0
    while core.has_unfinished_requests():
        for reply in core.step():
            tokens[reply.request_id[0]] = list(reply.outputs[0].token_ids)
        steps += 1
        if steps == 10:
            core.reset_prefix_cache(reset_running_requests=True)
    assert preemptions(asked.llm) - before == len(prompts)
    return tokens


@pytest.fixture(scope="module")
def one_tier(folder, case) -> dict[str, Any]:
    with ours(folder, case) as asked:
        return answers(asked)


@pytest.fixture(scope="module")
def two_tiers(folder, case) -> dict[str, Any]:
    with poisoned_tiers(), ours(folder, case, case.host) as asked:
        tiers, staged = asked.runner.runtime.tiers, Counter()
        rows = tiers.staged_rows
        tiers.staged_rows = lambda place: staged.update([place]) or rows(place)
        out = answers(asked)
        out["staged"], out["layers"] = staged, asked.runner.runtime.layers
        out["stats"] = asked.stats
        out["poisoned"] = asked.llm.collective_rpc(times_poisoned)[0]
        out["audit"] = asked.llm.collective_rpc("specontext_audit")[0]
        context = asked.runner.vllm_config.compilation_config.static_forward_context
        out["places"] = {name: layer.kv_cache.shape[0] for name, layer in context.items()}
        out["frames"] = 1 + asked.runner.runtime.tiers.plan.frames
        return out


@pytest.mark.parametrize(
    "scenario", ["first", "again", "hits", "next turn", "crowd", "all preempted"]
)
def test_tokens_are_those_of_one_tier(one_tier, two_tiers, scenario):
    assert two_tiers[scenario] == one_tier[scenario]
    assert max(one_tier["hits"]) > 300


def test_pages_came_from_the_host_and_nothing_reads_what_was_given_up(two_tiers):
    stats, staged, layers = two_tiers["stats"], two_tiers["staged"], two_tiers["layers"]
    assert stats["missed_head_pages"] > 0 and stats["loaded_bytes"] > 0
    assert stats["fetched_bytes"] > 0 and stats["layer_moves"] > 0
    assert two_tiers["poisoned"] > 0 and two_tiers["audit"]
    # Those that read the KV of the last layer that has any, too.
    assert all(staged[place] > 0 for place in range(len(layers.kv_names) - 1, len(layers.names)))


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_the_layers_with_windows_have_blocks_for_the_requests_alone(two_tiers, case):
    places, frames = two_tiers["places"], two_tiers["frames"]
    # Of a request with a step's prompt tokens, of what three that decode hold, twice, and vLLM's
    # null block; in each of the two groups.
    blocks = 1 + 2 * (11 + 2 * 3 * 4)
    windows = ("0", "3", "4")
    assert places == {
        f"model.layers.{i}.self_attn.attn": blocks if str(i) in windows else frames
        for i in range(5)
    }
    assert frames < 2 * 2 * case.blocks and two_tiers["stats"]["host_pool_bytes"] > 0


def test_within_the_budget_tokens_are_stock_s(folder, case, two_tiers):
    with serving(folder, **case.shape) as stock:
        expected = scenarios(stock)["first"]
    assert two_tiers["first"][:2] == expected[:2] and two_tiers["first"][2] != expected[2]


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_where_the_windows_blocks_run_out_requests_wait_and_answer_the_same(
    folder, case, one_tier, monkeypatch
):
    monkeypatch.setattr(other_blocks, "OTHERS_KEPT", 0)
    # Ten blocks, of which each of three requests wants four to six.
    less = {**case.host, "gpu_kv_gib": 0.0022}
    with ours(folder, case, less, max_num_batched_tokens=64) as asked:
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
        parts = asked.runner.runtime.tiers.plan.parts
        planned = planned_as_served(tmp_path, asked).others.apart_bytes(1024, 3)
        assert parts["layers of other kinds"] == planned
        assert asked.stats["missed_head_pages"] > 0
        assert asked.llm.collective_rpc(times_poisoned)[0] > 0
