"""Decode steps of vLLM engines: stock, specontext, and quest in our backend. An engine runs in a
child process of its own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.children import room_for_kv
from benchmarks.driven import driven
from benchmarks.standstill import Standstill
from benchmarks.workers import tensor_parallel

SETTLE = 8
"""Steps between the last prefill and the first timed step."""

BATCHED_TOKENS = 16384
"""vLLM's max_num_batched_tokens: the prompt tokens of one step."""

RETRIEVERS = {"specontext": {"retrieval_head": "dummy"}, "quest": {"retriever": "quest"}}
"""Settings of the engines that run our backend."""


@dataclass(frozen=True)
class Cell:
    """So many requests (None: as many as fit) of so many tokens.

    Attributes:
        room: tokens that a request grows to, where as many as fit are wanted; None: ``tokens``.
        prefill: whether Hugging Face prefills the context; else its cache is filled with random K
            and V.
    """

    requests: int | None
    tokens: int
    name: str
    room: int | None = None
    prefill: bool = True

    @classmethod
    def parse(cls, text: str) -> Cell:
        """`24x32k`, `2x256`, `fitx128k`.

        Raises:
            ValueError: another form.
        """
        found = re.fullmatch(r"(\d+|fit)x(\d+)(k?)", text.strip())
        if not found or found[1] == "0" or found[2] == "0":
            raise ValueError(
                f"--cells: found {text!r}; write REQUESTSxTOKENS, as in 24x32k, 2x256 or fitx128k."
            )
        return cls(
            None if found[1] == "fit" else int(found[1]),
            int(found[2]) * (1024 if found[3] else 1),
            text.strip(),
        )

    @property
    def named_requests(self) -> int:
        """The number of requests of a cell that names one.

        Raises:
            ValueError: it says "fit".
        """
        if self.requests is None:
            raise ValueError("--cells: found fit; name the number of requests.")
        return self.requests

    def label(self, requests: int) -> str:
        """The cell with its number of requests."""
        return f"{requests} x {self.name.split('x')[1]}"


