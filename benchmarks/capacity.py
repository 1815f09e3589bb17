"""Case `capacity`: more context in flight than the GPU holds: two tiers against stock vLLM with the
same room on the GPU.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.children import ENGINE_ENV, ChildError, run_child
from benchmarks.engines import BATCHED_TOKENS
from benchmarks.machine import gpus
from benchmarks.shapes import Shape
from benchmarks.timeline import one_step, start_profiler, stop_profiler

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
        }
        if engine == "stock":
            room = (
                {} if self.gpu_gib is None else {"kv_cache_memory_bytes": int(self.gpu_gib * 2**30)}
            )
            return arguments | room | ({"attention_backend": "FLASH_ATTN"} if self.on_gpu else {})
        settings = {"retrieval_head": "dummy", "budget": self.budget, "stickiness": 0}
        if engine == "tiered":
            settings |= {"gpu_kv_gib": self.gpu_gib, "host_kv_gib": self.host_gib}
        return arguments | {
            "attention_backend": "specontext",
            "additional_config": {"specontext": settings},
        }


def drive_selection(worker: Any, shares: Sequence[float]) -> None:
    """Make a worker's selections change as a real model's do: in step i the share ``shares[i]`` of
    the pages is scored anew.

    Random weights select at random. The head's own scoring still runs, so that its time is in the
    step; its scores are then replaced by numbers that stay the same but for that share.
    """
    import torch

    from specontext_vllm.retrieval import local as module

    runtime = worker.model_runner.runtime
    retriever, heads, max_requests = (
        runtime.retriever,
        runtime.num_kv_heads,
        worker.vllm_config.scheduler_config.max_num_seqs,
    )
    state = module.__dict__.setdefault("_driven", {"original": module.score_rows, "step": 0})
    state["shares"] = list(shares)
    if "share" not in state:
        # What a captured step reads lies in tensors that persist. The last row of the numbers is
        # the padding rows'.
        state["share"] = torch.zeros((), device=runtime.device)
        state["base"] = torch.rand(
            max_requests + 1, heads, retriever.max_pages, device=runtime.device
        )

    def rows_of(rows: range) -> Any:
        """The requests of the rows: their lanes, or without tiers the rows themselves, whose order
        does not matter there.
        """
        if runtime.tiers is None:
            return torch.arange(rows.start, rows.stop, device=runtime.device).clamp(
                max=max_requests
            )
        return runtime.tiers.lanes[rows.start : rows.stop].long()

    def driven(
        queries: Any,
        keys: Any,
        block_table: Any,
        seq_lens: Any,
        starts: Any,
        scores: Any,
        *,
        rows: range,
        **bounds: Any,
    ) -> None:
        state["original"](queries, keys, block_table, seq_lens, starts, scores, rows=rows, **bounds)
        real = range(rows.start, min(rows.stop, queries.shape[0]))
        lanes = rows_of(real)
        base = state["base"][lanes]
        base = torch.where(torch.rand_like(base) < state["share"], torch.rand_like(base), base)
        state["base"][lanes] = base
        page = torch.arange(base.shape[-1], device=queries.device)
        inside = page < ((seq_lens[real.start : real.stop, None] + 15) // 16)
        place = (
            torch.where(inside, starts[: len(real), None] + page, scores.capacity - 1)
            .flatten()
            .long()
        )
        # [rows, heads, width] -> [query heads, rows * width]
        values = (
            (10 * base)
            .transpose(0, 1)
            .reshape(heads, -1)
            .repeat_interleave(scores.page_max.shape[0] // heads, dim=0)
        )
        scores.page_max[:, place] = values
        scores.page_lse[:, place] = values

    def before_forward(*arguments: Any) -> None:
        state["share"].fill_(state["shares"][state["step"] % len(state["shares"])])
        state["step"] += 1
        type(retriever).before_forward(retriever, *arguments)

    retriever.before_forward = before_forward
    module.score_rows = driven


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
            llm.collective_rpc(drive_selection, args=(shares,))
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
    """How many requests decode at once where an engine is at its best, and what those steps take.

    Steps after ``SETTLE`` others with as many outputs count. Where requests queue there are several
    waves: taken is the largest number that held for at least a quarter as many steps as the one
        that held longest.

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
    most = max(count for count, taken in steps.items() if 4 * len(taken) >= longest)
    return most, steps[most]


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
    ends, counts, first, stats = [], [], {}, None
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            first.setdefault(output.request_id, now - begin)
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
    most, steady = steady_decode(ends, counts)
    # The rate goes by the mean: a few late prefetches make the distribution lopsided.
    step, mean, p90 = (
        (float(np.median(steady)), float(np.mean(steady)), float(np.percentile(steady, 90)))
        if steady
        else (None, None, None)
    )
    return {
        "requests": requests,
        "decoding_at_once": most,
        "step_ms": step,
        "step_mean_ms": mean,
        "step_p90_ms": p90,
        "steady_steps": len(steady),
        "decode_tokens_per_s": most / mean * 1e3 if steady else None,
        "first_token_s": {
            "first": min(first.values()),
            "median": float(np.median(list(first.values()))),
            "last": max(first.values()),
        },
        "total_s": total,
        "output_tokens_per_s": requests * load.output_tokens / total,
        "stats": stats or None,
    }


