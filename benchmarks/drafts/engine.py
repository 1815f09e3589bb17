"""One engine, with drafts or without, and its cells; runs in a child process of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import engines
from benchmarks.drafts import contexts
from benchmarks.engines import Cell, drain, summary

LOSSLESS = "lossless"
LOSSLESS_DRAFTS = 6
"""The most tokens that lossless mode drafts (engine/draft_length.py, MAX_DRAFTS)."""
SETTLE, SETTLE_ROWS = 24, 64
"""Steps, and rows, that decode after the requests have come or the acceptance has changed, before
any is timed: steps capture graphs of their own when they come up again, and lossless mode averages
over half as many verdicts.
"""
TIMED_ROWS = 384
"""Rows of the timed steps, if that is more steps than asked for: few requests say little about how
many drafts are accepted."""
LONGEST_TAIL = 64
"""Prompt tokens that may be missing in the prefix cache."""
CPU_KV_BYTES = 64 * 2**20


@dataclass(frozen=True)
class DraftSpec:
    """What one child runs.

    Attributes:
        engine: stock, specontext or lossless.
        drafts: tokens that an EAGLE-3 head drafts; 0: none. Lossless mode chooses.
        model, head: folders.
        steps: timed steps at the least.
        acceptances: probabilities with which a draft is accepted if those before it were, one
            after the other. Without drafts nothing is accepted.
        go: a file that tells the child to take the GPU; till then it only imports.
    """

    engine: str
    drafts: int
    model: str
    head: str
    on_gpu: bool
    budget: int
    steps: int
    cells: tuple[Cell, ...]
    acceptances: tuple[float, ...]
    go: str

    @property
    def name(self) -> str:
        return f"{self.engine}, {self.drafts} drafts" if self.drafts else self.engine

    @property
    def most_drafts(self) -> int:
        return LOSSLESS_DRAFTS if self.engine == LOSSLESS else self.drafts

    @property
    def rows(self) -> list[int]:
        """Numbers of requests, ascending."""
        return sorted({cell.named_requests for cell in self.cells})

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``LLM``."""
        spec = engines.EngineSpec(
            "stock" if self.engine == "stock" else "specontext",
            self.model,
            self.on_gpu,
            self.budget,
            # Lossless mode has graphs of as many numbers of drafts as there may be requests.
            max(self.rows[-1], LOSSLESS_DRAFTS + 1),
            self.steps,
            head=self.head,
        )
        arguments = spec.arguments()
        # Decode graphs of the batches that are timed, with each number of tokens a row.
        queries = range(1, self.most_drafts + 2)
        sizes = sorted({rows * tokens for rows in self.rows for tokens in queries})
        if self.on_gpu:
            arguments["compilation_config"] = {"cudagraph_capture_sizes": sizes}
        else:
            arguments["kv_cache_memory_bytes"] = CPU_KV_BYTES
        if self.engine == LOSSLESS:
            arguments["additional_config"]["specontext"]["mode"] = "lossless"
        if self.drafts:
            arguments["speculative_config"] = {
                "method": "eagle3",
                "model": self.head,
                "num_speculative_tokens": self.drafts,
                # The target's weights are made up; the head's are read, for two readers.
                "draft_load_config": {"load_format": "safetensors"},
            }
        return arguments


def run_engine(spec: DraftSpec) -> Iterator[tuple[str, Any]]:
    """Start the engine and measure the cells.

    Yields:
        ``("imported", None)``, when it waits for ``spec.go``; ``("ready", facts)``; then per cell
        and acceptance ``("cell", ((cell, acceptance), figures))``, or ``("failed", (cell,
        reason))``. Without drafts the acceptance is None.
    """
    from vllm import LLM

    _import_workers(spec.on_gpu)
    yield "imported", None
    while not Path(spec.go).exists():
        time.sleep(0.05)
    begin = time.perf_counter()
    llm = LLM(**spec.arguments())
    config = llm.llm_engine.vllm_config
    llm.collective_rpc(contexts.fill_caches)
    yield (
        "ready",
        {
            "start_s": round(time.perf_counter() - begin, 1),
            "kv_capacity_tokens": config.cache_config.num_gpu_blocks
            * config.cache_config.block_size,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "arguments": spec.arguments(),
        },
    )
    for index, cell in enumerate(spec.cells):
        try:
            for acceptance, figures in measure_cell(llm, spec, cell, index):
                yield "cell", ((cell.name, acceptance), figures)
        except Exception as error:
            drain(llm.llm_engine)
            yield "failed", (cell.name, f"{type(error).__name__}: {error}"[:500])


def _import_workers(on_gpu: bool) -> None:
    # What takes its time and needs no GPU.
    if on_gpu:
        import vllm.v1.worker.gpu.model_runner
        import vllm.v1.worker.gpu_worker  # noqa: F401


