"""Selections per layer inside captured decode graphs: the same tokens as without graphs, and those
of quest's own selection.
"""

from __future__ import annotations

import pytest

from specontext_vllm.synthetic.tasks import make_problem
from tests.engine.conftest import engine

pytestmark = pytest.mark.gpu

BUDGET = 256


def answers(retriever: str, **changes) -> tuple[list[str], list[str], dict]:
    """To six problems at once, to each of them alone, and the counts of the former."""
    from vllm import SamplingParams

    problems = [
        make_problem("needle" if i % 2 else "recitation", seed=900 + i, approx_tokens=1200 + 80 * i)
        for i in range(6)
    ]
    settings = {"specontext": {"retriever": retriever, "budget": BUDGET}}
    params = SamplingParams(temperature=0, max_tokens=60)
    with engine(
        attention_backend="specontext",
        additional_config=settings,
        max_model_len=2048,
        num_gpu_blocks_override=None,
        **changes,
    ) as llm:
        together = llm.chat([p.messages for p in problems], params, use_tqdm=False)
        stats = llm.collective_rpc("specontext_stats")[0]
        alone = [llm.chat([p.messages], params, use_tqdm=False)[0] for p in problems]
        return [o.outputs[0].text for o in together], [o.outputs[0].text for o in alone], stats


def test_graphs_select_as_eager_steps_do():
    captured, captured_alone, stats = answers("quest", enforce_eager=False)
    eager, eager_alone, _ = answers("quest", enforce_eager=True)
    assert stats["pages_read"] < 0.4 * stats["pages_total"]
    assert captured == captured_alone == eager == eager_alone
    # Or the two would be equal whatever they read.
    random, _, _ = answers("random", enforce_eager=True)
    assert all(ours != theirs for ours, theirs in zip(eager, random, strict=True))
