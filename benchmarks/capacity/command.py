"""Cases `capacity` and `overlap`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.capacity.engine import Load
from benchmarks.capacity.tables import NAMES, STEADY, TABLES, WORKERS, compare
from benchmarks.driven import DRIVEN
from benchmarks.kv_cache import KVCacheDtype, kv_suffix, kv_title
from benchmarks.machine import gpus
from benchmarks.shapes import Shape
from benchmarks.speed.options import refusing
from benchmarks.steps import chosen_engines
from benchmarks.workers import Workers, refuse_workers, workers_suffix, workers_title


def main(
    model_shape: Annotated[
        str, typer.Option(help="70b, 8b, 1b, demo or tiny; the weights are random.")
    ] = "8b",
    gpu_gib: Annotated[
        float, typer.Option(help="Room for KV on each GPU, both engines; 0: all that vLLM grants.")
    ] = 16,
    host_gib: Annotated[float, typer.Option(help="Host pool.")] = 80,
    prompt_tokens: Annotated[int, typer.Option(help="Prompt length.")] = 32768,
    output_tokens: Annotated[int, typer.Option(help="Tokens each request generates.")] = 512,
    budget: Annotated[int, typer.Option(help="Tokens a KV head may read in a step.")] = 2048,
    max_num_seqs: Annotated[int, typer.Option(help="vLLM's; hot buffers are sized for it.")] = 20,
    kv_cache_dtype: KVCacheDtype = "auto",
    workers: Workers = 1,
    engines: Annotated[
        str, typer.Option(help="Comma-separated: specontext, stock.")
    ] = "specontext,stock",
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
    shape = refusing(lambda: Shape.named(model_shape))
    chosen = refusing(lambda: chosen_engines("--engines", engines, ("specontext", "stock")))
    refusing(lambda: refuse_workers(workers))
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
        kv_cache_dtype,
        workers,
    )
    details: dict[str, Any] = {
        "shape": {"name": shape.name, **shape.config},
        "engines": {},
        "policy": policy,
        "prompt_tokens": prompt_tokens,
        "kv_cache_dtype": kv_cache_dtype,
    }
    room = f"{gpu_gib:g} GiB" if gpu_gib else "all of vLLM's room"
    title = (
        f"{prompt_tokens} tokens in, {output_tokens} out, {model_shape} shape, {room} for KV on "
        f"the GPU, host pool {host_gib:g} GiB" + kv_title(kv_cache_dtype) + workers_title(workers)
    )
    case = ("capacity" if gpu_gib else "capacity-full") + kv_suffix(kv_cache_dtype)
    case += shape.suffix + workers_suffix(workers)
    result = report.Report(case, title, TABLES, details=details)
    result.notes += [
        f"{DRIVEN} `recorded` takes the shares from the demo model's needle and recitation runs "
        f"({recorded.name}, policy {policy}); the "
        "others are fixed shares.",
        STEADY,
        *([WORKERS] if workers > 1 else []),
    ]
    every = {"tiered": turnovers, "stock": {"": [0.0]}}
    compare(
        result,
        load,
        shape,
        {name: passes for name, passes in every.items() if NAMES[name] in chosen},
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
    from specontext_vllm.residency.memory_model import HOT_FACTORS, KVShape, MemoryModel
    from specontext_vllm.residency.table_rows import default_captured_rows

    shape = Shape.named(model_shape)
    config = SpeContextConfig(budget=budget)
    longest = prompt_tokens + output_tokens + 16
    kv = KVShape(
        shape.num_hidden_layers,
        shape.num_key_value_heads,
        shape.head_dim,
        2,
        16 * shape.head_key_bytes_per_token() + 2 * shape.hidden_size,
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
    # Half a page more, since rounding to GiB and back might take one away.
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
