"""Case `speed`: specontext against every alternative, in parts that run, and run again, one by one."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report, serving, workloads
from benchmarks import steps as stepping
from benchmarks.engines import EngineSpec
from benchmarks.hugging_face import ATTENTION, MOST_STEPS
from benchmarks.machine import device_slug, gpus
from benchmarks.picture import draw_steps
from benchmarks.shapes import Shape

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
CELLS = "1x1k,6x1k,24x1k,1x8k,6x8k,24x8k,1x32k,6x32k,24x32k,1x128k,6x128k"
PAPER_REQUESTS = 4
"""Requests that the paper's Hugging Face eager held at once."""

MOST_REQUESTS = 32
EDGE_BATCHED_TOKENS = 2048
"""Prompt tokens of one step on 4 GiB: their activations count against the cap."""

ModelShape = Annotated[str, typer.Option(help="8b, 1b, demo or tiny; the weights are random.")]
Budget = Annotated[int, typer.Option(help="Tokens a KV head may read in a step.")]
Timed = Annotated[
    int, typer.Option(min=2, help="Timed steps of each cell; at most 32 of Hugging Face.")
]
Engines = Annotated[
    str, typer.Option(help="Comma-separated; results of the others stay as they are.")
]
EngineSeconds = Annotated[
    float, typer.Option(help="Time limit of each engine; what it measured till then is kept.")
]
Scale = Annotated[float, typer.Option(help="All lengths are multiplied by this.")]
Out = Annotated[
    Path, typer.Option(help="Folder of the result files; earlier ones there are added to.")
]
Work = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the model config and the engines' logs; default a new temporary one."
    ),
]

TABLES = {
    "Step time, ms": (
        stepping.CELL,
        report.Column("hf_eager", "HF eager", ".2f"),
        report.Column("hf_sdpa", "HF SDPA", ".2f"),
        report.Column("stock", "stock", ".2f"),
        report.Column("quest", "quest", ".2f"),
        report.Column("sparse", "specontext", ".2f"),
        report.Column("stock_limit", "byte limit dense", ".2f"),
        report.Column("sparse_limit", "byte limit sparse", ".2f"),
        report.Column("ratio", "times stock", ".2f"),
        report.Column("quest_ratio", "quest, times stock", ".2f"),
        report.Column("eager_ratio", "times HF eager", ".2f"),
        report.Column("over_limit", "times the byte limit", ".2f"),
        stepping.PAGES_READ,
    ),
    "Spread": (
        stepping.CELL,
        *(
            report.Column(f"{key}_spread", f"{name}, p10 to p90, ms")
            for name, key in stepping.KEYS.items()
        ),
        *(
            report.Column(f"{key}_prefill", f"{name}, prefill, s", ".2f")
            for name, key in stepping.KEYS.items()
        ),
    ),
    **stepping.STAGES,
}


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """Specontext against every alternative. Without a part: all parts with their defaults. Exit
    code 1 if anything failed.
    """
    if context.invoked_subcommand is None:
        failed = False
        for part in (steps, serve, paper, edge):
            try:
                part()
            except typer.Exit as ended:
                failed |= ended.exit_code != 0
        raise typer.Exit(1 if failed else 0)


def refusing(make: Callable[[], Any]) -> Any:
    """``make()``, or exit code 2 with the sentence of its ValueError."""
    try:
        return make()
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


@app.command()
def steps(
    cells: Annotated[
        str,
        typer.Option(
            help="Comma-separated REQUESTSxTOKENS; `fit` requests: as many as the KV room holds."
        ),
    ] = CELLS,
    model_shape: ModelShape = "8b",
    budget: Budget = 2048,
    timed: Timed = 128,
    engines: Engines = ",".join(stepping.KEYS),
    max_num_seqs: Annotated[
        int, typer.Option(help="vLLM's; `fit` never exceeds it.")
    ] = MOST_REQUESTS,
    engine_seconds: EngineSeconds = 280,
    out: Out = report.RESULTS,
    work: Work = None,
) -> None:
    """Decode steps at many requests and contexts: stock vLLM, specontext, quest, Hugging Face, and
    the byte limit.
    """

    def prepare() -> tuple[Any, ...]:
        shape = Shape.named(model_shape)
        # Shortest first: a longer context then finds the shorter one in the prefix cache.
        ordered = sorted(
            stepping.parse_cells(cells, shape, max_num_seqs),
            key=lambda cell: (cell.tokens, -(cell.requests or max_num_seqs)),
        )
        details = {
            "shape": {"name": shape.name, **shape.config},
            "budget": budget,
            "engines": {},
            "stages_ms": {},
            "cells": [],
        }
        title = f"Decode steps, {model_shape} shape, random weights, budget {budget} tokens"
        result = report.Report("speed-steps", title, TABLES, details=details)
        result.take_over(out, ("shape", "budget"))
        return (
            shape,
            ordered,
            stepping.chosen_engines("--engines", engines, tuple(stepping.KEYS)),
            result,
        )

    shape, ordered, chosen, result = refusing(prepare)
    folder, on_gpu = _work_folder(work), bool(gpus())
    model = str(shape.write(folder / "model"))
    details = result.details
    details["cells"] += [cell.name for cell in ordered if cell.name not in details["cells"]]
    every = stepping.parse_cells(",".join(details["cells"]), shape, MOST_REQUESTS + max_num_seqs)
    every.sort(key=lambda cell: (cell.tokens, cell.requests or max_num_seqs))
    notes = [
        f"Steady state: all requests decode; median over {timed} steps (Hugging Face: "
        f"{min(timed, MOST_STEPS)}) after the last prefill. "
        "Each engine in a process of its own, one after the other. vLLM's with prefix caching, "
        "chunked prefill and async scheduling as "
        "vLLM sets them"
        + (
            " and CUDA graphs."
            if on_gpu
            else "; on this CPU eagerly, so the times show nothing but that it runs."
        ),
        "Hugging Face: transformers' model alone with a DynamicCache, as `generate` runs it: one "
        "prefill over all prompts, then step by "
        f'step. "{stepping.OUT_OF_MEMORY}": that prefill, or the KV cache, does not fit this device. A prefill time is given where no '
        "prompt began as one before it.",
        stepping.LIMIT_NOTE,
    ]

    def save() -> None:
        result.rows = stepping.make_rows(shape, every, details, budget)
        result.notes = [*notes, *stepping.bandwidth_notes(details), *stepping.run_notes(details)]
        result.write(out)

    for name in chosen:
        spec = EngineSpec(name, model, on_gpu, budget, max_num_seqs, timed, shared_prompts=True)
        for _ in stepping.run_into(
            result, spec, ordered, log=folder / f"{name}.log", seconds=engine_seconds
        ):
            save()
    if "specontext" in chosen:
        for _ in stepping.probe_into(result, shape, ordered, log=folder / "stages.log"):
            save()
    picture = out / f"speed-steps-{device_slug(result.machine)}.png"
    if any("context" in row for row in result.rows):  # something was timed
        draw_steps(result.rows, result.title, picture)
    _end(result, out)


