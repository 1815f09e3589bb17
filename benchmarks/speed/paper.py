"""Parts `paper` and `edge`: the paper's workloads."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report, workloads
from benchmarks import steps as stepping
from benchmarks.engines import EngineSpec
from benchmarks.hugging_face import ATTENTION
from benchmarks.machine import gpus
from benchmarks.shapes import Shape
from benchmarks.speed.options import (
    MAX_REQUESTS,
    Budget,
    Engines,
    EngineSeconds,
    ModelShape,
    Out,
    Scale,
    Timed,
    Work,
    end,
    refusing,
    work_folder,
)

PAPER_REQUESTS = 4
"""Requests that the paper's Hugging Face eager held at once."""
EDGE_BATCHED_TOKENS = 2048
"""Prompt tokens of one step on 4 GiB: their activations count against the cap."""


def paper(
    model_shape: ModelShape = "8b",
    budget: Budget = 2048,
    engines: Engines = ",".join(workloads.ENGINES),
    requests: Annotated[
        int, typer.Option(help="Most requests of the vLLM engines (vLLM's max_num_seqs).")
    ] = MAX_REQUESTS,
    timed: Timed = 48,
    scale: Scale = 1,
    engine_seconds: EngineSeconds = 280,
    out: Out = report.RESULTS,
    work: Work = None,
) -> None:
    """The paper's four workloads by sampled step times: tokens/s against Hugging Face eager and
    stock vLLM.
    """
    title = f"The paper's workloads, {model_shape} shape, random weights, budget {budget} tokens"
    notes = [
        workloads.NOTE,
        f"Hugging Face eager holds {PAPER_REQUESTS} requests, as in the paper; vLLM's engines as "
        "many as their KV cache holds at "
        f"`in + out` tokens, up to {requests}.",
    ]
    _compare_workloads(
        "speed-paper",
        title,
        notes,
        refusing(lambda: Shape.named(model_shape)),
        dict(budget=budget, max_num_seqs=requests),
        engines,
        PAPER_REQUESTS,
        timed,
        scale,
        engine_seconds,
        out,
        work,
    )


def edge(
    model_shape: ModelShape = "1b",
    gpu_gib: Annotated[
        float, typer.Option(help="GPU memory that each engine may use, weights included.")
    ] = 4,
    budget: Budget = 2048,
    engines: Engines = ",".join(workloads.ENGINES),
    requests: Annotated[
        int, typer.Option(help="Most requests of every engine (vLLM's max_num_seqs).")
    ] = 6,
    turnover: Annotated[float, typer.Option(help="Share of pages scored anew a step.")] = 0.05,
    timed: Timed = 48,
    scale: Scale = 1,
    engine_seconds: EngineSeconds = 280,
    out: Out = report.RESULTS,
    work: Work = None,
) -> None:
    """The paper's edge case: a small GPU, host memory behind it for specontext, the same four
    workloads.
    """
    shape = refusing(lambda: Shape.named(model_shape))
    shape = Shape(
        shape.name, shape.config | {"tie_word_embeddings": True}
    )  # as Llama-3.2-1B has it, to fit
    longest = max(workload.room for workload in workloads.scaled(scale))
    host_gib = requests * (longest + 64) * shape.kv_bytes_per_token / 2**30
    on_gpu = bool(gpus())
    title = (
        f"Edge: {gpu_gib:g} GiB of GPU memory, {model_shape} shape with tied embeddings, random "
        f"weights, budget {budget} tokens"
    )
    capped = (
        "The cap: vLLM's gpu_memory_utilization, and for Hugging Face torch's per-process memory "
        "fraction; both leave out the CUDA context."
        " vLLM's engines are started twice: the first start compiles, and has less room for KV."
        if on_gpu
        else "On this CPU the cap is on specontext's KV cache alone; the others have none."
    )
    notes = [
        workloads.NOTE,
        f"{capped} Each engine has as many requests as it can hold at `in + out` tokens, up to "
        f"{requests} (Hugging Face: {requests}, "
        f"halved till a step fits). specontext has a host pool of {host_gib:.3g} GiB; its "
        "selections are driven: the head scores as ever, "
        f"then a share of {turnover:g} of the pages gets new scores in each step, since random "
        "weights would select at random. "
        "Stickiness is off.",
    ]
    settings = dict(
        budget=budget, max_num_seqs=requests, gpu_gib=gpu_gib, host_gib=host_gib, turnover=turnover
    )
    _compare_workloads(
        "speed-edge",
        title,
        notes,
        shape,
        settings | {"batched_tokens": EDGE_BATCHED_TOKENS},
        engines,
        None,
        timed,
        scale,
        engine_seconds,
        out,
        work,
    )


def _compare_workloads(
    case: str,
    title: str,
    notes: list[str],
    shape: Shape,
    settings: dict[str, Any],
    engines: str,
    eager_requests: int | None,
    timed: int,
    scale: float,
    engine_seconds: float,
    out: Path,
    work: Path | None,
) -> None:
    """Run the engines over the four workloads into the result of a case.

    Args:
        settings: of every engine, by the names of ``EngineSpec``; a host pool is specontext's
            alone.
        eager_requests: of Hugging Face; None: as many as fit.
    """
    scenes = workloads.scaled(scale)
    longest = max(workload.room for workload in scenes)

    def prepare() -> tuple[Any, ...]:
        if longest > shape.max_position_embeddings:
            raise ValueError(
                f"--scale: {longest} tokens exceed the {shape.max_position_embeddings} of "
                f"--model-shape {shape.name}."
            )
        details = {
            "shape": {"name": shape.name, **shape.config},
            "settings": settings,
            "scale": scale,
            "engines": {},
        }
        result = report.Report(case, title, workloads.TABLES, details=details, notes=notes)
        result.take_over(out, ("shape", "settings", "scale"))
        chosen = stepping.chosen_engines("--engines", engines, tuple(workloads.ENGINES))
        stepping.refuse_hugging_face(shape, chosen)
        return result, chosen

    result, chosen = refusing(prepare)
    cells = {
        name: workloads.make_cells(scenes, name, eager_requests, scale)
        for name in workloads.ENGINES
    }
    folder = work_folder(work)
    model, on_gpu = str(shape.write(folder / "model")), bool(gpus())
    for name in chosen:
        own = (
            settings
            if name == "specontext"
            else {key: value for key, value in settings.items() if key != "host_gib"}
        )
        spec = EngineSpec(
            name, model, on_gpu, steps=timed, shared_prompts=True, max_model_len=longest, **own
        )
        if spec.gpu_gib and on_gpu and name not in ATTENTION:
            # Compiling leaves less room for KV under a cap. Later starts are compared, so the first
            # only compiles.
            deque(
                stepping.run_into(
                    result, spec, [], log=folder / f"{name}-compile.log", seconds=engine_seconds
                ),
                maxlen=0,
            )
        for _ in stepping.run_into(
            result, spec, cells[name], log=folder / f"{name}.log", seconds=engine_seconds
        ):
            result.rows = workloads.make_rows(scenes, cells, result.details)
            result.notes = [*notes, *stepping.run_notes(result.details)]
            result.write(out)
    end(result, out)
