"""The command `host`."""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks import steps as stepping
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.engines import Cell, EngineSpec
from benchmarks.host.engine import CORES, ENGINES, ROUNDS, TRACED_STEPS, Turns, run_engine
from benchmarks.machine import gpus
from benchmarks.shapes import Shape

TABLES = {
    "Decode step, ms": (
        stepping.CELL,
        report.Column("engine", "engine"),
        report.Column("step", "step", ".2f"),
        report.Column("ratio", "times stock's", ".2f"),
        report.Column("ratios", "round by round"),
        report.Column("gpu", "GPU computes", ".2f"),
        report.Column("kernels", "kernels", ".0f"),
        report.Column("runner", "host: model runner", ".2f"),
        report.Column("begin_step", "of it tiers, metrics", ".3f"),
        report.Column("before_forward", "before the forward pass", ".3f"),
        report.Column("after_forward", "after it", ".3f"),
        report.Column("wait", "waits for an output", ".2f"),
        report.Column("rest", "scheduler, outputs", ".2f"),
        report.Column("busy", "thread on its core", ".2f"),
    )
}
NOTE = (
    "All requests decode. The engines are there at once, each in a process of its own, on the "
    f"same {CORES} processor cores, and take turns of some dozen steps, {ROUNDS} each: "
    "a rented machine's host may be half as fast a minute later. The threads that step sit on one "
    "and the same core: some cores of such a machine are slower, and a thread keeps its own. "
    "Medians over the steps; times stock's: the median over the rounds of the ratio of their "
    "medians, with the least and the most. "
    f"GPU computes: time during which at least one kernel runs, from a trace of {TRACED_STEPS} "
    "steps. Host: the calls' own times; the model runner's are execute_model and sample_tokens "
    "together, our hooks included. Thread on its core: processor time of the thread that steps, "
    "mean; it waited for what is missing to the step. "
    "Async scheduling as vLLM sets it: while the host prepares a step, the GPU may still compute "
    "the one before."
)


def make_rows(
    cells: Sequence[Cell], engines: Sequence[str], details: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row for each cell and engine that was measured."""
    rows = []
    for cell in cells:
        measured = {
            name: figures
            for name in engines
            if (figures := details["engines"].get(name, {}).get(cell.name))
        }
        for name, figures in measured.items():
            calls, rounds = figures["calls_ms"], figures["rounds_ms"]
            row = {
                "cell": cell.label(cell.named_requests),
                "engine": name,
                "step": statistics.median(itertools.chain(*rounds)),
                "gpu": figures.get("gpu_ms"),
                "kernels": figures.get("kernels"),
                "runner": calls["execute_model"] + calls["sample_tokens"],
                "busy": figures["busy_ms"],
            }
            row["rest"] = row["step"] - row["runner"] - calls.get("wait", 0.0)
            if name != "stock" and "stock" in measured:
                ratios = [
                    statistics.median(ours) / statistics.median(theirs)
                    for ours, theirs in zip(rounds, measured["stock"]["rounds_ms"], strict=True)
                ]
                row |= {
                    "ratio": statistics.median(ratios),
                    "ratios": f"{min(ratios):.2f} to {max(ratios):.2f}",
                }
            rows.append(
                row
                | {
                    key: calls[key]
                    for key in ("begin_step", "before_forward", "after_forward", "wait")
                    if key in calls
                }
            )
    return rows


def main(
    cells: Annotated[str, typer.Option(help="Comma-separated REQUESTSxTOKENS.")] = "1x1k,6x8k",
    model_shape: Annotated[
        str, typer.Option(help="8b, 1b, demo or tiny; the weights are random.")
    ] = "1b",
    engines: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(ENGINES)}.")
    ] = ",".join(ENGINES),
    budget: Annotated[int, typer.Option(help="Tokens a KV head may read in a step.")] = 2048,
    timed: Annotated[int, typer.Option(min=2, help="Timed steps of each cell and engine.")] = 256,
    gpu_gib: Annotated[
        float,
        typer.Option(
            help="GPU memory of each engine but two-tiers, weights included. All run at once."
        ),
    ] = 16,
    host_gib: Annotated[float, typer.Option(help="Host pool of two-tiers.")] = 6,
    tiers_gpu_gib: Annotated[
        float, typer.Option(help="GPU memory of two-tiers, weights included.")
    ] = 4.5,
    profile: Annotated[
        bool, typer.Option(help="Keep Python's profile of each cell in the result.")
    ] = True,
    engine_seconds: Annotated[
        float, typer.Option(help="Time limit of each engine, from its start to the end of all.")
    ] = 400,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the model config and the engines' logs; default a new temporary one."
        ),
    ] = None,
) -> None:
    """What of a decode step the host does, and how long the GPU computes. Exit code 1 if anything
    failed.
    """
    try:
        shape = Shape.named(model_shape)
        parsed = stepping.parse_cells(cells, shape, 32)
        max_requests = max(cell.named_requests for cell in parsed)
        chosen = [name.strip() for name in engines.split(",")]
        if unknown := [name for name in chosen if name not in ENGINES]:
            raise ValueError(f"--engines: found {unknown[0]!r}; use {', '.join(ENGINES)}.")
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    folder = (work or Path(tempfile.mkdtemp(prefix="specontext-bench-"))).resolve()
    model, on_gpu = str(shape.write(folder / "model")), bool(gpus())
    details: dict[str, Any] = {
        "shape": {"name": shape.name, **shape.config},
        "budget": budget,
        "timed": timed,
        "engines": {},
    }
    result = report.Report(
        "host",
        f"The host's share of a decode step, {model_shape} shape, random weights, budget {budget} "
        "tokens",
        TABLES,
        details=details,
    )
    result.notes = [
        NOTE,
        f"two-tiers: {host_gib:g} GiB of host memory behind {tiers_gpu_gib:g} GiB of GPU memory, "
        "driven selections.",
    ]
    context = multiprocessing.get_context("spawn")
    places = [context.Semaphore(0) for _ in chosen]
    longest = min(max(cell.tokens for cell in parsed) + 4096, shape.max_position_embeddings)
    running: dict[str, Generator[tuple[str, Any], None, None]] = {}
    try:
        for own, name in enumerate(chosen):
            memory: dict[str, float] = (
                {"host_gib": host_gib, "gpu_gib": tiers_gpu_gib}
                if name == "two-tiers"
                else {"gpu_gib": gpu_gib}
            )
            spec = EngineSpec(
                ENGINES[name],
                model,
                on_gpu,
                budget,
                max_requests,
                timed,
                max_model_len=longest,
                batched_tokens=8192,
                gpu_gib=memory["gpu_gib"],
                host_gib=memory.get("host_gib", 0.0),
            )
            print(f"{name}: starting", flush=True)
            running[name] = run_child(
                run_engine,
                spec,
                parsed,
                profile,
                Turns(places, own),
                log=folder / f"{name}.log",
                seconds=engine_seconds,
                env=engine_env(on_gpu),
            )
            # One after the other: each measures the GPU's free memory.
            next(running[name])
        places[0].release()
        for _ in parsed:
            for name, events in running.items():
                _, (cell, figures) = next(events)
                details["engines"].setdefault(name, {})[cell] = figures
            result.rows = make_rows(parsed, chosen, details)
            result.write(out)
    except ChildError as error:
        # The others wait for its turn, which does not come.
        result.failures[name] = str(error)
        result.write(out)
    finally:
        for events in running.values():
            events.close()
    result.show()
    print(f"written: {out}", flush=True)
    raise typer.Exit(1 if result.failures else 0)