@dataclass(frozen=True)
class EngineSpec:
    """What one child runs.

    Attributes:
        name: stock, specontext or quest; hf-eager or hf-sdpa with
            ``hugging_face.run_hugging_face``.
        shared_prompts: a request's prompt begins the same in all cells of one ``room``, so that a
            cell after a shorter one only prefills what is new. Else every cell has prompts of its
            own.
        max_model_len: None: the model's own.
        gpu_gib: cap on the GPU memory in GiB, weights included; on a CPU on our backend's KV cache
            alone. None: 90 % of the GPU.
        kv_gib: GPU memory for KV; None: what vLLM finds free.
        host_gib: host pool behind the engines of our backend; their selections are then driven, see
            ``benchmarks.driven``.
        turnover: share of the pages that a driven selection scores anew in a step.
        head: folder of the retrieval head; None: one of EAGLE-3's shape with random weights.
        additional: vLLM's ``additional_config`` besides our settings.
        kv_cache_dtype: vLLM's.
        workers: of tensor parallelism, a GPU each.
    """

    name: str
    model: str
    on_gpu: bool
    budget: int
    max_num_seqs: int
    steps: int
    shared_prompts: bool = False
    max_model_len: int | None = None
    batched_tokens: int = BATCHED_TOKENS
    gpu_gib: float | None = None
    kv_gib: float | None = None
    host_gib: float = 0.0
    turnover: float = 0.05
    head: str | None = None
    additional: dict[str, Any] = field(default_factory=dict)
    kv_cache_dtype: str = "auto"
    workers: int = 1

    @property
    def is_ours(self) -> bool:
        return self.name in RETRIEVERS

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``LLM``: the same for all engines, but for the backend."""
        arguments: dict[str, Any] = {
            "model": self.model,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "seed": 0,
            "enable_prefix_caching": True,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.batched_tokens,
            "gpu_memory_utilization": 0.9,
            "disable_log_stats": True,
            "kv_cache_dtype": self.kv_cache_dtype,
            **tensor_parallel(self.workers),
        }
        if self.additional:
            arguments["additional_config"] = self.additional
        if self.max_model_len:
            # Under a cap, stock vLLM would not start with more than fits; -1 takes what fits.
            arguments["max_model_len"] = (
                -1 if self.gpu_gib and not self.is_ours else self.max_model_len
            )
        if not self.on_gpu:
            arguments["enforce_eager"] = (
                True  # compiling for a CPU takes minutes and a C++ compiler
            )
        if self.gpu_gib and self.on_gpu:
            import torch

            arguments["gpu_memory_utilization"] = (
                self.gpu_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
            )
        if self.on_gpu:
            arguments |= room_for_kv(self.kv_gib)
        if self.is_ours:
            settings: dict[str, Any] = RETRIEVERS[self.name] | {"budget": self.budget}
            if self.head and "retrieval_head" in settings:
                settings["retrieval_head"] = self.head
            if self.host_gib:
                settings |= {"host_kv_gib": self.host_gib, "stickiness": 0}
                settings |= driven([self.turnover])
            if self.gpu_gib and not self.on_gpu:
                settings["gpu_kv_gib"] = self.gpu_gib
            return arguments | {
                "attention_backend": "specontext",
                "additional_config": {**self.additional, "specontext": settings},
            }
        return arguments | ({"attention_backend": "FLASH_ATTN"} if self.on_gpu else {})


def run_engine(
    spec: EngineSpec, cells: Sequence[Cell], fits: dict[str, int]
) -> Iterator[tuple[str, Any]]:
    """Start the engine and measure the cells; runs in a child.

    Args:
        fits: requests of the cells that say "fit", where another engine has found them.

    Yields:
        ``("ready", facts)``, then per cell ``("cell", (name, figures))`` or
        ``("failed", (name, reason))``. Figures of a cell that the KV cache cannot hold are
        ``requests`` and ``out_of_memory``, a sentence.
    """
    begin = time.perf_counter()
    from vllm import LLM

    llm = LLM(**spec.arguments())
    config = llm.llm_engine.vllm_config
    capacity = config.cache_config.num_gpu_blocks * config.cache_config.block_size
    yield (
        "ready",
        {
            "start_s": round(time.perf_counter() - begin, 1),
            "kv_capacity_tokens": capacity,
            "block_size": config.cache_config.block_size,
            "max_model_len": config.model_config.max_model_len,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "attention_backend": str(config.attention_config.backend),
            "worker": config.parallel_config.worker_cls,
            "arguments": spec.arguments(),
        },
    )
    for index, cell in enumerate(cells):
        try:
            requests = (
                cell.requests
                or fits.get(cell.name)
                or min(capacity // (cell.room or cell.tokens), spec.max_num_seqs)
            )
            yield "cell", (cell.name, measure_cell(llm, cell, requests, index, spec, capacity))
        except Exception as error:
            drain(llm.llm_engine)
            yield "failed", (cell.name, f"{type(error).__name__}: {error}"[:500])


def measure_cell(
    llm: Any, cell: Cell, requests: int, index: int, spec: EngineSpec, capacity: int
) -> dict[str, Any]:
    """Prefill ``requests`` random prompts, then time steps in which all of them decode.

    Args:
        capacity: tokens that the engine's KV cache holds.

    Returns:
        ``requests``, ``prompt_tokens``, ``context_tokens`` (mean over the timed steps),
        ``prefill_s`` (until every request has its first token), ``cached_tokens`` (of all prompts,
        found in the prefix cache), ``step_ms`` (median, p10, p90, mean over ``steps``), and for our
        backend ``stats``.
    """
    import numpy as np

    engine = llm.llm_engine
    full = {"requests": requests, "out_of_memory": f"the KV cache holds {capacity:,} tokens"}
    if requests == 0:
        return full
    longest = engine.vllm_config.model_config.max_model_len
    # Requests decode while others still prefill.
    prefill_steps = -(-requests * cell.tokens // spec.batched_tokens) + requests
    output_tokens = prefill_steps + SETTLE + spec.steps + 16
    limit = longest if cell.requests else min(longest, cell.room or cell.tokens)
    prompt_tokens = min(cell.tokens, limit - output_tokens)
    if prompt_tokens < 1:
        raise ValueError(
            f"{output_tokens} output tokens leave no room for a prompt in {limit}; lower --steps."
        )
    if requests * (prompt_tokens + output_tokens) > capacity:
        return full
    ids = send(
        engine, cell, requests, prompt_tokens, output_tokens, None if spec.shared_prompts else index
    )

    begin = time.perf_counter()
    generated, cached = dict.fromkeys(ids, 0), dict.fromkeys(ids, 0)
    prefilled: float | None = None
    ends: list[float] = []
    first_timed = 0
    wanted = SETTLE + spec.steps + 1
    with Standstill() as others:
        while len(ends) < wanted:
            if not engine.has_unfinished_requests():
                raise RuntimeError(
                    f"the requests ended after {len(ends)} of {wanted} steady steps."
                )
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                generated[output.request_id] += len(output.outputs[0].token_ids)
                cached[output.request_id] = output.num_cached_tokens or 0
            if prefilled is None:
                if min(generated.values()) > 0:
                    prefilled = now
                    others.stop_others()
                continue
            if len(outputs) != requests:
                # A preempted request: the cell is too large to be steady.
                if outputs:
                    ends.clear()
                continue
            ends.append(now)
            if len(ends) == SETTLE // 2 and spec.is_ours:
                llm.collective_rpc("specontext_stats", args=(True,))
            if len(ends) == SETTLE + 1:
                first_timed = sum(generated.values())
    assert prefilled is not None  # a step is timed after it only
    last_timed = sum(generated.values())
    stats = llm.collective_rpc("specontext_stats")[0] if spec.is_ours else None
    engine.abort_request(ids)
    drain(engine)
    return {
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "context_tokens": prompt_tokens + (first_timed + last_timed) // (2 * requests),
        "prefill_s": prefilled - begin,
        "cached_tokens": sum(cached.values()),
        "steps": spec.steps,
        "step_ms": summary(1e3 * np.diff(ends[SETTLE:])),
        "stats": stats,
    }


def send(
    engine: Any, cell: Cell, requests: int, prompt_tokens: int, output_tokens: int, own: int | None
) -> list[str]:
    """Add the cell's requests; their ids. With a number ``own`` no other number's prompts begin
    alike.
    """
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
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    ids = [f"{cell.name}-{i}" for i in range(requests)]
    for i, request in enumerate(ids):
        seed = [cell.room or 0, i] if own is None else [own, requests, cell.tokens, i]
        prompt = np.random.default_rng(seed).integers(5, vocabulary - 5, prompt_tokens).tolist()
        engine.add_request(request, {"prompt_token_ids": prompt}, params)
    return ids


def summary(steps: Any) -> dict[str, float]:
    """Median, spread and mean of step times in ms."""
    import numpy as np

    return {
        "median": float(np.median(steps)),
        "p10": float(np.percentile(steps, 10)),
        "p90": float(np.percentile(steps, 90)),
        "mean": float(np.mean(steps)),
        "max": float(np.max(steps)),
    }


def drain(engine: Any) -> None:
    while engine.has_unfinished_requests():
        engine.step()
