"""Part `serve`: `vllm bench serve` against a real server."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from benchmarks import report, serving
from benchmarks import steps as stepping
from benchmarks.machine import gpus
from benchmarks.shapes import Shape
from benchmarks.speed.options import (
    MAX_REQUESTS,
    Budget,
    Engines,
    EngineSeconds,
    ModelShape,
    Out,
    Work,
    end,
    refusing,
    work_folder,
)


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
    max_num_seqs: Annotated[int, typer.Option(help="vLLM's.")] = MAX_REQUESTS,
    server_options: Annotated[
        str,
        typer.Option(
            help="More options of `vllm serve` for all engines, in quotes, as in "
            "'--data-parallel-size 2 --tensor-parallel-size 2'; give a --label with them."
        ),
    ] = "",
    label: Annotated[str, typer.Option(help="Word that joins the result's name.")] = "",
    engine_seconds: EngineSeconds = 1200,
    out: Out = report.RESULTS,
    work: Work = None,
) -> None:
    """`vllm bench serve` against a real `vllm serve`: throughput, TTFT and TPOT of stock and
    specontext.
    """

    def prepare() -> tuple[Any, ...]:
        try:
            more = shlex.split(server_options)
        except ValueError as error:
            raise ValueError(
                f"--server-options: found {server_options!r} ({error}); close the quotes."
            ) from None
        shape = Shape.named(model_shape)
        loads = serving.parse_loads(lengths, concurrency, shape, max_num_seqs)
        details = {
            "shape": {"name": shape.name, **shape.config},
            "budget": budget,
            "server_options": more,
            "engines": {},
            "loads": [],
        }
        title = f"vllm bench serve, {model_shape} shape, random weights, budget {budget} tokens"
        if more:
            title += f", {shlex.join(more)}"
        case = "speed-serve" + (f"-{label}" if label else "")
        result = report.Report(case, title, serving.TABLES, details=details)
        same = ("shape", "budget", *(["server_options"] if more else []))
        result.take_over(out, same)
        return (
            shape,
            loads,
            more,
            stepping.chosen_engines("--engines", engines, ("specontext", "stock")),
            result,
        )

    shape, loads, more, chosen, result = refusing(prepare)
    folder = work_folder(work)
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
        arguments = serving.server_arguments(name, loads, budget, max_num_seqs, bool(gpus()), more)
        events = serving.run_server(
            model, arguments, loads, rounds=rounds, seconds=engine_seconds, folder=folder
        )
        for _ in stepping.collect(result, name, [load.cell for load in loads], events):
            save()
    end(result, out)
