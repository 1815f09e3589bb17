"""The budget changes between two starts over one compile cache: what the first start compiled does
not hold its budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.children import engine_env, run_child
from specontext_vllm.synthetic.tasks import make_problem
from tests.engine.conftest import ENGINE

# On a CPU nothing is compiled.
pytestmark = pytest.mark.gpu


def answer(budget: int) -> Iterator[tuple[str, Any]]:
    """Token ids of three replies, and the share of pages read; runs in a child."""
    from vllm import LLM, SamplingParams

    settings = {"specontext": {"budget": budget}}
    shape = {"max_model_len": 4096, "max_num_batched_tokens": 2048, "num_gpu_blocks_override": None}
    llm = LLM(**{**ENGINE, **shape}, attention_backend="specontext", additional_config=settings)
    problems = [make_problem("recitation", seed=70 + i, approx_tokens=2000) for i in range(3)]
    outputs = llm.chat(
        [p.messages for p in problems], SamplingParams(temperature=0, max_tokens=48), use_tqdm=False
    )
    stats = llm.collective_rpc("specontext_stats")[0]
    yield (
        "reply",
        (
            [list(o.outputs[0].token_ids) for o in outputs],
            stats["pages_read"] / stats["pages_total"],
        ),
    )


def test_a_warm_cache_does_not_keep_the_budget(tmp_path):
    def start(cache: Path, budget: int) -> tuple[list[list[int]], float]:
        env = {**engine_env(True), "VLLM_CACHE_ROOT": str(cache)}
        ((_, reply),) = run_child(answer, budget, log=tmp_path / "engine.log", seconds=300, env=env)
        return reply

    _, before = start(tmp_path / "cache", 1024)
    assert any((tmp_path / "cache").rglob("*"))  # or nothing was kept, and nothing is shown
    tokens, warm = start(tmp_path / "cache", 128)
    cold_tokens, cold = start(tmp_path / "another", 128)
    assert tokens == cold_tokens and warm == cold < 0.4 * before
