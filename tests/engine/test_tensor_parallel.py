"""Two workers, each with one of the demo model's two KV heads: each scores and selects for its own, and the tokens are one worker's."""

from __future__ import annotations

import pytest
import torch

from specontext_vllm.demo.tasks import make_problem, score
from tests.engine.conftest import engine

SHAPE = {"attention_backend": "specontext", "max_model_len": 4096, "max_num_batched_tokens": 2048}


def parallel(workers: int) -> dict:
    """Arguments of ``LLM`` for so many workers."""
    return {"tensor_parallel_size": workers, "distributed_executor_backend": "mp"} if workers > 1 else {}


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_workers_give_the_tokens_of_one_with_one_tier_and_with_two(monkeypatch):
    from vllm import SamplingParams

    pages, pool = 520, 0.25
    problems = [make_problem("needle", seed=40 + i, approx_tokens=2500) for i in range(2)]
    problems.append(make_problem("recitation", seed=50, approx_tokens=2500))
    params = [SamplingParams(temperature=0, max_tokens=24 + 2 * len(p.answer.split())) for p in problems]
    tokens, texts = {}, {}
    for name, workers, tiers in (
        ("alone", 1, {}), ("one", 2, {}), ("two", 2, {"host_kv_gib": pool, "gpu_kv_gib": 0.0115, "stickiness": 0})
    ):  # fmt: skip
        settings = {"specontext": {"budget": 256, **tiers}}
        if workers > 1:
            # vLLM's CPU workers want to be told their cores where the machine has no second NUMA node.
            monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        with engine(**SHAPE, **parallel(workers), num_gpu_blocks_override=pages, additional_config=settings) as llm:
            replies = llm.chat([p.messages for p in problems], params, use_tqdm=False)
            stats = llm.collective_rpc("specontext_stats")
        tokens[name] = [list(r.outputs[0].token_ids) for r in replies]
        texts[name] = [r.outputs[0].text for r in replies]
        assert len(stats) == workers
        for worker in stats:
            assert worker["pages_read"] < 0.12 * worker["pages_total"]
        if tiers:
            # The pool is the machine's: its workers share it.
            assert 0 < sum(worker["host_pool_bytes"] for worker in stats) <= pool * 2**30
            assert all(worker["fetched_bytes"] > 0 for worker in stats)
    assert [score(p, text) for p, text in zip(problems, texts["one"])] == [1.0] * 3
    assert tokens["two"] == tokens["one"] == tokens["alone"]
