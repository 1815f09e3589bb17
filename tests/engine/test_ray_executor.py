"""vLLM's Ray executor with one GPU: plugin, worker class, settings and /metrics survive Ray's own
way of starting processes.
"""

from __future__ import annotations

import pytest

from specontext_vllm.synthetic.tasks import make_problem, score
from tests.engine.conftest import engine

# vLLM 0.32 refuses Ray on a CPU.
pytestmark = pytest.mark.gpu


def test_the_ray_executor_answers_from_few_pages():
    pytest.importorskip("ray", reason="needs Ray (extra sidecar)")
    from vllm import SamplingParams

    problems = [make_problem("needle", seed=60 + i, approx_tokens=2500) for i in range(3)]
    settings = {"specontext": {"budget": 256}}
    shape = {
        "max_model_len": 4096,
        "max_num_batched_tokens": 2048,
        "num_gpu_blocks_override": None,
        "dtype": "bfloat16",
    }
    with engine(
        attention_backend="specontext",
        additional_config=settings,
        distributed_executor_backend="ray",
        **shape,
    ) as llm:
        replies = llm.chat(
            [p.messages for p in problems],
            SamplingParams(temperature=0, max_tokens=40),
            use_tqdm=False,
        )
        (stats,) = llm.collective_rpc("specontext_stats")
        # Steps with nothing left to do, in which the worker publishes what it has counted: one says
        # that all are gone, others may be under way.
        for _ in range(3):
            llm.llm_engine.step()
        shown = {
            metric.name: metric.value
            for metric in llm.get_metrics()
            if "specontext" in metric.name and hasattr(metric, "value")
        }
    assert [score(p, r.outputs[0].text) for p, r in zip(problems, replies, strict=True)] == [
        1.0
    ] * 3
    assert 0 < stats["pages_read"] < 0.12 * stats["pages_total"]
    # The figures crossed from Ray's process to this one's /metrics.
    assert shown["vllm:specontext_decode_rows"] == stats["decode_rows"] > 0
    assert shown["vllm:specontext_head_pages_read"] == stats["pages_read"]
