"""Selections per layer inside captured decode graphs: the same tokens as without graphs."""

from __future__ import annotations

import pytest

from specontext_vllm.demo.tasks import make_problem
from tests.engine.conftest import engine

pytestmark = pytest.mark.gpu

BUDGET = 512


def answers(**changes) -> tuple[list[str], dict]:
    from vllm import SamplingParams

    problems = [make_problem("needle" if i % 2 else "recitation", seed=900 + i, approx_tokens=1200 + 100 * i) for i in range(4)]
    settings = {"specontext": {"retriever": "quest", "budget": BUDGET}}
    with engine(attention_backend="specontext", additional_config=settings, max_model_len=2048, num_gpu_blocks_override=None, **changes) as llm:
        outputs = llm.chat([p.messages for p in problems], SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)
        return [o.outputs[0].text for o in outputs], llm.collective_rpc("specontext_stats")[0]


def test_graphs_select_as_eager_steps_do():
    captured, stats = answers(enforce_eager=False)
    eager, _ = answers(enforce_eager=True)
    assert stats["pages_read"] < 0.6 * stats["pages_total"]
    assert captured == eager
