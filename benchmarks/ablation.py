"""Case `ablation`: what prefetch with elastic loading, and then the adaptive memory model, add to
sparse attention over offloaded KV.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.capacity.engine import Load, serve
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.driven import DRIVEN, driven
from benchmarks.machine import gpus
from benchmarks.shapes import Shape
from benchmarks.workloads import mean_step, scaled

SAMPLES = (2048, 4096, 8192, 12288, 18432, 24576, 34304)
"""Context lengths whose steps are timed; between them a step's time is interpolated."""

STEPS = 48
MODES = {
    "sparse only": "all layers offloaded, each step first fetches all that it reads",
    "+ prefetch and elastic": (
        "all layers offloaded, misses alone are fetched, beside the layers' compute"
    ),
    "+ adaptive": "the memory model keeps as many layers on the GPU as fit",
}
LOADING = {"sparse only": "plain", "+ prefetch and elastic": "elastic", "+ adaptive": "adaptive"}
"""The setting ``loading`` of each mode; the modes differ in nothing else."""


def run_mode(
    load: Load, mode: str, requests: int, share: float, samples: list[int]
) -> Iterator[tuple[str, Any]]:
    """Events ``("ready", facts)`` and, per context length, ``("step", (tokens, ms, figures))``;
    runs in a child.
    """
    begin = time.perf_counter()
    from vllm import LLM

    arguments = load.arguments("tiered") | {"enable_prefix_caching": False}
    arguments["additional_config"]["specontext"]["loading"] = LOADING[mode]
    llm = LLM(**arguments)
    yield "ready", {"start_s": round(time.perf_counter() - begin, 1)}
    llm.collective_rpc("specontext_set", kwargs=driven([share]))
    for tokens in samples:
        # The first steps of a pass are not timed; the middle of the others is at `tokens`.
        figures = serve(
            llm,
            replace(load, prompt_tokens=tokens - STEPS // 2, output_tokens=STEPS),
            requests,
            True,
        )
        yield "step", (tokens, figures["step_ms"], figures["stats"])


def main(
    model_shape: Annotated[
        str, typer.Option(help="8b, 1b, demo or tiny; the weights are random.")
    ] = "8b",
    gpu_gib: Annotated[float, typer.Option(help="Room for KV on the GPU.")] = 8,
    requests: Annotated[
        int, typer.Option(help="Requests in flight (the paper's HF eager: 4).")
    ] = 4,
    budget: Annotated[int, typer.Option(help="Tokens a KV head may read in a step.")] = 2048,
    turnover: Annotated[float, typer.Option(help="Share of pages scored anew a step.")] = 0.05,
    engine_seconds: Annotated[float, typer.Option(help="Time limit of each engine.")] = 200,
    scale: Annotated[float, typer.Option(help="All lengths are multiplied by this.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
    work: Annotated[
        Path | None, typer.Option(help="Folder of the model config and the engines' logs.")
    ] = None,
) -> None:
    """The paper's ablation on its four workloads, by sampled step times. Exit code 1 if anything
    failed.
    """
    shape = Shape.named(model_shape)
    folder = work or Path(tempfile.mkdtemp(prefix="specontext-bench-"))
    samples = [int(scale * n) for n in SAMPLES]
    longest = samples[-1] + STEPS
    host_gib = (requests * longest + 4096) * shape.kv_bytes_per_token / 2**30
    load = Load(
        str(shape.write(folder / "model")),
        bool(gpus()),
        budget,
        gpu_gib,
        host_gib,
        longest - STEPS,
        STEPS,
        requests,
    )
    details: dict[str, Any] = {
        "shape": {"name": shape.name, **shape.config},
        "steps": {},
        "stats": {},
        "modes": MODES,
    }
    tables = {
        "Mean step over the workload, ms": (
            report.Column("workload", "[in, out]"),
            *(report.Column(mode, mode, ".2f") for mode in MODES),
            report.Column("elastic", "+ prefetch and elastic, times faster", ".2f"),
            report.Column("adaptive", "+ adaptive, times faster", ".2f"),
        )
    }
    title = (
        f"Ablation, {model_shape} shape, {requests} requests, {gpu_gib:g} GiB for KV on the GPU, "
        f"budget {budget}"
    )
    result = report.Report("ablation", title, tables, details=details)
    result.notes += [f"{mode}: {what}." for mode, what in MODES.items()]
    result.notes += [
        DRIVEN + f" The share is {turnover:g}.",
        f"Step times are medians at contexts of {', '.join(map(str, samples))} tokens, "
        "interpolated between, and averaged over the output.",
    ]
    for mode in MODES:
        print(f"{mode}: starting", flush=True)
        steps = details["steps"].setdefault(mode, {})
        try:
            arguments = (load, mode, requests, turnover, samples)
            log = folder / f"{mode.replace(' ', '-')}.log"
            for kind, value in run_child(
                run_mode, *arguments, log=log, seconds=engine_seconds, env=engine_env(bool(gpus()))
            ):
                print(f"{mode}: {value}", flush=True)
                if kind == "step":
                    steps[value[0]] = value[1]
                    details["stats"].setdefault(mode, {})[value[0]] = value[2]
        except ChildError as error:
            result.failures[mode] = str(error)
        result.rows = make_rows(details["steps"], scale)
        result.write(out)
    result.show()
    raise typer.Exit(1 if result.failures else 0)


def make_rows(steps: dict[str, dict[int, float]], scale: float) -> list[dict[str, Any]]:
    """The table's rows from the sampled step times."""
    rows = []
    for workload in scaled(scale):
        row: dict[str, Any] = {"workload": workload.name}
        for mode, known in steps.items():
            if known:
                row[mode] = mean_step(known, workload.prompt, workload.room)
        sparse, elastic, adaptive = (row.get(mode) for mode in MODES)
        if sparse and elastic:
            row["elastic"] = sparse / elastic
        if sparse and adaptive:
            row["adaptive"] = sparse / adaptive
        rows.append(row)
    return rows
