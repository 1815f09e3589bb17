"""One engine under a load of long requests: its steps, its times and a trace."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.children import room_for_kv
from benchmarks.driven import driven
from benchmarks.engines import BATCHED_TOKENS
from benchmarks.standstill import Standstill
from benchmarks.timeline import one_step, start_profiler, stop_profiler
from benchmarks.workers import tensor_parallel

PROFILED = 6
"""Steps that the timeline records."""
SETTLE = 16
"""Steps after the last change of the number of decoding requests that are not timed."""


@dataclass(frozen=True)
class Load:
    """What both engines serve, and the memory they have for it."""

    model: str
    on_gpu: bool
    budget: int
    gpu_gib: float | None
    host_gib: float
    prompt_tokens: int
    output_tokens: int
    max_num_seqs: int
    kv_cache_dtype: str = "auto"
    workers: int = 1

    def arguments(self, engine: str) -> dict[str, Any]:
        """Arguments of ``LLM`` for an engine: stock, untiered (specontext without a host pool) or
        tiered.
        """
        arguments: dict[str, Any] = {
            "model": self.model,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "seed": 0,
            "enable_prefix_caching": True,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": BATCHED_TOKENS,
            "gpu_memory_utilization": 0.9,
            "max_model_len": self.prompt_tokens + self.output_tokens + 16,
            "disable_log_stats": True,
            "enforce_eager": not self.on_gpu,
            "kv_cache_dtype": self.kv_cache_dtype,
            **tensor_parallel(self.workers),
        }
        if engine == "stock":
            room = (
                {} if self.gpu_gib is None else {"kv_cache_memory_bytes": int(self.gpu_gib * 2**30)}
            )
            return arguments | room | ({"attention_backend": "FLASH_ATTN"} if self.on_gpu else {})
        settings = {"retrieval_head": "dummy", "budget": self.budget, "stickiness": 0}
        if engine == "tiered":
            settings |= {"gpu_kv_gib": self.gpu_gib, "host_kv_gib": self.host_gib}
            if self.on_gpu:
                arguments |= room_for_kv(self.gpu_gib)
        return arguments | {
            "attention_backend": "specontext",
            "additional_config": {"specontext": settings},
        }


def run_engine(
    load: Load,
    engine: str,
    requests: int | None,
    turnovers: dict[str, list[float]],
    profile: bool = False,
) -> Iterator[tuple[str, Any]]:
    """Start one engine and serve the load; runs in a child.

    Args:
        engine: stock, untiered or tiered.
        requests: how many; None: as many as the engine's own capacity holds at once.
        turnovers: shares of pages scored anew a step, by name; each is one pass over the same
            prompts (the later ones hit the prefix cache).
        profile: end with a pass that records a few steps' kernels.
    Yields:
        ``("ready", facts)``, then per pass ``("pass", (name, figures))``, at last
        ``("timeline", kernels)`` if asked for.
    """
    begin = time.perf_counter()
    from vllm import LLM

    llm = LLM(**load.arguments(engine))
    config = llm.llm_engine.vllm_config
    capacity = config.cache_config.num_gpu_blocks * config.cache_config.block_size
    fitting = min(load.max_num_seqs, capacity // (load.prompt_tokens + load.output_tokens))
    yield (
        "ready",
        {
            "start_s": round(time.perf_counter() - begin, 1),
            "kv_capacity_tokens": capacity,
            "fitting": fitting,
            "arguments": load.arguments(engine),
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "async_scheduling": config.scheduler_config.async_scheduling,
        },
    )
    for name, shares in turnovers.items():
        if engine != "stock":
            llm.collective_rpc("specontext_set", kwargs=driven(shares))
        yield "pass", (name, serve(llm, load, requests or fitting, engine != "stock"))
    if profile and load.on_gpu:
        yield "timeline", record_timeline(llm, load, requests or fitting)


def send(llm: Any, load: Load, requests: int, output_tokens: int, name: str) -> list[str]:
    """Add the load's requests, always the same prompts; returns their ids."""
    import numpy as np
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=output_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    generator = np.random.default_rng(7)
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    ids = [f"{name}-{i}" for i in range(requests)]
    for request in ids:
        prompt = generator.integers(5, vocabulary - 5, load.prompt_tokens).tolist()
        llm.llm_engine.add_request(request, {"prompt_token_ids": prompt}, params)
    return ids


