"""The command: reads the options, asks an engine for the cells that are missing, writes tables, CSV
and pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import report
from benchmarks.accuracy.cells import CellError, CellStore
from benchmarks.accuracy.grid import (
    BUDGETS,
    CONTEXTS,
    THRESHOLDS,
    OptionError,
    head_words,
    label_words,
    make_grid,
    make_spec,
    make_writer,
    parse_names,
    read_other,
)
from benchmarks.accuracy.longbench import LongBenchError, find_tasks, read_folder
from benchmarks.accuracy.provenance import cell_settings, make_notes
from benchmarks.accuracy.run import Run, fill
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.writer import PromptError
from benchmarks.kv_cache import KVGib
from benchmarks.machine import device_slug, facts, gpus
from benchmarks.shapes import DEMO_MODEL
from specontext_vllm.config import ConfigError
from specontext_vllm.retrieval.rules import listed_rules

WORK = Path(__file__).parents[1] / ".work"
ENGINE_SECONDS = 6 * 3600


def main(
    model: Annotated[Path, typer.Option(help="Model folder.")] = DEMO_MODEL,
    head: Annotated[
        str | None,
        typer.Option(
            help="Retrieval head, a folder or a hub id. Its name joins the result's. "
            "Default: the model's own."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help=f"Some of {','.join(TASKS)}, or longbench/DATASET. Default: all."),
    ] = None,
    retrievers: Annotated[
        str | None,
        typer.Option(
            help=f"Some of {','.join(listed_rules())}; dense is always measured. Default: all."
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Tokens per KV head that a decode step reads.")
    ] = ",".join(map(str, BUDGETS)),
    contexts: Annotated[
        str | None,
        typer.Option(
            help=f"Tokens of a prompt. Default: {', '.join(map(str, CONTEXTS))}, "
            "as far as the model reaches."
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts of each task and context.")] = 50,
    thresholds: Annotated[
        str, typer.Option(help="Confidence thresholds of dlm's fallback; 0: none.")
    ] = ",".join(map(str, THRESHOLDS)),
    threshold_budget: Annotated[
        int | None, typer.Option(help="Budget they are tried with. Default: the smallest.")
    ] = None,
    recent_tokens: Annotated[
        str | None,
        typer.Option(
            help="Newest tokens that are always read, wherever the budget leaves a page to choose "
            "beside them; fewer are compared with the most. Default: as in an engine."
        ),
    ] = None,
    longbench: Annotated[
        Path | None, typer.Option(help="Folder of LongBench's JSONL files.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, or auto: float32 on a CPU, the model's own on a GPU."
        ),
    ] = "auto",
    head_keys: Annotated[
        str, typer.Option(help="What the head's keys are kept in: auto, fp8 or model.")
    ] = "auto",
    kv_gib: KVGib = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of an earlier result over the same prompts, to compare every cell "
            "with, prompt by prompt."
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="Word that joins the result's name, so that a second grid over the same model "
            "does not overwrite the first."
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder of finished cells, which a later run continues, and of the engine's log."
        ),
    ] = None,
    engine_seconds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Time limit of the engine; cells that it has not measured by then stay open.",
        ),
    ] = ENGINE_SECONDS,
    measure: Annotated[
        bool,
        typer.Option(help="Whether to measure what is missing, or only to write what is there."),
    ] = True,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """Accuracy by retriever, budget and context, with confidence intervals. Exit code 1 if anything
    failed.
    """
    on_gpu = bool(gpus())
    if dtype == "auto" and not on_gpu:
        dtype = "float32"
    try:
        known = find_tasks(longbench)
        chosen = {name: known[name] for name in parse_names("--tasks", tasks, list(known))}
        grid = make_grid(
            model,
            head,
            chosen,
            retrievers,
            budgets,
            contexts,
            prompts,
            thresholds,
            threshold_budget,
            recent_tokens,
        )
        typer.echo("making the prompts")
        groups = grid.groups(make_writer(model))
        spec = make_spec(grid, groups, dtype, head_keys, on_gpu, kv_gib)
        machine = facts()
        name, words = model.resolve().name, [*head_words(model, grid.head), *label_words(label)]
        folder = work or WORK / f"{'-'.join(['accuracy', name, *words])}-{device_slug(machine)}"
        title = (
            f"{' '.join([name, *words])}: accuracy by retriever and budget, "
            f"{prompts} prompts a cell"
        )
        notes = make_notes(grid, spec, read_folder(longbench)[1] if longbench else [])
        case = "-".join(
            ["accuracy", *([] if model.resolve() == DEMO_MODEL.resolve() else [name]), *words]
        )
        result = report.Report(case, title, {}, machine=machine, notes=notes)
        run = Run(
            grid,
            groups,
            CellStore(folder, cell_settings(grid, spec, machine)),
            result,
            out,
            read_other(against, groups),
        )
    except (OptionError, PromptError, LongBenchError, CellError, ConfigError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    try:
        if measure:
            fill(run, spec, longbench, folder, engine_seconds)
    finally:
        run.write()
    result.show()
    typer.echo(f"written: {out}")
    raise typer.Exit(1 if result.failures else 0)
