"""Two workers, each with one of the demo model's two KV heads: each scores and selects for its own."""

from __future__ import annotations

import pytest
import torch

from specontext_vllm.demo.tasks import make_problem, score
from tests.engine.conftest import engine


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_workers_answer_from_few_pages(monkeypatch):
    from vllm import SamplingParams

    # vLLM's CPU workers want to be told their cores where the machine has no second NUMA node.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    problems = [make_problem("needle", seed=40 + i, approx_tokens=2500) for i in range(2)]
    problems.append(make_problem("recitation", seed=50, approx_tokens=2500))
    params = [SamplingParams(temperature=0, max_tokens=24 + 2 * len(p.answer.split())) for p in problems]
    with engine(
        attention_backend="specontext", additional_config={"specontext": {"budget": 256}}, tensor_parallel_size=2,
        distributed_executor_backend="mp", max_model_len=4096, num_gpu_blocks_override=None, max_num_batched_tokens=2048,
    ) as llm:  # fmt: skip
        replies = llm.chat([p.messages for p in problems], params, use_tqdm=False)
        stats = llm.collective_rpc("specontext_stats")
    assert [score(p, r.outputs[0].text) for p, r in zip(problems, replies)] == [1.0] * 3
    assert len(stats) == 2
    for worker in stats:
        assert worker["pages_read"] < 0.12 * worker["pages_total"]
