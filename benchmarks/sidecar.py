"""Case `sidecar`: what a decode step gains in latency when the retrieval head moves from vLLM's
worker into a Ray actor.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.engines import BATCHED_TOKENS, Cell, EngineSpec, run_engine
from benchmarks.machine import gpus
from benchmarks.shapes import DEMO_MODEL, Shape

PLACES = ("inline", "ray")


@dataclass(frozen=True)
class SidecarEngine(EngineSpec):
    """The decode case's engine with the head in one of two places.

    Attributes:
        settings: added to the ``specontext`` settings.
    """

    settings: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        arguments = super().arguments()
        arguments["additional_config"]["specontext"] |= self.settings
        if self.model == str(DEMO_MODEL):
            # Its real weights and head are at hand.
            del arguments["load_format"]
            del arguments["additional_config"]["specontext"]["retrieval_head"]
        return arguments


TABLES = {
    "By load": (
        report.Column("cell", "requests x context"),
        report.Column("inline", "inline, ms", ".2f"),
        report.Column("ray", "ray, ms", ".2f"),
        report.Column("added", "added, ms", ".2f"),
        report.Column("waited", "ray: waiting for the actor (mean), ms", ".2f"),
        report.Column("inline_spread", "inline p10 to p90"),
        report.Column("ray_spread", "ray p10 to p90"),
        report.Column("pages_read", "pages read", ".1%"),
        report.Column("inline_prefill", "inline prefill, s", ".2f"),
        report.Column("ray_prefill", "ray prefill, s", ".2f"),
    ),
}


def make_rows(cells: list[Cell], engines: dict[str, Any]) -> list[dict[str, Any]]:
    """The table from what the children have reported so far; absent figures stay out."""
    rows = []
    for cell in cells:
        row: dict[str, Any] = {"cell": cell.name}
        for place in PLACES:
            if figures := engines.get(place, {}).get("cells", {}).get(cell.name):
                step, stats = figures["step_ms"], figures["stats"]
                row |= {
                    "cell": cell.label(figures["requests"]),
                    place: step["median"],
                    f"{place}_spread": f"{step['p10']:.2f} to {step['p90']:.2f}",
                    f"{place}_prefill": figures["prefill_s"],
                    "pages_read": stats["pages_read"] / stats["pages_total"],
                }
                if place == "ray":
                    row["waited"] = 1e3 * stats["sidecar_wait_seconds"] / stats["steps"]
        if all(place in row for place in PLACES):
            row["added"] = row["ray"] - row["inline"]
        rows.append(row)
    return rows


def main(
    cells: Annotated[str, typer.Option(help="Comma-separated REQUESTSxTOKENS.")] = "1x1k,1x3k,4x3k",
    model_shape: Annotated[
        str, typer.Option(help="demo: the bundled model; 8b, 1b or tiny: random weights.")
    ] = "demo",
    budget: Annotated[int, typer.Option(help="Tokens a KV head may read in a step.")] = 256,
    steps: Annotated[int, typer.Option(min=2, help="Timed steps of each cell.")] = 128,
    sidecar_gpus: Annotated[
        float, typer.Option(help="GPUs, or the fraction of one, of the actor.")
    ] = 0.0,
    sidecar_cpus: Annotated[int, typer.Option(help="CPU cores of the actor.")] = 1,
    max_num_seqs: Annotated[int, typer.Option(help="vLLM's.")] = 32,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="vLLM's; the channels' shared memory grows with it.")
    ] = BATCHED_TOKENS,
    engine_seconds: Annotated[
        float, typer.Option(help="Time limit of each engine; what it measured till then is kept.")
    ] = 600,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
    work: Annotated[
        Path | None, typer.Option(help="Folder of the engines' logs; default a new temporary one.")
    ] = None,
) -> None:
    """Steady decode step with the head inline and in a Ray actor, side by side. Exit code 1 if
    anything failed.
    """
    try:
        shape, parsed = Shape.named(model_shape), [Cell.parse(text) for text in cells.split(",")]
        for cell in parsed:
            if cell.requests is None or cell.requests > max_num_seqs:
                raise ValueError(
                    f"--cells: {cell.name} needs a number of requests up to --max-num-seqs "
                    f"({max_num_seqs})."
                )
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    folder = work or Path(tempfile.mkdtemp(prefix="specontext-bench-"))
    model = str(DEMO_MODEL) if model_shape == "demo" else str(shape.write(folder / "model"))
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = bool(gpus())
    details: dict[str, Any] = {"shape": shape.name, "budget": budget, "steps": steps, "engines": {}}
    weights = "its own weights" if model_shape == "demo" else "random weights"
    title = (
        f"The head inline and in a Ray actor, {model_shape} shape, {weights}, budget {budget} "
        "tokens"
    )
    result = report.Report("sidecar", title, TABLES, details=details)
    result.notes = [
        f"Steady state: all requests decode; median over {steps} steps after the last prefill. One "
        "engine after the other in this one "
        f"command. The actor asked Ray for {sidecar_cpus} CPU cores and {sidecar_gpus:g} GPUs.",
        "Waiting for the actor: from the sending of the step to the arrival of the selection, "
        "mean; the head's own work lies in it, as it "
        "lies in the inline step.",
    ]
    if not on_gpu:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        result.notes.append(
            f"Model, actor and Ray share the {cores} cores of this machine (load before "
            f"the run: {load:.1f}): `added` is what "
            f"the exchange costs where nothing is gained by moving the head."
        )
        if load > cores:
            result.notes.append(
                "**The machine was busy with other work throughout**: the figures show that it "
                "runs, and bound the cost from above."
            )
    moved = {"sidecar": "ray", "sidecar_gpus": sidecar_gpus, "sidecar_cpus": sidecar_cpus}
    for place in PLACES:
        spec = SidecarEngine(
            "specontext",
            model,
            on_gpu,
            budget,
            max_num_seqs,
            steps,
            batched_tokens=max_num_batched_tokens,
            settings=moved if place == "ray" else {},
        )
        kept = details["engines"].setdefault(place, {"cells": {}})
        print(f"{place}: starting (log {folder / place}.log)", flush=True)
        try:
            for kind, value in run_child(
                run_engine,
                spec,
                parsed,
                {},
                log=folder / f"{place}.log",
                seconds=engine_seconds,
                env=engine_env(on_gpu),
            ):
                if kind == "ready":
                    kept |= value
                elif kind == "cell":
                    kept["cells"][value[0]] = value[1]
                    print(
                        f"{place}: {value[0]}: step {value[1]['step_ms']['median']:.2f} ms",
                        flush=True,
                    )
                else:
                    result.failures[f"{place}, {value[0]}"] = value[1]
                result.rows = make_rows(parsed, details["engines"])
                result.write(out)
        except ChildError as error:
            result.failures[place] = str(error)
            result.write(out)
    result.show()
    print(f"written: {out}", flush=True)
    raise typer.Exit(1 if result.failures else 0)
