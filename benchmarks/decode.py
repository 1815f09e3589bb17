"""Case `decode`: steady-state decode step of stock vLLM and of specontext, side by side in one run."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.children import ChildError, run_child
from benchmarks.machine import gpus
from benchmarks.shapes import Shape

SETTLE = 8
"""Steps between the last prefill and the first timed step."""

BATCHED_TOKENS = 16384
"""vLLM's max_num_batched_tokens: the prompt tokens of one step."""

ENGINES = ("specontext", "stock")  # in this order: the one with less room for KV says how many requests fit

ENGINE_ENV = {
    # The engine runs in the child itself. Async scheduling does not need an engine process of its own (vllm/config/vllm.py
    # turns it on for the uniprocess executor as well); the run records that it was on.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """So many requests (None: as many as fit) of so many tokens."""

    requests: int | None
    tokens: int
    name: str

    @classmethod
    def parse(cls, text: str) -> Cell:
        """`24x32k`, `2x256`, `fitx128k`.

        Raises:
            ValueError: another form.
        """
        found = re.fullmatch(r"(\d+|fit)x(\d+)(k?)", text.strip())
        if not found or found[1] == "0" or found[2] == "0":
            raise ValueError(f"--cells: found {text!r}; write REQUESTSxTOKENS, as in 24x32k, 2x256 or fitx128k.")
        return cls(None if found[1] == "fit" else int(found[1]), int(found[2]) * (1024 if found[3] else 1), text.strip())

    def label(self, requests: int) -> str:
        """The cell with its number of requests."""
        return f"{requests} x {self.name.split('x')[1]}"


@dataclass(frozen=True)
class EngineSpec:
    """What one child runs."""

    name: str
    model: str
    on_gpu: bool
    budget: int
    max_num_seqs: int
    steps: int

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``LLM``: the same for both engines, but for the backend."""
        arguments: dict[str, Any] = {
            "model": self.model, "load_format": "dummy", "skip_tokenizer_init": True, "seed": 0, "enable_prefix_caching": True,
            "max_num_seqs": self.max_num_seqs, "max_num_batched_tokens": BATCHED_TOKENS, "gpu_memory_utilization": 0.9,
            "disable_log_stats": True,
        }  # fmt: skip
        if not self.on_gpu:
            arguments["enforce_eager"] = True  # compiling for a CPU takes minutes and a C++ compiler
        if self.name == "specontext":
            settings = {"retrieval_head": "dummy", "budget": self.budget}
            arguments |= {"attention_backend": "specontext", "additional_config": {"specontext": settings}}
        elif self.on_gpu:
            arguments["attention_backend"] = "FLASH_ATTN"
        return arguments


def run_engine(spec: EngineSpec, cells: list[Cell], fits: dict[str, int]) -> Iterator[tuple[str, Any]]:
    """Start the engine and measure the cells; runs in a child.

    Args:
        fits: requests of the cells that say "fit", where another engine has found them.

    Yields:
        ``("ready", facts)``, then per cell ``("cell", (name, figures))`` or ``("failed", (name, reason))``.
    """
    begin = time.perf_counter()
    from vllm import LLM

    llm = LLM(**spec.arguments())
    config = llm.llm_engine.vllm_config
    facts = {
        "start_s": round(time.perf_counter() - begin, 1),
        "kv_capacity_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
        "block_size": config.cache_config.block_size,
        "max_model_len": config.model_config.max_model_len,
        "async_scheduling": config.scheduler_config.async_scheduling,
        "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "attention_backend": str(config.attention_config.backend),
        "worker": config.parallel_config.worker_cls,
        "arguments": spec.arguments(),
    }
    yield "ready", facts
    for index, cell in enumerate(cells):
        try:
            requests = cell.requests or fits.get(cell.name) or _fitting(cell, facts["kv_capacity_tokens"], spec)
            yield "cell", (cell.name, measure_cell(llm, cell, requests, index, spec))
        except Exception as error:
            _drain(llm.llm_engine)
            yield "failed", (cell.name, f"{type(error).__name__}: {error}"[:500])


def _fitting(cell: Cell, capacity: int, spec: EngineSpec) -> int:
    requests = min(capacity // cell.tokens, spec.max_num_seqs)
    if requests == 0:
        raise ValueError(f"not one request of {cell.tokens} tokens fits into KV room for {capacity} tokens.")
    return requests


def measure_cell(llm: Any, cell: Cell, requests: int, index: int, spec: EngineSpec) -> dict[str, Any]:
    """Prefill ``requests`` random prompts, then time steps in which all of them decode.

    Returns:
        ``requests``, ``prompt_tokens``, ``context_tokens`` (mean over the timed steps), ``prefill_s`` (until every request has
        its first token), ``step_ms`` (median, p10, p90, mean over ``steps``), and for specontext ``stats``.
    """
    import numpy as np
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    config = engine.vllm_config.model_config
    # Requests that are through with their prompt decode while others still prefill.
    prefill_steps = -(-requests * cell.tokens // BATCHED_TOKENS) + requests
    output_tokens = prefill_steps + SETTLE + spec.steps + 16
    prompt_tokens = min(cell.tokens, config.max_model_len - output_tokens)
    if prompt_tokens < 1:
        raise ValueError(f"{output_tokens} output tokens leave no room for a prompt in {config.max_model_len}; lower --steps.")
    params = SamplingParams(
        temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    # Prompts of other cells and requests are others: nothing may hit the prefix cache.
    generator = np.random.default_rng([index, requests, cell.tokens])
    ids = [f"{cell.name}-{i}" for i in range(requests)]
    prompts = [generator.integers(5, config.get_vocab_size() - 5, prompt_tokens).tolist() for _ in ids]
    begin = time.perf_counter()
    for request, prompt in zip(ids, prompts, strict=True):
        engine.add_request(request, {"prompt_token_ids": prompt}, params)

    generated = dict.fromkeys(ids, 0)
    prefilled: float | None = None
    ends: list[float] = []
    first_timed = 0
    while len(ends) < SETTLE + spec.steps + 1:
        if not engine.has_unfinished_requests():
            raise RuntimeError(f"the requests ended after {len(ends)} of {SETTLE + spec.steps + 1} steady steps.")
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            generated[output.request_id] += len(output.outputs[0].token_ids)
        if prefilled is None:
            if min(generated.values()) > 0:
                prefilled = now
            continue
        if len(outputs) != requests:
            # A preempted request: the cell is too large to be steady.
            if outputs:
                ends.clear()
            continue
        ends.append(now)
        if len(ends) == SETTLE // 2 and spec.name == "specontext":
            llm.collective_rpc("specontext_stats", args=(True,))
        if len(ends) == SETTLE + 1:
            first_timed = sum(generated.values())
    last_timed = sum(generated.values())
    stats = llm.collective_rpc("specontext_stats")[0] if spec.name == "specontext" else None
    engine.abort_request(ids)
    _drain(engine)
    steps = 1e3 * np.diff(ends[SETTLE:])
    return {
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "context_tokens": prompt_tokens + (first_timed + last_timed) // (2 * requests),
        "prefill_s": prefilled - begin,
        "steps": len(steps),
        "step_ms": {
            "median": float(np.median(steps)), "p10": float(np.percentile(steps, 10)), "p90": float(np.percentile(steps, 90)),
            "mean": float(np.mean(steps)), "max": float(np.max(steps)),
        },
        "stats": stats,
    }  # fmt: skip


def _drain(engine: Any) -> None:
    while engine.has_unfinished_requests():
        engine.step()


CELL = report.Column("cell", "requests x context")
TABLES = {
    "Step time": (
        CELL,
        report.Column("stock", "stock, ms", ".2f"),
        report.Column("sparse", "specontext, ms", ".2f"),
        report.Column("ratio", "times faster", ".2f"),
        report.Column("stock_spread", "stock p10 to p90"),
        report.Column("sparse_spread", "specontext p10 to p90"),
        report.Column("pages_read", "pages read", ".1%"),
        report.Column("stock_limit", "byte limit dense, ms", ".2f"),
        report.Column("sparse_limit", "byte limit sparse, ms", ".2f"),
        report.Column("stock_prefill", "stock prefill, s", ".2f"),
        report.Column("sparse_prefill", "specontext prefill, s", ".2f"),
    ),
    "Stages of the specontext step, ms": (
        CELL,
        report.Column("head", "head: q, k, fused aux", ".3f"),
        report.Column("scoring", "scoring", ".3f"),
        report.Column("selection", "selection, page table", ".3f"),
        report.Column("attention", "attention, all layers", ".3f"),
        report.Column("rest", "rest of the step", ".3f"),
    ),
}


def make_rows(shape: Shape, cells: list[Cell], details: dict[str, Any], budget: int) -> list[dict[str, Any]]:
    """The table from what the children have reported so far; absent figures stay out."""
    rows = []
    for cell in cells:
        by_engine = {name: details["engines"].get(name, {}).get("cells", {}).get(cell.name) for name in ENGINES}
        known = [figures for figures in by_engine.values() if figures]
        row: dict[str, Any] = {"cell": cell.label(known[0]["requests"]) if known else cell.name}
        for key, name in (("stock", "stock"), ("sparse", "specontext")):
            if figures := by_engine[name]:
                step = figures["step_ms"]
                row |= {key: step["median"], f"{key}_spread": f"{step['p10']:.2f} to {step['p90']:.2f}"}
                row[f"{key}_prefill"] = figures["prefill_s"]
        if "stock" in row and "sparse" in row:
            row["ratio"] = row["stock"] / row["sparse"]
        stats = (by_engine["specontext"] or {}).get("stats")
        if stats and stats["pages_total"]:
            row["pages_read"] = stats["pages_read"] / stats["pages_total"]
        bandwidth = details.get("copy_bandwidth_bytes_per_s")
        if bandwidth and known:
            requests, context = known[0]["requests"], known[0]["context_tokens"]
            row["stock_limit"] = 1e3 * shape.dense_step_bytes(requests, context) / bandwidth
            row["sparse_limit"] = 1e3 * shape.sparse_step_bytes(requests, context, budget) / bandwidth
        stages = details["stages_ms"].get(cell.name)
        if stages:
            row |= stages
            if "sparse" in row:
                row["rest"] = row["sparse"] - sum(stages.values())
        rows.append(row)
    return rows


def main(
    cells: Annotated[str, typer.Option(help="Comma-separated REQUESTSxTOKENS; `fit` requests: as many as the KV room holds.")] = (
        "1x1k,8x8k,24x32k,fitx128k"
    ),
    model_shape: Annotated[str, typer.Option(help="8b, 1b, demo or tiny; the weights are random.")] = "8b",
    budget: Annotated[int, typer.Option(help="Tokens a KV head may read in a step.")] = 2048,
    steps: Annotated[int, typer.Option(min=2, help="Timed steps of each cell.")] = 128,
    backends: Annotated[str, typer.Option(help="Comma-separated: specontext, stock.")] = ",".join(ENGINES),
    max_num_seqs: Annotated[int, typer.Option(help="vLLM's; `fit` never exceeds it.")] = 32,
    engine_seconds: Annotated[float, typer.Option(help="Time limit of each engine; what it measured till then is kept.")] = 270,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
    work: Annotated[Path | None, typer.Option(help="Folder of the model config and the engines' logs; default a new temporary one.")] = None,
) -> None:
    """Steady-state decode step of stock vLLM and of specontext, side by side. Exit code 1 if anything failed."""
    try:
        shape, parsed = Shape.named(model_shape), [Cell.parse(text) for text in cells.split(",")]
        chosen = [name.strip() for name in backends.split(",")]
        for name in chosen:
            if name not in ENGINES:
                raise ValueError(f"--backends: found {name!r}; use specontext, stock or both.")
        for cell in parsed:
            if cell.tokens > shape.max_position_embeddings:
                raise ValueError(f"--cells: {cell.name} exceeds the {shape.max_position_embeddings} tokens of --model-shape {model_shape}.")
            if cell.requests and cell.requests > max_num_seqs:
                raise ValueError(f"--cells: {cell.name} needs --max-num-seqs of at least {cell.requests}.")
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None

    folder = work or Path(tempfile.mkdtemp(prefix="specontext-bench-"))
    model = str(shape.write(folder / "model"))
    on_gpu = bool(gpus())
    details: dict[str, Any] = {
        "shape": {"name": shape.name, **shape.config}, "budget": budget, "steps": steps, "engines": {}, "stages_ms": {},
    }  # fmt: skip
    result = report.Report("decode", f"Decode step, {model_shape} shape, random weights, budget {budget} tokens", TABLES, details=details)
    result.notes += [
        f"Steady state: all requests decode; median over {steps} steps after the last prefill. Both engines ran in this one "
        f"command, one after the other, each in a process of its own, with prefix caching, chunked prefill and async scheduling "
        f"as vLLM sets them" + (" and CUDA graphs on." if on_gpu else "; on this CPU eagerly, so the times show nothing but that it runs."),
        "Byte limit: bytes a step must read (weights; KV of the whole context, or of the budget with the head's weights and keys) "
        "over the measured copy bandwidth. Stages are timed apart from the engine; rest = step - stages.",
    ]

    def save() -> None:
        result.rows = make_rows(shape, parsed, details, budget)
        result.write(out)

    env = {**ENGINE_ENV, **({} if on_gpu else {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")})}
    fits: dict[str, int] = {}
    for name in (engine for engine in ENGINES if engine in chosen):
        spec = EngineSpec(name, model, on_gpu, budget, max_num_seqs, steps)
        kept = details["engines"].setdefault(name, {"cells": {}})
        print(f"{name}: starting (log {folder / name}.log)", flush=True)
        try:
            for kind, value in run_child(run_engine, spec, parsed, fits, log=folder / f"{name}.log", seconds=engine_seconds, env=env):
                if kind == "ready":
                    kept |= value
                    print(f"{name}: ready after {value['start_s']} s, KV room for {value['kv_capacity_tokens']:,} tokens", flush=True)
                elif kind == "cell":
                    cell, figures = value
                    kept["cells"][cell] = figures
                    fits.setdefault(cell, figures["requests"])
                    print(
                        f"{name}: {cell} ({figures['requests']} requests): prefill {figures['prefill_s']:.1f} s, "
                        f"step {figures['step_ms']['median']:.2f} ms", flush=True,
                    )  # fmt: skip
                else:
                    result.failures[f"{name}, {value[0]}"] = value[1]
                save()
        except ChildError as error:
            result.failures[name] = str(error)
            save()

    probed = [
        (cell.name, figures["requests"], figures["context_tokens"])
        for cell in parsed
        if (figures := next((e["cells"][cell.name] for e in details["engines"].values() if cell.name in e["cells"]), None))
    ]
    try:
        from benchmarks.stages import probe

        for kind, value in run_child(probe, shape, probed, budget, log=folder / "stages.log", seconds=150, env=ENGINE_ENV):
            if kind == "bandwidth":
                details["copy_bandwidth_bytes_per_s"] = value
                result.notes.append(f"Copy bandwidth of this device, bytes read + written: {value / 1e9:,.0f} GB/s.")
            elif kind == "stages":
                details["stages_ms"][value[0]] = value[1]
            else:
                result.failures[f"stages, {value[0]}"] = value[1]
            save()
    except ChildError as error:
        result.failures["stages"] = str(error)
    save()
    result.show()
    print(f"written: {out}", flush=True)
    raise typer.Exit(1 if result.failures else 0)
