"""One of the engines that take turns: its prefills and its decode steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.engines import Cell, EngineSpec, drain, send, summary
from benchmarks.host.engine import Turns, steps

ROUNDS = 4
"""Turns of decode steps in a cell."""
PREFILLS = 3
"""Turns of prefills in a cell."""
WARM_UP = 4
"""Steps of a turn before the timed ones."""
BATCHED_TOKENS = 4096
"""vLLM's own max_num_batched_tokens on a CPU."""
MARGIN = 512
"""Tokens of a request beyond its prompt, at most."""
READ_BYTES = 2**30
PATTERN = 2**20 + 7
"""Random numbers that are repeated over the caches."""


def run_engine(
    spec: EngineSpec, cells: Sequence[tuple[str, Cell]], eager: bool, turns: Turns
) -> Iterator[tuple[str, Any]]:
    """Start the engine and measure the cells; runs in a child.

    Args:
        cells: each with its kind, ``prefill`` or ``decode``.
    Yields:
        ``("ready", facts)``, then ``("cell", (kind and name, figures))`` for each.
    """
    import torch
    from vllm import LLM

    arguments = spec.arguments() | {
        "max_model_len": spec.max_model_len,
        "enforce_eager": eager,
        # What there is for KV stands in the environment.
        "gpu_memory_utilization": 0.1,
    }
    llm = LLM(**arguments)
    facts = {
        "threads": torch.get_num_threads(),
        "block_size": llm.llm_engine.vllm_config.cache_config.block_size,
        "arguments": arguments,
    }
    # All of the memory is touched once before anything is timed.
    llm.collective_rpc(fill_caches)
    yield "ready", facts
    for index, (kind, cell) in enumerate(cells):
        if kind == "prefill":
            figures = time_prefills(llm, cell, index, turns)
        else:
            figures = time_steps(llm, cell, index, spec, turns)
        yield "cell", (f"{kind} {cell.name}", figures)


def read_bandwidth() -> float:
    """Bytes that all threads together read of memory in a second, at best: a sum of what no cache
    holds.
    """
    import torch

    data = torch.ones(READ_BYTES // 4)
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begin)
    return READ_BYTES / best


def time_prefills(llm: Any, cell: Cell, index: int, turns: Turns) -> dict[str, Any]:
    """``prefills_s``, of each turn: from sending the requests until all have their first token."""
    engine, times = llm.llm_engine, []
    for number in range(PREFILLS):
        with turns.turn():
            begin = time.perf_counter()
            # Prompts of their own, so that nothing is in the prefix cache.
            ids = send_all(engine, cell, cell.tokens, PREFILLS * index + number)
            times.append(time.perf_counter() - begin)
            engine.abort_request(ids)
            drain(engine)
    return {"requests": cell.named_requests, "prefills_s": times}


def time_steps(llm: Any, cell: Cell, index: int, spec: EngineSpec, turns: Turns) -> dict[str, Any]:
    """``rounds_ms``: of each turn its steps' times; ``step_ms``, ``context_tokens`` and, for our
    backend, ``stats`` over all of them.
    """
    engine, requests = llm.llm_engine, cell.named_requests
    runner = engine.model_executor.driver_worker.worker.model_runner
    a_round = -(-spec.steps // ROUNDS)
    prompt = cell.tokens - a_round * ROUNDS // 2
    rounds: list[list[float]] = []
    with turns.turn():
        with without_model(runner):
            ids = send_all(engine, cell, prompt, PREFILLS * index)
        steps(engine, WARM_UP)
        if spec.is_ours:
            llm.collective_rpc("specontext_stats", args=(True,))
    for _ in range(ROUNDS):
        with turns.turn():
            steps(engine, WARM_UP)
            rounds.append(steps(engine, a_round))
    with turns.turn():
        stats = llm.collective_rpc("specontext_stats")[0] if spec.is_ours else None
        engine.abort_request(ids)
        drain(engine)
    return {
        "requests": requests,
        "context_tokens": cell.tokens,
        "rounds_ms": rounds,
        "step_ms": summary([ms for part in rounds for ms in part]),
        "stats": stats,
    }


def send_all(engine: Any, cell: Cell, prompt: int, own: int) -> list[str]:
    """Send the cell's requests and step until each has a token; their ids."""
    ids = send(engine, cell, cell.named_requests, prompt, MARGIN, own)
    waiting = set(ids)
    while waiting:
        waiting -= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    return ids


@contextmanager
def without_model(runner: Any) -> Iterator[None]:
    """Steps leave the model out. Prompts are then there at once, and their KV is what
    ``fill_caches`` has left in their pages.
    """

    def forward(input_ids: Any = None, positions: Any = None, *args: Any, **kwargs: Any) -> Any:
        import torch

        config = runner.model_config
        states = torch.zeros(len(positions), config.get_hidden_size(), dtype=config.dtype)
        return (states, [states]) if runner.use_aux_hidden_state_outputs else states

    runner._model_forward = forward
    try:
        yield
    finally:
        del runner._model_forward


def fill_caches(worker: Any) -> None:
    """Random numbers in all of a worker's KV, and in what the retrieval head remembers."""
    import torch

    runner = worker.model_runner
    tensors = list(runner.kv_caches)
    if (runtime := getattr(runner, "runtime", None)) is not None:
        cache = runtime.retriever.cache
        tensors += [cache.keys, cache.fused]
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(PATTERN, generator=generator).to(tensors[0].dtype)
    # Layers may share one storage.
    storages = {(s := tensor.untyped_storage()).data_ptr(): (s, tensor.dtype) for tensor in tensors}
    for storage, dtype in storages.values():
        for part in torch.empty(0, dtype=dtype).set_(storage).split(PATTERN):
            part.copy_(pattern[: len(part)])
