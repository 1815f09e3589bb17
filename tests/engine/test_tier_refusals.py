"""A host pool that cannot be had stops the engine at its start, with a sentence that has the
numbers.
"""

from __future__ import annotations

import pytest

from specontext_vllm.engine import kv_plan
from specontext_vllm.engine.kv_group import Block
from tests.engine.conftest import DEMO_MODEL, engine

HEAD = {"retrieval_head": str(DEMO_MODEL / "retrieval_head"), "budget": 128}


@pytest.mark.parametrize(
    ("shape", "settings", "sentence"),
    [
        (
            {},
            {"host_kv_gib": 1e6},
            r"host_kv_gib: found 1000000.00, but this machine has [\d.]+ GiB of memory; lower it",
        ),
        (
            {},
            {"host_kv_gib": 0.1, "gpu_kv_gib": 0.012, "budget": 1520},
            r"host_kv_gib: the hot buffer of a single request takes so much of the 0.01",
        ),
        (
            {"num_gpu_blocks_override": 40000},
            {"host_kv_gib": 0.1, "gpu_kv_gib": 0.01},
            r"host_kv_gib: --num-gpu-blocks-override 40000 blocks need",
        ),
    ],
    ids=["too large", "gains nothing", "too many blocks"],
)
def test_refused_with_the_numbers(shape, settings, sentence):
    arguments = {"attention_backend": "specontext", "num_gpu_blocks_override": None, **shape}
    with pytest.raises(ValueError, match=sentence):
        with engine(**arguments, additional_config={"specontext": {**HEAD, **settings}}):
            pass


def test_a_pool_that_nothing_needs_is_said_and_the_engine_runs_with_one_tier(prompts, monkeypatch):
    """Named regression: with all pages in the engine's own memory no layer is mirrored, and the
    start ended in an IndexError.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    said = []
    monkeypatch.setattr(
        kv_plan.logger, "warning", lambda message, *values: said.append(message % values)
    )
    with engine(
        attention_backend="specontext",
        additional_config={"specontext": {**HEAD, "host_kv_gib": 0.1, "gpu_kv_gib": 0.5}},
    ) as llm:
        runtime = llm.llm_engine.model_executor.driver_worker.worker.model_runner.runtime
        assert runtime.tiers is None and llm.collective_rpc("specontext_audit") == [{}]
        assert "hot_tokens" not in llm.collective_rpc("specontext_stats")[0]
        blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        assert (
            blocks
            == 101
            == runtime.retriever.cache.keys.shape[0]
            == runtime.kv_plan.num_blocks(1 << 29, Block(1, pages=1, other_bytes=0, layers=6))
        )
        (output,) = llm.generate([{"prompt_token_ids": prompts[-1]}], sampling, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 8
    told = "host_kv_gib 0.1, but no layer is mirrored: the 101 blocks of --num-gpu-blocks-override"
    assert any(told in sentence for sentence in said)