def record_timeline(llm: Any, load: Load, requests: int) -> list[Any]:
    """The kernels of one steady decode step, which the profiler slows down; see
    ``timeline.one_step``.
    """
    engine, settled, begin = llm.llm_engine, 0, time.perf_counter()
    ids = send(llm, load, requests, 8 * SETTLE, "timeline")

    def tell(what: str) -> None:
        print(f"timeline: {what} after {time.perf_counter() - begin:.1f} s", flush=True)

    while settled < 2 * SETTLE:
        if not engine.has_unfinished_requests():
            raise RuntimeError(f"the {requests} requests never all decoded at once.")
        settled = settled + 1 if len(engine.step()) == requests else 0
    tell("steady")
    llm.collective_rpc(start_profiler)
    tell("profiler started")
    for _ in range(PROFILED):
        engine.step()
    tell("recorded")
    kernels = llm.collective_rpc(stop_profiler)[0]
    tell(f"{len(kernels)} kernels read")
    engine.abort_request(ids)
    return one_step(kernels)


def steady_decode(ends: Sequence[float], counts: Sequence[int]) -> tuple[int, list[float]]:
    """The largest number of requests that decode at once for long, and how long those steps take.

    A step counts after ``SETTLE`` others with the same number of outputs. Where requests queue
    there are several waves: the result is the largest number that lasted at least a quarter as many
    steps as the longest-lasting one.

    Args:
        ends: when each step ended, in seconds. counts: requests that got a token in it.
    Returns:
        The number of requests, and milliseconds of each of its steps (none if no number held that
        long; then it is the largest seen).
    """
    steps: dict[int, list[float]] = {}
    for i in range(SETTLE + 1, len(ends)):
        if counts[i] and len(set(counts[i - SETTLE : i + 1])) == 1:
            steps.setdefault(counts[i], []).append(1e3 * (ends[i] - ends[i - 1]))
    if not steps:
        return max(counts), []
    longest = max(map(len, steps.values()))
    at_once = max(count for count, taken in steps.items() if 4 * len(taken) >= longest)
    return at_once, steps[at_once]


def serve(llm: Any, load: Load, requests: int, sparse: bool) -> dict[str, Any]:
    """Send all requests at once, run them to their end, and time the steps in which most of them
    decode and none prefills.

    Args:
        sparse: whether it is our backend, which has figures.
    """
    import numpy as np

    engine = llm.llm_engine
    begin = time.perf_counter()
    send(llm, load, requests, load.output_tokens, f"{begin}")
    ends: list[float] = []
    counts: list[int] = []
    first: dict[str, float] = {}
    stats: dict[str, Any] | None = None
    with Standstill() as others:
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                first.setdefault(output.request_id, now - begin)
            if len(first) == requests:
                others.stop_others()
            ends.append(now)
            counts.append(len(outputs))
            if sparse and counts[-SETTLE:] == [requests] * SETTLE and stats is None:
                llm.collective_rpc("specontext_stats", args=(True,))
                stats = {}
                ends[-1] = time.perf_counter()
            if (
                sparse
                and stats == {}
                and len(outputs) == requests
                and any(len(o.outputs[0].token_ids) and o.finished for o in outputs)
            ):
                stats = llm.collective_rpc("specontext_stats")[0]
    total = time.perf_counter() - begin
    at_once, steady = steady_decode(ends, counts)
    # The rate is taken from the mean, since a few late prefetches skew the distribution.
    step, mean, p90 = (
        (float(np.median(steady)), float(np.mean(steady)), float(np.percentile(steady, 90)))
        if steady
        else (None, None, None)
    )
    return {
        "requests": requests,
        "decoding_at_once": at_once,
        "step_ms": step,
        "step_mean_ms": mean,
        "step_p90_ms": p90,
        "steady_steps": len(steady),
        "decode_tokens_per_s": at_once / mean * 1e3 if mean else None,
        "first_token_s": {
            "first": min(first.values()),
            "median": float(np.median(list(first.values()))),
            "last": max(first.values()),
        },
        "total_s": total,
        "output_tokens_per_s": requests * load.output_tokens / total,
        "stats": stats or None,
    }