def measure_cell(
    llm: Any, spec: DraftSpec, cell: Cell, index: int
) -> Iterator[tuple[float | None, dict[str, Any]]]:
    """Let the cell's requests decode, at one acceptance after the other, and time the steps.

    Yields:
        The acceptance, None without drafts, and ``requests``, ``context_tokens`` (mean over the
        timed steps), ``steps``, ``step_ms`` (median, p10, p90, mean), ``tokens_per_row`` (a step),
        ``tokens_per_s``, ``drafts`` (mean), ``graph`` (of a step that verifies; on a GPU).
        Or ``requests`` and ``out_of_memory``, a sentence.
    """
    engine, requests = llm.llm_engine, cell.named_requests
    acceptances: tuple[float | None, ...] = spec.acceptances if spec.most_drafts else (None,)
    settle = max(SETTLE, -(-SETTLE_ROWS // requests))
    timed = max(spec.steps, -(-TIMED_ROWS // requests))
    output = (8 + len(acceptances) * (settle + timed)) * (1 + spec.most_drafts) + 16
    config = engine.vllm_config
    prompt_tokens = min(cell.tokens, config.model_config.max_model_len - output)
    capacity = config.cache_config.num_gpu_blocks * config.cache_config.block_size
    if requests * (prompt_tokens + output) > capacity:
        full = {"requests": requests, "out_of_memory": f"the KV cache holds {capacity:,} tokens"}
        for acceptance in acceptances:
            yield acceptance, full
        return
    prompts = _prompts(llm, requests, prompt_tokens, index)
    contexts.enter(llm, prompts)
    ids = _send(engine, cell.name, prompts, output)
    _first_tokens(engine, ids)
    chosen = _watch_length(llm)
    for acceptance in acceptances:
        if acceptance is not None and spec.on_gpu:
            llm.collective_rpc(accept, args=(acceptance, spec.most_drafts))
        _steps(engine, requests, settle, settling=True)
        del chosen[:]
        before = _computed(llm)
        begin = time.perf_counter()
        ends, tokens = _steps(engine, requests, timed)
        figures: dict[str, Any] = {
            "requests": requests,
            "context_tokens": (before + _computed(llm)) // (2 * requests),
            "steps": timed,
            "step_ms": summary([1e3 * (b - a) for a, b in zip([begin, *ends], ends)]),
            "tokens_per_row": tokens / (timed * requests),
            "tokens_per_s": tokens / (ends[-1] - begin),
            "drafts": sum(chosen) / len(chosen) if chosen else spec.drafts,
        }
        if spec.on_gpu:
            figures["graph"] = llm.collective_rpc(
                graph_of, args=(requests, 1 + round(figures["drafts"]))
            )[0]
        yield acceptance, figures
    engine.abort_request(ids)
    drain(engine)


def accept(worker: Any, acceptance: float, drafts: int) -> None:
    """From now on let vLLM accept each of up to ``drafts`` drafts with this probability, if those
    before it were; for ``collective_rpc``. It is what the rates of ``rejection_sample_method:
    synthetic`` become in vLLM's sampler (V2 runner), which then also works in an engine that makes
    its speculative configuration itself, and can change.
    """
    import torch

    runner = worker.model_runner
    runner.rejection_sampler.synthetic_conditional_rates = torch.full(
        (drafts,), acceptance, dtype=torch.float32, device=runner.device
    )


def graph_of(worker: Any, rows: int, tokens: int) -> str:
    """The kind of graph in which a step of so many rows of so many tokens runs; for
    ``collective_rpc``.
    """
    manager = worker.model_runner.cudagraph_manager
    return str(manager.dispatch(rows, rows * tokens, tokens, 0, tokens).cg_mode.name)


def _prompts(llm: Any, requests: int, tokens: int, index: int) -> list[list[int]]:
    """Random prompts of which none begins like one of another cell."""
    import numpy as np

    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    return [
        np.random.default_rng([index, i]).integers(5, vocabulary - 5, tokens).tolist()
        for i in range(requests)
    ]


def _send(engine: Any, name: str, prompts: Sequence[list[int]], output_tokens: int) -> list[str]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    ids = [f"{name}-{i}" for i in range(len(prompts))]
    for i, prompt in enumerate(prompts):
        params = SamplingParams(
            temperature=0,
            max_tokens=output_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            # vLLM draws its verdicts from seed and position: all engines with as many drafts
            # accept the same ones.
            seed=i,
        )
        engine.add_request(ids[i], {"prompt_token_ids": prompt}, params)
    return ids


def _first_tokens(engine: Any, ids: Sequence[str]) -> None:
    """Run until every request has a token.

    Raises:
        RuntimeError: a context was not in the prefix cache.
    """
    waiting = set(ids)
    while waiting:
        for output in engine.step():
            missing = len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
            if missing > LONGEST_TAIL:
                raise RuntimeError(f"{missing} tokens of a prompt were not in the prefix cache.")
            if output.outputs[0].token_ids:
                waiting.discard(output.request_id)


def _steps(
    engine: Any, requests: int, count: int, settling: bool = False
) -> tuple[list[float], int]:
    """When each of ``count`` steps in which all requests decode has ended, and their tokens.

    Args:
        settling: steps that answer fewer requests are not counted; else there must be none.
    Raises:
        RuntimeError: a request has ended or was preempted.
    """
    ends: list[float] = []
    tokens = 0
    while len(ends) < count:
        outputs = engine.step()
        if not outputs:  # scheduled ahead
            if not engine.has_unfinished_requests():
                raise RuntimeError(f"the requests ended after {len(ends)} of {count} steps.")
            continue
        if len(outputs) != requests:
            if settling:
                continue
            raise RuntimeError(f"a step answered {len(outputs)} of {requests} requests.")
        ends.append(time.perf_counter())
        tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
    return ends, tokens


def _computed(llm: Any) -> int:
    """Tokens of all running requests."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return sum(request.num_tokens for request in scheduler.running)


def _watch_length(llm: Any) -> list[int]:
    """A list that grows by the number of drafts that lossless mode chooses in each step."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    chosen: list[int] = []
    length = getattr(scheduler, "draft_length", None)
    if length is not None:
        choose = type(length).choose

        def watched(contexts: Sequence[int]) -> int:
            chosen.append(choose(length, contexts))
            return chosen[-1]

        length.choose = watched
    return chosen
