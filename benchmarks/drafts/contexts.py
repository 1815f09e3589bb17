"""Contexts that nobody has computed: random keys and values, found in the prefix cache.

Prefilling them takes longer than all that is measured, and what a step costs does not depend on
what they say. Attention reads as many bytes, the head's keys have the distribution of those that it
makes, and every page lies where a prompt's would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

IN_FLIGHT = 4
"""Steps that an engine may be ahead of its answers, and more."""


def fill_caches(worker: Any) -> None:
    """Overwrite the worker's KV, and what the head remembers, with random numbers of order 1; for
    ``collective_rpc``.
    """
    import torch

    runner = worker.model_runner
    tensors = list(runner.kv_caches)
    if (runtime := getattr(runner, "runtime", None)) is not None:
        cache = runtime.retriever.cache
        tensors += [] if cache is None else [cache.keys, cache.fused]
    with torch.inference_mode():
        for tensor in tensors:
            if tensor.dtype.itemsize > 1:
                tensor.normal_()
                continue
            # 8-bit floats are drawn as wider ones, in pieces.
            for piece in tensor.split(1024):
                drawn = torch.randn(piece.shape, dtype=torch.bfloat16, device=piece.device)
                piece.copy_(drawn.to(piece.dtype))


def enter(llm: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Let the prefix cache hold the whole blocks of these prompts, and nothing else; for an engine
    in this process, without requests.

    Raises:
        RuntimeError: the KV cache is too small, or in use.
    """
    from vllm import SamplingParams
    from vllm.v1.request import Request

    core = llm.llm_engine.engine_core.engine_core
    steps = 0
    while not llm.reset_prefix_cache():
        # A step that was scheduled ahead may still hold blocks of requests that are gone.
        if steps == IN_FLIGHT:
            raise RuntimeError("blocks of the requests before are still in use.")
        llm.llm_engine.step()
        steps += 1
    pool = core.scheduler.kv_cache_manager.block_pool
    groups = core.scheduler.kv_cache_config.kv_cache_groups
    for number, prompt in enumerate(prompts):
        # It has the blocks' hashes, and is never scheduled.
        request = Request(
            f"context-{number}",
            list(prompt),
            SamplingParams(max_tokens=1),
            None,
            block_hasher=core.request_block_hasher,
        )
        for index, group in enumerate(groups):
            size = group.kv_cache_spec.block_size
            count = len(prompt) // size
            if count > pool.get_num_free_blocks():
                raise RuntimeError(f"the KV cache holds less than {len(prompts)} prompts.")
            blocks = pool.get_new_blocks(count)
            pool.cache_full_blocks(request, blocks, 0, count, size, index)
            pool.free_blocks(blocks)
