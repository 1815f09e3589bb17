"""The command `drafts`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from benchmarks import report, steps
from benchmarks.drafts.engine import LOSSLESS, DraftSpec
from benchmarks.drafts.head import write_eagle3
from benchmarks.drafts.lanes import run_all
from benchmarks.drafts.tables import OURS, STOCK, TABLES, cell_key, make_rows
from benchmarks.engines import Cell
from benchmarks.machine import gpus as gpus_here
from benchmarks.shapes import Shape
from benchmarks.speed.options import Budget, ModelShape, Out, Work, end, refusing, work_folder

CELLS = "24x32k,1x32k,1x128k,6x128k,1x1k,24x8k,6x32k,6x8k,1x8k"
ENGINES = (STOCK, "specontext-drafts", LOSSLESS, "stock-drafts", OURS)
"""In the order in which they run: those first that the others are compared with."""


def main(
    cells: Annotated[
        str, typer.Option(help="Comma-separated REQUESTSxTOKENS, measured in this order.")
    ] = CELLS,
    engines: Annotated[
        str, typer.Option(help="Comma-separated; results of the others stay as they are.")
    ] = ",".join(ENGINES),
    drafts: Annotated[
        str,
        typer.Option(
            help="Comma-separated numbers of drafts of the EAGLE-3 head; an engine each of "
            "stock-drafts and specontext-drafts."
        ),
    ] = "3",
    acceptance: Annotated[
        str,
        typer.Option(
            help="Comma-separated probabilities with which a draft is accepted if those before it "
            "were."
        ),
    ] = "0.8,0.9,0.6",
    model_shape: ModelShape = "8b",
    budget: Budget = 2048,
    timed: Annotated[int, typer.Option(min=2, help="Timed steps of each cell, or more.")] = 32,
    gpus: Annotated[
        int, typer.Option(min=1, help="GPUs to spread the engines over, one engine on each.")
    ] = 1,
    seconds: Annotated[
        float, typer.Option(help="Time limit of it all; what was measured till then is kept.")
    ] = 540,
    out: Out = report.RESULTS,
    work: Work = None,
) -> None:
    """Tokens per second with drafts of an EAGLE-3 head and in lossless mode, at acceptances that
    are set.
    """

    def prepare() -> tuple[Any, ...]:
        shape = Shape.named(model_shape)
        wanted = [Cell.parse(part) for part in cells.split(",")]
        for cell in wanted:
            cell.named_requests  # noqa: B018 - refuses "fit"
        steps.parse_cells(cells, shape, max(cell.named_requests for cell in wanted))
        chosen = [name.strip() for name in engines.split(",")]
        for name in chosen:
            if name not in ENGINES:
                raise ValueError(f"--engines: found {name!r}; use {', '.join(ENGINES)}.")
        counts = _numbers("--drafts", drafts, int, 1, 16)
        rates = _numbers("--acceptance", acceptance, float, 0, 1)
        details = {
            "shape": {"name": shape.name, **shape.config},
            "budget": budget,
            "engines": {},
            "cells": [],
            "drafts": [],
            "acceptances": [],
        }
        title = f"Drafts, {model_shape} shape, random weights, budget {budget} tokens"
        result = report.Report(f"drafts-{model_shape}", title, TABLES, details=details)
        result.take_over(out, ("shape", "budget"))
        return shape, wanted, [name for name in ENGINES if name in chosen], counts, rates, result

    shape, wanted, chosen, counts, rates, result = refusing(prepare)
    folder, found = work_folder(work), gpus_here()
    if found and gpus > len(found):
        raise typer.BadParameter(f"found {gpus}, but this machine has {len(found)}.")
    model = str(shape.write(folder / "model"))
    head = str(write_eagle3(shape, folder / "head"))
    specs = []
    for name, count in _runs(chosen, counts):
        go = folder / f"{name}-{count}.go"
        go.unlink(missing_ok=True)
        specs.append(
            DraftSpec(
                name.removesuffix("-drafts"),
                count,
                model,
                head,
                bool(found),
                budget,
                timed,
                tuple(wanted),
                tuple(rates),
                str(go),
            )
        )
    details = result.details
    for key, values in (
        ("cells", [cell.name for cell in wanted]),
        ("drafts", counts),
        ("acceptances", rates),
    ):
        details[key] += [value for value in values if value not in details[key]]
    details.setdefault("runs", {})[result.date] = result.run()
    for spec in specs:
        kept = details["engines"].setdefault(spec.name, {"cells": {}})["cells"]
        for cell in wanted:
            for at in (None, *rates):
                kept.pop(cell_key(cell.name, at), None)
            result.failures.pop(f"{spec.name}, {cell.name}", None)
        result.failures.pop(spec.name, None)

    def take(name: str, kind: str, value: Any) -> None:
        engine = details["engines"][name]
        if kind == "ready":
            engine |= value
            print(f"{name}: ready after {value['start_s']} s", flush=True)
        elif kind == "cell":
            (cell, at), figures = value
            engine["cells"][cell_key(cell, at)] = figures | {"run": result.date}
            print(f"{name}: {cell_key(cell, at)}: {_brief(figures)}", flush=True)
        else:
            what = name if kind == "error" else f"{name}, {value[0]}"
            result.failures[what] = value if kind == "error" else value[1]
            print(f"{what}: failed: {result.failures[what]}", flush=True)
        save()

    def save() -> None:
        every = sorted(
            (Cell.parse(cell) for cell in details["cells"]),
            key=lambda cell: (cell.tokens, cell.named_requests),
        )
        result.rows = make_rows(
            every, sorted(details["drafts"]), sorted(details["acceptances"]), details
        )
        result.notes = [*_notes(bool(found)), *steps.run_notes(details)]
        result.write(out)

    run_all(specs, gpus=gpus if found else 0, seconds=seconds, folder=folder, take=take)
    end(result, out)


def _numbers(option: str, text: str, kind: Any, least: float, most: float) -> list[Any]:
    """The comma-separated numbers.

    Raises:
        ValueError: something else, or one that is out of bounds.
    """
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(least <= number <= most for number in numbers):
        raise ValueError(f"{option}: found {text!r}; give numbers from {least} to {most}.")
    return numbers


def _runs(chosen: list[str], counts: list[int]) -> list[tuple[str, int]]:
    """Engines and their numbers of drafts in the order in which they run: all with the first
    number, then those that draft with the others.
    """
    drafting = [name for name in chosen if name.endswith("-drafts")]
    first = [(name, counts[0] if name in drafting else 0) for name in chosen]
    return first + [(name, count) for count in counts[1:] for name in drafting]


def _brief(figures: dict[str, Any]) -> str:
    if "out_of_memory" in figures:
        return f"out of memory: {figures['out_of_memory']}"
    return (
        f"{figures['tokens_per_s']:,.0f} tokens/s, step {figures['step_ms']['median']:.2f} ms, "
        f"{figures['tokens_per_row']:.2f} tokens a row, {figures['drafts']:.1f} drafts"
        + (f", graph {figures['graph']}" if "graph" in figures else "")
    )


def _notes(on_gpu: bool) -> list[str]:
    accepted = (
        "Acceptance is the probability with which a draft is accepted if those before it were: "
        "vLLM's own synthetic rejection sampling, with the rates of its sampler set between cells. "
        "It draws from a request's seed and the position, so engines with as many drafts accept "
        "the same ones."
        if on_gpu
        else "vLLM has no synthetic acceptance on a CPU: drafts were accepted as random weights "
        "have it, so the figures show nothing but that it runs."
    )
    return [
        accepted,
        "Tokens/s: of all requests, in steps in which all decode; one step verifies the drafts "
        "before it and makes new ones. Contexts are random keys and values that the prefix cache "
        "holds: nothing was prefilled.",
        "Stock with drafts: vLLM's EAGLE-3 of the same random checkpoint, which ours also selects "
        "with. Lossless mode chooses its number of drafts itself, up to 6.",
        "Each engine in a process of its own, with prefix caching, chunked prefill, async "
        "scheduling and, on a GPU, CUDA graphs as vLLM sets them; graphs were captured for the "
        "batches that are timed.",
    ]