TABLES = {
    "Steady decode": (
        report.Column("name", "engine, pages scored anew a step"),
        report.Column("capacity", "KV capacity, tokens", ",d"),
        report.Column("at_once", "requests at once"),
        report.Column("step", "step, ms", ".2f"),
        report.Column("mean", "mean, ms", ".2f"),
        report.Column("p90", "p90, ms", ".2f"),
        report.Column("rate", "tokens/s", ",.0f"),
        report.Column("ratio", "times stock", ".2f"),
        report.Column("fetched", "fetched a step, MB", ".0f"),
        report.Column("missed", "of the budget", ".1%"),
        report.Column("late", "late prefetches", ".1%"),
        report.Column("late_us", "late by, us", ".0f"),
        report.Column("resident", "resident layers"),
    ),
    "End to end, from an empty prefix cache": (
        report.Column("cold", "engine, pages scored anew a step"),
        report.Column("requests", "requests"),
        report.Column("last_first", "until the last first token, s", ".1f"),
        report.Column("prompt_rate", "prompt tokens/s until then", ",.0f"),
        report.Column("total", "until all are done, s", ".1f"),
        report.Column("throughput", "output tokens/s", ",.0f"),
    ),
}


def make_rows(details: dict[str, Any], budget: int, heads: int) -> list[dict[str, Any]]:
    """The tables' rows from what the children have reported."""
    rows = []
    first = {
        engine: next(iter(kept["passes"].values()), None)
        for engine, kept in details["engines"].items()
    }
    stock, untiered = first.get(NAMES["stock"]), first.get(NAMES["untiered"])
    for engine, kept in details["engines"].items():
        for number, (name, figures) in enumerate(kept["passes"].items()):
            label = f"{engine}, {name}" if engine != "stock" else engine
            row = {
                "name": label,
                "capacity": kept["kv_capacity_tokens"],
                "at_once": figures["decoding_at_once"],
                "step": figures["step_ms"],
                "mean": figures["step_mean_ms"],
                "p90": figures["step_p90_ms"],
                "rate": figures["decode_tokens_per_s"],
            }
            if number == 0:  # later passes find their prompts in the prefix cache
                last = figures["first_token_s"]["last"]
                row |= {
                    "cold": label,
                    "requests": figures["requests"],
                    "last_first": last,
                    "total": figures["total_s"],
                    "throughput": figures["output_tokens_per_s"],
                    "prompt_rate": figures["requests"] * details["prompt_tokens"] / last,
                }
            if stock and engine != "stock" and row["rate"] and stock["decode_tokens_per_s"]:
                row["ratio"] = row["rate"] / stock["decode_tokens_per_s"]
            if untiered and engine == NAMES["tiered"] and row["step"]:
                row["against"] = row["step"] / untiered["step_ms"]
            stats = figures["stats"]
            if stats and stats.get("tier_steps"):
                row |= {"late": stats["late_share"], "late_us": stats["late_us"]}
                row["fetched"] = stats["fetched_bytes"] / stats["tier_steps"] / 1e6
                row["missed"] = (
                    stats["missed_head_pages"]
                    / stats["tier_steps"]
                    / (figures["decoding_at_once"] * heads * budget / 16)
                )
                row["resident"] = f"{stats['resident_layers']} of {stats['num_layers']}"
            rows.append(row)
    return rows


