"""Case `decode`: steady-state decode step of stock vLLM and of specontext in one run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks import steps as stepping
from benchmarks.engines import EngineSpec
from benchmarks.machine import gpus
from benchmarks.shapes import Shape

ENGINES = ("specontext", "stock")
TABLES = {
    "Step time": (
        stepping.CELL,
        report.Column("stock", "stock, ms", ".2f"),
        report.Column("sparse", "specontext, ms", ".2f"),
        report.Column("ratio", "times faster", ".2f"),
        report.Column("stock_spread", "stock p10 to p90"),
        report.Column("sparse_spread", "specontext p10 to p90"),
        stepping.PAGES_READ,
        *stepping.LIMITS,
        report.Column("stock_prefill", "stock prefill, s", ".2f"),
        report.Column("sparse_prefill", "specontext prefill, s", ".2f"),
    ),
    **stepping.STAGES,
}


def main(
    cells: Annotated[
        str,
        typer.Option(
            help="Comma-separated REQUESTSxTOKENS; `fit` requests: as many as the KV room holds."
        ),
    ] = ("1x1k,8x8k,24x32k,fitx128k"),
    model_shape: Annotated[
        str, typer.Option(help="8b, 1b, demo or tiny; the weights are random.")
    ] = "8b",
    budget: Annotated[int, typer.Option(help="Tokens a KV head may read in a step.")] = 2048,
    steps: Annotated[int, typer.Option(min=2, help="Timed steps of each cell.")] = 128,
    backends: Annotated[str, typer.Option(help="Comma-separated: specontext, stock.")] = ",".join(
        ENGINES
    ),
    max_num_seqs: Annotated[int, typer.Option(help="vLLM's; `fit` never exceeds it.")] = 32,
    engine_seconds: Annotated[
        float, typer.Option(help="Time limit of each engine; what it measured till then is kept.")
    ] = 270,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the model config and the engines' logs; default a new temporary one."
        ),
    ] = None,
) -> None:
    """Steady-state decode step of stock vLLM and of specontext, side by side. Exit code 1 if
    anything failed.
    """
    try:
        shape = Shape.named(model_shape)
        parsed = stepping.parse_cells(cells, shape, max_num_seqs)
        chosen = stepping.chosen_engines("--backends", backends, ENGINES)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None

    folder = work or Path(tempfile.mkdtemp(prefix="specontext-bench-"))
    model, on_gpu = str(shape.write(folder / "model")), bool(gpus())
    details: dict[str, Any] = {
        "shape": {"name": shape.name, **shape.config},
        "budget": budget,
        "steps": steps,
        "engines": {},
        "stages_ms": {},
    }
    result = report.Report(
        "decode",
        f"Decode step, {model_shape} shape, random weights, budget {budget} tokens",
        TABLES,
        details=details,
    )
    notes = [
        f"Steady state: all requests decode; median over {steps} steps after the last prefill. "
        "Both engines ran in this one "
        "command, one after the other, each in a process of its own, with prefix caching, chunked "
        "prefill and async scheduling "
        f"as vLLM sets them"
        + (
            " and CUDA graphs on."
            if on_gpu
            else "; on this CPU eagerly, so the times show nothing but that it runs."
        ),
        stepping.LIMIT_NOTE,
    ]

    def save() -> None:
        result.rows = stepping.make_rows(shape, parsed, details, budget)
        result.notes = notes + stepping.bandwidth_notes(details)
        result.write(out)

    for name in chosen:
        spec = EngineSpec(name, model, on_gpu, budget, max_num_seqs, steps)
        for _ in stepping.run_into(
            result, spec, parsed, log=folder / f"{name}.log", seconds=engine_seconds
        ):
            save()
    for _ in stepping.probe_into(result, shape, parsed, log=folder / "stages.log"):
        save()
    result.show()
    print(f"written: {out}", flush=True)
    raise typer.Exit(1 if result.failures else 0)
