"""vLLM's Ray executor with one GPU: plugin, worker class and settings survive Ray's own way of starting processes."""

from __future__ import annotations

import pytest

from specontext_vllm.demo.tasks import make_problem, score
from tests.engine.conftest import engine

# vLLM 0.32 refuses Ray on a CPU.
pytestmark = pytest.mark.gpu


def test_the_ray_executor_answers_from_few_pages():
    pytest.importorskip("ray", reason="needs Ray (extra sidecar)")
    from vllm import SamplingParams

    problems = [make_problem("needle", seed=60 + i, approx_tokens=2500) for i in range(3)]
    settings = {"specontext": {"budget": 256}}
    shape = {"max_model_len": 4096, "max_num_batched_tokens": 2048, "num_gpu_blocks_override": None, "dtype": "bfloat16"}
    with engine(attention_backend="specontext", additional_config=settings, distributed_executor_backend="ray", **shape) as llm:
        replies = llm.chat([p.messages for p in problems], SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
        (stats,) = llm.collective_rpc("specontext_stats")
    assert [score(p, r.outputs[0].text) for p, r in zip(problems, replies, strict=True)] == [1.0] * 3
    assert 0 < stats["pages_read"] < 0.12 * stats["pages_total"]