@app.command()
def serve(
    lengths: Annotated[
        str, typer.Option(help="Comma-separated IN/OUT in tokens.")
    ] = "8k/1k,32k/4k,1k/16k",
    concurrency: Annotated[
        str, typer.Option(help="Comma-separated numbers of requests at once.")
    ] = "1,8,24",
    rounds: Annotated[
        int, typer.Option(min=1, help="Requests of a cell for each one at once.")
    ] = 1,
    model_shape: ModelShape = "8b",
    budget: Budget = 2048,
    engines: Engines = "specontext,stock",
    max_num_seqs: Annotated[int, typer.Option(help="vLLM's.")] = MOST_REQUESTS,
    engine_seconds: EngineSeconds = 1200,
    out: Out = report.RESULTS,
    work: Work = None,
) -> None:
    """`vllm bench serve` against a real `vllm serve`: throughput, TTFT and TPOT of stock and
    specontext.
    """

    def prepare() -> tuple[Any, ...]:
        shape = Shape.named(model_shape)
        loads = serving.parse_loads(lengths, concurrency, shape, max_num_seqs)
        details = {
            "shape": {"name": shape.name, **shape.config},
            "budget": budget,
            "engines": {},
            "loads": [],
        }
        title = f"vllm bench serve, {model_shape} shape, random weights, budget {budget} tokens"
        result = report.Report("speed-serve", title, serving.TABLES, details=details)
        result.take_over(out, ("shape", "budget"))
        return (
            shape,
            loads,
            stepping.chosen_engines("--engines", engines, ("specontext", "stock")),
            result,
        )

    shape, loads, chosen, result = refusing(prepare)
    folder = _work_folder(work)
    model = shape.write(folder / "model")
    serving.write_tokenizer(shape, model)
    details = result.details
    known = {tuple(load) for load in details["loads"]} | {
        (load.name, load.prompt, load.output, load.concurrency) for load in loads
    }
    details["loads"] = sorted(known, key=lambda load: load[1:])
    notes = [
        f"The client sends {rounds} round(s) of as many random requests as run at once, all as "
        "soon as one is free; temperature 0. "
        "Medians over the requests. One server per engine for all rows, with the same options but "
        "for the backend.",
        "The tokenizer has one word per id; the weights are random, so the words mean nothing.",
    ]

    def save() -> None:
        result.rows = serving.make_rows([serving.Load(*load) for load in details["loads"]], details)
        result.notes = [*notes, *stepping.run_notes(details)]
        result.write(out)

    for name in chosen:
        arguments = serving.server_arguments(name, loads, budget, max_num_seqs, bool(gpus()))
        events = serving.run_server(
            model, arguments, loads, rounds=rounds, seconds=engine_seconds, folder=folder
        )
        for _ in stepping.collect(result, name, [load.cell for load in loads], events):
            save()
    _end(result, out)


@app.command()
def paper(
    model_shape: ModelShape = "8b",
    budget: Budget = 2048,
    engines: Engines = ",".join(workloads.ENGINES),
    requests: Annotated[
        int, typer.Option(help="Most requests of the vLLM engines (vLLM's max_num_seqs).")
    ] = MOST_REQUESTS,
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


@app.command()
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
    title = f"Edge: {gpu_gib:g} GiB of GPU memory, {model_shape} shape with tied embeddings, random weights, budget {budget} tokens"
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
        return result, stepping.chosen_engines("--engines", engines, tuple(workloads.ENGINES))

    result, chosen = refusing(prepare)
    cells = {
        name: workloads.make_cells(scenes, name, eager_requests, scale)
        for name in workloads.ENGINES
    }
    folder = _work_folder(work)
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
            # A start that compiles finds less room for KV under a cap than every later one; what is
            # compared is the later one.
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
    _end(result, out)


def _work_folder(work: Path | None) -> Path:
    # Absolute: servers and clients run in other folders, and the client asks for the model by its
    # path.
    return (work or Path(tempfile.mkdtemp(prefix="specontext-bench-"))).resolve()


def _end(result: report.Report, out: Path) -> None:
    result.show()
    print(f"written: {out}", flush=True)
    raise typer.Exit(1 if result.failures else 0)