NAMES = {"stock": "stock", "untiered": "specontext, one tier", "tiered": "specontext"}
DRIVEN = (
    "Random weights select at random, so the selections are driven: the head scores as ever, then "
    "a share of the pages gets new scores in "
    "each step. Stickiness is off, since it would distort that share. Later passes of an engine "
    "use the same prompts and hit the prefix cache; their times end to end are left out."
)
STEADY = (
    "Steady decode: step (median), mean and slowest tenth over the steps in which nothing prefills "
    "and as many requests decode as do at once for long: all, or a full wave where "
    "the rest queues; tokens/s by the mean. The engines ran in "
    "this one command, each in a process of its own, with prefix caching, chunked prefill, async "
    "scheduling and CUDA graphs as vLLM sets "
    "them. Late: layers whose misses arrived after the layer was ready for them, by the GPU's "
    "clock."
)


def compare(
    result: report.Report,
    load: Load,
    shape: Shape,
    engines: dict[str, dict[str, list[float]]],
    folder: Path,
    out: Path,
    seconds: float,
) -> None:
    """Run the engines one after the other into the result; the first one says how many requests
    there are.

    Args:
        engines: by name, each with its passes.
    """
    details = result.details

    def save() -> None:
        result.rows = make_rows(details, load.budget, shape.num_key_value_heads)
        result.write(out)

    requests: int | None = None
    for engine, passes in engines.items():
        name = NAMES[engine]
        kept = details["engines"].setdefault(name, {"passes": {}})
        log = folder / f"{engine}.log"
        print(f"{name}: starting (log {log})", flush=True)
        try:
            arguments = (load, engine, requests, passes, engine != "stock")
            for kind, value in run_child(
                run_engine, *arguments, log=log, seconds=seconds, env=ENGINE_ENV
            ):
                if kind == "ready":
                    kept |= value
                    print(
                        f"{name}: ready after {value['start_s']} s, "
                        f"{value['kv_capacity_tokens']:,} tokens, {value['fitting']} fit",
                        flush=True,
                    )
                elif kind == "timeline":
                    details.setdefault("timeline", {})[name] = value
                else:
                    kept["passes"][value[0]] = value[1]
                    requests = requests or value[1]["requests"]
                    print(f"{name} {value[0]}: {value[1]}", flush=True)
                save()
        except ChildError as error:
            result.failures[name] = str(error)
            save()
    result.show()
    raise typer.Exit(1 if result.failures else 0)


def main(
    model_shape: Annotated[
        str, typer.Option(help="8b, 1b, demo or tiny; the weights are random.")
    ] = "8b",
    gpu_gib: Annotated[
        float, typer.Option(help="Room for KV on the GPU, both engines; 0: all that vLLM grants.")
    ] = 16,
    host_gib: Annotated[float, typer.Option(help="Host pool.")] = 80,
    prompt_tokens: Annotated[int, typer.Option(help="Prompt length.")] = 32768,
    output_tokens: Annotated[int, typer.Option(help="Tokens each request generates.")] = 512,
    budget: Annotated[int, typer.Option(help="Tokens a KV head may read in a step.")] = 2048,
    max_num_seqs: Annotated[int, typer.Option(help="vLLM's; hot buffers are sized for it.")] = 20,
    turnover: Annotated[
        str, typer.Option(help="Comma-separated shares of pages scored anew a step, or `recorded`.")
    ] = "recorded,0.05,0.1",
    recorded: Annotated[
        Path, typer.Option(help="Result of the case `transfer` that `recorded` draws from.")
    ] = (report.RESULTS / "transfer-cpu.json"),
    policy: Annotated[
        str, typer.Option(help="Row of that result.")
    ] = "elastic, stickiness 1, 2x slots",
    engine_seconds: Annotated[float, typer.Option(help="Time limit of each engine.")] = 300,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
    work: Annotated[
        Path | None, typer.Option(help="Folder of the model config and the engines' logs.")
    ] = None,
) -> None:
    """Long requests in flight on little GPU memory: two tiers against stock vLLM. Exit code 1 if
    anything failed.
    """
    shape = Shape.named(model_shape)
    turnovers: dict[str, list[float]] = {}
    for text in turnover.split(","):
        turnovers[text] = (
            json.loads(recorded.read_text())["details"]["steady_shares"][policy]
            if text == "recorded"
            else [float(text)]
        )
    folder = work or Path(tempfile.mkdtemp(prefix="specontext-bench-"))
    load = Load(
        str(shape.write(folder / "model")),
        bool(gpus()),
        budget,
        gpu_gib or None,
        host_gib,
        prompt_tokens,
        output_tokens,
        max_num_seqs,
    )
    details: dict[str, Any] = {
        "shape": {"name": shape.name, **shape.config},
        "engines": {},
        "policy": policy,
        "prompt_tokens": prompt_tokens,
    }
    room = f"{gpu_gib:g} GiB" if gpu_gib else "all of vLLM's room"
    title = f"{prompt_tokens} tokens in, {output_tokens} out, {model_shape} shape, {room} for KV on the GPU, host pool {host_gib:g} GiB"
    result = report.Report(
        "capacity" if gpu_gib else "capacity-full", title, TABLES, details=details
    )
    result.notes += [
        f"{DRIVEN} `recorded` takes the shares from the demo model's needle and recitation runs "
        f"({recorded.name}, policy {policy}); the "
        "others are fixed shares.",
        STEADY,
    ]
    compare(
        result,
        load,
        shape,
        {"tiered": turnovers, "stock": {"": [0.0]}},
        folder,
        out,
        engine_seconds,
    )


