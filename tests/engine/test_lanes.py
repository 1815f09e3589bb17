"""With vLLM's default of 256 for --max-num-seqs as many requests run at once as the memory model
has hot buffers for; the others wait, and answer as they do alone.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from specontext_vllm import planning
from specontext_vllm.config import SpeContextConfig
from specontext_vllm.engine import kv_plan
from tests.conftest import CUDA
from tests.engine.conftest import DEMO_MODEL, engine
from tests.engine.scenarios import ids, sampling

GPU_BYTES, HOST_BYTES = int(0.006 * 2**30), int(0.05 * 2**30)
LENGTH = 704
SETTINGS = {
    "retrieval_head": str(DEMO_MODEL / "retrieval_head"),
    "budget": 64,
    "sink_tokens": 16,
    "recent_tokens": 16,
    "stickiness": 0,
    "gpu_kv_gib": 0.006,
    "host_kv_gib": 0.05,
}


def start(**arguments):
    return engine(
        attention_backend="specontext",
        max_model_len=LENGTH,
        num_gpu_blocks_override=None,
        enable_prefix_caching=False,
        additional_config={"specontext": SETTINGS},
        **arguments,
    )


def retriever_bytes(worker) -> int:
    return worker.model_runner.runtime.retriever.bytes_per_block


def planned(bytes_per_page: int, requests: int, monkeypatch) -> planning.Plan:
    """What `specontext plan` says of the engine: of its memory, without graphs, with its head."""
    model = planning.read_model(DEMO_MODEL)
    # In float32.
    model = replace(model, kv=replace(model.kv, itemsize=4, retriever_page_bytes=bytes_per_page))
    monkeypatch.setattr(planning, "default_captured_rows", lambda requests: 0)
    used = GPU_BYTES + model.weight_bytes + model.head_bytes + planning.ACTIVATIONS
    return planning.make_plan(
        model,
        SpeContextConfig(budget=64, sink_tokens=16, recent_tokens=16),
        gpu_bytes=-int(-used // planning.UTILIZATION),
        host_bytes=HOST_BYTES,
        requests=requests,
        max_model_len=LENGTH,
        miss_rate=None,
        link_bytes_per_s=5e10,
    )


def gauge(llm, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:num_requests_{name}")


def crowd(llm, prompts, **changes) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The tokens of all prompts at once, and after each step how many ran and waited."""
    inner, seen, outputs = llm.llm_engine, [], {}
    for name, prompt in enumerate(prompts):
        inner.add_request(str(name), {"prompt_token_ids": prompt}, sampling(**changes))
    while inner.has_unfinished_requests():
        outputs |= {int(out.request_id): out for out in inner.step() if out.finished}
        seen.append((gauge(llm, "running"), gauge(llm, "waiting")))
    return ids(outputs[name] for name in range(len(prompts))), seen


@pytest.mark.skipif(CUDA, reason="sizes of a head with float32 keys; float32 products")
def test_more_requests_than_lanes_wait_and_answer_as_alone(prompts, monkeypatch):
    said: list[str] = []
    info = kv_plan.logger.info
    monkeypatch.setattr(
        kv_plan.logger,
        "info",
        lambda message, *values, **kwargs: (said.append(message % values), info(message, *values)),
    )
    with start(max_num_seqs=256) as llm:
        (lanes,) = llm.collective_rpc("specontext_lanes")
        (head,) = llm.collective_rpc(retriever_bytes)
        plan = planned(head, 256, monkeypatch)
        assert 2 < lanes < 8 and (plan.requests, plan.asked) == (lanes, 256)
        config = llm.llm_engine.vllm_config
        assert config.cache_config.num_gpu_blocks == plan.tiers.num_pages
        wanted = (
            f"{lanes} requests run at once, each with hot buffers; others of --max-num-seqs 256"
        )
        assert any(wanted in sentence for sentence in said)
        asked = [prompt[shift:] for shift in (0, 7, 23) for prompt in prompts[4:]]
        asked += prompts[:4]
        alone = [crowd(llm, [prompt], max_tokens=24)[0][0] for prompt in asked]
        together, seen = crowd(llm, asked, max_tokens=24)
        assert together == alone
        assert max(running for running, _ in seen) == lanes
        assert all(waiting == 0 or running > 0 for running, waiting in seen)
        assert seen[0][1] >= len(asked) - lanes
        # All layers were offloaded at times, and no lane was lost.
        (stats,) = llm.collective_rpc("specontext_stats")
        assert stats["layer_moves"] > 0 and llm.collective_rpc("specontext_audit")


@pytest.mark.skipif(CUDA, reason="as above")
def test_the_number_that_somebody_asks_for_is_kept(monkeypatch):
    with start(max_num_seqs=2) as llm:
        assert llm.collective_rpc("specontext_lanes") == [2]
        (head,) = llm.collective_rpc(retriever_bytes)
    assert planned(head, 2, monkeypatch).requests == 2


def test_a_spawned_engine_core_counts_lanes_and_judges_requests_too():
    """It does not check its configuration again, where the others are hooked."""
    script = (
        "from vllm.v1.engine import core; from vllm.plugins import load_general_plugins; "
        "load_general_plugins(); print(core.EngineCore._initialize_kv_caches._specontext, "
        "core.EngineCore.preprocess_add_request._specontext)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["True True"], done.stderr
