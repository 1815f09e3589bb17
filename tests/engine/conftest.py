"""Engines are expensive (10 to 40 s each): each is started once a session and shared."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from openai import OpenAI

from specontext_vllm.demo.server import VllmServer, device_arguments
from specontext_vllm.retrieval.checkpoint import random_checkpoint, read_checkpoint, save_head
from tests.forked import context

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "models" / "demo"
GPU_ROOM = 2 * 2**30
"""Bytes for KV on a GPU. Named, not found out: vLLM measures the GPU's free memory for that, and
other test runs may be using it at the same time.
"""
GPU_OPTIONS = ["--kv-cache-memory-bytes", str(GPU_ROOM)] if torch.cuda.is_available() else []
"""The same for `vllm serve`."""
ENGINE = {
    "model": str(DEMO_MODEL),
    "dtype": "float32",
    "max_model_len": 1536,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 256,
    "enforce_eager": not torch.cuda.is_available(),
    "gpu_memory_utilization": 0.08 if torch.cuda.is_available() else 0.3,
    "seed": 0,
    "disable_log_stats": False,
    # 1,600 tokens: four of the requests below do not fit at once, so some are preempted and
    # resumed.
    "block_size": 16,
    "num_gpu_blocks_override": 101,
    "kv_cache_memory_bytes": GPU_ROOM if torch.cuda.is_available() else None,
}


# vLLM's own CPU attention takes blocks of 32 tokens; as many tokens in all.
STOCK = {} if torch.cuda.is_available() else {"block_size": 32, "num_gpu_blocks_override": 51}


@cache
def import_vllm() -> None:
    """Import what an engine runs. vLLM's kernels for CPUs take their places once, not at each
    engine's start, since it goes through all modules for that; and it looks at a model's class in
    this process: for that alone it would start one that imports all of it anew.
    """
    from vllm import LLM  # noqa: F401
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform
    from vllm.v1.engine import core  # noqa: F401

    current_platform.register_triton_kernel_overrides = cache(
        current_platform.register_triton_kernel_overrides
    )
    registry._run_in_subprocess = lambda inspect: inspect()


@contextmanager
def cheap_collections() -> Iterator[None]:
    """Collections of garbage see what is made from here on, not all that is imported: vLLM asks for
    some ten when an engine starts and ends, and makes them see everything.
    """
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@contextmanager
def engine(**overrides) -> Iterator:
    """A vLLM engine in this process, gone with all it held at the end."""
    import_vllm()
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    with cheap_collections():
        llm = LLM(**{**ENGINE, **overrides})
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    """Engines of several workers on a CPU fork them from one process that has imported vLLM. vLLM
    spawns them, so that each would import it anew; the fixture ``server`` does so.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr("vllm.v1.executor.multiproc_executor.get_mp_context", context)
        yield


@contextmanager
def unproven_served() -> Iterator[None]:
    """Engines start with what is refused on a GPU until tests have passed there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specontext_vllm.engine.prepare.refuse_unproven", lambda *given: None)
        yield


@pytest.fixture(scope="module")
def served_on_a_gpu() -> Iterator[None]:
    """For a file whose engines are refused there until it has passed there."""
    with unproven_served():
        yield


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Token ids of demo prompts: within a page, ragged, and long enough for several chunks."""
    from transformers import AutoTokenizer

    from specontext_vllm.synthetic.tasks import make_problem

    tokenizer = AutoTokenizer.from_pretrained(str(DEMO_MODEL))
    lengths = (200, 333, 450, 513, 600)
    made = []
    for seed, length in enumerate(lengths):
        problem = make_problem(
            "recitation" if seed % 2 else "needle", seed=seed, approx_tokens=length
        )
        made.append(
            tokenizer.apply_chat_template(
                problem.messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    return [made[0][:1], made[0][:5], made[0][:16], made[0][:17], *made]


@pytest.fixture(scope="session")
def own_head(tmp_path_factory) -> Path:
    """Folder of a head in the format of our own, which makes keys from own states: the demo model's
    head, each query head twice, with something random and small beside its projections.
    """
    trained = read_checkpoint(DEMO_MODEL / "retrieval_head")
    spec = replace(trained.spec, num_heads=8, key_states="own", q_mlp=48, k_mlp=80)
    tensors = random_checkpoint(replace(spec, dtype=torch.float32), seed=1).tensors
    small = 0.1 * tensors["k_proj.weight"][:, spec.query_width :]
    for name in ("q_mlp.down_proj.weight", "k_mlp.down_proj.weight"):
        tensors[name] *= 0.1
    tensors |= {name: tensor.float() for name, tensor in trained.tensors.items()}
    queries = tensors["q_proj.weight"].unflatten(0, (spec.num_kv_heads, -1))
    tensors["q_proj.weight"] = queries.repeat(1, 2, 1).flatten(0, 1)
    tensors["k_proj.weight"] = torch.cat((tensors["k_proj.weight"], small), 1)
    folder = tmp_path_factory.mktemp("own_head")
    save_head(folder, spec, tensors, dtype=None)
    return folder


@pytest.fixture(scope="session")
def stock(prompts):
    """What stock vLLM answers in every scenario."""
    from tests.engine.shared_runs import run_stock

    return run_stock(prompts)


@pytest.fixture(scope="session")
def both_budgets(prompts):
    """What one engine answers with a budget over the context and with a small one."""
    from tests.engine.shared_runs import run_both_budgets

    return run_both_budgets(prompts)


@pytest.fixture(scope="session")
def server() -> Iterator[VllmServer]:
    """The demo's own server; one start serves all tests."""
    with VllmServer(
        DEMO_MODEL,
        ["--config", str(ROOT / "configs" / "demo.yaml"), *device_arguments(), *GPU_OPTIONS],
    ) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: VllmServer) -> OpenAI:
    return client_of(server)


def client_of(server: VllmServer) -> OpenAI:
    """A client that asks once and waits two minutes."""
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)