def overlap(
    model_shape: Annotated[
        str, typer.Option(help="8b, 1b, demo or tiny; the weights are random.")
    ] = "8b",
    requests: Annotated[int, typer.Option(help="Requests in flight.")] = 24,
    prompt_tokens: Annotated[int, typer.Option(help="Prompt length.")] = 32768,
    output_tokens: Annotated[int, typer.Option(help="Tokens each request generates.")] = 256,
    budget: Annotated[int, typer.Option(help="Tokens a KV head may read in a step.")] = 2048,
    offloaded: Annotated[int, typer.Option(help="Layers to offload.")] = 16,
    turnover: Annotated[
        str, typer.Option(help="Comma-separated shares of pages scored anew a step.")
    ] = "0.05,0.112",
    engine_seconds: Annotated[float, typer.Option(help="Time limit of each engine.")] = 300,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
    work: Annotated[
        Path | None, typer.Option(help="Folder of the model config and the engines' logs.")
    ] = None,
) -> None:
    """What offloading costs where it is not needed: some layers offloaded against one tier, the
    same load. Exit code 1 if anything failed.
    """
    from specontext_vllm.config import SpeContextConfig, pages_for
    from specontext_vllm.residency.memory_model import (
        HOT_FACTORS,
        KVShape,
        MemoryModel,
        default_captured_rows,
    )

    shape = Shape.named(model_shape)
    config = SpeContextConfig(budget=budget)
    longest = prompt_tokens + output_tokens + 16
    kv = KVShape(
        shape.num_hidden_layers,
        shape.num_key_value_heads,
        shape.head_dim,
        2,
        16 * shape.head_key_bytes_per_token + 2 * shape.hidden_size,
    )
    model = MemoryModel(
        kv,
        budget_pages=config.budget_pages,
        table_pages=config.table_pages(longest),
        max_num_seqs=requests,
        max_model_len=longest,
        captured_rows=default_captured_rows(requests) if gpus() else 0,
    )
    pages = 1 + requests * pages_for(prompt_tokens + output_tokens)
    plan = model.size(
        pages, offloaded, min(pages_for(longest), int(HOT_FACTORS[0] * config.table_pages(longest)))
    )
    # Half a page more, lest rounding to GiB and back takes one away.
    gpu_gib, host_gib = (
        (plan.gpu_bytes + kv.page_bytes / 2) / 2**30,
        (plan.host_bytes + kv.page_bytes / 2) / 2**30,
    )
    turnovers = {text: [float(text)] for text in turnover.split(",")}
    folder = work or Path(tempfile.mkdtemp(prefix="specontext-bench-"))
    load = Load(
        str(shape.write(folder / "model")),
        bool(gpus()),
        budget,
        gpu_gib,
        host_gib,
        prompt_tokens,
        output_tokens,
        requests,
    )
    details: dict[str, Any] = {
        "shape": {"name": shape.name, **shape.config},
        "engines": {},
        "prompt_tokens": prompt_tokens,
    }
    title = (
        f"{offloaded} of {shape.num_hidden_layers} layers offloaded against none, {requests} "
        f"requests of {prompt_tokens} tokens, {model_shape} "
        f"shape, budget {budget}"
    )
    tables = {
        "Steady decode": (
            *TABLES["Steady decode"],
            report.Column("against", "step, times one tier's", ".3f"),
        )
    }
    result = report.Report("overlap", title, tables, details=details, notes=[DRIVEN, STEADY])
    engines = {"untiered": dict([next(iter(turnovers.items()))]), "tiered": turnovers}
    compare(result, load, shape, engines, folder, out, engine_seconds)
